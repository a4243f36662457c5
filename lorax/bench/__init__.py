"""Measuring lorax on a machine, beside the alternatives: `python -m lorax.bench`."""
