"""Hydra's configuration groups; installed as the package megatron_mm_configs."""
