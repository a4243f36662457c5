"""DeBERTa v2 and v3 (He et al. 2020, arXiv:2006.03654; 2021, arXiv:2111.09543) as a plain Linen
module, and its Hugging Face layout.

An encoder like `bert.BERT` whose attention scores also have content-to-position and
position-to-content terms, for relative positions. Axes: B batch, T positions (queries), S positions
(keys), H heads, D features of one head, R rows of relative embeddings, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models import bert
from lorax.models.blocks import MLP
from lorax.models.layers import (
    ACTIVATION,
    ACTIVATIONS,
    LayerNorm,
    causal_context,
    layer_norm,
    over_layers,
    padding_mask,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names and with its defaults, the head, and how to run the
    layers.

    pos_att_type: the attention terms to add, among "c2p" and "p2c". position_buckets: rows of the
    relative embeddings on either side, each covering one distance when near and more and more
    distances when far; -1 for one row per distance up to max_relative_positions (-1:
    max_position_embeddings). legacy: which of Hugging Face's two MLM heads is used. head, labels:
    as in `bert.Config`. remat, unroll: as in `gpt2.Config`.
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    embedding_size: int | None = None  # hidden_size
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    pooler_hidden_act: str = "gelu"
    legacy: bool = True
    tie_word_embeddings: bool = True
    head: str = "mlm"
    labels: int = 2
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    @property
    def embed_features(self) -> int:
        """Features of the embeddings; if not hidden_size, a layer projects them to it."""
        return self.embedding_size or self.hidden_size

    @property
    def furthest(self) -> int:
        """The largest distinguished distance; larger ones share its row."""
        longest = self.max_relative_positions
        return longest if longest >= 1 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Number of rows of the relative embeddings on either side."""
        return self.position_buckets if self.position_buckets > 0 else self.furthest

    @property
    def norms_relative(self) -> bool:
        """Whether the relative embeddings are normalised."""
        return self.relative_attention and self.norm_rel_ebd == "layer_norm"


def relative_rows(config: Config, length: int) -> np.ndarray:
    """(T, S) int64: the row of the relative embeddings for each query and key.

    Equation 3 of arXiv:2006.03654. With buckets, distances d beyond h, half the buckets, are spaced
    logarithmically as in the authors' released code for v2: h + ceil((h - 1) log(d / h) /
    log((furthest - 1) / h)).
    """
    c = config
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if c.position_buckets > 0:
        half, far = c.position_buckets // 2, np.abs(distance)
        log = lambda x: np.log(np.asarray(x, np.float32))
        turns = log(np.maximum(far, half) / half) / log((c.furthest - 1) / half)
        bucket = half + np.ceil(turns * np.float32(half - 1)).astype(np.int64)
        distance = np.where(far <= half, distance, np.sign(distance) * bucket)
    return np.clip(distance + c.span, 0, 2 * c.span - 1)


class Attention(nn.Module):
    """Disentangled attention (arXiv:2006.03654, equation 4).

    x: (B, T, hidden_size); mask: (B or 1, T, S) bool; relative: (R, hidden_size), the relative
    embeddings that this length uses, and rows: (T, S) int32, indices into them, or both None.
    """

    config: Config

    @nn.compact
    def __call__(self, x, mask, relative, rows):
        c = self.config
        dense = functools.partial(nn.Dense, c.hidden_size, dtype=c.dtype, kernel_init=bert.normal)
        heads = lambda x: rearrange(x, "... (h d) -> ... h d", h=c.num_attention_heads)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        to_q, to_k = dense(name="q"), dense(name="k")
        q, k, v = heads(to_q(x)), heads(to_k(x)), heads(dense(name="v")(x))
        scores = product("bthd,bshd->bhts", q, k)
        if relative is not None:
            pick = functools.partial(jnp.take_along_axis, axis=-1, mode="promise_in_bounds")
            if "c2p" in c.pos_att_type:  # if shared, the same layer, including its adapter
                to_pos = to_k if c.share_att_key else dense(name="pos_k")
                c2p = product("bthd,rhd->bhtr", q, heads(to_pos(relative)))
                scores += pick(c2p, rows[None, None])
            if "p2c" in c.pos_att_type:
                to_pos = to_q if c.share_att_key else dense(name="pos_q")
                p2c = product("bshd,rhd->bhsr", k, heads(to_pos(relative)))
                scores += pick(p2c, rows.T[None, None]).swapaxes(-1, -2)
        # Hugging Face counts the terms of pos_att_type even if relative_attention is false.
        scale = (q.shape[-1] * (1 + len(c.pos_att_type))) ** -0.5
        scores = jnp.where(mask[:, None], scale * scores, jnp.finfo(jnp.float32).min)
        o = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores).astype(v.dtype), v)
        return dense(name="o")(rearrange(o, "b t h d -> b t (h d)"))


