"""Adapters of torchtune in its own names, as safetensors.

    layers.0.attn.q_proj.lora_a.weight (r, in), .lora_b.weight (out, r), .magnitude (out,)
    layers.0.attention.wq....                         the same in Meta's names
    layers.0.mlp.experts.lora_gate_a (E, in, r), lora_gate_b (E, r, out)    and up, down

s = lora_alpha / r of adapter_config.json. Rows of q and k are in Meta's rotary order (`heads`)
where torchtune's model has Meta's rotary embeddings: all but Qwen's and Phi's.
(torchtune/models/convert_weights.py, modules/moe/experts.py.)
"""

import re

from lorax.interop.formats import heads, pairs
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened
from lorax.interop.formats.scales import alpha_over_rank

_KEY = re.compile(r"(?P<layer>.+)\.(?P<name>lora_[ab]|magnitude)(\.weight)?")
_EXPERTS = re.compile(r"(?P<layer>.+\.experts)\.lora_(?P<part>gate|up|down)_(?P<side>[ab])")
_Q = re.compile(r".*\b(attn|attention)\.(q_proj|wq)")
_K = re.compile(r".*\b(attn|attention)\.(k_proj|wk)")
_UNTURNED = ("qwen", "phi")  # how the names of models begin whose rows are in Hugging Face's order


def recognises(opened: Opened) -> bool:
    """Whether a file is torchtune's own."""
    ends = (".lora_a.weight", ".lora_b.weight")
    return any(
        name.endswith(ends) or _EXPERTS.fullmatch(name) is not None for name in opened.tensors
    )


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names the file for tensors that it should not
    have."""
    layers: dict[str, dict[str, pairs.Lazy]] = {}
    for key, tensor in opened.tensors.items():
        if match := _EXPERTS.fullmatch(key):
            layer, name = f"{match['layer']}.{match['part']}", f"lora_{match['side']}"
        elif match := _KEY.fullmatch(key):
            layer, name = match["layer"], match["name"]
        else:
            raise ValueError(
                f"{opened.file}: {key}: a tensor that torchtune's adapters don't have; expected "
                ".lora_a.weight, .lora_b.weight or .magnitude"
            )
        layers.setdefault(layer, {})[name] = pairs.lazy(tensor)
    updates = []
    for layer, tensors in layers.items():
        updates += _updates(opened, layer, tensors)
    return Found("torchtune", opened.path, tuple(updates), {}, opened.config)


def _updates(opened: Opened, layer: str, tensors) -> list[Update]:
    a, b = tensors.get("lora_a"), tensors.get("lora_b")
    if a is None or b is None:
        raise ValueError(f"{opened.file}: {layer}: needs both lora_a and lora_b")
    experts = ".experts." in layer
    rank = a.shape[-1] if experts else a.shape[0] if a.shape else 0
    scale, source, warnings = alpha_over_rank(opened, rank)
    if experts and len(a.shape) == len(b.shape) == 3:
        return pairs.stack(layer, a, b, scale, source, pairs.as_is, pairs.as_is, warnings)
    if experts:
        return [pairs.update(layer, pairs.as_is(a), pairs.as_is(b), scale, source)]
    m = pairs.row(tensors["magnitude"]) if "magnitude" in tensors else None
    b = pairs.transposed(b)
    turned = not str(heads.language_part(opened.base).get("model_type", "")).startswith(_UNTURNED)
    if turned and (_Q.fullmatch(layer) or _K.fullmatch(layer)):
        known = heads.heads(opened.base)
        n = known and (known.q if _Q.fullmatch(layer) else known.kv)
        b, said = heads.in_order(b, n, "Meta")
        m = m and heads.in_order(m, n, "Meta")[0]
        warnings = (*warnings, *said)
    return [pairs.update(layer, pairs.transposed(a), b, scale, source, m, warnings)]
