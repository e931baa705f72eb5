"""A family and a source of data of one's own, for megatron_mm."""
