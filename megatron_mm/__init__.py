"""megatron_mm: distributed pretraining of unified text-and-image transformers."""

import warnings

__version__ = "0.1.0"

# megatron-core warns at import of each optional package that is missing, on every rank; nothing here depends on them.
warnings.filterwarnings("ignore", module=r"megatron\.core")
