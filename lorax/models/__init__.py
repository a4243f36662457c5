"""Plain Linen modules that know nothing of adapters, and `load`."""

from lorax.models.load import Base, kernels, load, save, sources

__all__ = ["Base", "kernels", "load", "save", "sources"]
