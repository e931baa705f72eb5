import megatron_mm.parallel  # noqa: F401  (imports megatron-core as it should be)
