"""Trained methods in PEFT's on-disk format (LoRA and DoRA: `lorax.interop.peft`).

`adapter_model.safetensors` holds a method's arrays by PEFT's modules, `adapter_config.json` says
what they mean. Both are written so that `PeftModel.from_pretrained` computes what `method.bind`
does, and read so that `bind` computes what PEFT does (0.21). AdaLoRA, LoHa, LoKr, VeRA and (IA)3:
`lorax.interop.peft.matrices`; prefixes, prompts and LLaMA-Adapter: `lorax.interop.peft.tokens`.
LN-tuning is here: norms that are trained whole are PEFT's `ln_tuning_layers`.

Parameters trained in full beside a method become PEFT's `modules_to_save` or biases. A parameter of
which a file has some layers alone (one norm of a stack) has the base's own values in the others.

PEFT has no LoHa or LoKr of GPT-2's Conv1D, and nothing like bottleneck adapters, BitFit and full
fine-tuning.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lorax import catalogue, methods, tree
from lorax.adapters import check_task
from lorax.interop import peft
from lorax.interop.peft import files, matrices, tokens
from lorax.interop.peft import whole as whole_files
from lorax.interop.peft.config import check_targets
from lorax.interop.peft.matrices import Arrays, Place
from lorax.interop.places import Places, as_index, fused_width, natural
from lorax.methods.vera import SHARED
from lorax.models.load import FAMILIES, Base, layer_names, parameter_layers, sources

#: Our name -> PEFT's peft_type, of what is not written as LoRA.
TYPES = {row.name: row.peft for row in catalogue.ROWS.values() if row.peft not in (None, "LORA")}


def save(
    directory: str | os.PathLike,
    method: methods.Method,
    state: methods.State,
    base: Base,
    base_name: str,
) -> pathlib.Path:
    """Write a trained method as PEFT's files; the directory.

    base_name: what PEFT should load as the base model (a Hub id or a directory).
    Raises ValueError for a method that lorax can't write for PEFT, and for what PEFT could not
    compute the same with: it says what, and nothing is written.
    """
    if method.name not in TYPES:
        hint = "" if method.factors is None else "; store it as LoRA, lorax.interop.peft.save"
        raise ValueError(f"{method.name}: lorax does not write it in PEFT's format{hint}")
    places = Places(sources(base))
    weights = _weights(state, base)
    causal = _causal(base)
    if causal and places.tied:
        _, weights = whole_files.with_head({}, weights, places.tied)
    classifier = any(path.startswith("head/") for path in weights)
    task_type = "CAUSAL_LM" if causal else "SEQ_CLS" if classifier else None
    whole = whole_files.stored_weights(weights, places)
    targets: set[str] = set()
    if method.name in matrices.KINDS:
        tensors, config = _write_matrices(method, state, base, places)
        targets = set(config["target_modules"])
    elif method.name in tokens.KINDS:
        if whole:
            raise ValueError(f"{method.name}: PEFT stores no weights beside it: {', '.join(whole)}")
        tensors, config = _write_tokens(method, state, base, places)
    else:
        tensors, config, whole = _write_norms(whole, places)
    saved, bias = whole_files.how_saved(whole, targets, places, task_type)
    if method.name not in tokens.KINDS:
        config["modules_to_save"] = saved or None
    beside = getattr(matrices.KINDS.get(method.name), "bias", None)
    if beside is not None:
        config["bias"] = beside if bias == "lora_only" else bias
    elif bias != "none":
        raise ValueError(f"{method.name}: PEFT trains no biases beside it, but whole modules")
    for name, tensor in whole.items():
        module, _, last = name.rpartition(".")
        tensors[f"{module}.base_layer.{last}" if module in targets else name] = tensor
    config |= {
        "peft_type": TYPES[method.name],
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
    }
    bare = ("prompt_embeddings", "base_model.")
    tensors = {
        name if name.startswith(bare) else peft.PREFIX + name: tensor
        for name, tensor in tensors.items()
    }
    return files.write(directory, tensors, config)


def load(directory: str | os.PathLike, base: Base) -> tuple[methods.Method, methods.State]:
    """Read a directory of PEFT's that holds one of `TYPES`.

    The method's hyperparameters are those of the config as far as they mean something here; its
    targets and layers the smallest product of the two that covers what is stored, in which the
    state has zeros for what is not.

    Raises FileNotFoundError, or ValueError that names the file for another kind of adapter, a
    damaged file, and modules or shapes that the base does not have.
    """
    directory = pathlib.Path(directory)
    config = peft.read_config(directory / peft.CONFIG)
    kind = config["peft_type"]
    name = next((name for name, theirs in TYPES.items() if theirs == kind), None)
    if name is None:
        given = f"{directory / peft.CONFIG}: peft_type {kind!r} given"
        known = ", ".join(sorted(TYPES.values()))
        raise ValueError(f"{given}; {known} are read here, LORA by lorax.interop.peft")
    check_task(base, config.get("task_type"), f"{directory / peft.CONFIG}: ")
    stored, _ = peft.read_tensors(directory / peft.WEIGHTS)
    stored = peft.own_names(stored, directory / peft.WEIGHTS)
    places = Places(sources(base))
    try:
        if name in matrices.KINDS:
            hp, arrays, rest = _read_matrices(name, stored, config, base, places, directory)
        elif name in tokens.KINDS:
            read = tokens.KINDS[name].read
            (hp, arrays), rest = read(stored, config, _attention(base, places), directory), {}
            arrays = {last: {(): x} for last, x in arrays.items()}
        else:
            hp, arrays = {}, {}
            rest = _read_norms(stored, config, directory)
        weights = _whole(rest, config, places, base, directory / peft.WEIGHTS)
        return _state(name, hp, arrays, weights, base)
    except ValueError as error:
        named = str(error).startswith(str(directory))
        raise ValueError(str(error) if named else f"{directory}: {error}") from error


def _causal(base: Base) -> bool:
    return hasattr(base.module, "empty_cache")


# --------------------------------------------------------------------------------------- matrices


def _write_matrices(method, state, base: Base, places):
    kind = matrices.KINDS[method.name]
    own, trained = methods.joined(*state), methods.joined(state.trainable)
    shared = {name: np.asarray(x) for name, x in own.pop(SHARED, {}).items()}
    modules: dict[str, tuple[Place, dict[str, Arrays]]] = {}
    for layer, (path, index) in _layers(base).items():
        here = {name: np.asarray(x)[index] for name, x in own.get(path, {}).items()}
        if not here or "w" in here:
            continue
        moves = any(here[name].any() for name in trained[path])
        if here.get("on", moves):
            place = _place(places.module(layer), base, places, method.name)
            modules.setdefault(place.name, (place, {}))[1][layer] = here
    if not modules:
        raise ValueError(f"{method.name}: nothing to save, no matrix is adapted")
    tensors, config = kind.write([*modules.values()], shared, method.hp)
    config["target_modules"] = sorted(modules)
    if any(place.conv1d for place, _ in modules.values()):
        config["fan_in_fan_out"] = True
    return tensors, config


def _read_matrices(name: str, stored, config, base: Base, places, directory: pathlib.Path):
    """(hp, {path/name: {index: array}}, the other tensors)."""
    kind, file = matrices.KINDS[name], directory / peft.WEIGHTS
    modules: dict[str, Arrays] = {}
    shared, rest = {}, {}
    for key, tensor in stored.items():
        if match := re.fullmatch(rf"(?P<module>.+)\.(?P<name>{kind.names})", key):
            modules.setdefault(match["module"], {})[match["name"]] = tensor
        elif key.startswith("base_model."):
            shared[key.removeprefix("base_model.")] = tensor
        else:
            rest[key] = tensor
    if not modules:
        raise ValueError(f"{file}: holds no tensors of {TYPES[name]}")
    check_targets(config, modules, directory / peft.CONFIG)
    found = [
        (_place(module, base, places, f"{file}: {name}"), modules[module])
        for module in sorted(modules, key=natural)
    ]
    hp, layers, shared = kind.read(found, shared, config, directory)
    known, indices = _layers(base), set()
    arrays = {f"{SHARED}/{name}": {(): x} for name, x in shared.items()}
    for layer, own in layers.items():
        path, index = known[layer]
        indices |= set(index)
        for leaf, value in own.items():
            arrays.setdefault(f"{path}/{leaf}", {})[index] = value
    paths = {known[layer][0] for layer in layers}
    exactly = lambda paths: tuple(f"re:{re.escape(path)}" for path in sorted(paths))
    flat = tree.flatten(base.params)
    depth = max((flat[path].shape[0] for path in paths if base.sites[path].stack), default=0)
    hp |= {"targets": exactly(paths)}
    hp |= {"layers": None if len(indices) in (0, depth) else tuple(sorted(indices))}
    if name == "ia3":
        inner = {path for path in paths if f"{path}/l_in" in arrays}
        both = sorted(path for path in inner if f"{path}/l" in arrays)
        if both:
            raise ValueError(f"{file}: {', '.join(both)}: some layers scale the input, some not")
        hp["feedforward"] = exactly(inner)
    return hp, arrays, rest


def _layers(base: Base) -> dict[str, tuple[str, tuple]]:
    """{layer: (path of its kernel, its index in the stack)} of all that can be adapted."""
    flat = tree.flatten(base.params)
    return {
        layer: (path, index)
        for path, site in base.sites.items()
        for layer, index in layer_names(path, site, flat[path].shape).items()
    }


def _place(module: str, base: Base, places: Places, where: str) -> Place:
    """What is known of a linear module. Raises ValueError, which begins with `where`, for one that
    is none."""
    flat, layers = tree.flatten(base.params), _layers(base)
    linear = {
        layer: path for layer, (path, _) in layers.items() if base.sites[path].kind == "linear"
    }
    found = {p.rpartition("/")[0]: s for p, s in places.at(f"{module}.weight").items()}
    if not found or not found.keys() <= linear.keys():
        known = sorted({re.sub(r"\.\d+\.", ".{}.", places.module(layer)) for layer in linear})
        raise ValueError(f"{where}: {module} is none of the linear layers, {', '.join(known)}")
    path = linear[next(iter(found))]
    _, inputs, outputs = base.sites[path].matrix_shape(flat[path].shape)
    fused = any(source.part is not None for source in found.values())
    return Place(
        module,
        inputs,
        fused_width(found) if fused else outputs,
        {layer: as_index(source.part) for layer, source in found.items()},
        fused,
        conv1d=all(source.axes is None for source in found.values()),
    )


# ----------------------------------------------------------------------- virtual tokens and norms


def _write_tokens(method, state, base: Base, places):
    leaves = tree.flatten(state.trainable) | tree.flatten(state.constants)
    own = {path.rpartition("/")[2]: np.asarray(leaf) for path, leaf in leaves.items()}
    return tokens.KINDS[method.name].write(own, _attention(base, places))


def _attention(base: Base, places: Places) -> tokens.Attention:
    keys = [layer for layer in _layers(base) if layer.endswith("attn/k")]
    modules = tuple(places.module(layer).rpartition(".")[0] for layer in keys)
    raw = FAMILIES[base.family][0].hf_config(base.config)
    return tokens.Attention(base.family, _causal(base), raw, modules)


def _write_norms(whole: Arrays, places: Places):
    """(tensors, config, what is not of a norm that is trained whole)."""
    parent = lambda name: name.rpartition(".")[0]
    scales = {s.name for path, s in places.sources.items() if path.endswith("/scale")}
    norms = {parent(name) for name in whole if re.sub(r"\.\d+\.", ".{}.", name) in scales}
    norms = {norm for norm in norms if set(places.below(norm)) <= set(whole)}
    if not norms:
        raise ValueError("ln-tuning: nothing to save, no norm is trained")
    tensors = {
        f"{parent(name)}.ln_tuning_layers.{name.rpartition('.')[2]}": x
        for name, x in whole.items()
        if parent(name) in norms
    }
    rest = {name: x for name, x in whole.items() if parent(name) not in norms}
    return tensors, {"target_modules": sorted(norms)}, rest


def _read_norms(stored: Arrays, config, directory: pathlib.Path) -> Arrays:
    """The tensors with those of norms by the names that the base has for them."""
    file, word = directory / peft.WEIGHTS, ".ln_tuning_layers."
    norms = {key: key.replace(word, ".") for key in stored if word in key}
    if not norms:
        raise ValueError(f"{file}: holds no tensors of {TYPES['ln-tuning']}")
    for key, name in norms.items():
        if name in stored:
            raise ValueError(f"{file}: {name} stands there twice, once as {key}")
    modules = [key.partition(word)[0] for key in norms]
    check_targets(config, modules, directory / peft.CONFIG)
    return {norms.get(key, key): x for key, x in stored.items()}


# ------------------------------------------------------------------------------------------- state


def _weights(state, base: Base) -> Arrays:
    """{layer's parameter: value} of what is trained in full."""
    found = {}
    for path, own in methods.joined(*state).items():
        if "layers" in own:
            first, rest = path.split("/", 1)
            numbered = zip(np.asarray(own["layers"]), np.asarray(own["w"]), strict=True)
            found |= {f"{first}/{i}/{rest}": x for i, x in numbered}
        elif "w" in own:
            found |= parameter_layers(path, np.asarray(own["w"]), base)
    return found


def _whole(rest: Arrays, config, places: Places, base: Base, file) -> Arrays:
    """{layer's parameter: value} of the tensors that belong to the base itself."""
    weights: Arrays = {}
    whole_files.check_saved(config, rest, places, file)
    for name, tensor in rest.items():
        if files.WHOLE.fullmatch(name) is None:
            raise ValueError(f"{file}: {name}: no tensor of {config['peft_type']}, weight or bias")
        weights |= whole_files.oriented(name, tensor, places, file)
    if places.tied and weights:
        weights = whole_files.without_head(peft.Adapter({}, weights, config), places.tied).weights
    here, flat = _parameters(base), tree.flatten(base.params)
    for name, value in weights.items():
        if name not in here:
            raise ValueError(f"{file}: {name}: the base reads out with its embedding")
        path, i = here[name]
        shape = flat[path].shape[0 if i is None else 1 :]
        if value.shape != shape:
            raise ValueError(f"{file}: {name} is {value.shape}, the base's {shape}")
    return weights


def _parameters(base: Base) -> dict[str, tuple[str, int | None]]:
    """{layer's parameter: (path of the parameter, its index in the stack)}"""
    return {
        name: (path, None if name == path else i)
        for path, leaf in tree.flatten(base.params).items()
        for name, i in parameter_layers(path, range(leaf.shape[0]), base).items()
    }


def _state(name: str, hp: dict, arrays: Mapping[str, dict], weights: Arrays, base: Base):
    """(Method, State) with these arrays.

    arrays: {path of a leaf, or its end: {index in its stack: its first rows and columns}}, zero
    elsewhere. weights: {layer's parameter: value}.
    """
    here, flat = _parameters(base), tree.flatten(base.params)
    full = dict.fromkeys(here[parameter][0] for parameter in weights)
    if name == "ln-tuning":
        norm = lambda path: f"{path.rpartition('/')[0]}/scale" in flat
        full = [path for path in full if not norm(path)]
    hp = hp | ({"full": tuple(f"re:{re.escape(path)}" for path in full)} if full else {})
    method = methods.method(name, **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    trainable, constants = ({p: np.array(x) for p, x in tree.flatten(t).items()} for t in state)
    unset = {path for path in trainable if not path.endswith("/w")}
    for end, values in arrays.items():
        known = (*trainable, *constants)
        paths = [end] if end in known else [path for path in known if path.endswith(f"/{end}")]
        if len(paths) != 1:
            raise ValueError(f"{end}: {name} has {', '.join(paths) or 'no such array'} here")
        leaf = trainable.get(paths[0], constants.get(paths[0]))
        leaf[...] = 0
        for index, value in values.items():
            shape, most = np.shape(value), leaf.shape[len(index) :]
            smaller = name in matrices.KINDS and np.less_equal(shape, most).all()
            if shape != most and not smaller:
                raise ValueError(f"{end}: {shape} given, the base's is {most}")
            leaf[(*index, *map(slice, shape))] = value
        unset.discard(paths[0])
    if unset:
        raise ValueError(f"{', '.join(sorted(unset))}: {name} needs them")
    for parameter, value in weights.items():
        path, i = here[parameter]
        trainable[f"{path}/w"][... if i is None else i] = value
    jax_tree = lambda flat: tree.unflatten({path: jnp.asarray(x) for path, x in flat.items()})
    return method, methods.State(jax_tree(trainable), jax_tree(constants))
