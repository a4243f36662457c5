"""PEFT's files, one module at a time; `lorax.interop.peft` has their layout and reads them whole.

LoRA and DoRA, of linear layers, embeddings, convolutions and experts; AdaLoRA; LoHa and LoKr. The
dW of PEFT's other methods needs the base, which `lorax.adapters.load` reads them onto.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import parse_json, write_bytes, write_json
from lorax.interop.adapter import Factors
from lorax.interop.formats import factored, flux, fused, image_names, names, updates, writing
from lorax.interop.formats.configs import LYCORIS, config_fields
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened, numbers, open_adapter, quiet, same
from lorax.interop.peft import experts
from lorax.interop.peft.config import (
    CONFIG,
    WEIGHTS,
    adalora_scale,
    check_targets,
    read_config,
    scale_of_kind,
)
from lorax.interop.peft.files import PREFIX, WHOLE, own_names, serialise
from lorax.interop.peft.lora import by_module, check_lengths
from lorax.interop.peft.metadata import index_of, own_factors
from lorax.interop.places import Places, natural
from lorax.interop.tensors import Stored

_WORDS = {"A": "lora_down", "B": "lora_up", "m": "magnitude"}
#: The tensors of a module, of the methods whose dW the file has.
_KEYS = {
    "ADALORA": re.compile(r"(?P<module>.+)\.lora_(?P<word>[ABE])"),
    "LOHA": re.compile(r"(?P<module>.+)\.(?P<word>hada_(w[12]_[ab]|t[12]))"),
    "LOKR": re.compile(r"(?P<module>.+)\.(?P<word>lokr_(w[12](_[ab])?|t2))"),
}
#: Last words of modules that are embeddings, whose tensors have names of their own.
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "token_embedding")
_NO_CONFIG = f"default 1: there is no {CONFIG}, which has it"


def recognises(opened: Opened) -> bool:
    """Whether a config of PEFT's is beside the file, or tensors have its names."""
    return "peft_type" in opened.config or any(key.startswith(PREFIX) for key in opened.tensors)


def read(opened: Opened) -> Found:
    """The updates of a file. Raises as `lorax.interop.peft.load`, and ValueError for a method whose
    dW the file does not have."""
    if opened.config or "lorax" in opened.metadata:
        config = read_config(opened.file.parent / CONFIG)
    else:
        config = {"peft_type": "LORA"}
    if config["peft_type"] == "LORA":
        return _lora(opened, config)
    if config["peft_type"] in _KEYS:
        return _other(opened, config)
    raise ValueError(
        f"{opened.file.parent / CONFIG}: {config['peft_type']}: no update of weights that can be "
        "read without its base"
    )


# ------------------------------------------------------------------------------------------- LoRA


def _lora(opened: Opened, config: Mapping[str, Any]) -> Found:
    found, parts, beside = _lora_modules(opened, config)
    source = _source(config, opened)
    entries = {} if opened.as_stored else _entries(opened)
    whole = [_of_expert(layer, part, source) for layer, part in parts.items()]
    whole += [updates.update(module) for module in found if module.layer in entries]
    rest = [module for module in found if module.layer not in entries]
    made = [*fused.updates_of(rest, opened.as_stored)]
    for update in whole:
        made += _parts(update, entries.pop(update.layer, {}), opened.file)
    if entries:
        named = next(iter(entries))
        raise ValueError(f"{opened.file}: its metadata 'lorax' does not fit: no module {named}")
    made.sort(key=lambda update: natural(update.layer))
    notes = () if opened.config else (f"{opened.file}: {_NO_CONFIG}; every s is taken as 1",)
    return Found("PEFT", opened.path, tuple(made), beside, dict(config), notes)


def _lora_modules(opened: Opened, config: Mapping[str, Any]):
    """(modules that are single matrices, {layer: `experts.Part`}, shapes of other tensors)."""
    folder = opened.file.parent
    stored, whole = by_module(opened.tensors, opened.file, same)
    stored, parts = experts.unpack(stored, config, Places({}), folder)
    check_targets(config, stored, folder / CONFIG)
    scale, found = _scale(config, opened), []
    for layer in sorted(stored, key=natural):
        tensors = {_WORDS[side]: tensor for side, tensor in stored[layer].items()}
        found.append(updates.Module(layer, tensors, scale, opened.file))
        up = found[-1].shape("lora_up")
        if opened.config and up:
            check_lengths(layer, tensors.get("magnitude"), up[0], config, folder)
    return found, parts, {name: tensor.shape for name, tensor in whole.items()}


