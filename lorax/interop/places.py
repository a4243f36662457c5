"""The places of our parameters in Hugging Face's files: names of tensors, parts of fused ones.

"h/3/attn/q/kernel" is columns 0 to 767 of "transformer.h.3.attn.c_attn.weight" in GPT-2.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lorax.interop.hf import Source  # it imports JAX, which reading an adapter can do without

HEAD = "lm_head"  # every causal model's name for the output head


class Places:
    """Maps parameters to Hugging Face's tensors and back, by the names of single layers.

    tied: path of the embedding whose weight a causal model's head shares ("wte"), "" if the head
    has a separate weight. A tied head has a place too, "lm_head/kernel", because PEFT adapts
    modules. experts: {parameter of a layer that holds all its experts: their number}; each of them
    has a place of its own, "...experts.{}.gate_up_proj.weight" (`lorax.interop.peft.experts`).
    """

    def __init__(self, sources: Mapping[str, Source]):
        embeddings = (
            path for path in sources if re.fullmatch(r"(.*/)?(wte|embed)/embedding", path)
        )
        has_head = f"{HEAD}/kernel" in sources or "head/out/kernel" in sources
        self.tied = "" if has_head else next(embeddings, "").removesuffix("/embedding")
        if self.tied:
            linear = sources[f"{self.tied}/embedding"]._replace(name=f"{HEAD}.weight", axes=(1, 0))
            sources = {**sources, f"{HEAD}/kernel": linear}
        self.sources: dict[str, Source] = {}  # by "h/{}/attn/q/kernel"
        self.tensors: dict[str, dict[str, Source]] = {}  # by "transformer.h.{}.attn.c_attn.weight"
        self.experts: dict[str, int] = {}  # by "model.layers.{}.mlp.experts.gate_up_proj"
        older: dict[str, dict[str, Source]] = {}
        for path, source in sources.items():
            path = in_one_layer(path, source)
            packed = source if source.experts else source.other
            if packed is not None:
                if packed is not source:  # a file of transformers 4 may have it there
                    older.setdefault(source.name, {})[path] = source
                source = self._one_expert(packed) if packed.experts else packed
            self.sources[path] = source
            self.tensors.setdefault(source.name, {})[path] = source
        self.bare = {name.partition(".")[2]: name for name in self.tensors}
        self.older = {name: at for name, at in older.items() if name not in self.tensors}

    def _one_expert(self, packed: Source) -> Source:
        """The place of one expert's part of a tensor that has all of a layer."""
        if packed.name.endswith("_bias"):
            return packed._replace(name=packed.name.replace("experts.", "experts.{}."))
        self.experts[packed.name] = packed.experts
        container, _, name = packed.name.rpartition(".")
        return packed._replace(name=f"{container}.{{}}.{name}.weight", axes=(1, 0))

    def of(self, path: str) -> Source | None:
        """The place of one layer's parameter: "h/3/attn/q/kernel" -> its `Source`, or None."""
        for template, numbers in templates(path, "/"):
            if template in self.sources:
                source = self.sources[template]
                return source._replace(name=source.name.format(*numbers))
        return None

    def at(self, tensor: str) -> dict[str, Source]:
        """{path: Source} of the parameters in a tensor, in order along its last axis; {} for an
        unknown tensor. In a checkpoint of the bare model, names lack their first word."""
        for template, numbers in templates(tensor, "."):
            for name in (template, self.bare.get(template)):
                found = self.tensors.get(name) or self.older.get(name)
                if found:
                    sources = {
                        path.format(*numbers): source._replace(name=source.name.format(*numbers))
                        for path, source in found.items()
                    }
                    return dict(sorted(sources.items(), key=lambda item: _first(item[1].part)))
        return {}

    def module(self, path: str, where: str = "") -> str:
        """Hugging Face's module of an adaptable layer, "transformer.h.3.attn.c_attn" for
        "h/3/attn/q". Raises ValueError, which begins with `where`, for a layer that is not there.
        """
        for last in ("kernel", "embedding"):
            source = self.of(f"{path}/{last}")
            if source is not None:
                return source.name.removesuffix(".weight")
        known = [p.rpartition("/") for p in self.sources]
        known = [layer for layer, _, last in known if last in ("kernel", "embedding")]
        raise ValueError(f"{where}{path}: the base has no such layer; there is {', '.join(known)}")

    def below(self, module: str) -> list[str]:
        """All tensors of one module."""
        return [
            name.format(*numbers)
            for template, numbers in templates(module, ".")
            for name in self.tensors
            if name.startswith(f"{template}.")
        ]


def in_one_layer(path: str, source: Source | None) -> str:
    """A parameter's name in one layer, with "{}" for the layer's number if it is stacked:
    "h/attn/q/kernel" -> "h/{}/attn/q/kernel"."""
    if source is None or source.layer is not None or "{}" not in source.name:
        return path if source is None or source.layer is None else source.layer
    first, _, rest = path.partition("/")
    return f"{first}/{{}}/{rest}"


def templates(name: str, separator: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(template, numbers): the name itself, then with "{}" in place of one or two of its numbers,
    of a layer, or of a layer and its expert."""
    words = name.split(separator)
    places = [i for i, word in enumerate(words) if word.isdigit()]
    for count in range(3):
        for taken in itertools.combinations(places, count):
            put = ("{}" if i in taken else word for i, word in enumerate(words))
            yield separator.join(put), tuple(words[i] for i in taken)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def _first(part: slice | np.ndarray | None) -> int:
    """The first column of a part."""
    if part is None:
        return 0
    return part.start or 0 if isinstance(part, slice) else int(np.min(part))


def fused_width(sources: Mapping[str, Source]) -> int:
    """Columns of a fused tensor with these parameters, 0 if it is not fused."""
    return max(
        (source.width() for source in sources.values() if source.part is not None), default=0
    )


def place_as_json(source: Source) -> dict[str, Any]:
    """A source as JSON for a file's metadata."""
    columns = columns_as_json(source.part)
    return {"tensor": source.name, "axes": source.axes, "columns": columns}


def columns_as_json(part: slice | np.ndarray | None) -> str | list[int] | None:
    """A part of a tensor's last axis: "0:64", "1:64:2", [0, 3, 5], or None for all of it."""
    if isinstance(part, slice):
        step = "" if part.step in (None, 1) else f":{part.step}"
        return f"{part.start or 0}:{part.stop}{step}"
    return None if part is None else [int(i) for i in part]


def as_index(part) -> slice | np.ndarray:
    """A part, or its form from `columns_as_json`, as an index."""
    if isinstance(part, str):
        return slice(*map(int, part.split(":")))
    if part is None:
        return slice(None)
    return part if isinstance(part, slice) else np.asarray(part, int)
