"""transformers models: attention registered with transformers, and checkpoints loaded, converted and verified."""
