"""Compress trained LoRA adapters into PRoLoRA form, expand and merge them, and tell the error."""

__version__ = "0.1.0"
