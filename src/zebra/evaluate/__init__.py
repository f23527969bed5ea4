"""Measuring: what a model makes of a text, position by position."""
