"""Files whose tensors have a module's path with its dots: diffusers, ComfyUI's style and others.

    diffusers   unet.down_blocks.0...attn1.processor.to_q_lora.down.weight   first generation
                unet.down_blocks.0...attn1.to_q.lora.down.weight             second
                text_encoder...q_proj.lora_linear_layer.down.weight          of text encoders
                unet.down_blocks.0...attn1.to_q.lora_A.weight                third, PEFT's words
    ComfyUI     diffusion_model.layers.0.attention.to_q.lora_A.weight, .lora_down.weight, .alpha
    XLabs       double_blocks.0.processor.qkv_lora1.down.weight
    no prefix   transformer_blocks.0.attn.to_q.lora_A.default.weight
                also what diffusers' `save_lora_adapter` writes

(diffusers, utils/state_dict_utils.py, loaders/peft.py and loaders/lora_conversion_utils.py.) s is
from a tensor "alpha", from diffusers' metadata "lora_adapter_metadata", a `LoraConfig` or a
`LoKrConfig` for each prefix, or of the file if names have no prefix, or 1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import write_bytes
from lorax.interop.formats import factored, flux, fused, image_names, updates
from lorax.interop.formats.configs import config_fields
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.kohya import changes, of_alpha, put, readable, shapes_of
from lorax.interop.formats.opened import Opened, fields, open_adapter
from lorax.interop.peft.config import ALPHAS, COUNT, NUMBER, RANKS, scale_of_kind
from lorax.interop.peft.files import serialise
from lorax.interop.tensors import Stored

#: The first words of names, by format.
PREFIXES = {
    "diffusers": r"(unet|transformer(_\d)?|text_encoder(_\d)?|prior|controlnet|decoder)\.",
    "ComfyUI": r"(diffusion_model|text_encoders|model\.diffusion_model)\.",
    "XLabs": r"(double|single)_blocks\.\d+\.processor\.",
    "PEFT's names": r"((double_|single_|single_transformer_|transformer_|down_|up_)?blocks|layers|"
    r"mid_block|conv_in|conv_out)\.",
}
FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_HELD = (*factored.KINDS, "LoKr")  # kinds that `write` takes
_SIDES = {"down": "lora_down", "up": "lora_up", "A": "lora_down", "B": "lora_up"}
_SIDES |= {"mid": "lora_mid", "magnitude_vector": "magnitude"}
#: A module and the last words of its tensors, of every generation.
_KEY = re.compile(
    r"(?P<layer>.+?)("
    r"(?P<old>_lora\d?)\.(?P<old_side>down|up)\.weight"
    r"|\.lora(_linear_layer)?\.(?P<new_side>down|up)\.weight"
    r"|\.lora_(?P<side>A|B|down|up|mid)(\.(?P<name>[^.]+))?\.weight"
    r"|\.lora_(?P<m>magnitude_vector)(\.(?P<m_name>[^.]+))??(\.weight)?"
    r"|\.(?P<word>alpha|dora_scale|hada_\w+|lokr_\w+|diff|diff_b|w_norm|b_norm)"
    r")"
)


def recognises(opened: Opened) -> bool:
    """Whether names begin with a component of a pipeline and end as an adapter's."""
    return bool(_format(opened)) and "peft_type" not in opened.config


