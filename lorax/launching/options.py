"""Checks of options that engines share."""

import argparse


def at_least(options: argparse.Namespace, **least: float) -> None:
    """Raises ValueError for an option that is given and below its least value, by its name."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: {value} given, must be at least {low}")