class Block(nn.Module):
    """One layer, post-norm: x (B, T, hidden_size) -> (x, None).

    near: (B, T, hidden_size), which layer 0 adds to its output, and norm: {"scale", "bias"} of the
    layer norm that follows (the convolution of xlarge models), or both None.
    """

    config: Config

    @nn.compact
    def __call__(self, x, layer, mask, relative, rows, near, norm):
        c = self.config
        after = functools.partial(LayerNorm, c.layer_norm_eps)
        x = after(name="norm_1")(x + Attention(c, name="attn")(x, mask, relative, rows))
        mlp = MLP(c.intermediate_size, c.hidden_act, c.dtype, bert.normal, name="mlp")
        x = after(name="norm_2")(x + mlp(x))
        if near is not None:
            scale, bias = (norm[name].astype(jnp.float32) for name in ("scale", "bias"))
            add = lambda x: layer_norm(
                (x + near).astype(jnp.float32), scale, bias, c.layer_norm_eps
            )
            x = jax.lax.cond(layer == 0, lambda x: add(x).astype(x.dtype), lambda x: x, x)
        return x, None


class DeBERTa(bert.Encoder):
    """DeBERTa. T is at most `config.max_position_embeddings` if position_biased_input is set, and
    unlimited otherwise."""

    config: Config

    def setup(self):
        c = self.config
        embed = functools.partial(nn.Embed, dtype=c.dtype, embedding_init=bert.normal)
        dense = dict(dtype=c.dtype, kernel_init=bert.normal)
        self.embed = embed(c.vocab_size, c.embed_features)
        if c.position_biased_input:
            self.position_embed = embed(c.max_position_embeddings, c.embed_features)
        if c.type_vocab_size:
            self.type_embed = embed(c.type_vocab_size, c.embed_features)
        if c.embed_features != c.hidden_size:
            self.embed_proj = nn.Dense(c.hidden_size, use_bias=False, **dense)
        self.embed_norm = LayerNorm(c.layer_norm_eps)
        if c.relative_attention:
            self.rel_embed = embed(2 * c.span, c.hidden_size)
        if c.norms_relative:
            self.rel_norm = LayerNorm(c.layer_norm_eps)
        if c.conv_kernel_size > 0:
            self.conv = nn.DenseGeneral(c.hidden_size, axis=(-2, -1), **dense)
            # Only the parameters: a module created here can't be called inside the layer loop.
            norm = {"scale": jnp.ones(c.hidden_size), "bias": jnp.zeros(c.hidden_size)}
            self.conv_norm = self.param("conv_norm", lambda key: norm)
        self.h = over_layers(Block, c, c.num_hidden_layers, c.hidden_size, (0, *[nn.broadcast] * 5))
        if c.head == "mlm":
            self.predict = bert.MLMHead(c, c.embed_features, c.hidden_act, name="head")
        elif c.head == "classification":
            self.classify = bert.Classifier(c, ACTIVATIONS[c.pooler_hidden_act], name="head")

    def hidden(self, tokens, segments=None, types=None):
        """Final hidden states (B, T, hidden_size); segments, types and positions as in
        `bert.BERT.hidden`. A model without token types (type_vocab_size 0) ignores `types`."""
        c, mask = self.config, padding_mask(tokens, segments)
        x = self.embed(tokens)
        if c.position_biased_input:
            bert.check_length(tokens, c.max_position_embeddings, "max_position_embeddings is")
            x += self.position_embed(causal_context(tokens, segments).positions)
        if c.type_vocab_size:
            x += self.type_embed(jnp.zeros_like(tokens) if types is None else types)
        if c.embed_features != c.hidden_size:
            x = self.embed_proj(x)
        x = self.embed_norm(x)
        near = self._near(x, mask) if c.conv_kernel_size > 0 else None
        norm = self.conv_norm if c.conv_kernel_size > 0 else None
        relative, rows = self._relative(tokens.shape[-1]) if c.relative_attention else (None, None)
        layers = jnp.arange(c.num_hidden_layers)
        return self.h(x, layers, mask, relative, rows, near, norm)[0]

    def _relative(self, length: int):
        """The relative embeddings for this length (R, hidden_size), and (T, S) indices into
        them."""
        used, rows = np.unique(relative_rows(self.config, length), return_inverse=True)
        relative = self.rel_embed(jnp.asarray(used, jnp.int32))
        if self.config.norms_relative:
            relative = self.rel_norm(relative)
        return relative, jnp.asarray(rows.reshape(length, length), jnp.int32)

    def _near(self, x, mask):
        """Convolution of each token with its neighbours in its text: (B, T, hidden_size)."""
        c, t = self.config, x.shape[1]
        reach = c.conv_kernel_size // 2
        around = np.arange(t)[:, None] + np.arange(c.conv_kernel_size)  # (T, K), of padded columns
        x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))[:, around]  # (B, T, K, hidden_size)
        same = jnp.pad(mask, ((0, 0), (0, 0), (reach, reach)))
        same = jnp.take_along_axis(same, around[None], axis=-1)  # (B or 1, T, K)
        return _ACTIVATIONS[c.conv_act](self.conv(jnp.where(same[..., None], x, 0)))


