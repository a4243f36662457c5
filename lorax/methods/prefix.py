"""Virtual tokens: prefix tuning, prompt tuning and LLaMA-Adapter. The weights don't change.

    prefix           o = attention(q, [k'; k], [v'; v])        k', v' (tokens, K D) of each layer
    prompt           the text is read after `tokens` trained rows (tokens, features) of embedding
    llama-adapter    o = attention(q, k, v) + g softmax(q (p wk + bk)^T / sqrt D) (p wv + bv)
                     p (tokens, features) and the scalar g of each adapted layer

- Prefix tuning (Li & Liang 2021, arXiv:2101.00190, section 4.2). k' and v' are trained directly, as
  in PEFT without `prefix_projection`; the MLP that produces them during the paper's training
  (section 4.3) is left out. As in PEFT, k' are not rotated in models with RoPE, and the text's
  first token has position `tokens`. Two differences from PEFT: a sliding window always includes the
  prefix (PEFT's leaves it behind), and with ALiBi the whole prefix is at position 0 (PEFT: at 0,
  1...).
- Prompt tuning (Lester et al. 2021, arXiv:2104.08691). As in PEFT, the virtual tokens have the
  positions 0 to `tokens` - 1. A classifier reads the text's first token, as without them (PEFT's
  reads the first virtual one). Several texts in a row of a causal model share one copy at the start
  of the row, since virtual tokens don't depend on the text after them. A model that scales its
  embeddings (Gemma) scales the virtual ones as well; PEFT's are scaled already.
- LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199, section 3). The keys of p are not rotated, and
  p goes through the base's frozen projections. As in PEFT there is one scalar gate per layer,
  without a tanh (the released code has tanh(g) per head). g starts at zero, which is the identity.
  The sum goes through the layer's output projection in every model (PEFT skips it for GPT-2).

A prefix or a prompt is never the identity at step 0: even zero keys take a share of the softmax,
and positions shift by `tokens`. For the same reason none of the three can be merged. All are for
causal models and BERT; a model without `layers.Attend` raises ValueError.
"""

import dataclasses
import inspect
import re
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax import intercept, leaves, ops, tree
from lorax.methods.arrays import Matrix, joined, key_for, matrices
from lorax.methods.contract import Method, State
from lorax.methods.targets import adapted_matrices, matching
from lorax.models import layers as model_layers
from lorax.models import masks