def _source(config: Mapping[str, Any], opened: Opened) -> str:
    if not opened.config:
        return _NO_CONFIG
    alpha = "lora_alpha" if config["peft_type"] == "LORA" else "alpha"
    return f"config {alpha} / {'sqrt r' if config.get('use_rslora') else 'r'}"


def _scale(config: Mapping[str, Any], opened: Opened) -> updates.Scale:
    """PEFT's rule."""
    file, source = opened.file.parent / CONFIG, _source(config, opened)

    def scale(layer: str, rank: int | None) -> tuple[float, str]:
        if not opened.config:
            return 1.0, source
        return scale_of_kind(config, layer, rank, file), source

    return scale


def _of_expert(layer: str, part: experts.Part, source: str) -> Update:
    (_, inputs), (outputs, _), rank = part.A.shape, part.B.shape, len(part.rows)

    def read() -> Factors:
        a = numbers(part.A, [part.rows, range(inputs)]).T
        b = numbers(part.B, [range(outputs), part.columns]).T
        return Factors(a, b, part.s)

    shape = inputs, outputs
    return Update(layer, "LoRA", shape, rank, float(part.s), source, part.A.kind, read)


# ----------------------------------------------------------------------- fused modules of our files


def _entries(opened: Opened) -> dict[str, dict[str, dict]]:
    """{module: {our layer: its entry}} of modules with several layers of ours, from the metadata
    that `lorax.interop.peft.save` writes. Raises ValueError for metadata that is not that."""
    if "lorax" not in opened.metadata:
        return {}
    found: dict[str, dict[str, dict]] = {}
    try:
        stored = parse_json(opened.metadata["lorax"], "line")["factors"]
        for layer, entry in stored.items():
            found.setdefault(entry["module"], {})[layer] = entry
        return {
            module: layers
            for module, layers in found.items()
            if any(entry["columns"] is not None for entry in layers.values())
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{opened.file}: its metadata 'lorax' does not fit: {error!r}") from None


def _parts(whole: Update, entries: Mapping[str, dict], file: Path) -> list[Update]:
    """The updates of a module's layers, named "<module>.<last word of the layer>"; the module's own
    if it has no entries."""
    if not entries:
        return [whole]

    @quiet
    def read(layer: str) -> Factors:
        own = lambda: own_factors(entries, {whole.layer: whole.read()}, Places({}))
        return fitting(own)[layer]

    def fitting(make: Callable):
        try:
            return make()
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file}: {whole.layer}: its metadata 'lorax' does not fit: {error}"
            ) from None

    made = []
    for layer, entry in entries.items():
        rank, outputs, s = fitting(lambda entry=entry: _sizes(entry, whole))
        made.append(
            whole._replace(
                layer=f"{whole.layer}.{layer.rpartition('/')[2]}",
                shape=(whole.shape[0], outputs),
                rank=rank,
                scale=s,
                read=functools.partial(read, layer),
            )
        )
    return made


def _sizes(entry: Mapping[str, Any], whole: Update) -> tuple[int, int, float]:
    """(rank, outputs, scale) of a part of a module."""
    size = lambda part, n: len(np.arange(n)[index_of(part, n)])
    rank, outputs = size(entry["rows"], whole.rank), size(entry["columns"], whole.shape[1])
    return rank, outputs, float(entry["scale"])


# --------------------------------------------------------------------------------- other methods


def _other(opened: Opened, config: Mapping[str, Any]) -> Found:
    """AdaLoRA, LoHa and LoKr."""
    key, modules, beside = _KEYS[config["peft_type"]], {}, {}
    for name, tensor in own_names(opened.tensors, opened.file, same).items():
        if match := key.fullmatch(name):
            word = _WORDS.get(match["word"], match["word"])
            modules.setdefault(match["module"], {})[word] = tensor
        elif WHOLE.fullmatch(name):
            beside[name] = tensor.shape
        else:
            raise ValueError(f"{opened.file}: {name}: no tensor of {config['peft_type']}")
    check_targets(config, modules, opened.file.parent / CONFIG)
    if config["peft_type"] == "ADALORA":
        s = adalora_scale(config)[0]
        scale = lambda layer, rank: (s, "config lora_alpha / init_r")
    else:
        scale = _scale(config, opened)
    made, notes = [], []
    for layer in sorted(modules, key=natural):
        if config["peft_type"] == "ADALORA" and all(0 in x.shape for x in modules[layer].values()):
            notes.append(f"{layer} has no update: AdaLoRA pruned it to rank 0")
            continue
        singular = modules[layer].pop("E", None)
        module = updates.Module(layer, modules[layer], scale, opened.file)
        one = updates.update(module)
        if config["peft_type"] == "ADALORA":
            one = _with_singular(one, module, singular)
        made.append(one)
    return Found("PEFT", opened.path, tuple(made), beside, dict(config), tuple(notes))


