"""Compare methods of reading texts longer than a model was trained for, on the user's own text."""
