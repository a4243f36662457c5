"""LoRA adapters in Hugging Face PEFT's on-disk format.

A directory holds `adapter_model.safetensors` and `adapter_config.json`. PEFT stores, for a module
with y = W x, `lora_A.weight` (r, in) and `lora_B.weight` (out, r) and scales by lora_alpha / r;
ours are y = x @ w + s * (x @ a) @ b, so A = a^T, B = b^T and lora_alpha = s * r. Neither is ever
stored transposed, whatever `fan_in_fan_out` says about the base's own weight.

A fused module (GPT-2's c_attn holds q, k and v side by side) is joined exactly: the rows of A are
those of its parts one after the other and B is block-diagonal, so the rank is the sum of theirs.
PEFT reads that as one module; the file's own metadata says how to take it apart again, bit for bit.
"""

import base64
import json
import math
import os
import pathlib
import re
import warnings
import zlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from lorax.files import write_bytes

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# Module of the Hugging Face model -> our paths, in the order in which they lie along its outputs.
# A further family is a further entry here and in the two constants below.
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "transformer.h.{}.attn.c_attn": ("h/{}/attn/q", "h/{}/attn/k", "h/{}/attn/v"),
        "transformer.h.{}.attn.c_proj": ("h/{}/attn/o",),
        "transformer.h.{}.mlp.c_fc": ("h/{}/mlp/up",),
        "transformer.h.{}.mlp.c_proj": ("h/{}/mlp/down",),
        "transformer.wte": ("wte",),
        "transformer.wpe": ("wpe",),
    },
}
EMBEDDINGS = frozenset({"transformer.wte", "transformer.wpe"})
CONV1D = frozenset({"gpt2"})  # families whose linear layers store (in, out): fan_in_fan_out

# Fields of PEFT's LoraConfig (0.21), and those among them that, when set, make the stored tensors
# mean something else than W + s B A on the named base.
_KNOWN = frozenset(
    """alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias
    corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform loftq_config
    lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save
    monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules target_parameters task_type trainable_token_indices use_bdlora
    use_dora use_qalora use_rslora velora_config""".split()
)
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(\.weight)?"
)
_NUMBER = re.compile(r"(?<=[./])\d+(?=[./])")


class Factors(NamedTuple):
    """The update of one matrix, dW = s * a @ b: a (in, r) and b (r, out), float32; s a float."""

    a: np.ndarray
    b: np.ndarray
    s: float


