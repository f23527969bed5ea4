"""Measured time and memory of zebra and of alternatives, with the plan's prediction: paired turns after a gate.

`configs` holds the sizes, `runner` the protocol, and a module of each config the variants.
"""
