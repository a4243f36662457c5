"""Prefixes, prompts and LLaMA-Adapter in PEFT's format, as numpy arrays on both sides.

    prefix          prompt_embeddings (tokens, 2 L K D): k of layer 0, v of layer 0, k of layer 1...
    prompt          prompt_embeddings (tokens, features)
    llama-adapter   adaption_prompt (1, tokens, features) and adaption_gate (1,) of each attention

Every method has two functions,

    write(arrays, base) -> (tensors, config)
    read(stored, config, base, where) -> (hp, arrays)

arrays: {last word of a leaf's path: array}, layers stacked. base: an `Attention`. tensors, stored:
{PEFT's name: float32}. where: the directory, for error messages. Both raise ValueError for a base
for which PEFT's method differs, and for what the other side can't represent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorax.interop.peft.config import CONFIG, WEIGHTS
from lorax.interop.peft.modules import fit

#: Families in which PEFT's prefix works as ours does.
PREFIX_FAMILIES = (
    *("gpt2", "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3"),
    *("olmo2", "olmo3", "granite", "gemma", "phi3"),
)
#: Families for which PEFT has LLaMA-Adapter. Its GPT-2 leaves out the output projection.
ADAPTER_FAMILIES = ("llama", "mistral")


class Attention(NamedTuple):
    """Facts about a base. family: Hugging Face's model_type. causal: whether it generates text.
    raw: its config.json. modules: PEFT's name of each layer's attention. embedded: factor by which
    the embedding module multiplies its rows (Gemma's does), and which PEFT's prompts go without."""

    family: str
    causal: bool
    raw: Mapping[str, Any]
    modules: tuple[str, ...]
    embedded: float = 1.0

    def field(self, *names: str) -> Any:
        """The first of these fields of config.json that is set."""
        return next((self.raw[name] for name in names if self.raw.get(name) is not None), None)

    def need(self, method: str, families: tuple[str, ...] | None = None) -> None:
        """Raises ValueError for a base that is not causal, or not of one of the families."""
        if not self.causal or families and self.family not in families:
            known = ", ".join(families or ("causal models",))
            raise ValueError(f"{method}: PEFT has the same for {known}, not for {self.family}")

    def sizes(self, heads: int, width: int) -> dict[str, Any]:
        """The fields of a config with the model's sizes."""
        sizes = {"num_layers": len(self.modules), "num_transformer_submodules": 1}
        return sizes | {"num_attention_heads": heads, "token_dim": width}

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.field("num_attention_heads", "n_head")


class Kind(NamedTuple):
    """How a method is written and read: see above."""

    write: Callable
    read: Callable


def write_prefix(arrays, base):
    """k and v (L, tokens, K D) as one `prompt_embeddings`.

    Raises ValueError for a base whose prefix differs in PEFT, and for a prefix in some layers
    only."""
    _check_prefix(base)
    if not arrays["on"].all():
        raise ValueError("method.layers: PEFT has a prefix in all layers or in none")
    both = np.stack([arrays["k"], arrays["v"]], axis=1)  # (L, 2, tokens, K D)
    tokens, width = both.shape[2:]
    config = {"num_virtual_tokens": tokens, "prefix_projection": False}
    config |= {"encoder_hidden_size": width}
    config |= base.sizes(base.field("num_key_value_heads") or base.heads, width)
    return {"prompt_embeddings": both.transpose(2, 0, 1, 3).reshape(tokens, -1)}, config


def read_prefix(stored, config, base, where):
    """k and v (L, tokens, K D).

    Raises ValueError for a base whose prefix differs in PEFT, features that don't make k and v of
    every layer, and a config that contradicts the tensor or the base."""
    _check_prefix(base)
    n = fit(str(where / WEIGHTS), stored, prompt_embeddings=("tokens", "all"))
    layers = len(base.modules)
    if n["all"] % (2 * layers):
        raise ValueError(f"{where / WEIGHTS}: {n['all']} features are none of {layers} layers")
    both = stored["prompt_embeddings"].reshape(n["tokens"], layers, 2, -1)
    k, v = (both[:, :, i].swapaxes(0, 1) for i in (0, 1))
    heads = base.field("num_key_value_heads") or base.heads
    _agree(config, where, num_virtual_tokens=n["tokens"], **base.sizes(heads, k.shape[-1]))
    return {"tokens": n["tokens"]}, {"k": k, "v": v}


def _check_prefix(base: Attention) -> None:
    base.need("prefix", PREFIX_FAMILIES)
    if base.raw.get("sliding_window") is not None and base.raw.get("use_sliding_window", True):
        raise ValueError("prefix: PEFT's sliding window leaves the prefix behind, ours does not")


def write_prompt(arrays, base):
    """The prompt (tokens, features), times `base.embedded`, as `prompt_embeddings`. Raises
    ValueError for a base that is not causal."""
    base.need("prompt")
    tokens, width = arrays["prompt"].shape
    config = {"num_virtual_tokens": tokens, "prompt_tuning_init": "RANDOM"}
    prompt = arrays["prompt"] * np.float32(base.embedded)
    return {"prompt_embeddings": prompt}, config | base.sizes(base.heads, width)


def read_prompt(stored, config, base, where):
    """The prompt (tokens, features).

    Raises ValueError for a base that is not causal, and a config that contradicts the tensor."""
    base.need("prompt")
    n = fit(str(where / WEIGHTS), stored, prompt_embeddings=("tokens", "features"))
    sizes = dict(num_virtual_tokens=n["tokens"], token_dim=n["features"])
    _agree(config, where, num_transformer_submodules=1, **sizes)
    prompt = stored["prompt_embeddings"] / np.float32(base.embedded)
    return {"tokens": n["tokens"]}, {"prompt": prompt}


def write_adapter(arrays, base):
    """A prompt (tokens, features) and a gate of each adapted layer.

    Raises ValueError for a base whose LLaMA-Adapter differs in PEFT, and for layers that are not
    the last ones."""
    base.need("llama-adapter", ADAPTER_FAMILIES)
    on, depth = np.flatnonzero(arrays["on"]), len(arrays["on"])
    if list(on) != list(range(depth - len(on), depth)):
        raise ValueError(f"method.layers: {on.tolist()}; PEFT adapts the last layers alone")
    tensors = {}
    for i in on:
        tensors[f"{base.modules[i]}.adaption_prompt"] = arrays["prompt"][i][None]
        tensors[f"{base.modules[i]}.adaption_gate"] = arrays["gate"][i][None]
    config = {"adapter_len": arrays["prompt"].shape[1], "adapter_layers": len(on)}
    return tensors, config | {"target_modules": base.modules[0].rpartition(".")[2]}


def read_adapter(stored, config, base, where):
    """prompt (L, tokens, features) and gate (L,), zero in layers that are not adapted.

    Raises ValueError for a base whose LLaMA-Adapter differs in PEFT, an attention that it does not
    have, layers with different shapes, and a config that contradicts the tensors or the base."""
    base.need("llama-adapter", ADAPTER_FAMILIES)
    file, by_layer = where / WEIGHTS, {}
    for name, x in stored.items():
        module, _, last = name.rpartition(".")
        if module not in base.modules:
            known = ", ".join(base.modules)
            raise ValueError(f"{file}: {name}: the base has no such attention, it has {known}")
        by_layer.setdefault(base.modules.index(module), {})[last] = x
    if not by_layer:
        raise ValueError(f"{file}: holds no tensors of ADAPTION_PROMPT")
    for i, x in by_layer.items():
        shapes = dict(adaption_prompt=(1, "tokens", "features"), adaption_gate=(1,))
        shape = fit(f"{file}: {base.modules[i]}", x, **shapes)
    word = base.modules[0].rpartition(".")[2]
    said = dict(adapter_len=shape["tokens"], adapter_layers=len(by_layer), target_modules=word)
    _agree(config, where, **said)
    arrays = {"prompt": np.zeros((len(base.modules), *shape.values()), np.float32)}
    arrays["gate"] = np.zeros(len(base.modules), np.float32)
    for i, x in by_layer.items():
        if x["adaption_prompt"].shape[1:] != arrays["prompt"].shape[1:]:
            raise ValueError(f"{file}: {base.modules[i]}: not as many tokens as in other layers")
        arrays["prompt"][i], arrays["gate"][i] = x["adaption_prompt"][0], x["adaption_gate"][0]
    return {"tokens": shape["tokens"], "layers": tuple(sorted(by_layer))}, arrays


def _agree(config: Mapping[str, Any], where, **right) -> None:
    """Raises ValueError for a field that contradicts the tensors or the base."""
    for field, value in right.items():
        if config.get(field) not in (None, value):
            given = f"{config[field]!r} given, the tensors and the base have {value!r}"
            raise ValueError(f"{where / CONFIG}: {field}: {given}")


KINDS = {
    "prefix": Kind(write_prefix, read_prefix),
    "prompt": Kind(write_prompt, read_prompt),
    "llama-adapter": Kind(write_adapter, read_adapter),
}
