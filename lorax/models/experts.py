"""The feed-forward layer of a mixture of experts.

    p = softmax over the k largest of x router, or their part of the softmax over all experts
    y = sum of p_e down_e(f(gate_e x) * up_e x) over the k experts e

Mixtral (arXiv:2401.04088, section 2.1), OLMoE (arXiv:2409.02060), Qwen3-MoE (arXiv:2505.09388) and
gpt-oss (arXiv:2508.10925). Every token goes to all of its k experts: there is no limit to the
tokens of an expert, so none is dropped. Tokens are sorted by expert, and an expert's are multiplied
together (`lorax.grouped`). Axes: B batch, T positions, N = B T tokens, E experts, k of a token, L
layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorax import divided, grouped
from lorax.losses import Routed
from lorax.models.layers import ACTIVATIONS


class Experts(nn.Module):
    """x (B, T, D) -> (y (B, T, D), logits of the router (B, T, E) float32).

    config: a `decoder.Config` with `num_experts` above 0. Parameters: router/kernel (D, E), and
    gate, up (E, D, I), down (E, I, D), each with a bias if the config says so.
    """

    config: object

    @nn.compact
    def __call__(self, x):
        c, k = self.config, self.config.num_experts_per_tok
        init = nn.initializers.normal(0.02)
        router = nn.Dense(
            c.num_experts, use_bias=c.expert_bias, dtype=c.dtype, kernel_init=init, name="router"
        )
        logits = router(x).astype(jnp.float32)
        weights, experts = chosen(logits.reshape(-1, c.num_experts), k, c.norm_topk_prob)

        # Where a mesh divides the batch, each device sorts its own tokens.
        each = divided.of_devices(len(experts))
        tokens, weights, experts = map(each, (x.reshape(-1, x.shape[-1]), weights, experts))
        over_devices = jax.vmap if tokens.ndim == 3 else lambda function: function
        rows, sizes, order = over_devices(functools.partial(sort_rows, c.num_experts))(
            tokens, experts
        )
        dense = functools.partial(
            grouped.GroupedDense, c.num_experts, use_bias=c.expert_bias, dtype=c.dtype,
            kernel_init=init,
        )  # fmt: skip
        gate = dense(features=c.expert_size, name="gate")(rows, sizes)
        up = dense(features=c.expert_size, name="up")(rows, sizes)
        product = functools.partial(gated, c)
        # Recomputed in the backward pass, so that only gate and up are stored.
        product = jax.checkpoint(product, prevent_cse=False)
        out = dense(features=x.shape[-1], name="down")(product(gate, up), sizes)

        y = over_devices(add_rows)(out, weights, order)
        return y.reshape(x.shape), logits


def sort_rows(n_experts: int, tokens, experts):
    """Rows by expert: tokens (N, D), experts (N, k) -> (rows (N k, D), sizes (E,) int32, how many
    each expert has, order (N k,)). Row i is token order[i] // k."""
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=n_experts).astype(jnp.int32)
    return tokens.at[order // experts.shape[1]].get(mode="promise_in_bounds"), sizes, order


def add_rows(out, weights, order):
    """The weighted sum of each token's k rows: out (N k, D), weights (N, k), order (N k,) of
    `sort_rows` -> (N, D)."""
    place = jnp.argsort(order)  # of each token's k rows among the sorted ones
    of_tokens = out.at[place].get(mode="promise_in_bounds", unique_indices=True)
    of_tokens = of_tokens.reshape(*weights.shape, -1)
    return jnp.sum(weights[..., None].astype(out.dtype) * of_tokens, axis=1)


def chosen(logits, k: int, normalise: bool):
    """The k experts of each token and their weights: logits (N, E) float32 -> ((N, k) float32,
    (N, k) int32). normalise: whether the k weights sum to 1, otherwise all E would."""
    most, experts = jax.lax.top_k(logits, k)
    if normalise:
        return jax.nn.softmax(most, axis=-1), experts
    return jnp.exp(most - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), experts


def gated(config, gate, up):
    """f(gate) * up: SwiGLU (arXiv:2002.05202, section 2), or gpt-oss' variant, which clamps both
    sides and adds 1 to up."""
    limit = config.swiglu_limit
    if limit is None:
        return ACTIVATIONS[config.hidden_act](gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)


def routed(logits, k: int, coefficient: float) -> Routed:
    """How tokens are routed, for the load-balancing loss. logits: (L, B, T, E) float32, of the
    router."""
    _, indices = jax.lax.top_k(logits, k)
    used = jnp.sum(jax.nn.one_hot(indices, logits.shape[-1]), axis=-2)
    p = jax.nn.softmax(logits, axis=-1)
    return Routed(jnp.mean(used, axis=0), jnp.mean(p, axis=0), jnp.float32(coefficient))
