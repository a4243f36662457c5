"""kohya-ss's files and those of LyCORIS: one flattened name for a module.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha

(sd-scripts, networks/lora.py; LyCORIS, lycoris/modules/*.py.) The words after the first dot say the
kind (`updates`). s is the tensor alpha over the rank; without it, or if it is 0, s is 1. The "."
of a module's path are "_", which only the base's own names can undo.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax.files import write_bytes
from lorax.interop.formats import factored, flux, fused, image_names, updates
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened, fields, number
from lorax.interop.peft.files import serialise
from lorax.interop.tensors import Stored

PREFIXES = ("lora_unet", "lora_te", "lora_transformer", "lora_prior", "lycoris", "oft_unet")
_KEY = re.compile(r"(?P<layer>[^.]+)\.(?P<rest>.+)")
#: Tensors that are no matrices' updates: of biases and norms.
_BESIDE = ("diff_b", "w_norm", "b_norm", "lora_up.bias")
#: Words of PEFT's, which some trainers take.
WORDS = {"lora_A": "lora_down", "lora_B": "lora_up", "lora_magnitude_vector": "magnitude"}
_CHANGES = ("diff", "diff_b", "w_norm", "b_norm")  # of them, those that are differences
_HELD = (*factored.KINDS, "LoHa", "LoKr", "full")  # kinds that `write` takes
_HASHES = ("sshs_", "modelspec.hash")  # of the tensors, which are others now
_EMBEDDING = "bundle_emb."  # of trained tokens, which OneTrainer stores beside
#: Kinds that multiply the base's weights, so dW does not follow from the file: by a tensor's word.
_NEEDS_BASE = {
    "oft_blocks": "OFT rotates the base's weights",
    "rescale": "OFT rotates the base's weights",
    "on_input": "IA3 scales the base's weights",
    "a1": "GLoRA multiplies the base's weights",
    "a2": "GLoRA multiplies the base's weights",
    "lambda_layer": "T-LoRA's start is not in the file",
}


def recognises(opened: Opened) -> bool:
    """Whether a tensor's name begins as flattened names do."""
    return any(name.startswith(PREFIXES) for name in opened.tensors)


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names file and tensor."""
    found, beside = _modules(opened)
    made = fused.updates_of(found, opened.as_stored)
    about = fields(opened.metadata), _notes(opened)
    return Found("kohya", opened.path, made, shapes_of(beside), *about, changes(beside))


def _notes(opened: Opened) -> tuple[str, ...]:
    """What the header says of the scale against the file."""
    dim, alpha = (opened.metadata.get(f"ss_network_{name}") for name in ("dim", "alpha"))
    if alpha in (None, dim) or any(name.endswith(".alpha") for name in opened.tensors):
        return ()
    given = f"ss_network_alpha is {alpha[:20]}, ss_network_dim {str(dim)[:20]}"
    return (f"{given} in the header, but the file has no alpha: programs take s = 1",)


def shapes_of(beside: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """{name: shape}."""
    return {name: tensor.shape for name, tensor in beside.items()}


def changes(beside: Mapping[str, Stored]) -> dict[str, Stored]:
    """Those that are differences of biases and norms."""
    return {name: x for name, x in beside.items() if name.rpartition(".")[2] in _CHANGES}


def _modules(opened: Opened) -> tuple[list[updates.Module], dict[str, Stored]]:
    """(the modules of a file as they are stored, {name: tensor} of biases and norms)."""
    by_layer: dict[str, dict[str, Stored]] = {}
    beside = {}
    for name, tensor in opened.tensors.items():
        match = _KEY.fullmatch(name)
        if name.startswith(_EMBEDDING):
            beside[name] = tensor
        elif match is None or not name.startswith(PREFIXES):
            raise ValueError(f"{opened.file}: {name}: no tensor of kohya's or LyCORIS")
        else:
            word = match["rest"].removesuffix(".weight")
            put(by_layer, match["layer"], WORDS.get(word, word), tensor)
    found, vectors = readable(opened, by_layer, lambda layer, alpha: of_alpha(alpha))
    return found, beside | vectors


def put(by_layer: dict[str, dict[str, Stored]], layer: str, word: str, tensor: Stored) -> None:
    """Add a tensor to {layer: {word: tensor}}. Raises ValueError for a word that is there."""
    own = by_layer.setdefault(layer, {})
    if word in own:
        raise ValueError(f"{tensor.file}: {layer} has {word} twice; {tensor.key} is one")
    own[word] = tensor


def readable(
    opened: Opened,
    by_layer: Mapping[str, dict[str, Stored]],
    scale_of: Callable[[str, Stored | None], updates.Scale],
) -> tuple[list[updates.Module], dict[str, Stored]]:
    """(the modules that have an update, {name: tensor} of tensors that change a bias or a norm) of
    {layer: {word: tensor}}. scale_of: (layer, its tensor alpha or None) -> its scale.

    Raises ValueError that names file and module for a kind whose dW the file does not have, for
    unknown tensors, and for an alpha without an update.
    """
    found, beside = [], {}
    for layer, tensors in by_layer.items():
        vectors = [word for word in tensors if word in _BESIDE]
        vectors += ["diff"] * ("diff" in tensors and len(tensors["diff"].shape) < 2)
        beside |= {f"{layer}.{word}": tensors[word] for word in vectors}
        rest = {word: x for word, x in tensors.items() if word not in (*vectors, "alpha")}
        module = updates.Module(layer, rest, scale_of(layer, tensors.get("alpha")), opened.file)
        if rest:
            _check_readable(module)
            found.append(module)
        elif not vectors:
            raise ValueError(f"{opened.file}: {layer}: alpha without an update")
    return found, beside


def write(out: Path, found: Found, base: Mapping[str, Any] | None = None) -> Path:
    """Write updates, read as they are stored, as a file of kohya's; the file.

    Every matrix has its alpha. base: not needed. What was read from such a file keeps its names and
    texts. Raises ValueError that says what the format can't hold: kinds other than LoRA, LoCon,
    DoRA, AdaLoRA, LoHa, LoKr and full weights, and modules without a name of kohya's.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out.name}: kohya's files end in .safetensors")
    refused = factored.refusal(found, "kohya")
    own = found.format == "kohya"
    if not own:
        found = flux.joined(found, refused)
    of_flux = any(flux.parts(update.layer) for update in found.updates)
    name_of = str if own else _name
    by_name = factored.named(found, "kohya", name_of, kinds=_HELD, changes=True)
    several = of_flux or any(name.startswith("text_encoder_2.") for name in by_name)

    def layer_of(name: str) -> str:
        layer = name if own or flux.parts(name) else image_names.kohya(name, several)
        if layer is None:
            raise refused(f"its files have other modules than {name}")
        return layer

    layers: dict[str, Update] = {}
    for name, update in by_name.items():
        layer = layer_of(name)
        if layer in layers:
            raise refused(f"{layer} is the name of several modules, {name} is one")
        layers[layer] = update
    alphas = {layer: _alpha(update, refused) for layer, update in layers.items()}
    tensors: dict[str, np.ndarray] = {}
    for layer, update in layers.items():
        tensors |= {f"{layer}.{word}": x for word, x in (_words(update) | alphas[layer]).items()}
    for key, change in found.changes.items():
        layer, _, word = key.rpartition(".")
        if (name := name_of(layer)) is None:
            raise refused(f"its name of {layer} is not known")
        tensors[f"{layer_of(name)}.{word}"] = factored.unchanged(change)
    texts = {"ss_network_module": _module(by_name.values())}
    for key, x in found.config.items() if own else ():
        if not key.startswith(_HASHES):
            texts[key] = x if isinstance(x, str) else json.dumps(x)
    return write_bytes(out, serialise(tensors, texts | _ranks(by_name.values())))


