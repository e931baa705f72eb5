"""Kernels that know nothing of the trainer: tensors in, tensors out."""