_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh}

# ----------------------------------------------------------------------------- Hugging Face layout
#: Fields read from a config.json.
FIELDS = bert.COMMON | {
    "embedding_size": fields.optional(fields.SIZE),
    "type_vocab_size": fields.COUNT,
    "max_position_embeddings": fields.SIZE,  # 2 x relative rows must fit int32
    **dict.fromkeys(("max_relative_positions", "position_buckets"), fields.whole(-1, 2**20)),
    "pos_att_type": fields.optional(fields.either(fields.TEXT, fields.TEXTS)),
    **dict.fromkeys(("relative_attention", "share_att_key", "legacy"), fields.FLAG),
    "position_biased_input": fields.FLAG,
    "norm_rel_ebd": fields.one_of(("none", "layer_norm")),
    "conv_kernel_size": fields.whole(0, 2**20),
    "conv_act": fields.TEXT,
    "pooler_hidden_act": ACTIVATION,
    **dict.fromkeys(("attention_head_size", "pooler_hidden_size", "conv_groups"), fields.SIZE),
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run and errors as in `bert.config_from_hf`."""
    hf = fields.read(hf, FIELDS)
    arguments = bert.fields_from_hf(Config, hf, "DebertaV2", run)
    terms = arguments.get("pos_att_type") or ()
    terms = terms.lower().split("|") if isinstance(terms, str) else terms
    arguments["pos_att_type"] = tuple(dict.fromkeys(term.strip() for term in terms))
    c = Config(**arguments)
    bert.check(c)
    for field, supported in (
        ("attention_head_size", c.hidden_size // c.num_attention_heads),
        ("pooler_hidden_size", c.hidden_size),
        ("conv_groups", 1),
    ):
        if hf.get(field, supported) != supported:
            raise ValueError(f"{field} {hf[field]} is not supported, only {supported}")
    if set(c.pos_att_type) - {"c2p", "p2c"}:
        raise ValueError(f"pos_att_type {[*c.pos_att_type]} must be from 'c2p' and 'p2c'")
    if c.relative_attention and not c.pos_att_type:
        raise ValueError("relative_attention=true needs 'c2p', 'p2c' or both in pos_att_type")
    if c.position_buckets > 0 and not 0 < c.position_buckets // 2 < c.furthest - 1:
        raise ValueError(
            f"position_buckets {c.position_buckets} must be at least 2, and half of it less than "
            f"{c.furthest - 1}, max_relative_positions - 1 (-1 stands for max_position_embeddings)"
        )
    if c.conv_kernel_size > 0 and (c.conv_kernel_size % 2 == 0 or c.conv_act not in _ACTIVATIONS):
        raise ValueError(
            f"conv_kernel_size {c.conv_kernel_size}, conv_act {c.conv_act!r}: supported are odd "
            f"sizes and {[*_ACTIVATIONS]}"
        )
    if not c.legacy and (c.embed_features != c.hidden_size or not c.tie_word_embeddings):
        raise ValueError(
            f"legacy=false decodes with the word embeddings: embedding_size {c.embed_features} "
            f"must be hidden_size {c.hidden_size} and tie_word_embeddings true"
        )
    return c


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}."""
    c, layer = config, "deberta.encoder.layer.{}"
    embeds = {"embed": "deberta.embeddings.word_embeddings"}
    norms = {
        "embed_norm": "deberta.embeddings.LayerNorm",
        "h/norm_1": f"{layer}.attention.output.LayerNorm",
        "h/norm_2": f"{layer}.output.LayerNorm",
    }
    linears = {
        "h/attn/q": f"{layer}.attention.self.query_proj",
        "h/attn/k": f"{layer}.attention.self.key_proj",
        "h/attn/v": f"{layer}.attention.self.value_proj",
        "h/attn/o": f"{layer}.attention.output.dense",
        "h/mlp/up": f"{layer}.intermediate.dense",
        "h/mlp/down": f"{layer}.output.dense",
    }
    others = {}
    if c.position_biased_input:
        embeds["position_embed"] = "deberta.embeddings.position_embeddings"
    if c.type_vocab_size:
        embeds["type_embed"] = "deberta.embeddings.token_type_embeddings"
    if c.embed_features != c.hidden_size:
        others["embed_proj/kernel"] = Source("deberta.embeddings.embed_proj.weight", axes=(1, 0))
    if c.relative_attention:
        embeds["rel_embed"] = "deberta.encoder.rel_embeddings"
        if c.norms_relative:
            norms["rel_norm"] = "deberta.encoder.LayerNorm"
        if not c.share_att_key:
            named = {"c2p": ("pos_k", "pos_key_proj"), "p2c": ("pos_q", "pos_query_proj")}
            for ours, theirs in (named[term] for term in c.pos_att_type):
                linears[f"h/attn/{ours}"] = f"{layer}.attention.self.{theirs}"
    if c.conv_kernel_size > 0:
        others["conv/kernel"] = Source("deberta.encoder.conv.conv.weight", axes=(2, 1, 0))
        others["conv/bias"] = Source("deberta.encoder.conv.conv.bias")
        norms["conv_norm"] = "deberta.encoder.conv.LayerNorm"
    if c.head == "mlm":
        outer = "cls.predictions" if c.legacy else "lm_predictions.lm_head"
        inner = f"{outer}.transform" if c.legacy else outer
        linears["head/dense"], norms["head/norm"] = f"{inner}.dense", f"{inner}.LayerNorm"
        others |= bert.decoder(outer, embeds["embed"], c)
    elif c.head == "classification":
        linears |= {"head/pooler": "pooler.dense", "head/out": "classifier"}
    return bert.sources(embeds, norms, linears) | others


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers builds the same model."""
    described = bert.fields_to_hf(config, "DebertaV2") | {"model_type": "deberta-v2"}
    described["pos_att_type"] = [*config.pos_att_type]
    return {name: value for name, value in described.items() if value is not None}