def save(
    directory: str | os.PathLike,
    factors: dict[str, Factors],
    base_name: str,
    model_type: str = "gpt2",
    dropout: float = 0.0,
) -> pathlib.Path:
    """Write an adapter that PEFT loads as it is and that `load` reads back bit for bit.

    Args:
      factors: by path without "/kernel" ("h/0/attn/q"); a (in, r), b (r, out), float32.
      base_name: what PEFT should load as the base model (a Hub id or a directory).
      model_type: the family, a key of `MODULES`.
      dropout: on the adapter's input in training; recorded, without effect on the weights.

    Returns the directory. Raises ValueError for an unknown family or path, shapes that do not fit
    together, a rank of 0 or a scale that is not finite, naming the path.
    """
    if model_type not in MODULES:
        raise ValueError(f"model_type {model_type!r}: PEFT names are known for {sorted(MODULES)}")
    if not factors:
        raise ValueError("factors: nothing to save, no matrix is adapted")
    module_of = {path: module for module, paths in MODULES[model_type].items() for path in paths}
    modules: dict[str, dict[str, Factors]] = {}
    for path, factor in factors.items():
        template, number = _split(path)
        if template not in module_of:
            raise ValueError(f"{path}: no path of a {model_type}; there are {sorted(module_of)}")
        _check(path, factor)
        modules.setdefault(module_of[template].format(number), {})[path] = factor

    tensors: dict[str, np.ndarray] = {}
    inverse: dict[str, dict[str, Any]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, parts in sorted(modules.items()):
        template, number = _split(module)
        paths = [path.format(number) for path in MODULES[model_type][template]]
        A, B, scale, entries = _join(paths, parts)
        embedding = template in EMBEDDINGS
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for name, tensor in zip(names, (A, B), strict=True):
            key = f"base_model.model.{module}.{name}" + ("" if embedding else ".weight")
            tensors[key] = np.ascontiguousarray(tensor)
        inverse.update(entries)
        ranks[module] = A.shape[0]
        alphas[module] = scale * A.shape[0]

    # The commonest rank and alpha are the defaults; whatever differs goes into the patterns.
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "revision": None,
        "r": r,
        "lora_alpha": _number(alpha),
        "rank_pattern": {m: rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {m: _number(x) for m, x in alphas.items() if x != alpha},
        "lora_dropout": float(dropout),
        "target_modules": sorted(modules),
        "fan_in_fan_out": model_type in CONV1D,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    metadata = {
        "format": "pt",
        "lorax": json.dumps({"model_type": model_type, "factors": inverse}),
    }
    directory = pathlib.Path(directory)
    write_bytes(directory / WEIGHTS, _serialise(tensors, metadata))
    text = json.dumps(config, indent=2, sort_keys=True)
    write_bytes(directory / CONFIG, text.encode())
    return directory


def load(directory: str | os.PathLike) -> dict[str, Factors]:
    """Read a PEFT LoRA adapter: our own exports bit for bit, and anybody's for a known family.

    A fused module of a foreign adapter is split: every part gets the shared `a` and its own
    columns of `b`, so the parts have one row space in common. `rank_pattern`, `alpha_pattern` and
    `use_rslora` are honoured.

    Returns factors by path without "/kernel", float32. Raises FileNotFoundError, or ValueError
    that names the file for a damaged file, another kind of adapter (DoRA, AdaLoRA...), factors
    that belong to a changed base (PiSSA, OLoRA...) or a module of an unknown family. Warns about
    config fields it does not know and tensors it leaves out.
    """
    directory = pathlib.Path(directory)
    config = _read_config(directory / CONFIG)
    tensors, metadata = _read_tensors(directory / WEIGHTS)
    file = directory / WEIGHTS

    sides: dict[str, dict[str, np.ndarray]] = {}
    left_out = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        else:
            left_out.append(key)
    if left_out:
        warnings.warn(f"{file}: left out, not LoRA factors: {sorted(left_out)}", stacklevel=2)
    if not sides:
        raise ValueError(f"{file}: holds no lora_A and lora_B tensors")
    family = _family(sides, file)

    own = None
    if "lorax" in metadata:
        try:
            own = {path: dict(e) for path, e in json.loads(metadata["lorax"])["factors"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: damaged metadata 'lorax': {error!r}") from error

    factors: dict[str, Factors] = {}
    for module, pair in sorted(sides.items(), key=lambda item: _order(item[0], family)):
        A, B = pair.get("A"), pair.get("B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = {side: tensor.shape for side, tensor in pair.items()}
            raise ValueError(f"{file}: {module}: need A (r, in) and B (out, r), got {shapes}")
        scale = _scale(config, module, A.shape[0], directory / CONFIG)
        template, number = _split(module)
        paths = [path.format(number) for path in MODULES[family][template]]
        if B.shape[0] % len(paths):
            raise ValueError(f"{file}: {module}: {B.shape[0]} outputs do not split into {paths}")
        if own is None:
            blocks = np.split(B, len(paths))
            parts = {p: (A.T, block.T, scale) for p, block in zip(paths, blocks, strict=True)}
        else:
            parts = _take_apart(paths, A, B, scale, own, file)
        for path, (a, b, s) in parts.items():
            factors[path] = Factors(np.ascontiguousarray(a), np.ascontiguousarray(b), s)
    if own is not None and set(own) != set(factors):
        raise ValueError(f"{file}: metadata 'lorax' and tensors differ: {set(own) ^ set(factors)}")
    return factors


# ---------------------------------------------------------------------------------------- joining


def _join(
    paths: list[str], parts: dict[str, Factors]
) -> tuple[np.ndarray, np.ndarray, float, dict[str, dict[str, Any]]]:
    """One module's A (r', in), B (out', r') and scale, and the metadata that undoes it."""
    parts = {path: parts[path] for path in paths if path in parts}
    # The largest scale is kept and the others' ratios to it, at most 1, go into B.
    scale = max((float(factor.s) for factor in parts.values()), key=abs)
    d_out = next(iter(parts.values())).b.shape[1]
    for path, (a, b, _) in parts.items():
        first = next(iter(parts))
        if a.shape[0] != parts[first].a.shape[0] or b.shape[1] != d_out:
            raise ValueError(f"{path} and {first} are one module but differ in shape")
    A = np.concatenate([_float32(factor.a).T for factor in parts.values()])
    B = np.zeros((len(paths) * d_out, A.shape[0]), np.float32)
    entries = {}
    start = 0
    for path, (_, b, s) in parts.items():
        b, rank = _float32(b), b.shape[0]
        rows = slice(paths.index(path) * d_out, (paths.index(path) + 1) * d_out)
        entries[path] = {"rank": rank, "scale": float(s)}
        block = b.T
        if float(s) != scale:
            block = _rescale(b.T, float(s) / scale)
            # A rounded product can't be undone by division alone: keep the few bits that it lost.
            entries[path]["bits"] = _lost_bits(b.T, _undo(block, float(s), scale))
        B[rows, start : start + rank] = block
        start += rank
    return A, B, scale, entries


def _take_apart(
    paths: list[str],
    A: np.ndarray,
    B: np.ndarray,
    scale: float,
    own: dict[str, dict[str, Any]],
    file: pathlib.Path,
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Undo `_join` with the metadata that it left."""
    try:
        entries = {path: own[path] for path in paths if path in own}
        common = max((float(entry["scale"]) for entry in entries.values()), key=abs)
        if sum(int(entry["rank"]) for entry in entries.values()) != A.shape[0]:
            raise ValueError(f"ranks of {sorted(entries)} do not add up to {A.shape[0]}")
        if not math.isclose(common, scale, rel_tol=1e-9):
            raise ValueError(f"scale {common} of {sorted(entries)}, but {CONFIG} says {scale}")
        d_out = B.shape[0] // len(paths)
        parts = {}
        start = 0
        for path, entry in entries.items():
            rank, s = int(entry["rank"]), float(entry["scale"])
            row = paths.index(path) * d_out
            block = B[row : row + d_out, start : start + rank]
            if "bits" in entry:
                block = _restore_bits(_undo(block, s, common), entry["bits"])
            parts[path] = (A[start : start + rank].T, block.T, s)
            start += rank
        return parts
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{file}: its metadata 'lorax' does not fit: {error}") from error


def _serialise(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes are a function of its content.

    The library writes the metadata in a random order; here the header's keys are sorted. (The
    format: 8 bytes of header length, the header as JSON padded with spaces, the data.)
    """
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _rescale(block: np.ndarray, ratio: float) -> np.ndarray:
    return (block.astype(np.float64) * ratio).astype(np.float32)


def _undo(block: np.ndarray, s: float, common: float) -> np.ndarray:
    return _rescale(block, common / s) if s else np.zeros_like(block)


def _lost_bits(exact: np.ndarray, guess: np.ndarray) -> str:
    """What turns `guess` into `exact`, as text: the xor of two float32 arrays, compressed."""
    bits = np.ascontiguousarray(exact).view(np.uint32) ^ np.ascontiguousarray(guess).view(np.uint32)
    return base64.b64encode(zlib.compress(bits.astype("<u4").tobytes())).decode()


def _restore_bits(guess: np.ndarray, text: str) -> np.ndarray:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").reshape(guess.shape)
    return (np.ascontiguousarray(guess).view(np.uint32) ^ bits.astype(np.uint32)).view(np.float32)


# ------------------------------------------------------------------------------------------ names


def _split(name: str) -> tuple[str, str]:
    """A path or module name's template and layer number: h/3/attn/q -> h/{}/attn/q, 3."""
    numbers = _NUMBER.findall(name)
    return _NUMBER.sub("{}", name), numbers[0] if numbers else ""


def _order(module: str, family: str) -> tuple[int, int]:
    template, number = _split(module)
    return int(number or -1), list(MODULES[family]).index(template)


def _family(modules: dict[str, Any], file: pathlib.Path) -> str:
    templates = {_split(module)[0] for module in modules}
    for family, known in MODULES.items():
        if templates <= set(known):
            return family
    families = {family: sorted(known) for family, known in MODULES.items()}
    unknown = sorted(m for m in modules if not any(_split(m)[0] in k for k in MODULES.values()))
    raise ValueError(f"{file}: modules {unknown[:4]} are of no known family; known are {families}")


# ---------------------------------------------------------------------------------------- reading


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; a PEFT adapter is {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: need an object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {config.get('peft_type')!r}; only LORA can be read")
    for field in _REFUSED:
        if config.get(field):
            raise ValueError(
                f"{file}: {field} {config[field]!r} can't be read; only plain LoRA can"
            )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{file}: init_lora_weights {init!r}: the factors belong to a changed base; save them "
            "with PEFT's path_initial_model_for_weight_conversion as plain LoRA first"
        )
    unknown = sorted(set(config) - _KNOWN)
    if unknown:
        warnings.warn(f"{file}: fields without a meaning here are ignored: {unknown}", stacklevel=3)
    return config


def _read_tensors(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; a PEFT adapter is {CONFIG} and {WEIGHTS}")
    try:
        with safetensors.safe_open(file, framework="np") as stored:
            tensors = {key: _float32(stored.get_tensor(key)) for key in stored.keys()}
            return tensors, stored.metadata() or {}
    except (safetensors.SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error


def _scale(config: dict[str, Any], module: str, rank: int, file: pathlib.Path) -> float:
    """PEFT's own rule: alpha / r, or alpha / sqrt(r), after the first pattern that matches."""
    try:
        r = int(_pattern(config.get("rank_pattern"), module, config.get("r", 8)))
        alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(f"{file}: r, lora_alpha or a pattern can't be read: {error}") from error
    if r != rank:
        raise ValueError(f"{file}: {module} has rank {r} here and {rank} in {WEIGHTS}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check(path: str, factor: Factors) -> None:
    a, b, s = factor
    if np.ndim(a) != 2 or np.ndim(b) != 2 or np.shape(a)[1] != np.shape(b)[0]:
        shapes = f"{np.shape(a)} and {np.shape(b)}"
        raise ValueError(f"{path}: need a (in, r) and b (r, out), got {shapes}")
    if np.shape(a)[1] == 0:
        raise ValueError(f"{path}: rank 0; leave out a matrix that is not adapted")
    if not math.isfinite(s):
        raise ValueError(f"{path}: scale {s}; it must be finite")


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array, dtype=np.float32)


def _number(x: float) -> int | float:
    return int(x) if float(x).is_integer() else float(x)
