"""The training loop and what it needs: stages, packing, DeepSpeed engine, checkpoints."""
