"""PEFT's methods with arrays per module, as numpy arrays on both sides: AdaLoRA, LoHa, LoKr, VeRA
and (IA)3 here, others in files of their own; all are in `KINDS`.

PEFT adapts modules. If a module is several matrices here (GPT-2's c_attn is q, k and v)

    AdaLoRA, LoHa   the parts' inner ranks are concatenated, each with its own outputs
    (IA)3           the parts' vectors are concatenated, with ones for parts that are not adapted
    VeRA            every part has a copy of the shared pair in which the other parts' outputs are
                    zero, so the rank is multiplied by the number of copies
    LoKr            can't be stored, because the module has only one Kronecker product

which is exact. When it is read back, a part keeps the inner ranks that are nonzero in it; a part
without any is not adapted.

Every method has two functions,

    write(modules, shared, hp) -> (tensors, config)
    read(modules, shared, config, where) -> (hp, layers, shared)

modules: [(`Place`, x)], where x is {layer: its arrays} with the names of `lorax.methods` to write,
{name below the module: tensor} to read. shared: arrays of no single layer, VeRA's pair {"a", "b"}.
tensors: {PEFT's name: float32}. config: the fields of the method. where: the directory, for error
messages. Both raise ValueError for what the other side can't represent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax.interop.peft import fourierft, gralora, hira, hra, miss, oft, randlora, shira
from lorax.interop.peft.config import (
    CONFIG,
    WEIGHTS,
    adalora_scale,
    as_number,
    as_patterns,
    from_patterns,
    scale_of,
)
from lorax.interop.peft.modules import (
    Arrays,
    Kind,
    Place,
    apart,
    fit,
    input_of,
    joined,
    largest,
    not_conv1d,
    widest,
)

# ---------------------------------------------------------------------------------------- AdaLoRA


def write_adalora(modules, shared, hp):
    """`lora_A` (r, in), `lora_E` (r, 1) and `lora_B` (out, r) of every module, with one rank for
    all.

    All triplets are written, including those that the budget has set to zero; PEFT drops pruned
    ones. Raises ValueError for an alpha of at most 0."""
    if hp["scale"] <= 0:
        raise ValueError(f"method.alpha: {hp['alpha']} given; PEFT takes the rank for one below 0")
    whole = {place.name: joined(place, parts, ("a", "e"), ("b",)) for place, parts in modules}
    rank = max(len(arrays["e"]) for arrays in whole.values())
    tensors = {}
    for name, arrays in whole.items():
        padding = rank - len(arrays["e"])  # PEFT has one rank for all
        tensors[f"{name}.lora_A"] = np.pad(arrays["a"], ((0, padding), (0, 0)))
        tensors[f"{name}.lora_E"] = np.pad(arrays["e"], (0, padding))[:, None]
        tensors[f"{name}.lora_B"] = np.pad(arrays["b"], ((0, 0), (0, padding)))
    alpha = hp["alpha"] if rank == hp["rank"] else hp["scale"] * (rank + 1e-5)
    config = {ADALORA[name]: hp[name] for name in ADALORA}
    # The schedule only matters in training, but PEFT requires one with a step to prune in.
    config |= {"init_r": rank, "target_r": hp["target_rank"], "rank_pattern": None}
    config |= {"lora_alpha": as_number(alpha), "total_step": hp["tinit"] + hp["tfinal"] + 1}
    return tensors, config | {"init_lora_weights": True}


#: Our hyperparameters -> PEFT's fields.
ADALORA = {"dropout": "lora_dropout", "tinit": "tinit", "tfinal": "tfinal", "every": "deltaT"}
ADALORA |= {"orthogonal": "orth_reg_weight", "beta1": "beta1", "beta2": "beta2"}


def read_adalora(modules, shared, config, where):
    """The triplets, also of modules that PEFT has pruned, whose rank is in `rank_pattern`.

    Raises ValueError for shapes that don't fit, a rank that the config contradicts, and if all
    updates are zero."""
    scale, init_r, alpha = adalora_scale(config)
    patterns = config.get("rank_pattern") or {}
    layers = {}
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        shapes = {"lora_A": ("r", place.inputs), "lora_B": (place.outputs, "r")}
        rank = fit(here, tensors, **shapes, lora_E=("r", 1))["r"]
        name = f"{place.name}.lora_E"
        ranks_kept = patterns.get(name, patterns.get(f"{name}.default"))
        said, field = (
            (init_r, "init_r") if ranks_kept is None else (sum(ranks_kept), "rank_pattern")
        )
        if rank != said:
            raise ValueError(f"{here}: rank {rank}, but {said} in {CONFIG}, {field}")
        arrays = {"a": tensors["lora_A"], "e": tensors["lora_E"][:, 0], "b": tensors["lora_B"]}
        layers |= apart(place, arrays, ("a", "e"), ("b",))
    for arrays in layers.values():
        arrays["real"] = np.ones(len(arrays["e"]), bool)
    rank = widest(layers, "e", where)
    hp = {"rank": rank, "alpha": alpha if rank == init_r else scale * (rank + 1e-5)}
    hp["target_rank"] = min(config.get("target_r", 8), rank)
    return hp | {n: config[field] for n, field in ADALORA.items() if field in config}, layers, {}


# ----------------------------------------------------------------------------------- LoHa and LoKr

#: Our names, each (in, r) or (r, out) -> PEFT's, transposed.
HADA = {"a1": "hada_w1_b", "a2": "hada_w2_b", "b1": "hada_w1_a", "b2": "hada_w2_a"}


def write_loha(modules, shared, hp):
    """`hada_w1_a` and `hada_w2_a` (out, r), `hada_w1_b` and `hada_w2_b` (r, in) of every module.

    Raises ValueError for GPT-2's Conv1D, and for parts of a module with different scales."""
    tensors, ranks, scales = {}, {}, {}
    for place, parts in modules:
        not_conv1d(place, "LoHa", instead="; store it as LoRA")
        arrays = joined(place, parts, ("a1", "a2"), ("b1", "b2"))
        tensors |= {f"{place.name}.{HADA[name]}": x for name, x in arrays.items()}
        ranks[place.name], scales[place.name] = len(arrays["a1"]), _scale(parts, hp)
    return tensors, _lycoris(ranks, scales) | {"rank_dropout": 0.0, "module_dropout": 0.0}


