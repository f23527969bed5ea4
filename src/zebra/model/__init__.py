"""Models of transformers: attention registered with it; checkpoints loaded, converted, verified."""
