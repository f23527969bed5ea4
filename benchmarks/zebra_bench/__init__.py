"""Measured time and memory beside the plan's prediction: paired, gated by correctness, one number a row.

A subject is data: its sizes stand in `subjects`, its variants in the module of its name. `pairing` measures them all.
"""