def _with_singular(one: Update, module: updates.Module, singular: Stored | None) -> Update:
    """AdaLoRA's update a diag(E) b."""
    if singular is None or math.prod(singular.shape) != one.rank:
        shape = None if singular is None else singular.shape
        raise module.error(f"need lora_E ({one.rank}, 1), it is {shape}")
    read = one.read

    @quiet
    def with_singular() -> Factors:
        factors = read()
        return factors._replace(a=factors.a * numbers(singular).reshape(-1))

    return one._replace(kind="AdaLoRA", read=with_singular)


# ---------------------------------------------------------------------------------------- writing


def write(out: Path, found: Found, base: Mapping[str, Any] | None = None) -> Path:
    """Write updates, read as they are stored, as the two files of PEFT's; the directory.

    PEFT's directory is of one model: of the U-Net or of a text encoder alone. base: not needed.
    Raises ValueError that says what the format can't hold.
    """
    refused = factored.refusal(found, "PEFT")
    found = flux.apart(found, refused)
    kinds = (*factored.KINDS, *LYCORIS)
    name_of = functools.partial(_name, found.format)
    by_name = factored.named(found, "PEFT", name_of, kinds=kinds)
    component = ""
    if found.format in factored.IMAGES:
        components = {name.partition(".")[0] for name in by_name}
        if len(components) > 1:
            raise refused(f"one directory is of one model, and this is of {sorted(components)}")
        component = f"{components.pop()}."
    modules = {name.removeprefix(component): update for name, update in by_name.items()}
    config = _config(modules, found, refused)
    tensors: dict[str, np.ndarray] = {}
    is_embedding = _embeddings(found)
    for name, update in modules.items():
        words = _words(update, is_embedding(name))
        tensors |= {f"{PREFIX}{name}.{word}": x for word, x in words.items()}
    write_bytes(out / WEIGHTS, serialise(tensors, {"format": "pt"}))
    write_json(out / CONFIG, config)
    written = read(open_adapter(out)._replace(as_stored=True))
    factored.check_written(modules, written, refused)
    return out


def _config(
    modules: Mapping[str, Update], found: Found, refused: Callable[[str], ValueError]
) -> dict[str, Any]:
    """The fields of a config for {module: update}."""
    own = found.config if found.format == "PEFT" else {}
    about = {
        "task_type": own.get("task_type"),
        "base_model_name_or_path": writing.base_name(found.config),
        "inference_mode": True,
    }
    fields = config_fields(modules, refused)
    if fields["peft_type"] == "LORA":
        about["fan_in_fan_out"] = bool(own.get("fan_in_fan_out"))
    return fields | about


def _words(update: Update, embedding: bool) -> dict[str, np.ndarray]:
    """{word below a module: tensor}."""
    if update.kind in LYCORIS:
        return factored.as_stored(update)
    words = factored.as_peft(update)
    if embedding:
        words["lora_embedding_A"] = words.pop("lora_A.weight")
        words["lora_embedding_B"] = words.pop("lora_B.weight")
    return words


def _embeddings(found: Found) -> Callable[[str], bool]:
    """Whether a module is an embedding: by the tensors of PEFT's own file, otherwise by name."""
    if found.format != "PEFT":
        return lambda name: name.endswith(_EMBEDDINGS)
    stored = open_adapter(found.path).tensors
    keys = (key.removeprefix(PREFIX).partition(".lora_embedding_") for key in stored)
    return {module for module, word, _ in keys if word}.__contains__


def _name(format: str, layer: str) -> str | None:
    """The name that transformers and diffusers have for a matrix, None if it is not known."""
    if re.search(r"\.experts\.\d+\.", layer):
        return None  # PEFT's files have all experts of a layer in one tensor
    if format in factored.IMAGES:
        return image_names.diffusers(layer)
    name = names.hugging_face(layer)
    return name if format in ("PEFT", "MLX") or name.startswith(("model.", "lm_head")) else None