def read_loha(modules, shared, config, where):
    """The two pairs of factors, with each module's own rank and scale.

    Raises ValueError for shapes that don't fit, a rank that the config contradicts, and if all
    updates are zero."""
    layers = {}
    for place, tensors in modules:
        shapes = {
            theirs: ("r", place.inputs) if ours[0] == "a" else (place.outputs, "r")
            for ours, theirs in HADA.items()
        }
        rank = fit(f"{where / WEIGHTS}: {place.name}", tensors, **shapes)["r"]
        arrays = {ours: tensors[theirs] for ours, theirs in HADA.items()}
        parts = apart(place, arrays, ("a1", "a2"), ("b1", "b2"))
        for part in parts.values():
            part["s"] = _lycoris_scale(config, place.name, rank, where)
        layers |= parts
    rank = widest(layers, "a1", where)
    return _alpha_of(rank, layers), layers, {}


#: Our names -> PEFT's, transposed.
KRON = {"w": "lokr_w{}", "a": "lokr_w{}_b", "b": "lokr_w{}_a"}


def write_lokr(modules, shared, hp):
    """`lokr_w1` (out 1, in 1) of every module, or its factors `lokr_w1_a` (out 1, r) and
    `lokr_w1_b` (r, in 1); `lokr_w2` alike. The update is their Kronecker product.

    Raises ValueError for GPT-2's Conv1D and for parts of a fused module."""
    tensors, ranks, scales = {}, {}, {}
    for place, parts in modules:
        if place.conv1d or place.fused:
            kind = "of GPT-2's Conv1D" if place.conv1d else f"of parts of it, {', '.join(parts)}"
            raise ValueError(f"{place.name}: PEFT has no LoKr {kind}")
        (arrays,) = parts.values()
        for i in "12":
            whole = arrays.get(f"on{i}", 0) > 0
            for name in ("w",) if whole else ("a", "b"):
                x = arrays[f"{name}{i}"]  # padded, where a sweep has larger ranks
                x = x[:, : hp["rank"]] if name == "a" else x[: hp["rank"]] if name == "b" else x
                tensors[f"{place.name}.{KRON[name].format(i)}"] = x.T
        ranks[place.name], scales[place.name] = hp["rank"], _scale(parts, hp)
    config = {"decompose_both": hp["decompose_both"], "decompose_factor": hp["factor"]}
    config |= {"rank_dropout": 0.0, "module_dropout": 0.0, "rank_dropout_scale": False}
    return tensors, _lycoris(ranks, scales) | config


