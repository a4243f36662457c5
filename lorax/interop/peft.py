"""LoRA and DoRA adapters in Hugging Face PEFT's on-disk format.

A directory holds `adapter_model.safetensors` and `adapter_config.json`. PEFT stores, for a module
with y = W x, `lora_A.weight` (r, in) and `lora_B.weight` (out, r) and scales by lora_alpha / r;
ours are y = x @ w + s * (x @ a) @ b, so A = a^T, B = b^T and lora_alpha = s * r. Neither is ever
stored transposed, whatever `fan_in_fan_out` says about the base's own weight.

A fused module (GPT-2's c_attn holds q, k and v side by side) is joined exactly: the rows of A are
those of its parts one after the other (once where parts share them) and B is block-diagonal. PEFT
reads that as one module; the file's own metadata says how to take it apart again.

A head that is tied to the embedding shares its update here. PEFT adapts modules, not weights, so
such an update is written for both, and read as one where both say the same.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors.numpy

from lorax.files import parse_json, write_bytes
from lorax.interop.peft_config import (
    CONFIG,
    NUMBER,
    WEIGHTS,
    check_targets,
    missing,
    read_config,
)
from lorax.interop.places import (
    HEAD,
    Places,
    as_index,
    columns_as_json,
    fused_width,
    natural,
    place_as_json,
)
from lorax.interop.tensors import read_safetensors

if TYPE_CHECKING:
    from lorax.interop.hf import Source  # it imports JAX, which reading an adapter can do without

#: First words of the modules that PEFT itself adds to `modules_to_save`, as a whole, by task type.
_HEADS = ("classifier", "score", "qa_outputs")
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_TYING = "ensure_weight_tying"

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\."
    r"(lora_(embedding_)?(?P<side>[AB])(\.weight)?|(?P<m>lora_magnitude_vector)(\.weight)?)"
)
WHOLE = re.compile(r"(?!.*lora_)(.+)\.(weight|bias)")
# A tensor of an adapter in a module: in a running model an adapter's name stands behind the word.
_OWN = re.compile(
    r"(?P<start>(.+\.)?(lora_(embedding_)?[ABE]|lora_magnitude_vector|hada_\w+|lokr_\w+"
    r"|vera_lambda_[bd]|vera_[AB]|ia3_l|ln_tuning_layers))"
    r"(\.(?P<name>[^.]+))??(?P<end>(\.(weight|bias))?)"
)
# A module trained whole: the one that was trained, and the base's own, which nothing computes with.
_COPY = re.compile(r"(?P<module>.+)\.(?P<which>modules_to_save|original_module)\.(?P<rest>.+)")


class Factors(NamedTuple):
    """The update of one matrix, dW = s * a @ b: a (in, r) and b (r, out), float32; s a float.

    m: (out,) float32, the lengths that DoRA gives the columns of w + dW, or None.
    """

    a: np.ndarray
    b: np.ndarray
    s: float
    m: np.ndarray | None = None


class Adapter(NamedTuple):
    """What an adapter file holds.

    factors: {path of a layer without "/kernel": Factors}, e.g. "h/0/attn/q".
    weights: {path of a parameter with its layer: float32 array as we orient it}, of what was
        trained in full: "h/0/attn/q/bias", "head/dense/kernel".
    config: what the file says beside: base_model_name_or_path, task_type, ... Its
        "ensure_weight_tying" says whether an update of the embedding is one of a tied head as well;
        without that field it is.
    """

    factors: dict[str, Factors]
    weights: dict[str, np.ndarray]
    config: dict[str, Any]


def save(
    directory: str | os.PathLike,
    adapter: Adapter | Mapping[str, Factors],
    sources: Mapping[str, Source],
    base_name: str,
    dropout: float = 0.0,
    task_type: str | None = "CAUSAL_LM",
) -> pathlib.Path:
    """Write an adapter that PEFT loads as it is, and `load` reads back.

    It comes back bit for bit where the parts of each fused module have one scale; otherwise the
    ratio of the scales went into B and out again, at the rounding of float32.

    Args:
      adapter: an `Adapter` or its factors alone. Its config is not written.
      sources: where the base's parameters lie in Hugging Face's tensors (`hf_tensors` of a family).
      base_name: what PEFT should load as the base model (a Hub id or a directory).
      dropout: on the adapter's input in training; recorded, without effect on the weights.
      task_type: PEFT's word for the kind of model: "CAUSAL_LM", "SEQ_CLS"... or None.

    Returns the directory. Raises ValueError that names the path for one that the base does not
    have, shapes that do not fit together, a rank of 0, a scale that is not finite, or something
    that PEFT has no way to store.
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter(dict(adapter), {}, {})
    if not adapter.factors:
        raise ValueError("factors: nothing to save, no matrix is adapted")
    places = Places(sources)
    factors, weights = adapter.factors, adapter.weights
    tied = places.tied
    if tied and adapter.config.get(_TYING, True):
        if tied in factors and "head/bias" in sources:
            raise ValueError(
                f"{tied}: an update of an embedding that a masked language model's head shares "
                "can't be stored: PEFT would adapt the embedding alone"
            )
        tied = tied if task_type == "CAUSAL_LM" else ""
        factors, weights = with_head(factors, weights, tied)
    modules: dict[str, dict[str, Factors]] = {}
    for path, factor in factors.items():
        _check(path, factor)
        modules.setdefault(places.module(path), {})[path] = factor
    plain = sorted(path for path, factor in factors.items() if factor.m is None)
    dora = len(plain) < len(factors)
    if dora and plain:
        raise ValueError(
            f"{plain[0]}: no magnitudes, but others have: PEFT has DoRA in all or none"
        )
    joined = {module: _join(module, places, parts) for module, parts in sorted(modules.items())}
    whole = stored_weights(weights, places)
    saved, bias = how_saved(whole, set(modules), places, task_type)

    tensors: dict[str, np.ndarray] = {}
    for module, one in joined.items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in one.tensors.items()}
    for name, tensor in whole.items():
        module, _, last = name.rpartition(".")
        tensors[f"{module}.base_layer.{last}" if module in modules else name] = tensor
    own = {
        "factors": {path: entry for one in joined.values() for path, entry in one.parts.items()},
        "weights": {path: place_as_json(places.of(path)) for path in weights},
        "tied": tied,
    }
    # The commonest rank and alpha are the defaults; whatever differs goes into the patterns.
    ranks = {module: one.rank for module, one in joined.items()}
    alphas = {module: one.alpha for module, one in joined.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "revision": None,
        "r": r,
        "lora_alpha": as_number(alpha),
        "rank_pattern": {m: rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {m: as_number(x) for m, x in alphas.items() if x != alpha},
        "lora_dropout": float(dropout),
        "target_modules": sorted(modules),
        "fan_in_fan_out": any(one.conv1d for one in joined.values()),
        "bias": bias,
        "modules_to_save": saved or None,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": dora,
    }
    tensors = {PREFIX + key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    directory = pathlib.Path(directory)
    data = serialise(tensors, {"format": "pt", "lorax": json.dumps(own)})
    write_bytes(directory / WEIGHTS, data)
    write_bytes(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return directory


def load(directory: str | os.PathLike, sources: Mapping[str, Source] | None = None) -> Adapter:
    """Read a PEFT adapter: LoRA or DoRA, with whatever weights were trained in full beside it.

    `rank_pattern`, `alpha_pattern` and `use_rslora` are honoured. The parts of a fused module each
    get the shared `a` and their own columns of `b`, so they have one row space in common.

    Args:
      sources: where the base's parameters lie in Hugging Face's tensors (`hf_tensors` of a family).
        Without them an adapter that `save` wrote still comes by its own paths; a foreign one by its
        modules' and tensors' own names, unsplit, full weights as they are stored.

    Names of tensors may be a running model's, with one adapter's name in them (`own_names`).

    Raises FileNotFoundError, or ValueError that names the file for a damaged file, another kind of
    adapter (AdaLoRA...), factors that belong to a changed base (PiSSA, OLoRA...), fields and
    tensors that contradict each other or have no meaning here, and a module that `sources` do not
    have. Warns about config fields that PEFT does not have.
    """
    directory = pathlib.Path(directory)
    file = directory / WEIGHTS
    config = read_config(directory / CONFIG)
    if config["peft_type"] != "LORA":
        given = f"{directory / CONFIG}: peft_type {config['peft_type']!r} given"
        raise ValueError(f"{given}; LORA is read here, others by lorax.peft_methods")
    stored, metadata = read_tensors(file)
    modules, whole = _sort(stored, file)
    check_targets(config, modules, directory / CONFIG)
    updates = {
        module: _update(module, sides, config, directory)
        for module, sides in sorted(modules.items(), key=lambda item: natural(item[0]))
    }
    places = Places(sources or {})
    check_saved(config, whole, places, file)
    tied = places.tied
    if "lorax" in metadata:
        factors, weights, own_tied = _take_apart(updates, whole, metadata["lorax"], places, file)
        tied = own_tied if tied or sources is None else ""
    elif sources is None:
        return Adapter(updates, whole, config)
    else:
        factors, weights = {}, {}
        for module, update in updates.items():
            factors |= _split(module, update, places, file)
        for name, tensor in whole.items():
            weights |= oriented(name, tensor, places, file)
    adapter = Adapter(factors, weights, config)
    return without_head(adapter, tied) if tied else adapter


# -------------------------------------------------------------------------------------- tied heads


def with_head(factors, weights, embedding: str):
    """(factors, weights) of an embedding and of the head that shares its weight."""
    factors, weights = dict(factors), dict(weights)
    if embedding in factors and HEAD not in factors:
        a, b, s, m = factors[embedding]
        if m is not None:
            raise ValueError(
                f"{embedding}: DoRA of an embedding that is the head as well can't be stored: PEFT "
                "would give lengths to the head's columns, not to the embedding's"
            )
        factors[HEAD] = Factors(b.T, a.T, s)
    if f"{embedding}/embedding" in weights and f"{HEAD}/kernel" not in weights:
        weights[f"{HEAD}/kernel"] = weights[f"{embedding}/embedding"].T
    return factors, weights


def without_head(adapter: Adapter, embedding: str) -> Adapter:
    """Inverse of `with_head` where the head has the embedding's update and weight; where it has
    its own or none, the config says that they are not tied."""
    factors, weights = dict(adapter.factors), dict(adapter.weights)
    tied = bool(adapter.config.get(_TYING))
    same = lambda x, y: x is y if x is None or y is None else np.array_equal(x, y)
    head, own = factors.get(HEAD), factors.get(embedding)
    w_head, w_own = weights.get(f"{HEAD}/kernel"), weights.get(f"{embedding}/embedding")
    if head is not None or w_head is not None:
        tied = same(w_head, None if w_own is None else w_own.T) and (head is None) == (own is None)
        if tied and head is not None:
            plain = head.m is None and own.m is None and math.isclose(head.s, own.s)
            tied = plain and same(head.a, own.b.T) and same(head.b, own.a.T)
    if tied:
        factors.pop(HEAD, None)
        weights.pop(f"{HEAD}/kernel", None)
    return Adapter(factors, weights, adapter.config | {_TYING: tied})


# ---------------------------------------------------------------------------------------- writing


class _Joined(NamedTuple):
    """A module as it is stored. tensors: {name below the module: value}. rank, alpha: its own.
    conv1d: whether its weight is (in, out). parts: {our layer: how to take it out again}."""

    tensors: dict[str, np.ndarray]
    rank: int
    alpha: float
    conv1d: bool
    parts: dict[str, dict[str, Any]]


def _join(module: str, places: Places, parts: dict[str, Factors]) -> _Joined:
    """One module of PEFT's from the layers in it."""
    found = places.at(f"{module}.weight")
    embedding = next(iter(found)).endswith("/embedding")
    layers = {path.rsplit("/", 1)[0]: source for path, source in found.items()}
    if any(source.axes not in (None, (1, 0)) for source in layers.values()):
        raise ValueError(f"{', '.join(parts)}: {module} is a convolution, which can't be stored")
    n_in, n_out = next(iter(parts.values())).a.shape[0], fused_width(found)
    # The largest scale is kept and the others' ratios to it, at most 1, go into B.
    scale = max((float(parts[layer].s) for layer in layers if layer in parts), key=abs)
    A: list[np.ndarray] = []
    blocks: list[tuple[slice | np.ndarray, slice, np.ndarray]] = []  # rows and columns of B, values
    entries: dict[str, dict[str, Any]] = {}
    rank = 0
    for layer in (layer for layer in layers if layer in parts):
        a, b, s, _ = parts[layer]
        part = layers[layer].part
        own = b.shape[1] if part is None else np.empty(n_out)[part].size
        if a.shape[0] != n_in or b.shape[1] != own:
            want = f"a ({n_in}, r) and b (r, {own})"
            raise ValueError(f"{layer}: need {want} in {module}, got {a.shape} and {b.shape}")
        same = next((other for other in entries if np.array_equal(parts[other].a, a)), None)
        rows = entries[same]["rows"] if same else f"{rank}:{rank + a.shape[1]}"
        if not same:
            A.append(_float32(a).T)
            rank += a.shape[1]
        entries[layer] = {"module": module, "rows": rows, "scale": float(s)}
        entries[layer]["columns"] = columns_as_json(part)
        blocks.append((as_index(part), as_index(rows), _rescale(b, float(s), scale).T))
    B = np.zeros((n_out or blocks[0][2].shape[0], rank), np.float32)
    for rows, columns, values in blocks:
        B[rows, columns] = values
    if embedding:
        tensors = {"lora_embedding_A": np.concatenate(A), "lora_embedding_B": B}
    else:
        tensors = {"lora_A.weight": np.concatenate(A), "lora_B.weight": B}
    if next(iter(parts.values())).m is not None:
        tensors["lora_magnitude_vector"] = _magnitudes(module, layers, parts)
    conv1d = not embedding and all(source.axes is None for source in layers.values())
    return _Joined(tensors, rank, scale * rank, conv1d, entries)


def _magnitudes(module: str, layers: dict[str, Source], parts: dict[str, Factors]) -> np.ndarray:
    """DoRA's lengths of all columns of a module."""
    missing = [layer for layer in layers if layer not in parts]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not adapted, but a part of {module}: the lengths that DoRA "
            "would store for its columns are those of the base's weight. Adapt all parts"
        )
    m = np.zeros(sum(parts[layer].m.size for layer in layers), np.float32)
    for layer, source in layers.items():
        m[as_index(source.part)] = parts[layer].m
    return m


def stored_weights(weights: Mapping[str, np.ndarray], places: Places) -> dict[str, np.ndarray]:
    """{Hugging Face's tensor: value} of parameters trained in full, fused ones joined."""
    tensors: dict[str, np.ndarray] = {}
    for path in weights:
        source = places.of(path)
        if source is None:
            raise ValueError(f"{path}: the base has no such parameter")
        if source.name in tensors:
            continue
        found = places.at(source.name)
        missing = [other for other in found if other not in weights]
        if missing:
            raise ValueError(f"{path}: PEFT can only store it with {', '.join(missing)}")
        whole = _float32(weights[path])
        if source.part is not None:
            whole = np.zeros((*whole.shape[:-1], fused_width(found)), np.float32)
            for part, own in found.items():
                whole[..., own.part] = weights[part]
        tensors[source.name] = whole.transpose(np.argsort(source.axes or range(whole.ndim)))
    return tensors


def how_saved(whole: Mapping[str, np.ndarray], targets: set[str], places: Places, task_type):
    """(modules_to_save, bias) of PEFT's config for tensors trained in full."""
    heads = lambda module: module.split(".")[0] in _HEADS
    saved, biases = [], []
    for module, _, last in (name.rpartition(".") for name in whole):
        if module in targets:
            biases += [module] * (last == "bias")
        elif last == "bias" and f"{module}.weight" not in whole and not heads(module):
            biases.append(module)
        else:
            saved.append(module.split(".")[0] if heads(module) else module)
    saved = sorted(set(saved))
    for module in saved:
        missing = sorted(set(places.below(module)) - set(whole))
        if missing:
            raise ValueError(f"{module}: PEFT stores the whole module; missing is {missing}")
    if task_type in _HEAD_TASKS and not any(heads(module) for module in saved):
        raise ValueError(
            f"task_type {task_type}: PEFT reads the head ({' or '.join(_HEADS)}) from the adapter, "
            "and its weights are not among those to save"
        )
    bias = "none" if not biases else "lora_only" if set(biases) <= targets else "all"
    return saved, bias


def serialise(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes are a function of its content.

    The library writes the metadata in a random order; here the header's keys are sorted. (The
    format: 8 bytes of header length, the header as JSON padded with spaces, the data.)
    """
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _rescale(block: np.ndarray, s: float, common: float) -> np.ndarray:
    """float32 block * s / common, the block itself where the two are equal, 0 where one is 0."""
    if s == common:
        return _float32(block)
    with np.errstate(over="ignore", invalid="ignore"):  # of a scale that does not fit the file's
        return (np.asarray(block, np.float64) * (s / common if common else 0)).astype(np.float32)


# ---------------------------------------------------------------------------------------- reading


def read_tensors(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: float32 array}, the file's metadata) of a safetensors file. Raises FileNotFoundError,
    or ValueError for a file that is none and a tensor of something else than finite floats."""
    if not file.exists():
        raise missing(file)
    return read_safetensors(file)


def own_names(stored: Mapping[str, np.ndarray], file: pathlib.Path) -> dict[str, np.ndarray]:
    """{name as `save_pretrained` writes it, without "base_model.model.": tensor}.

    Written by hand, a running model's names have the adapter's in them ("lora_A.default.weight")
    and a module trained whole twice, "modules_to_save" and "original_module". Of the two the first
    is the module; the second is the base's own and left out.

    Raises ValueError that names the file for several adapters in it, a name that stands there twice
    with unlike values, and a base's own module without the trained one.
    """
    matches = {key: _OWN.fullmatch(key.removeprefix(PREFIX)) for key in stored}
    adapters = {match["name"] for match in matches.values() if match}
    if len(adapters) > 1:
        named = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise ValueError(
            f"{file}: several adapters, {named}; one can be read: save it by itself with PEFT's "
            "save_pretrained(folder, selected_adapters=[name])"
        )
    found: dict[str, np.ndarray] = {}
    originals = {}
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        if match := matches[key]:
            name = match["start"] + match["end"]
        elif match := _COPY.fullmatch(name):
            first, _, rest = match["rest"].partition(".")
            rest = rest if rest and first in adapters | {"default"} else match["rest"]
            name = f"{match['module']}.{rest}"
            if match["which"] == "original_module":
                originals[f"{match['module']}.{match['rest']}"] = key
                continue
        name = re.sub(r"\.base_layer\.(\w+)$", r".\1", name)
        if name in found and not np.array_equal(found[name], tensor):
            raise ValueError(f"{file}: {name} stands there twice, with unlike values; {key} is one")
        found[name] = tensor
    for name, key in originals.items():
        if name not in found:
            raise ValueError(f"{file}: {key}: the base's own module, the trained one is missing")
    return found


def _sort(stored: Mapping[str, np.ndarray], file: pathlib.Path):
    """({module: {"A", "B", "m"}}, {tensor trained in full: value}) by Hugging Face's names."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, tensor in own_names(stored, file).items():
        if match := _FACTOR.fullmatch(name):
            modules.setdefault(match["module"], {})[match["side"] or "m"] = tensor
        elif WHOLE.fullmatch(name):
            whole[name] = tensor
        else:
            raise ValueError(f"{file}: {name}: no factor of LoRA, and no module's weight or bias")
    if not modules:
        raise ValueError(f"{file}: holds no lora_A and lora_B tensors")
    return modules, whole


def check_saved(config, names: Iterable[str], places: Places, file: pathlib.Path) -> None:
    """Raises ValueError for a parameter of the base that belongs to one of the config's
    `modules_to_save`, modules that PEFT stores whole, and is not among a file's `names`."""
    template = lambda name: re.sub(r"(^|\.)\d+(?=\.)", r"\1{}", name)
    stored = {template(name) for name in names}
    stored |= {places.bare[name] for name in stored & places.bare.keys()}
    tied = {f"{HEAD}.weight", getattr(places.sources.get(f"{places.tied}/embedding"), "name", "")}
    if config.get(_TYING) and stored & tied:
        stored |= tied
    for module in config.get("modules_to_save") or ():
        inside = re.compile(rf".*{re.escape(template(module))}\..+")  # in PEFT the end of a name
        for name in places.tensors:
            if inside.fullmatch(name) and name not in stored:
                given = f"{CONFIG} says that {module} was trained whole (modules_to_save)"
                raise ValueError(f"{file}: {given}, and {name} is missing")


def _update(module: str, sides: dict, config: dict, directory: pathlib.Path) -> Factors:
    """The factors of one module of Hugging Face, oriented as ours."""
    A, B, m = (sides.get(side) for side in ("A", "B", "m"))
    fits = A is not None and B is not None and A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
    if not fits or A.size == 0 or B.size == 0:
        shapes = {side: tensor.shape for side, tensor in sides.items()}
        raise ValueError(
            f"{directory / WEIGHTS}: {module}: need A (r, in) and B (out, r), got {shapes}"
        )
    if bool(config.get("use_dora")) != (m is not None) or m is not None and m.size != len(B):
        given = "no magnitudes" if m is None else f"magnitudes {m.shape}"
        raise ValueError(
            f"{directory / WEIGHTS}: {module}: {given} for {len(B)} outputs, but {CONFIG} says "
            f"use_dora={bool(config.get('use_dora'))}"
        )
    scale = scale_of(config, module, A.shape[0], directory / CONFIG)
    a, b = np.ascontiguousarray(A.T), np.ascontiguousarray(B.T)
    return Factors(a, b, scale, None if m is None else m.reshape(-1))


def scale_of(config: dict[str, Any], module: str, rank: int, file: pathlib.Path) -> float:
    """PEFT's own rule: alpha / r, or alpha / sqrt(r), after the first pattern that matches."""
    r = pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if r != rank:
        raise ValueError(
            f"{file}: r or rank_pattern: {module} has rank {r} here and {rank} in {WEIGHTS}"
        )
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first of PEFT's patterns, regexes of a name's end, that a module matches."""
    for end, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({end})$", module):
            return value
    return default


def _take_apart(updates, whole, text: str, places: Places, file: pathlib.Path):
    """(factors, weights, path of the tied embedding or "") by the metadata that `save` left, which
    is checked as all that a file says: it leaves out nothing and agrees with the base."""
    where = f"{file}: its metadata 'lorax' does not fit"
    try:
        own = parse_json(text, "line")
        factors = _own_factors(own["factors"], updates, places)
        weights = _own_weights(own["weights"], whole, places)
        if not isinstance(own["tied"], str) or places.tied and own["tied"] not in ("", places.tied):
            raise ValueError(f"tied is {str(own['tied'])[:60]}")
        return factors, weights, own["tied"]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _own_factors(own: dict, updates: Mapping[str, Factors], places: Places) -> dict[str, Factors]:
    """{layer: its factors} from the modules' by the metadata's entries."""
    scales: dict[str, list[float]] = {}
    for entry in own.values():
        scales.setdefault(entry["module"], []).append(_number(entry["scale"]))
    factors: dict[str, Factors] = {}
    # What of b is taken, and in a last row which of its columns.
    taken = {name: np.zeros((len(x.b) + 1, x.b.shape[1]), bool) for name, x in updates.items()}
    for path, entry in own.items():
        module, s = entry["module"], _number(entry["scale"])
        a, b, scale, m = updates[module]
        common = max(scales[module], key=abs)
        if not math.isclose(common, scale, rel_tol=1e-9):
            raise ValueError(f"scale {common} of {path}, but {CONFIG} says {scale}")
        last = "kernel" if places.of(f"{path}/kernel") else "embedding"
        _agree(f"{path}/{last}", f"{module}.weight", entry["columns"], b.shape[1], places)
        columns, rows = _index(entry["columns"], b.shape[1]), _index(entry["rows"], len(b))
        taken[module][rows, columns] = taken[module][-1, columns] = True
        part = np.ascontiguousarray(b[rows, columns])
        own_b, own_m = _rescale(part, common, s), None if m is None else m[columns]
        if not np.isfinite(own_b).all() or part.any() and not own_b.any():
            raise ValueError(f"scale {s} of {path} beside {common}")
        factors[path] = Factors(np.ascontiguousarray(a[:, rows]), own_b, s, own_m)
    for module, (_, b, _, m) in updates.items():
        *part, columns = taken[module]
        part = np.array(part)
        if b[~part].any() or not part.any(axis=1).all() or m is not None and not columns.all():
            raise ValueError(f"it leaves out a part of {module}")
    return factors


def _own_weights(own: dict, whole: Mapping[str, np.ndarray], places: Places):
    """{path: value} of what was trained in full, by the metadata's entries."""
    weights, taken = {}, {name: np.zeros(tensor.shape, bool) for name, tensor in whole.items()}
    for path, entry in own.items():
        name, axes = entry["tensor"], entry["axes"]
        tensor, source = whole[name], places.of(path)
        if axes is not None and sorted(axes) != [*range(tensor.ndim)]:
            raise ValueError(f"axes {axes} of {path}")
        width = tensor.shape[-1 if axes is None else axes[-1]]
        _agree(path, name, entry["columns"], width, places)
        if source is not None and (source.axes and [*source.axes]) != axes:
            raise ValueError(f"axes {axes} of {path}, in the base they are {source.axes}")
        columns = _index(entry["columns"], width)
        taken[name].transpose(axes or range(tensor.ndim))[..., columns] = True
        weights[path] = _ours(tensor, axes, columns)
    for name, part in taken.items():
        if not part.all():
            raise ValueError(f"it leaves out a part of {name}")
    return weights


def _number(x: Any) -> float:
    """A scale of the metadata. Raises ValueError for what is no number of float32."""
    if not NUMBER.fits(x):
        raise ValueError(f"scale {x!r}; it should be {NUMBER.words}")
    return float(x)


def _index(part: Any, size: int) -> slice | np.ndarray:
    """`as_index` of what the metadata says of an axis. Raises ValueError for what is no part."""
    if isinstance(part, str) and re.fullmatch(r"\d{1,9}:\d{1,9}", part):
        index = as_index(part)
        if index.start <= index.stop <= size:
            return index
    elif part is None:
        return slice(None)
    elif isinstance(part, list) and all(type(i) is int and 0 <= i < size for i in part):
        if part and len(set(part)) == len(part):
            return as_index(part)
    raise ValueError(f"{str(part)[:60]} is no part of {size}")


def _agree(path: str, name: str, columns: Any, width: int, places: Places) -> None:
    """Raises ValueError where a base is known in which the parameter `path` does not lie in the
    tensor `name`, or in other columns of it. A base of another width is left to the check of
    shapes that all adapters get."""
    if not places.sources:
        return
    source = places.of(path)
    if source is None:
        raise ValueError(f"{path}: the base has no such parameter")
    have = columns_as_json(source.part)
    same = fused_width(places.at(source.name)) not in (0, width) or have == columns
    if source.name != name or not same:
        said = f"{name}, columns {columns}"
        raise ValueError(f"{path} is {source.name}, columns {have} in the base, not {said}")


def _split(module: str, update: Factors, places: Places, file: pathlib.Path) -> dict[str, Factors]:
    """The factors of a module's parts, by our paths."""
    found = places.at(f"{module}.weight")
    if not found:
        known = ", ".join(sorted(name.removesuffix(".weight") for name in places.tensors))
        raise ValueError(f"{file}: {module}: the base has no such module; it has {known}")
    a, b, s, m = update
    width = fused_width(found)
    if width not in (0, b.shape[1]):
        raise ValueError(f"{file}: {module}: {b.shape[1]} outputs, the base's has {width}")
    parts = {}
    for path, source in found.items():
        columns = as_index(source.part)
        own = None if m is None else m[columns]
        parts[path.rsplit("/", 1)[0]] = Factors(a, np.ascontiguousarray(b[:, columns]), s, own)
    return parts


def oriented(name: str, tensor: np.ndarray, places: Places, file: pathlib.Path):
    """{path: value} of the parameters in a tensor that was trained in full."""
    found = places.at(name)
    if not found:
        raise ValueError(
            f"{file}: {name} was trained in full, and the base has no such parameter"
            + (": load it with its head" if name.split(".")[0] in _HEADS else "")
        )
    return {
        path: _ours(tensor, source.axes, as_index(source.part)) for path, source in found.items()
    }


def _ours(tensor: np.ndarray, axes, columns: slice | np.ndarray) -> np.ndarray:
    axes = range(tensor.ndim) if axes is None else axes
    return np.ascontiguousarray(tensor.transpose(tuple(axes))[..., columns])


def _check(path: str, factor: Factors) -> None:
    a, b, s, m = factor
    if np.ndim(a) != 2 or np.ndim(b) != 2 or np.shape(a)[1] != np.shape(b)[0]:
        shapes = f"{np.shape(a)} and {np.shape(b)}"
        raise ValueError(f"{path}: need a (in, r) and b (r, out), got {shapes}")
    if np.shape(a)[1] == 0 and m is None:
        raise ValueError(f"{path}: rank 0; leave out a matrix that is not adapted")
    if not math.isfinite(s):
        raise ValueError(f"{path}: scale {s}; it must be finite")
    if m is not None and np.shape(m) != (np.shape(b)[1],):
        raise ValueError(f"{path}: need magnitudes m ({np.shape(b)[1]},), got {np.shape(m)}")


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array, dtype=np.float32)


def as_number(x: float) -> int | float:
    """A number as PEFT's JSON has it: 16, not 16.0."""
    return int(x) if float(x).is_integer() else float(x)
