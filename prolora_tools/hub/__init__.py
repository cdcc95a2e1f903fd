"""The Hugging Face Hub: push, pull, Hub names as inputs, and model cards."""
