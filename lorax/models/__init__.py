"""Plain Linen modules that know nothing about adapters, and `load`."""

from lorax.models.base import Base, kernel, kernels
from lorax.models.custom import Model
from lorax.models.load import load, unread
from lorax.models.saving import save

__all__ = ["Base", "Model", "kernel", "kernels", "load", "save", "unread"]
