"""megatron_mm: distributed pretraining of unified text-and-image transformers."""

__version__ = "0.1.0"
