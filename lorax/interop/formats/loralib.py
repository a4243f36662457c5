"""Checkpoints of loralib, the LoRA authors' code, as safetensors: `<module>.lora_A` (r, in) and
`lora_B` (out, r). s is in the training script (`lorax.interop.loralib` reads them onto a base).

A fused module with n adapted parts has lora_A (n r, in) and lora_B (n d, r): they are n updates
here, "<module>.0" and so on. Which parts they are, only the base and the script say.
"""

import re

from lorax.interop.adapter import Factors
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened, check_floats, numbers
from lorax.interop.tensors import Stored

_KEY = re.compile(r"(module\.)?(?P<module>.+)\.(lora_(?P<side>[AB])|weight|bias)")
SOURCE = "default 1: lora_alpha is in the training script"
FUSED = "a part of a fused module; which one the file does not say"


def recognises(opened: Opened) -> bool:
    """Whether tensors are named as loralib names them; PEFT's have a config or a prefix."""
    keys = opened.tensors
    return any(key.endswith(".lora_A") for key in keys) and all(map(_KEY.fullmatch, keys))


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names file and module."""
    modules: dict[str, dict[str, Stored]] = {}
    beside = {}
    for key, tensor in opened.tensors.items():
        match = _KEY.fullmatch(key)
        if not match["side"]:
            beside[key] = tensor.shape
        elif modules.setdefault(match["module"], {}).setdefault(match["side"], tensor) != tensor:
            raise ValueError(f"{opened.file}: {key} occurs twice, with and without 'module.'")
    found = []
    for module, sides in modules.items():
        found += _updates(opened, module, sides.get("A"), sides.get("B"))
    return Found("loralib", opened.path, tuple(found), beside, {})


def _updates(opened: Opened, module: str, A: Stored | None, B: Stored | None) -> list[Update]:
    shapes = [None if x is None else x.shape for x in (A, B)]
    fits = all(shape and len(shape) == 2 and 0 not in shape for shape in shapes)
    parts = A.shape[0] // B.shape[1] if fits else 0
    if not parts or A.shape[0] % B.shape[1] or B.shape[0] % parts:
        raise ValueError(
            f"{opened.file}: {module}: need lora_A (r, in) and lora_B (out, r), got {shapes}"
        )
    check_floats(A), check_floats(B)
    rank, inputs, outputs = B.shape[1], A.shape[1], B.shape[0] // parts

    def read(i: int) -> Factors:
        a = numbers(A, [range(i * rank, (i + 1) * rank), range(inputs)])
        b = numbers(B, [range(i * outputs, (i + 1) * outputs), range(rank)])
        return Factors(a.T, b.T, 1.0)

    shape, warnings = (inputs, outputs), (FUSED,) * (parts > 1)
    return [
        Update(f"{module}.{i}" if parts > 1 else module, "LoRA", shape, rank, 1.0, SOURCE, A.kind,
               lambda i=i: read(i), warnings)
        for i in range(parts)
    ]  # fmt: skip
