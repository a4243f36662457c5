"""BERT (Devlin et al. 2018, arXiv:1810.04805) and RoBERTa (Liu et al. 2019, arXiv:1907.11692) as a
plain Linen module, and their Hugging Face layout.

The two differ in how they number positions and in their heads. Encoder layers run under `nn.scan`:
every parameter below "h/" has a leading layer axis. `DeBERTa` shares the heads. Axes: B batch, T
positions, H heads, D features of one head, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models.blocks import MLP, SelfAttention
from lorax.models.layers import (
    ACTIVATION,
    ACTIVATIONS,
    LayerNorm,
    causal_context,
    over_layers,
    padding_mask,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, the head, and how to run the layers.

    model_type: "bert" or "roberta". head: "mlm" (`logits` of every token), "classification"
    (`scores` of a text for `labels` classes, or one for a regression) or "none". remat, unroll: as
    in `gpt2.Config`.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    head: str = "mlm"
    labels: int = 2
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    @property
    def first_position(self) -> int:
        """Position embedding row of a text's first token; RoBERTa's start after pad_token_id."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0


class Block(nn.Module):
    """One layer, post-norm: x (B, T, hidden_size) -> (x, None)."""

    config: Config

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        norm = functools.partial(LayerNorm, c.layer_norm_eps)
        how = c.dtype, normal
        read = SelfAttention(c.num_attention_heads, False, *how, name="attn")(x, mask)
        x = norm(name="norm_1")(x + read)
        mlp = MLP(c.intermediate_size, c.hidden_act, *how, name="mlp")
        return norm(name="norm_2")(x + mlp(x)), None


class MLMHead(nn.Module):
    """Hidden states (..., hidden_size) -> logits of masked tokens (..., V) float32.

    A dense layer of `features` outputs, an activation and a norm; then `attend`, the product with
    the word embeddings, or a separate dense layer if the embeddings are not tied.
    """

    config: Config
    features: int
    activation: str

    @nn.compact
    def __call__(self, x, attend: Callable):
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=normal)
        x = ACTIVATIONS[self.activation](dense(self.features, name="dense")(x))
        x = LayerNorm(c.layer_norm_eps, name="norm")(x)
        if not c.tie_word_embeddings:
            attend = dense(c.vocab_size, use_bias=False, name="out")
        logits = attend(x).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), jnp.float32)
        return logits + jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)


class Classifier(nn.Module):
    """A text's first hidden state (B, hidden_size) -> its scores (B, labels) float32."""

    config: Config
    activation: Callable

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=normal)
        x = self.activation(dense(c.hidden_size, name="pooler")(x))
        return dense(c.labels, name="out")(x).astype(jnp.float32)


class Encoder(nn.Module):
    """An encoder's heads, chosen by `config.head`.

    `setup` makes the head's module under the parameter name "head": `predict` for "mlm",
    `classify` for "classification".
    """

    config: Config
    #: The parameters that `logits` reads.
    head: ClassVar[tuple[str, ...]] = ("embed", "head")

    def __call__(self, tokens, segments=None, types=None):
        """Tokens (B, T) int32 -> `logits`, `scores` or, without a head, hidden states."""
        hidden = self.hidden(tokens, segments, types)
        if self.config.head == "none":
            return hidden
        return self.logits(hidden) if self.config.head == "mlm" else self.scores(hidden)

    def logits(self, hidden):
        """Hidden states (..., hidden_size) -> logits (..., V) float32."""
        self._needs("mlm", "logits")
        return self.predict(hidden, self.embed.attend)

    def scores(self, hidden):
        """Hidden states (B, T, hidden_size) -> scores (B, labels) float32, from column 0 of each
        row: one text per row, padded on the right."""
        self._needs("classification", "scores")
        return self.classify(hidden[:, 0])

    @nn.nowrap
    def _needs(self, head: str, output: str) -> None:
        if self.config.head != head:
            raise ValueError(f"{output}: head is {self.config.head!r}; load with head={head!r}")