def _name(layer: str) -> str | None:
    """kohya's name of a module of Flux's, otherwise diffusers' name, None if it is not known."""
    joined = layer if layer.startswith("lora_unet_") else None
    return flux.kohya(layer) or joined or image_names.diffusers(layer)


def _words(update: Update) -> dict[str, np.ndarray]:
    """{word below a module: tensor}, without its alpha."""
    if update.kind not in factored.KINDS:
        return factored.as_stored(update)
    down, up, m = factored.tensors(update)
    words = {"lora_down.weight": down, "lora_up.weight": up}
    if m is not None:
        words["dora_scale"] = m.reshape(-1, *(1 for _ in down.shape[1:]))
    return words


def _alpha(update: Update, refused: Callable[[str], ValueError]) -> dict[str, np.ndarray]:
    """{"alpha": tensor}, in 64 bits if 32 do not hold it; {} for a kind without a rank."""
    if factored.inner_rank(update) is None:
        if update.scale != 1:
            raise refused(f"{update.layer} has the scale {update.scale:g}, and no rank: it takes 1")
        return {}
    alpha = np.array(factored.alpha_of(update, refused))
    exact = float(np.float32(alpha)) == float(alpha)
    return {"alpha": alpha.astype(np.float32) if exact else alpha}


def _module(written: Collection[Update]) -> str:
    """The code that trains such a file, as sd-scripts names it in the header."""
    lora = all(update.kind in factored.KINDS for update in written)
    return "networks.lora" if lora else "lycoris.kohya"


def _ranks(written: Collection[Update]) -> dict[str, str]:
    """What sd-scripts writes about ranks and alphas in the header; "Dynamic" if they differ."""
    inner = [(factored.inner_rank(update) or 1, update.scale) for update in written]
    ranks, alphas = {rank for rank, _ in inner}, {rank * s for rank, s in inner}
    one = lambda values: f"{values.pop():g}" if len(values) == 1 else "Dynamic"
    return {"ss_network_dim": one(ranks), "ss_network_alpha": one(alphas)}


def of_alpha(alpha: Stored | None) -> updates.Scale:
    """The rule of kohya's scale: the tensor alpha over the rank."""

    def scale(layer: str, rank: int | None) -> tuple[float, str]:
        if rank is None:
            return 1.0, "1: the kind has no scale"
        if alpha is None:
            return 1.0, "default 1: the file has none"
        value = number(alpha)
        return (value / rank, updates.OF_TENSOR) if value else (1.0, "tensor alpha is 0: 1")

    return scale


def _check_readable(module: updates.Module) -> None:
    """Raises ValueError for a kind whose dW the file does not have, and for unknown tensors."""
    for word in module.tensors:
        why = _NEEDS_BASE.get(word.partition(".")[0])
        if why:
            raise module.error(f"{why}, so its dW can't be read from the file alone")
    unknown = sorted(set(module.tensors) - set(updates.WORDS))
    if unknown:
        raise module.error(f"unknown tensors {', '.join(unknown)}")