# ------------------------------------------------------------------------------------------- leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Around a model's `hidden`: virtual tokens before every text.

    tokens: (static) positions that they take. read: (static) True if they are read as the ids -1,
    -2... at the start of a row, False if they are in each layer's attention.
    """

    tokens: int = dataclasses.field(default=0, metadata={"static": True})
    read: bool = dataclasses.field(default=False, metadata={"static": True})
    method: ClassVar[str] = "hidden"

    def __call__(self, module, call, *args, **kwargs):
        signature = inspect.signature(type(module).hidden)
        if "first" not in signature.parameters:
            raise ValueError(
                f"method.name: {type(module).__name__} has no place for virtual tokens; causal "
                f"models and BERT do"
            )
        arguments = dict(signature.bind(module, *args, **kwargs).arguments)
        del arguments["self"]
        if not self.read:
            return call(**arguments, first=self.tokens)
        if arguments.get("cache") is not None:  # decoding adds them once, when it fills the cache
            return call(**arguments)
        arguments["tokens"] = self._with_ids(arguments["tokens"])
        for name, value in (("segments", -1), ("types", 0)):
            if arguments.get(name) is not None:
                arguments[name] = self._padded(arguments[name], value)
        return call(**arguments)[:, self.tokens :]

    def before(self, tokens, segments):
        """(tokens, segments) of rows with one text each (B, T), with virtual ids in front."""
        if not self.read:
            return tokens, segments
        return self._with_ids(tokens), self._padded(segments, 1)

    def _with_ids(self, tokens):
        ids = jnp.broadcast_to(-1 - jnp.arange(self.tokens), (tokens.shape[0], self.tokens))
        return jnp.concatenate([ids.astype(tokens.dtype), tokens], axis=1)

    def _padded(self, x, value):
        return jnp.pad(x, ((0, 0), (self.tokens, 0)), constant_values=value)


def ahead(params: dict) -> Ahead:
    """The `Ahead` leaf of bound parameters, or one with no tokens."""
    return params.get(intercept.AROUND, Ahead())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Around an embedding: rows (tokens, features) for the ids -1, -2..."""

    rows: jax.Array
    method: ClassVar[str] = "__call__"

    def __call__(self, module, call, ids):
        known = call(jnp.maximum(ids, 0))
        virtual = jnp.take(self.rows.astype(known.dtype), jnp.maximum(-1 - ids, 0), axis=0)
        return jnp.where((ids < 0)[..., None], virtual, known)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Around `layers.Attend`: keys and values that every query sees, (tokens, K D) each.

    on: () float32, 1, or 0 if the layer has no prefix. All three have the layer axes first.
    """

    k: jax.Array
    v: jax.Array
    on: jax.Array
    method: ClassVar[str] = "__call__"

    def __call__(self, module, call, q, k, v, mask, scale, kv=None, column=None, sinks=None):
        causal = module.causal and kv is None
        k, v, kv = model_layers.remember(k, v, kv, column)
        k, v = (
            jnp.concatenate([_heads(new, x), x], axis=1) for new, x in ((self.k, k), (self.v, v))
        )
        mask = masks.ahead(mask, len(self.k), self.on > 0)
        attend = model_layers.causal_attention if causal else model_layers.attention
        return attend(q, k, v, mask, scale, module.cap, sinks), kv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """Around `layers.Attend`: attention to keys and values (tokens, K D) with a separate softmax,
    multiplied by `gate` () and added. All three have the layer axes first."""

    k: jax.Array
    v: jax.Array
    gate: jax.Array
    method: ClassVar[str] = "__call__"

    def __call__(self, module, call, q, k, v, mask, scale, kv=None, column=None, sinks=None):
        o, kv = call(q, k, v, mask, scale, kv, column, sinks)
        everyone = masks.everyone(q.shape[1], len(self.k))
        k, v = _heads(self.k, k), _heads(self.v, v)
        extra = model_layers.attention(q, k, v, everyone, scale, module.cap)
        return o + self.gate.astype(o.dtype) * extra, kv


def _heads(x, like):
    """x (tokens, K D) as (B, tokens, K, D) in the dtype of `like` (B, S, K, D + G), padded with
    zeros if ALiBi has added G features."""
    x = x.astype(like.dtype).reshape(1, len(x), like.shape[2], -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, like.shape[3] - x.shape[3])))
    return jnp.broadcast_to(x, (like.shape[0], *x.shape[1:]))


# ------------------------------------------------------------------------------------------ methods


def prefix(tokens: int = 10, std: float = 1.0, layers: tuple[int, ...] | None = None) -> Method:
    """Prefix tuning. tokens: length of the prefix (PEFT has no default). std: of its Gaussian
    initialisation (1, torch's default for the embedding that PEFT stores it in). layers: indices,
    None for all.

    Raises ValueError for a value out of range.
    """
    _check(tokens, std)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        for m in _attention(params, sites, layers, key):
            width = m.n_out
            draw = lambda key, index, width=width: {
                name: std * jax.random.normal(part, (tokens, width))
                for name, part in zip("kv", jax.random.split(key), strict=True)
            }
            trainable[m.path] = m.fill({"k": (tokens, width), "v": (tokens, width)}, draw)
            constants[m.path] = {"on": jnp.asarray(m.active, jnp.float32)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def bind(trainable, constants, params, key=None, sites=None):
        arrays = joined(trainable, constants)
        around = {path: Prefix(x["k"], x["v"], x["on"]) for path, x in arrays.items()}
        return _bound(params, around, "k/kernel", Ahead(tokens))

    def count(params, sites=None):
        adapted = _attention(params, sites, layers)
        return sum(2 * int(m.active.sum()) * tokens * m.n_out for m in adapted)

    hp = dict(tokens=tokens, std=std, layers=layers)
    return Method("prefix", hp, init, bind, None, count)


def prompt(tokens: int = 10, std: float | None = None) -> Method:
    """Prompt tuning. tokens: number of virtual tokens. std: of a Gaussian initialisation (PEFT's
    "RANDOM" is 1), None to start from random rows of the base's embedding (PEFT's "SAMPLE_VOCAB";
    from the whole vocabulary, while the paper uses the 5,000 most common tokens).

    Raises ValueError for a value out of range and a model without exactly one token embedding.
    """
    _check(tokens, 0 if std is None else std)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        path, rows, features = _embedding(params, sites)
        key = key_for(key, path)
        if std is None:
            ids = jax.random.randint(key, (tokens,), 0, rows)
            start = ops.embed(ids, tree.flatten(params)[path]).astype(jnp.float32)
        else:
            start = std * jax.random.normal(key, (tokens, features))
        return State(tree.unflatten({tree.sibling(path, "prompt"): start}), {})

    def bind(trainable, constants, params, key=None, sites=None):
        ((parent, x),) = joined(trainable).items()
        leaf = Rows(x["prompt"])
        name = f"{parent.rpartition('/')[2]}/embedding"
        return _bound(params, {parent: leaf}, name, Ahead(tokens, read=True))

    def count(params, sites=None):
        return tokens * _embedding(params, sites)[2]

    return Method("prompt", dict(tokens=tokens, std=std), init, bind, None, count)


def llama_adapter(tokens: int = 10, layers: tuple[int, ...] | None = None) -> Method:
    """LLaMA-Adapter. tokens: virtual tokens per adapted layer. layers: indices, None for all (the
    paper adapts the last 30 of 32; -1, -2... count from the end).

    Raises ValueError for a value out of range.
    """
    _check(tokens, 0)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        for m in _attention(params, sites, layers, key):
            features = m.n_in
            draw = lambda key, index, features=features: {
                "prompt": jax.random.normal(key, (tokens, features))
            }
            trainable[m.path] = m.fill({"prompt": (tokens, features), "gate": ()}, draw)
            constants[m.path] = {"on": jnp.asarray(m.active, jnp.float32)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def bind(trainable, constants, params, key=None, sites=None):
        sites, flat = sites or ops.sites_from_shapes(params), tree.flatten(params)
        around = {}
        for path, x in joined(trainable, constants).items():
            keys_and_values = []
            for name in "kv":
                kernel, bias = (tree.sibling(path, f"{name}/{part}") for part in ("kernel", "bias"))
                project = ops.over_layers(ops.linear, sites[kernel].stack)
                keys_and_values.append(project(x["prompt"], flat[kernel], flat.get(bias)))
            around[path] = Gated(*keys_and_values, x["gate"] * x["on"].astype(x["gate"].dtype))
        return _bound(params, around, "k/kernel", Ahead())

    def count(params, sites=None):
        adapted = _attention(params, sites, layers)
        return sum(int(m.active.sum()) * (tokens * m.n_in + 1) for m in adapted)

    hp = dict(tokens=tokens, layers=layers)
    return Method("llama-adapter", hp, init, bind, None, count)


KEYS = "re:(.*/)?attn/k/kernel"  # the key projections of attention


def _check(tokens, std):
    if tokens < 1:
        raise ValueError(f"method.tokens: {tokens} given, must be at least 1")
    if std < 0:
        raise ValueError(f"method.std: {std} given, must not be negative")


def _attention(params, sites, layers, key=None) -> list[Matrix]:
    """The matrices (features, K D) of the attention's keys, under the path of the `Attend` that
    reads them."""
    sites = sites or ops.sites_from_shapes(ops.inner(params))
    if not matching(KEYS, sites):
        raise ValueError(
            "method.name: virtual tokens need attention whose keys come from .../attn/k/kernel, as "
            f"in lorax.models; there is {', '.join(sites)}"
        )
    keys = []
    for m in matrices(params, adapted_matrices(params, sites, (KEYS,), layers)):
        path = re.sub("k/kernel$", "attend", m.path)
        keys.append(m._replace(path=path, key=None if key is None else key_for(key, path)))
    return keys


def _embedding(params, sites) -> tuple:
    """(path, V, features) of the token embedding."""
    sites = sites or ops.sites_from_shapes(ops.inner(params))
    paths = matching("embed", sites)
    if len(paths) != 1:
        raise ValueError(
            "method.name: a prompt needs one token embedding, .../wte/embedding or "
            f".../embed/embedding; there is {', '.join(paths or sites)}"
        )
    return paths[0], *tree.flatten(params)[paths[0]].shape


def _bound(params, around: dict, beside: str, root: Ahead) -> dict:
    """The parameters with the leaves of `around` {path: leaf}, and `root` around the model itself.

    beside: the kernel next to each path, which becomes a leaf too: a plain `module.apply` would
    ignore the leaves around modules, and so it fails instead.
    """
    flat = tree.flatten(params)
    for path, leaf in around.items():
        kernel = tree.sibling(path, beside)
        flat |= {f"{path}/{intercept.AROUND}": leaf, kernel: leaves.Same(flat[kernel])}
    return tree.unflatten(flat | {intercept.AROUND: root})