class BERT(Encoder):
    """BERT or RoBERTa; T at most `config.max_position_embeddings` (less the rows that RoBERTa
    keeps for padding)."""

    def setup(self):
        c = self.config
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, dtype=c.dtype, embedding_init=normal
        )
        self.embed = embed(c.vocab_size)
        self.position_embed = embed(c.max_position_embeddings)
        self.type_embed = embed(c.type_vocab_size)
        self.embed_norm = LayerNorm(c.layer_norm_eps)
        self.h = over_layers(Block, c, c.num_hidden_layers, c.hidden_size, nn.broadcast)
        if c.head == "mlm":
            activation = "gelu" if c.model_type == "roberta" else c.hidden_act
            self.predict = MLMHead(c, c.hidden_size, activation, name="head")
        elif c.head == "classification":
            self.classify = Classifier(c, jnp.tanh, name="head")

    def hidden(self, tokens, segments=None, types=None, first: int = 0):
        """Final hidden states (B, T, hidden_size).

        segments: (B, T) int32 or None; tokens of one text share a number above 0 and see each
        other, 0 is padding: an attention mask of 0 and 1 works too. types: (B, T) int32, the token
        types (sentence A or B), or None for zeros. first: see `layers.causal_context`.

        Positions count from the first token of each text. Hugging Face's RoBERTa does the same; its
        BERT only with padding on the right, since it also counts padding on the left.
        """
        c = self.config
        room = c.max_position_embeddings - c.first_position - first
        check_length(tokens, room, "max_position_embeddings leaves room for")
        types = jnp.zeros_like(tokens) if types is None else types
        positions = causal_context(tokens, segments, first=first + c.first_position).positions
        x = self.embed(tokens) + self.type_embed(types) + self.position_embed(positions)
        return self.h(self.embed_norm(x), padding_mask(tokens, segments))[0]


normal = nn.initializers.normal(0.02)


def check_length(tokens, room: int, why: str) -> None:
    """Raises ValueError for rows longer than the number of positions."""
    if tokens.shape[-1] > room:
        raise ValueError(f"{tokens.shape[-1]} tokens, but {why} {room}")


# ----------------------------------------------------------------------------- Hugging Face layout