def read_lokr(modules, shared, config, where):
    """The two sides of the product, whole or in factors, with each module's own scale.

    Raises ValueError for a fused module, shapes that don't fit, sides that don't make the base's
    matrix, and modules with different ranks."""
    layers, ranks = {}, set()
    for place, tensors in modules:
        here = f"{where / WEIGHTS}: {place.name}"
        if place.fused:
            raise ValueError(f"{here}: one Kronecker product for {', '.join(place.columns)}")
        rank = from_patterns(config.get("rank_pattern"), place.name, config.get("r", 8))
        shapes: dict[str, tuple] = {}
        for i in "12":
            if f"lokr_w{i}" in tensors:
                shapes[f"lokr_w{i}"] = (f"out {i}", f"in {i}")
            else:
                shapes |= {f"lokr_w{i}_a": (f"out {i}", rank), f"lokr_w{i}_b": (rank, f"in {i}")}
        sizes = fit(here, tensors, **shapes)
        n_in, n_out = (sizes[f"{side} 1"] * sizes[f"{side} 2"] for side in ("in", "out"))
        if (n_in, n_out) != (place.inputs, place.outputs):
            want = f"{place.outputs} x {place.inputs}"
            raise ValueError(f"{here}: the factors make {n_out} x {n_in}, the base has {want}")
        arrays = {
            f"{ours}{i}": tensors[theirs.format(i)].T
            for i in "12"
            for ours, theirs in KRON.items()
            if theirs.format(i) in tensors
        }
        (layer,) = place.columns
        layers[layer] = arrays | {"s": _lycoris_scale(config, place.name, rank, where)}
        ranks.add(rank)
    if len(ranks) > 1:
        raise ValueError(f"{where / CONFIG}: rank_pattern: one rank can be read, not {ranks}")
    hp = {"factor": config.get("decompose_factor", -1)}
    hp["decompose_both"] = bool(config.get("decompose_both"))
    return hp | _alpha_of(ranks.pop(), layers), layers, {}


def _scale(parts: Mapping[str, Arrays], hp) -> float:
    """The scale of a module's layers; the exact hyperparameter if it is equal in float32."""
    scales = {float(arrays["s"]) for arrays in parts.values()}
    if len(scales) > 1:
        raise ValueError(f"{', '.join(parts)}: one module in PEFT, with one scale and not {scales}")
    (s,) = scales
    return hp["scale"] if np.float32(hp["scale"]) == np.float32(s) else s


