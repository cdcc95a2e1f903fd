"""What is on disk: configs, safetensors, adapters, checkpoints, and the staged writing of new folders."""
