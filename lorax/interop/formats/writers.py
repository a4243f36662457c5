"""Low-rank updates written in a program's format, by the names that the format gives to modules.

PEFT     a directory, names of modules with dots; the scale is config lora_alpha / r
kohya    one file, flattened names; the scale is the tensor alpha / r
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import write_bytes
from lorax.interop.adapter import Factors
from lorax.interop.peft import files
from lorax.interop.peft.config import as_patterns

#: Fields of a PEFT config that say what the adapter is for.
ABOUT = ("base_model_name_or_path", "task_type")


def write(
    out: Path, factors: Mapping[str, Factors], format: str, config: Mapping[str, Any]
) -> None:
    """Write the factors of linear layers. out: a directory for PEFT, else a file. config: of the
    file that they are from.

    Raises ValueError for a format that is not written, and for nothing to write.
    """
    check(format)
    if not factors:
        raise ValueError("nothing to write: no matrix keeps a direction")
    WRITERS[format](out, factors, config)


def check(format: str) -> None:
    """Raises ValueError for a format that is not written."""
    if format not in WRITERS:
        raise ValueError(f"format {format} is not written; expected one of {', '.join(WRITERS)}")


def _peft(out: Path, factors: Mapping[str, Factors], config: Mapping[str, Any]) -> None:
    tensors = {}
    for module, (a, b, _, m) in factors.items():
        start = f"{files.PREFIX}{module}"
        tensors |= {f"{start}.lora_A.weight": a.T, f"{start}.lora_B.weight": b.T}
        if m is not None:
            tensors[f"{start}.lora_magnitude_vector"] = m
    r, ranks = as_patterns({module: f.a.shape[1] for module, f in factors.items()})
    alpha, alphas = as_patterns({module: f.s * f.a.shape[1] for module, f in factors.items()})
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(factors),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "use_dora": any(f.m is not None for f in factors.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    files.write(out, tensors, fields | {name: config.get(name) for name in ABOUT})


def _kohya(out: Path, factors: Mapping[str, Factors], config: Mapping[str, Any]) -> None:
    tensors = {}
    for layer, (a, b, s, m) in factors.items():
        tensors |= {f"{layer}.lora_down.weight": a.T, f"{layer}.lora_up.weight": b.T}
        tensors[f"{layer}.alpha"] = np.array(s * a.shape[1], np.float32)
        if m is not None:
            tensors[f"{layer}.dora_scale"] = m[:, None]
    about = {key: x for key, x in config.items() if isinstance(x, str)}
    about |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    write_bytes(out, files.serialise(tensors, about))


WRITERS = {"PEFT": _peft, "kohya": _kohya}