def _lycoris(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a config for {module: rank} and {module: alpha / rank}: the commonest values,
    and patterns for modules that differ."""
    alphas = {module: scales[module] * rank for module, rank in ranks.items()}
    (r, rank_pattern), (alpha, alpha_pattern) = as_patterns(ranks), as_patterns(alphas)
    config = {"r": r, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern}
    return config | {"init_weights": True, "use_effective_conv2d": False}


def _lycoris_scale(config, module: str, rank: int, where) -> np.ndarray:
    fields = {"r": config.get("r", 8), "lora_alpha": config.get("alpha", 8)}
    fields |= {name: config.get(name) for name in ("rank_pattern", "alpha_pattern")}
    return np.float64(scale_of(fields, module, rank, where / CONFIG))


def _alpha_of(rank: int, layers: Mapping[str, Arrays]) -> dict[str, Any]:
    """The rank, and the alpha that gives the commonest scale at that rank."""
    s = Counter(float(arrays["s"]) for arrays in layers.values()).most_common(1)[0][0]
    return {"rank": rank, "alpha": as_number(s * rank)}


# ------------------------------------------------------------------------------------------- VeRA


def write_vera(modules, shared, hp):
    """`base_model.vera_A` (r, in) and `base_model.vera_B` (out, r), with the sizes of the widest
    module, and `vera_lambda_d` (r,) and `vera_lambda_b` (out,) of every module.

    r is our rank times the number of copies of the pair; d is zero in a module's other copies."""
    used = shared["a"].any(axis=0) | shared["b"].any(axis=1)  # the rest is padding
    a, b = shared["a"][:, used], shared["b"][used]
    copies: dict[bytes, np.ndarray] = {}  # the outputs that see a copy
    for place, parts in modules:
        for layer in parts:
            key, rows = _copy(place, layer)
            copies[key] = max(copies.get(key, rows), rows, key=len)
    spans = {key: slice(i * len(b), (i + 1) * len(b)) for i, key in enumerate(copies)}
    inputs, outputs = largest(modules)
    B = np.zeros((outputs, len(copies) * len(b)), np.float32)
    for key, rows in copies.items():
        B[rows, spans[key]] = b[:, : len(rows)].T
    tensors = {"base_model.vera_A": np.tile(a[:inputs].T, (len(copies), 1)), "base_model.vera_B": B}
    for place, parts in modules:
        d, v = np.zeros(B.shape[1], np.float32), np.zeros(place.outputs, np.float32)
        for layer, arrays in parts.items():
            d[spans[_copy(place, layer)[0]]] = arrays["d"][used]
            v[place.columns[layer]] = arrays["v"]
        tensors |= {f"{place.name}.vera_lambda_d": d, f"{place.name}.vera_lambda_b": v}
    config = {"r": B.shape[1], "projection_prng_key": hp["projection_seed"]}
    config |= {"save_projection": True, "vera_dropout": hp["dropout"], "init_weights": True}
    return tensors, config | {"d_initial": hp["d_initial"]}


def read_vera(modules, shared, config, where):
    """One pair for all layers, joined from the copies that are used, and each layer's d and v.

    Raises ValueError for a file without the pair (`save_projection=False`), a rank that the config
    contradicts, and shapes that don't fit."""
    file = where / WEIGHTS
    if set(shared) != {"vera_A", "vera_B"}:
        raise ValueError(
            f"{file}: vera_A and vera_B are missing, which torch's generator would draw again; "
            "save with save_projection=True"
        )
    inputs, outputs = largest(modules)
    r = fit(str(file), shared, vera_A=("r", inputs), vera_B=(outputs, "r"))["r"]
    if r != config.get("r", 256):
        raise ValueError(f"{where / CONFIG}: r: {config.get('r', 256)}, but {r} in vera_A")
    a, b = shared["vera_A"].T, shared["vera_B"].T
    copies: dict[bytes, tuple[np.ndarray, dict[str, Arrays]]] = {}  # outputs, and who sees them
    for place, tensors in modules:
        shapes = dict(vera_lambda_d=(r,), vera_lambda_b=(place.outputs,))
        fit(f"{file}: {place.name}", tensors, **shapes)
        v = {layer: tensors["vera_lambda_b"][columns] for layer, columns in place.columns.items()}
        for layer in [layer for layer, arrays in v.items() if arrays.any()] or v:
            key, rows = _copy(place, layer)
            most, layers = copies.setdefault(key, (rows, {}))
            layers[layer] = {"d": tensors["vera_lambda_d"], "v": v[layer]}
            copies[key] = max(most, rows, key=len), layers
    # Here every copy starts at the first output; the unused part of the pair is left out.
    widest, rank = max(len(rows) for rows, _ in copies.values()), 0
    inner, outer, spans = [], [], {}
    for rows, layers in copies.values():
        b_rows = b[:, rows]
        used = b_rows.any(axis=1) & np.any([x["d"] for x in layers.values()], axis=0)
        inner.append(a[:, used])
        outer.append(np.pad(b_rows[used], ((0, 0), (0, widest - len(rows)))))
        for layer, x in layers.items():
            spans[layer] = slice(rank, rank + int(used.sum())), x["d"][used], x["v"]
        rank += int(used.sum())
    by_layer = {}
    for layer, (span, d, v) in spans.items():
        by_layer[layer] = {"d": np.zeros(max(rank, 1), np.float32), "v": v}
        by_layer[layer]["d"][span] = d
    hp = {"rank": max(rank, 1), "projection_seed": config.get("projection_prng_key", 0)}
    hp |= {"dropout": config.get("vera_dropout", 0.0)}
    hp |= {"d_initial": float(config.get("d_initial", 0.1))}
    return hp, by_layer, {"a": np.concatenate(inner, axis=1), "b": np.concatenate(outer)}


def _copy(place: Place, layer: str) -> tuple[bytes, np.ndarray]:
    """(name of the copy of VeRA's pair that a layer uses, its outputs in the module). Modules that
    are not fused share one copy."""
    rows = np.arange(place.outputs)[place.columns[layer]]
    return rows.tobytes() if place.fused else b"", rows


# ------------------------------------------------------------------------------------------ (IA)3


def write_ia3(modules, shared, hp):
    """`ia3_l` of every module: (1, in) if it scales the input, and the module is named in
    `feedforward_modules`, otherwise (out, 1).

    Raises ValueError for a module of which only some parts have their input scaled, or parts that
    don't share one vector for it."""
    tensors, inner = {}, []
    for place, parts in modules:
        first = next(iter(parts.values()))
        if "l_in" in first:
            tensors[f"{place.name}.ia3_l"] = input_of(place, parts, "l_in", "scales")[None]
            inner.append(place.name)
        else:
            whole = np.ones(place.outputs, np.float32)
            for layer, arrays in parts.items():
                if "l" not in arrays:
                    raise ValueError(f"{place.name}: PEFT scales its input or its output")
                whole[place.columns[layer]] = arrays["l"]
            tensors[f"{place.name}.ia3_l"] = whole[:, None]
    return tensors, {"feedforward_modules": sorted(inner), "init_ia3_weights": True}


def read_ia3(modules, shared, config, where):
    """Scales of inputs for modules named in `feedforward_modules`, otherwise of outputs; if the
    config does not have the field, the shape decides.

    Raises ValueError for a shape that does not fit."""
    layers, named = {}, config.get("feedforward_modules")
    for place, tensors in modules:
        if isinstance(named, str):
            inner = re.fullmatch(named, place.name) is not None
        elif named is None:  # left to PEFT's own table: the shape says it
            inner = tensors["ia3_l"].shape[:1] == (1,)
        else:
            inner = any(place.name.endswith(name) for name in named)
        shape = (1, place.inputs) if inner else (place.outputs, 1)
        said = f"{place.name}, {'in' if inner else 'not in'} feedforward_modules"
        fit(f"{where / WEIGHTS}: {said}", tensors, ia3_l=shape)
        x = tensors["ia3_l"].reshape(-1)
        parts = {layer: x if inner else x[columns] for layer, columns in place.columns.items()}
        # A part of a fused module that is all ones is not adapted.
        moved = [layer for layer, x in parts.items() if np.any(x != 1)] or [*parts]
        for layer in moved:
            layers[layer] = {"l_in" if inner else "l": parts[layer], "on": np.float32(1)}
    return {}, layers, {}


KINDS = {
    "adalora": Kind("lora_[ABE]", write_adalora, read_adalora, "lora_only"),
    "loha": Kind("hada_[a-z0-9_]+", write_loha, read_loha),
    "lokr": Kind("lokr_[a-z0-9_]+", write_lokr, read_lokr),
    "vera": Kind("vera_lambda_[bd]", write_vera, read_vera, "vera_only"),
    "ia3": Kind("ia3_l", write_ia3, read_ia3),
    "hira": Kind("hira_[AB]", hira.write, hira.read),
    "shira": Kind("shira_(weight|indices)", shira.write, shira.read),
    "miss": Kind("miss_block", miss.write, miss.read, "MiSS_only"),
    "gralora": Kind("gralora_[A-Za-z_]+", gralora.write, gralora.read, "gralora_only"),
    "oft": Kind(r"oft_(embedding_)?R\.weight", oft.write, oft.read, "oft_only"),
    "fourierft": Kind("fourierft_spectrum", fourierft.write, fourierft.read, "fourier_only"),
    "hra": Kind("hra_u", hra.write, hra.read, "hra_only"),
    "randlora": Kind("randlora_(lambda|gamma|A|B)", randlora.write, randlora.read, "randlora_only"),
}