HEADS = {
    "ForMaskedLM": "mlm",
    "ForPreTraining": "mlm",
    "ForSequenceClassification": "classification",
}
#: Fields of an encoder's Config that Hugging Face doesn't have.
OURS = ("head", "labels", "dtype", "remat", "unroll")
_STEMS = {"bert": "Bert", "roberta": "Roberta"}  # of Hugging Face's class names
#: Fields that encoders read from a config.json.
COMMON = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), fields.ROWS),
    **dict.fromkeys(("hidden_size", "intermediate_size"), fields.SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), fields.SIZE),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": fields.POSITIVE,
    "tie_word_embeddings": fields.FLAG,
    "architectures": fields.optional(fields.TEXTS),
    "num_labels": fields.optional(fields.SIZE),
    "id2label": fields.optional(fields.OBJECT),
}
FIELDS = COMMON | {
    "model_type": fields.TEXT,
    "type_vocab_size": fields.ROWS,
    "pad_token_id": fields.optional(fields.ID),
    "is_decoder": fields.FLAG,
    "add_cross_attention": fields.FLAG,
    "position_embedding_type": fields.TEXT,
}
_DEFAULTS = {"bert": {}, "roberta": {"vocab_size": 50265, "pad_token_id": 1}}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`.

    run: `dtype`, `remat`, `unroll`, and `head` and `labels`, which by default follow
    "architectures" and "num_labels" or "id2label". Raises ValueError for options that this module
    does not compute, and as `fields.read` does.
    """
    hf = fields.read(hf, FIELDS)
    kind = hf.get("model_type", "bert")
    if kind not in _STEMS:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(_STEMS)}")
    for field in ("is_decoder", "add_cross_attention"):
        if hf.get(field):
            raise ValueError(f"{field}=true is not supported for {_STEMS[kind]}")
    if hf.get("position_embedding_type", "absolute") != "absolute":
        embedding_type = hf["position_embedding_type"]
        raise ValueError(
            f"position_embedding_type {embedding_type!r} is not supported, only 'absolute'"
        )
    config = Config(**fields_from_hf(Config, _DEFAULTS[kind] | hf, _STEMS[kind], run))
    if kind == "roberta" and config.pad_token_id is None:
        raise ValueError(
            "pad_token_id null is not supported for Roberta: positions start after its value"
        )
    if config.first_position >= config.max_position_embeddings:
        raise ValueError(
            f"pad_token_id {config.pad_token_id} leaves no positions of max_position_embeddings "
            f"{config.max_position_embeddings}: they start after it"
        )
    check(config)
    return config


def fields_from_hf(config: type, hf: dict, stem: str, run: dict) -> dict:
    """Arguments for an encoder's Config: from a config.json, `run`, and the head.

    Raises ValueError for a head, in `run` or in the files, that the encoder lacks.
    """
    names = [f.name for f in dataclasses.fields(config) if f.name not in OURS]
    arguments = {name: hf[name] for name in names if name in hf} | run
    if "head" not in run and hf.get("architectures"):
        known = {stem + suffix: head for suffix, head in HEADS.items()} | {f"{stem}Model": "none"}
        heads = [known[name] for name in hf["architectures"] if name in known]
        if not heads:
            raise ValueError(
                f"architectures {hf['architectures']} is not one of {', '.join(known)}; set head "
                f"('mlm', 'classification', 'none') to load the encoder with another head"
            )
        arguments["head"] = heads[0]
    if "labels" not in run:
        arguments["labels"] = hf.get("num_labels") or len(hf.get("id2label") or ()) or 2
    return arguments


def check(config) -> None:
    """Raises ValueError if the fields that encoders share contradict each other or are invalid."""
    c = config
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(
            f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads "
            f"{c.num_attention_heads}"
        )
    if c.head not in (heads := [*dict.fromkeys(HEADS.values()), "none"]):
        raise ValueError(f"head {c.head!r} is not one of {', '.join(heads)}")
    if c.labels < 1:
        raise ValueError(f"labels {c.labels} is less than 1")


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}."""
    model = config.model_type
    layer = f"{model}.encoder.layer.{{}}"
    embeds = {
        "embed": f"{model}.embeddings.word_embeddings",
        "position_embed": f"{model}.embeddings.position_embeddings",
        "type_embed": f"{model}.embeddings.token_type_embeddings",
    }
    norms = {
        "embed_norm": f"{model}.embeddings.LayerNorm",
        "h/norm_1": f"{layer}.attention.output.LayerNorm",
        "h/norm_2": f"{layer}.output.LayerNorm",
    }
    linears = {
        "h/attn/q": f"{layer}.attention.self.query",
        "h/attn/k": f"{layer}.attention.self.key",
        "h/attn/v": f"{layer}.attention.self.value",
        "h/attn/o": f"{layer}.attention.output.dense",
        "h/mlp/up": f"{layer}.intermediate.dense",
        "h/mlp/down": f"{layer}.output.dense",
    }
    head = {}
    if config.head == "mlm" and model == "bert":
        linears["head/dense"] = "cls.predictions.transform.dense"
        norms["head/norm"] = "cls.predictions.transform.LayerNorm"
        head = decoder("cls.predictions", embeds["embed"], config)
    elif config.head == "mlm":
        linears["head/dense"] = "lm_head.dense"
        norms["head/norm"] = "lm_head.layer_norm"
        head = decoder("lm_head", embeds["embed"], config)
    elif config.head == "classification" and model == "bert":
        linears |= {"head/pooler": "bert.pooler.dense", "head/out": "classifier"}
    elif config.head == "classification":
        linears |= {"head/pooler": "classifier.dense", "head/out": "classifier.out_proj"}
    return sources(embeds, norms, linears) | head


def sources(embeds: Mapping, norms: Mapping, linears: Mapping) -> dict[str, Source]:
    """Sources for torch's Embedding, LayerNorm and Linear; arguments: {our module: theirs}."""
    table = {f"{ours}/embedding": Source(f"{theirs}.weight") for ours, theirs in embeds.items()}
    for ours, theirs in norms.items():
        table[f"{ours}/scale"] = Source(f"{theirs}.weight")
        table[f"{ours}/bias"] = Source(f"{theirs}.bias")
    for ours, theirs in linears.items():
        table[f"{ours}/kernel"] = Source(f"{theirs}.weight", axes=(1, 0))
        table[f"{ours}/bias"] = Source(f"{theirs}.bias")
    return table


def decoder(name: str, embed: str, config) -> dict[str, Source]:
    """Sources of an MLM head's last layer. Its bias has two names. If tied, the two are equal and
    files usually have the outer one; untied, transformers computes with the inner one. embed: the
    embedding that its weight is tied to."""
    if config.tie_word_embeddings:
        return {
            "embed/embedding": Source(f"{embed}.weight", tied=f"{name}.decoder.weight"),
            "head/bias": Source(f"{name}.bias", tied=f"{name}.decoder.bias"),
        }
    return {
        "head/out/kernel": Source(f"{name}.decoder.weight", axes=(1, 0)),
        "head/bias": Source(f"{name}.decoder.bias"),
    }


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers builds the same model."""
    return fields_to_hf(config, _STEMS[config.model_type])


def fields_to_hf(config, stem: str) -> dict:
    """Inverse of `fields_from_hf`."""
    names = [f.name for f in dataclasses.fields(config) if f.name not in OURS]
    suffix = next((suffix for suffix, head in HEADS.items() if head == config.head), "Model")
    described = {name: getattr(config, name) for name in names} | {"architectures": [stem + suffix]}
    if config.head == "classification":
        described["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.labels)}
        described["label2id"] = {label: int(i) for i, label in described["id2label"].items()}
    return described
