"""Text as rows of tokens: reading, tokenising once, packing."""
