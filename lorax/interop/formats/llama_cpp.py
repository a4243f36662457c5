"""Adapters of llama.cpp: GGUF files with general.type "adapter".

    blk.7.attn_q.weight.lora_a (r, in), .lora_b (out, r)     s = adapter.lora.alpha / r, 0: s = 1
    token_embd.weight.lora_a (V, r)                          transposed, as its rows are looked up
    blk.7.ffn_up_exps.weight.lora_a (E, r, in), .lora_b      of E experts; one of them may have 1
    blk.7.attn_norm.weight                                   a norm, stored whole

The converter keeps only `lora_alpha` of PEFT's config. For the architectures in `TURNED` it moves
the rows of q and k (`heads`). (llama.cpp, convert_lora_to_gguf.py and conversion/*.py.)
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from lorax.interop.formats import heads, pairs
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.gguf_file import Gguf, read_header
from lorax.interop.formats.opened import Opened

#: Architectures whose rows of q and k the converter moves: its classes with `permute`.
TURNED = frozenset(
    "llama arcee smollm3 granite granitemoe granitehybrid olmo minicpm deepseek bailingmoe deci "
    "internlm2 chameleon mistral3 nanbeige baichuan xverse arctic".split()
)
LOST = (
    "the converter keeps only lora_alpha: if the adapter was trained with rsLoRA or with patterns "
    "of ranks or alphas, its true scales are others"
)
_KEY = re.compile(r"(?P<layer>.+?)(\.weight)?\.lora_(?P<side>[ab])")
_NORM = re.compile(r".*_norm(\.weight|\.bias)?")


def recognises(opened: Opened) -> bool:
    """Whether a file is GGUF; `read` refuses those that are no adapters."""
    return opened.container == "gguf"


def read(opened: Opened) -> Found:
    """The updates of a file. Raises
    ValueError that names the file if it is damaged, a model, or has other tensors."""
    gguf = read_header(opened.file)
    kind = gguf.fields.get("general.type", "model"), gguf.fields.get("adapter.type", "lora")
    if kind != ("adapter", "lora"):
        raise ValueError(
            f"{opened.file}: general.type {kind[0]!r}, adapter.type {kind[1]!r} given; expected an "
            "adapter of type lora"
        )
    layers: dict[str, dict[str, pairs.Lazy]] = {}
    beside = {}
    for name, tensor in gguf.tensors.items():
        if match := _KEY.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["side"]] = tensor
        elif _NORM.fullmatch(name):
            beside[name] = tensor.shape
        else:
            raise ValueError(f"{opened.file}: {name}: neither .lora_a, .lora_b nor a norm")
    updates = []
    for layer, tensors in layers.items():
        updates += _updates(opened, layer, tensors, gguf)
    notes = (LOST,)
    if "adapter.alora.invocation_tokens" in gguf.fields:
        notes += ("aLoRA: it acts only after its invocation tokens",)
    return Found("GGUF", opened.path, tuple(updates), beside, gguf.fields, notes)


def _updates(opened: Opened, layer: str, tensors, gguf: Gguf) -> list[Update]:
    a, b = tensors.get("a"), tensors.get("b")
    if a is None or b is None:
        raise ValueError(f"{opened.file}: {layer}: needs both lora_a and lora_b")
    rank = b.shape[-1] if b.shape else 0
    scale, source = _scale(opened, gguf.fields, rank)
    if len(a.shape) == len(b.shape) == 3:
        return pairs.stack(layer, a, b, scale, source, pairs.transposed, pairs.transposed)
    warnings: tuple[str, ...] = ()
    as_a = pairs.as_is if layer == "token_embd" else pairs.transposed
    b = pairs.transposed(b)
    if gguf.fields.get("general.architecture") in TURNED and layer.endswith((".attn_q", ".attn_k")):
        known = heads.heads(opened.base)
        n = known and (known.q if layer.endswith(".attn_q") else known.kv)
        b, warnings = heads.in_order(b, n, "llama.cpp")
    return [pairs.update(layer, as_a(a), b, scale, source, warnings=warnings)]


def _scale(opened: Opened, fields: Mapping[str, Any], rank: int) -> tuple[float, str]:
    alpha = fields.get("adapter.lora.alpha")
    if alpha is None:
        return 1.0, "default 1: the file has none"
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ValueError(f"{opened.file}: adapter.lora.alpha: {alpha!r}; it should be finite")
    if alpha == 0 or rank == 0:
        return 1.0, "1: adapter.lora.alpha is 0"
    return alpha / rank, "adapter.lora.alpha / r"
