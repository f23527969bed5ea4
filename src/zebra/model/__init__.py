"""The host: attention registered with transformers, checkpoints loaded, converted and verified. Importing this does nothing."""
