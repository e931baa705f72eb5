"""`python -m megatron_mm.plan`: what a run will need, before it has a cluster."""
