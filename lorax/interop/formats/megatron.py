"""Adapters of Megatron-Bridge and NeMo, as safetensors.

    ....self_attention.linear_qkv.adapter.linear_in.weight (r, in), .linear_out.weight (out, r)
    ....linear_qkv.adapter.adapter_q.linear_in.weight     q, k, v, gate, up apart ("canonical")
    ....self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight       of NeMo before 2.0
    tensors (E, r, in), (E, out, r) of E experts

s = alpha / dim of the part `peft` of run_config.yaml. The rows of a fused q, k, v lie by query
group, its q heads, then its k, then its v:

    (groups, heads of a group + 2, d)   ->   all of q, all of k, all of v

One A serves them all, so they are one update of rank r here. linear_fc1 is gate, then up.
(Megatron-Bridge, conversion/peft_bridge.py and param_mapping.py `split_qkv_weights`.)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import read_text
from lorax.interop.formats import heads, pairs
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened
from lorax.interop.formats.scales import alpha_over_rank

RUN = "run_config.yaml"
_KEY = re.compile(
    r"(?P<layer>.+?)\.(adapter(\.adapter_(?P<part>\w+))?|adapter_layer\.(?P<old>\w+))"
    r"\.linear_(?P<side>in|out)\.weight"
)
_SHARDS = "; shards of tensor parallelism must be joined first"


def recognises(opened: Opened) -> bool:
    """Whether a file is Megatron's or NeMo's."""
    return any(_KEY.fullmatch(name) is not None for name in opened.tensors)


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names the file for other tensors and for a
    damaged run_config.yaml."""
    config = run_config(opened)
    layers: dict[str, dict[str, pairs.Lazy]] = {}
    for key, tensor in opened.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{opened.file}: {key}: neither .linear_in nor .linear_out of Megatron's"
            )
        words = match["layer"], match["part"] or match["old"]
        layers.setdefault(".".join(filter(None, words)), {})[match["side"]] = pairs.lazy(tensor)
    known = heads.heads(opened.base)
    updates = []
    for layer, sides in layers.items():
        updates += _updates(opened, layer, sides, config, known)
    return Found("Megatron", opened.path, tuple(updates), {}, dict(config))


def _updates(opened: Opened, layer: str, sides, config, known) -> list[Update]:
    a, b = sides.get("in"), sides.get("out")
    if a is None or b is None:
        raise ValueError(f"{opened.file}: {layer}: needs both linear_in and linear_out")
    if a.shape[-2:-1] != b.shape[-1:]:
        raise ValueError(
            f"{opened.file}: {layer}: linear_in {a.shape} and linear_out {b.shape} given; "
            f"expected (r, in) and (out, r){_SHARDS}"
        )
    scale, source, warnings = alpha_over_rank(opened, b.shape[-1], config, ("alpha", "dim"))
    if len(a.shape) == len(b.shape) == 3:
        turned = pairs.transposed
        return pairs.stack(layer, a, b, scale, source, turned, turned, warnings)
    b = pairs.transposed(b)
    if layer.endswith((".linear_qkv", ".lora_kqv_adapter", ".lora_qkv_adapter")):
        b, said = _told_apart(b, known)
        warnings = (*warnings, *said)
    elif layer.endswith(".linear_fc1"):
        warnings = (*warnings, "gate, then up, in one update: they share A")
    return [pairs.update(layer, pairs.transposed(a), b, scale, source, warnings=warnings)]


def _told_apart(b: pairs.Side, known: heads.Heads | None) -> tuple[pairs.Side, tuple[str, ...]]:
    """(b with all of q first, then k, then v; warnings)."""
    if known is None:
        return b, (
            "q, k and v in one update, by query group; with the base's config.json beside the file "
            "they are put apart",
        )
    order = by_matrix(known, b.shape[1])
    if order is None:
        of = f"{known.q} heads in {known.kv} groups"
        return b, (f"{b.shape[1]} rows of q, k and v are not those of the base's {of}",)
    return pairs.columns(b, order), ("q, then k, then v, in one update: they share A",)


def by_matrix(known: heads.Heads, rows: int) -> np.ndarray | None:
    """(rows,) the places, in Megatron's order, of the rows of q, then k, then v; None if there are
    not as many as the heads have."""
    each = known.q // known.kv
    if rows % (known.q + 2 * known.kv):
        return None
    places = np.arange(rows).reshape(known.kv, each + 2, -1)
    parts = places[:, :each], places[:, each], places[:, each + 1]
    return np.concatenate([part.reshape(-1) for part in parts])


def run_config(opened: Opened) -> Mapping[str, Any]:
    """The part `peft` of run_config.yaml beside the file or in the folder above, {} without one."""
    folder = opened.file.parent
    file = next((f / RUN for f in (folder, folder.parent) if (f / RUN).is_file()), None)
    if file is None:
        return {}
    return _peft_part(file)


def _peft_part(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = str(error).replace("\n", " ")[:200]
        raise ValueError(f"{file}: not readable YAML ({why})") from None
    part = fields.get("peft") if isinstance(fields, dict) else None
    return {str(key): x for key, x in part.items()} if isinstance(part, dict) else {}
