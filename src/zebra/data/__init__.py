"""Training and evaluation data: reading text and records, tokenising once, packing, generating tasks."""
