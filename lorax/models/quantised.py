"""A base, or its parameters, with linear kernels in 4 or 8 bits, and back."""

import jax

from lorax import leaves, quant
from lorax.models.base import Base


def quantize(model, kind: str = "nf4", double: bool = False, block: int = 64):
    """A `Base`, or a tree of parameters, whose linear kernels are stored in `kind`.

    kind: "nf4", "fp4" or "int8". double: the scales are stored in 8 bits as well (QLoRA,
    arXiv:2305.14314, section 3). block: number of weights that share a scale. Embeddings, heads,
    biases and norms are not quantised. Raises ValueError as `lorax.quant.quantize` does.
    """
    if isinstance(model, Base):
        params = quant.quantize(model.params, kind, double, block, sites=model.sites)
        return model.replace(params=params)
    return quant.quantize(model, kind, double, block)


def dequantize(model):
    """The model with quantised kernels decoded to plain arrays: the rounded weights that are used
    in computation, not the originals."""
    if isinstance(model, Base):
        return model.replace(params=dequantize(model.params))
    is_frozen = lambda leaf: isinstance(leaf, leaves.FrozenWeight)
    decode = lambda leaf: leaf.decoded() if is_frozen(leaf) else leaf
    return jax.tree.map(decode, model, is_leaf=is_frozen)
