"""A run's own step, rehearsed without its GPUs: any rank of any layout, on the meta device, every operation counted."""
