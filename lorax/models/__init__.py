"""Plain Linen modules that know nothing of adapters, and `load`."""

from lorax.models.load import Base, kernels, load, sources
from lorax.models.saving import save

__all__ = ["Base", "kernels", "load", "save", "sources"]
