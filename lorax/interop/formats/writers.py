"""Updates written in the format of a program, by the format's name in `Found.format`.

PEFT     a directory, names of modules with dots; the scale is config lora_alpha / r
kohya    one file, flattened names; the scale is the tensor alpha / r
MLX, GGUF: `mlx.write`, `llama_cpp.write`
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import write_bytes
from lorax.interop.formats import llama_cpp, mlx
from lorax.interop.formats.contract import Found
from lorax.interop.peft import files
from lorax.interop.peft.config import as_patterns

#: Fields of a PEFT config that say what the adapter is for.
ABOUT = ("base_model_name_or_path", "task_type")


def check(found: Found, format: str) -> None:
    """Raises ValueError for a format that is not written, and for what it can't hold."""
    if format not in WRITERS:
        raise ValueError(f"format {format} is not written; expected one of {', '.join(WRITERS)}")
    if convolutions := [update.layer for update in found.updates if update.kind == "LoCon"]:
        raise ValueError(f"{convolutions[0]} is a convolution, which is not written")
    if format == "PEFT" and found.format == "kohya":
        raise ValueError(f"{found.path}: PEFT needs names with dots, which kohya's don't have")
    if format == "PEFT" and any("/" in update.layer for update in found.updates):
        raise ValueError(f"{found.path}: its layers have lorax's names; give --base")


def _peft(out: Path, found: Found, base: Mapping[str, Any]) -> Path:
    tensors, config = {}, found.config
    by_name = {update.layer: update for update in found.updates}
    for module, update in by_name.items():
        a, b, _, m = update.read()
        start = f"{files.PREFIX}{module}"
        tensors |= {f"{start}.lora_A.weight": a.T, f"{start}.lora_B.weight": b.T}
        if m is not None:
            tensors[f"{start}.lora_magnitude_vector"] = m
    r, ranks = as_patterns({module: update.rank for module, update in by_name.items()})
    alpha, alphas = as_patterns({module: x.scale * x.rank for module, x in by_name.items()})
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(by_name),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "use_dora": any(update.kind == "DoRA" for update in found.updates),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return files.write(out, tensors, fields | {name: config.get(name) for name in ABOUT})


def _kohya(out: Path, found: Found, base: Mapping[str, Any]) -> Path:
    tensors = {}
    for layer, read in ((update.layer, update.read) for update in found.updates):
        a, b, s, m = read()
        tensors |= {f"{layer}.lora_down.weight": a.T, f"{layer}.lora_up.weight": b.T}
        tensors[f"{layer}.alpha"] = np.array(s * a.shape[1], np.float32)
        if m is not None:
            tensors[f"{layer}.dora_scale"] = m[:, None]
    about = {key: x for key, x in found.config.items() if isinstance(x, str)}
    about |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    return write_bytes(out, files.serialise(tensors, about))


#: (path, what to write, fields of the base's config.json) -> the path
WRITERS = {"PEFT": _peft, "kohya": _kohya, "MLX": mlx.write, "GGUF": llama_cpp.write}
FOLDERS = ("PEFT", "MLX")
