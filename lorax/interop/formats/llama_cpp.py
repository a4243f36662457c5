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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import atomically
from lorax.interop.formats import factored, heads, names, pairs, writing
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.factored import Tensors
from lorax.interop.formats.gguf_file import Gguf, package, read_header
from lorax.interop.formats.opened import Opened

#: Architectures whose rows of q and k the converter moves: its classes with `permute`.
TURNED = frozenset(
    "llama arcee smollm3 granite granitemoe granitehybrid olmo minicpm deepseek bailingmoe deci "
    "internlm2 chameleon mistral3 nanbeige baichuan xverse arctic".split()
)
#: llama.cpp's names of architectures, by `model_type` of a base's config.json: those with the names
#: of `names`, whose matrices the converter stores as they are, but for q and k.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
LOST = (
    "the converter keeps only lora_alpha: if the adapter was trained with rsLoRA or with patterns "
    "of ranks or alphas, its true scales are others"
)
_HELD = ("LoRA", "DoRA", "AdaLoRA")  # kinds that have names and factors; `write` refuses DoRA
_KEY = re.compile(r"(?P<layer>.+?)(\.weight)?\.lora_(?P<side>[ab])")
_OWN = re.compile(r"blk\.\d+\.[a-z_]+|token_embd|output")
_NORM = re.compile(r".*_norm(\.weight|\.bias)?")


def recognises(opened: Opened) -> bool:
    """Whether a file is GGUF; `read` refuses those that are no adapters."""
    return opened.container == "gguf"


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names the file if it is damaged, a model, or
    has other tensors."""
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
        return 1.0, "1: no adapter.lora.alpha"
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ValueError(f"{opened.file}: adapter.lora.alpha: {alpha!r}; it should be finite")
    if alpha == 0 or rank == 0:
        return 1.0, "1: adapter.lora.alpha is 0"
    return alpha / rank, "adapter.lora.alpha / r"


# ---------------------------------------------------------------------------------------- writing


def write(out: Path, found: Found, base: Mapping[str, Any] | None = None) -> Path:
    """Write updates as a GGUF file; the file.

    base: the fields of the base's config.json, which say the architecture and, for q and k, the
    heads; not needed for what was read from GGUF in its own order (`read` with base {}).
    llama.cpp has one alpha for all matrices. Raises ValueError that says what it can't hold.
    """
    refused = factored.refusal(found, "GGUF")
    own = found.format == "GGUF"
    name_of = _own_name if own else _name
    by_name = factored.named(found, "GGUF", name_of, unordered=own, kinds=_HELD)
    scale, rank = writing.one_scale(by_name, refused)
    alpha = np.float32(scale * rank)
    if alpha == 0 or not np.isfinite(alpha):
        raise refused(f"alpha {alpha:g}, and llama.cpp takes 0 for a scale of 1")
    if dora := [name for name, update in by_name.items() if update.kind == "DoRA"]:
        raise refused(
            f"llama.cpp has no DoRA; {dora[0]} has lengths; python -m lorax.convert merge adds it "
            "to its base"
        )
    arch = found.config.get("general.architecture") if own else _architecture(base or {}, refused)
    if not isinstance(arch, str):
        raise refused("general.architecture is missing")
    orders = {}
    for name, update in by_name.items():
        stays = heads.is_unordered(update) or arch not in TURNED
        stays |= not name.endswith((".attn_q", ".attn_k"))
        orders[name] = None if stays else _order(name, update.shape[1], base or {}, refused)
    padded = {name: writing.padded(update, rank) for name, update in by_name.items()}
    return atomically(out, lambda file: _write(file, padded, orders, arch, alpha))


def _own_name(layer: str) -> str | None:
    return layer if _OWN.fullmatch(layer) else None


def _name(layer: str) -> str | None:
    return names.llama_cpp(names.hugging_face(layer))


def _architecture(base: Mapping[str, Any], refused: Callable[[str], ValueError]) -> str:
    """llama.cpp's name of a base's architecture, by the fields of its config.json."""
    family = heads.language_part(base).get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        given = family or "no base, or one without model_type,"
        raise refused(f"{given} given; llama.cpp's names are known for bases of {known}")
    return ARCHITECTURES[family]


def _order(layer: str, rows: int, base: Mapping[str, Any], refused) -> np.ndarray:
    """The order of Hugging Face's rows of q or k in llama.cpp's file."""
    known = heads.heads(base)
    n = known and (known.q if layer.endswith(".attn_q") else known.kv)
    if n is None or rows % (2 * n):
        raise refused(f"{rows} rows of {layer} don't fit the heads of the base; give its --base")
    return heads.from_hugging_face(n, rows)


def _write(file: Path, made: Mapping[str, Tensors], orders, arch: str, alpha: np.float32) -> None:
    """orders: {name: the order of up's rows, or None}."""
    gguf = package(str(file))
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, (down, up, _) in made.items():
        up = up if orders[name] is None else up[orders[name]]
        down = down.T if name == "token_embd" else down
        for side, x in (("a", down), ("b", up)):
            x, kind = np.ascontiguousarray(x), None
            if x.dtype.name == "bfloat16":
                x, kind = x.view(np.uint8), gguf.GGMLQuantizationType.BF16
            writer.add_tensor(f"{name}.weight.lora_{side}", x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
