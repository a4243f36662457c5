"""The terminal, which shows the user's values verbatim."""

from rich.console import Console


def console(**options) -> Console:
    """rich's Console with its `options`, but without markup ("[...]"), emoji (":smile:") and
    automatic highlighting, in tables and their titles too."""
    return Console(markup=False, emoji=False, highlight=False, **options)
