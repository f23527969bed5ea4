"""The host: attention registered with transformers; checkpoints loaded, converted, verified."""
