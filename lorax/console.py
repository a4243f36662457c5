"""The terminal, where every value that someone gave is shown as it is."""

from rich.console import Console


def console(**options) -> Console:
    """rich's console (its `options`) for which "[...]" is no markup and ":smile:" no picture, in
    tables and their titles too; nothing is coloured for what it looks like."""
    return Console(markup=False, emoji=False, highlight=False, **options)
