"""Ways to read texts longer than a model was trained for, measured side by side on the user's own text."""