def _format(opened: Opened) -> str:
    for name, prefix in PREFIXES.items():
        if any(re.match(prefix, key) and _KEY.fullmatch(key) for key in opened.tensors):
            return name
    return ""


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names file and tensor."""
    found, beside = _modules(opened)
    made = fused.updates_of(found, opened.as_stored)
    about = shapes_of(beside), fields(opened.metadata)
    return Found(_format(opened), opened.path, made, *about, changes=changes(beside))


def _modules(opened: Opened) -> tuple[list[updates.Module], dict[str, Stored]]:
    """(the modules of a file as they are stored, {name: tensor} of biases and norms)."""
    configs = _configs(opened)

    def scale_of(layer: str, alpha: Stored | None) -> updates.Scale:
        component = "" if "" in configs else layer.partition(".")[0]
        if component not in configs:
            return of_alpha(alpha)
        if alpha is not None:
            raise ValueError(
                f"{opened.file}: {layer}: a tensor alpha, and {METADATA} in the header; one of "
                "them can say the scale"
            )
        return _of_config(configs[component], layer.removeprefix(f"{component}."), opened.file)

    return readable(opened, _by_layer(opened), scale_of)


def _by_layer(opened: Opened) -> dict[str, dict[str, Stored]]:
    """{layer: {word: tensor}}, by the words of `updates`."""
    modules: dict[str, dict[str, Stored]] = {}
    adapters = set()
    for key, tensor in opened.tensors.items():
        bias = key.removesuffix(".bias")
        match = _KEY.fullmatch(bias + ".weight" if bias != key else key)
        if match is None or bias != key and match["side"] not in ("B", "up"):
            raise ValueError(f"{opened.file}: {key}: no tensor of an adapter that can be read")
        layer = match["layer"].replace(".processor.", ".") if match["old"] else match["layer"]
        if match["old"] == "_lora" and layer.endswith("to_out"):
            layer += ".0"  # the first generation leaves the number out
        elif match["old"] not in (None, "_lora"):
            layer = f"{match['layer']}{match['old']}"
        side = match["old_side"] or match["new_side"] or match["side"] or match["m"]
        word = _SIDES[side] if side else match["word"]
        word += ".bias" if bias != key else ""
        adapters |= {match["name"]} if match["side"] else set()
        adapters |= {match["m_name"]} if match["m"] else set()
        put(modules, layer, word, tensor)
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise ValueError(f"{opened.file}: several adapters, {names}; one can be read")
    return modules


def _configs(opened: Opened) -> dict[str, dict[str, Any]]:
    """{component: its fields of a LoraConfig or LoKrConfig} from diffusers' metadata; the component
    is "" in a file of one model, which `save_lora_adapter` writes."""
    if METADATA not in opened.metadata:
        return {}
    stored = fields(opened.metadata)[METADATA]
    where = f"{opened.file}: {METADATA}"
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: no JSON object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in stored.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component, {})[field] = value
    want = {"r": COUNT, "lora_alpha": NUMBER, "alpha": NUMBER}
    want |= {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    for component, config in configs.items():
        for field, kind in want.items():
            if field in config and not kind.fits(config[field]):
                name = f"{component}.{field}".removeprefix(".")
                raise ValueError(f"{where}: {name} should be {kind.words}")
    return configs


def _of_config(config: dict[str, Any], module: str, file: Path) -> updates.Scale:
    lokr = "alpha" in config and "lora_alpha" not in config
    divisor = "sqrt r" if config.get("use_rslora") else "r"
    source = f"metadata {'alpha' if lokr else 'lora_alpha'} / {divisor}"

    def scale(layer: str, rank: int | None) -> tuple[float, str]:
        if rank is None and not lokr:
            return 1.0, "1: the kind has no scale"
        return scale_of_kind(config, module, rank, file), source

    return scale


# ---------------------------------------------------------------------------------------- writing


def write(out: Path, found: Found, base: Mapping[str, Any] | None = None) -> Path:
    """Write updates, read as they are stored, as diffusers' file in the folder `out`; the folder.

    The scales are in the header, which diffusers reads as a `LoraConfig`, or a `LoKrConfig`, for
    each component. LoKr is loaded by a model's `load_lora_adapter`, and by the pipelines of Flux.2
    and Z-Image.
    base: not needed. Raises ValueError that says what the format can't hold.
    """
    refused = factored.refusal(found, "diffusers")
    found = flux.apart(found, refused)
    name_of = str if found.format == "diffusers" else image_names.diffusers
    by_name = factored.named(found, "diffusers", name_of, kinds=_HELD)
    components: dict[str, dict[str, Update]] = {}
    for name, update in by_name.items():
        component, _, module = name.partition(".")
        components.setdefault(component, {})[module] = update
    header: dict[str, Any] = {}
    for component, modules in components.items():
        config = config_fields(modules, refused)
        if config.pop("peft_type") == "LOKR" and component.startswith("text_encoder"):
            raise refused(f"LoKr of {component}; it has LoRA alone of text encoders")
        header |= {f"{component}.{field}": value for field, value in config.items()}
    tensors: dict[str, np.ndarray] = {}
    for name, update in by_name.items():
        as_words = factored.as_stored if update.kind == "LoKr" else factored.as_peft
        tensors |= {f"{name}.{word}": x for word, x in as_words(update).items()}
    metadata = {"format": "pt", METADATA: json.dumps(header, indent=2, sort_keys=True)}
    file = write_bytes(out / FILE, serialise(tensors, metadata))
    written = read(open_adapter(file)._replace(as_stored=True))
    factored.check_written(by_name, written, refused)
    return out
