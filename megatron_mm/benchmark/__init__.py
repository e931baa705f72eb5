"""`python -m megatron_mm.benchmark`: whole training steps of one device, ours beside other ways."""
