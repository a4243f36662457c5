"""Parts of a transformer's layer that several families have in common, with the families' names for
their projections: q, k, v and o of an attention, up and down of a feed-forward layer.

Axes: B batch, T queries, S keys, D features of x.
"""

import functools
from collections.abc import Callable

from einops import rearrange
from flax import linen as nn

from lorax.models.layers import ACTIVATIONS, Attend, attention
from lorax.models.masks import everyone


class SelfAttention(nn.Module):
    """Self-attention under a mask: x (B, T, D), mask (`masks`) -> (B, T, D).

    causal: as in `layers.Attend`.
    """

    heads: int
    causal: bool
    dtype: str
    kernel_init: Callable

    @nn.compact
    def __call__(self, x, mask):
        dense = functools.partial(
            nn.Dense, x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init
        )
        q, k, v = (_by_head(dense(name=name)(x), self.heads) for name in "qkv")
        o, _ = Attend(causal=self.causal, name="attend")(q, k, v, mask, q.shape[-1] ** -0.5)
        return dense(name="o")(rearrange(o, "b t h d -> b t (h d)"))


class UnmaskedAttention(nn.Module):
    """Attention in which all queries see all keys: x (B, T, D) reads context (B, S, ...), itself if
    that is None: (B, T, D).

    qkv_bias: whether q, k and v have biases; o has one.
    """

    heads: int
    qkv_bias: bool
    dtype: str
    kernel_init: Callable

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        dense = functools.partial(
            nn.Dense, x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init
        )
        read = {"q": x, "k": context, "v": context}
        q, k, v = (
            _by_head(dense(use_bias=self.qkv_bias, name=name)(y), self.heads)
            for name, y in read.items()
        )
        o = attention(q, k, v, everyone(q.shape[1], k.shape[1]), q.shape[-1] ** -0.5)
        return dense(name="o")(rearrange(o, "b t h d -> b t (h d)"))


class MLP(nn.Module):
    """Feed-forward: down(act(up(x))), as wide as x.

    hidden: features in between. activation: a name in `layers.ACTIVATIONS`.
    """

    hidden: int
    activation: str
    dtype: str
    kernel_init: Callable
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(
            nn.Dense, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        y = ACTIVATIONS[self.activation](dense(self.hidden, name="up")(x))
        return dense(x.shape[-1], name="down")(y)


def _by_head(x, heads: int):
    return rearrange(x, "b t (h d) -> b t h d", h=heads)
