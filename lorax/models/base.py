"""`Base`: a frozen model, and the names of its layers.

One weight has three names: a layer ("h/3/attn/q"), the parameter that holds it, stacked with the
other layers ("h/attn/q/kernel", at index 3), and the tensor that Hugging Face stores it in
("transformer.h.3.attn.c_attn.weight", columns 0 to 767). `Base` translates between them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import linen as nn

from lorax import gather, ops, tree
from lorax.interop.adapter import Unread
from lorax.interop.hf import Source
from lorax.interop.places import Places, in_one_layer
from lorax.models.families import FAMILIES, Traits, traits
from lorax.vocabulary import Vocabulary


class Part(NamedTuple):
    """One layer's part of a parameter. path: the parameter's path; index: along its leading layer
    axes, () for a parameter that is not stacked."""

    path: str
    index: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Base:
    """A frozen model.

    module: Linen module; params: its "params" collection, arrays, `jax.ShapeDtypeStruct`s
    (`skeleton`) or quantised leaves; config: the family's Config; vocabulary: its tokenizer with
    its special ids, or None; sites: {path: `ops.Site`} of every adaptable parameter; family:
    Hugging Face's model_type; name: as passed to `load`; hashed: returns `sha256`, which is
    computed only if it is asked for; fresh: paths of a head that the files lack and that was
    initialised at random; directory: where the files are, None for random weights; traits: the
    model's inputs and outputs, by default those of its family.
    """

    module: nn.Module
    params: dict
    config: object
    vocabulary: Vocabulary | None
    sites: dict[str, ops.Site]
    family: str
    name: str
    hashed: Callable[[], str] = str
    fresh: tuple[str, ...] = ()
    directory: Path | None = None
    traits: Traits | None = None

    def __post_init__(self):
        if self.traits is None:
            known = self.family in FAMILIES
            object.__setattr__(
                self, "traits", traits(self.family, self.config) if known else Traits()
            )

    def __repr__(self):
        leaves = tree.flatten(self.params).values()
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        size = tree.nbytes(self.params)
        size = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        return (
            f"Base({self.name!r}, {self.family}, {tree.count(self.params):,} parameters, {size}, "
            f"{dtypes})"
        )

    def replace(self, **changes) -> "Base":
        """The same base with other fields."""
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the weight files, of the arrays of a user's own module, or "random" for random
        weights. Raises ValueError if a file has changed since it was loaded."""
        return self.hashed()

    @property
    def tokenizer(self):
        """The `tokenizers.Tokenizer`, or None."""
        return self.vocabulary and self.vocabulary.tokenizer

    # ------------------------------------------------------------------------------------- reads

    @property
    def causal(self) -> bool:
        """Whether it is a language model (see `Traits`)."""
        return self.traits.causal

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one input array, None for a model that reads tokens."""
        return self.traits.input_shape

    @property
    def positions(self) -> int | None:
        """The longest input in tokens, None without a limit."""
        return self.traits.positions

    # -------------------------------------------------------------------------- table of layers

    @functools.cached_property
    def layers(self) -> dict[str, Part]:
        """{layer: its part of a parameter} of every adaptable matrix:
        "h/3/attn/q" -> ("h/attn/q/kernel", (3,))."""
        return {
            layer: Part(path, index)
            for path, layers in self._layers_of.items()
            for layer, index in layers.items()
        }

    def layers_of(self, path: str) -> dict[str, tuple[int, ...]]:
        """{layer: its index in the stack} of an adaptable parameter:
        "h/attn/q/kernel" -> {"h/0/attn/q": (0,), ...}."""
        return self._layers_of[path]

    @functools.cached_property
    def parts(self) -> dict[str, Part]:
        """{path with the layer number: its part} of every parameter: "h/3/attn/q/bias" ->
        ("h/attn/q/bias", (3,)); a parameter that is not stacked keeps its path."""
        return {
            name: Part(path, index)
            for path, parts in self._parts_of.items()
            for name, index in parts.items()
        }

    def parts_of(self, path: str, value=None) -> dict:
        """{path with the layer number: its index in the stack} of any parameter. With `value`, an
        array with the parameter's layer axes: {path with the layer number: its slice of it}."""
        parts = self._parts_of[path]
        return parts if value is None else {name: value[index] for name, index in parts.items()}

    @property
    def sources(self) -> Mapping[str, Source]:
        """{parameter path: its place in Hugging Face's tensors}."""
        return self.traits.sources

    @functools.cached_property
    def places(self) -> Places:
        """Parameters and Hugging Face's tensors by layer name."""
        return Places(self.sources)

    @functools.cached_property
    def _layers_of(self) -> dict[str, dict[str, tuple[int, ...]]]:
        flat = tree.flatten(self.params)
        return {
            path: {
                name.rpartition("/")[0]: index
                for name, index in self._numbered(path, flat[path].shape[: site.stack]).items()
            }
            for path, site in self.sites.items()
        }

    @functools.cached_property
    def _parts_of(self) -> dict[str, dict[str, tuple[int, ...]]]:
        layer = lambda path: in_one_layer(path, self.sources.get(path))
        return {
            path: self._numbered(path, leaf.shape[: layer(path).count("{}")])
            for path, leaf in tree.flatten(self.params).items()
        }

    def _numbered(self, path: str, axes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """{the parameter's name in one layer: index along its layer axes}."""
        name = in_one_layer(path, self.sources.get(path))
        if axes and "{}" not in name:  # not of a known family: assembled by hand
            first, _, rest = path.partition("/")
            name = "/".join((first, *["{}"] * len(axes), rest))
        return {name.format(*index): index for index in np.ndindex(*axes)}


def kernel(base: Base, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    """(in, out) float32: one layer of an adaptable weight, decoded if it is quantised. index: along
    the parameter's layer axes, as in `Base.layers`."""
    leaf = tree.flatten(base.params)[path]
    return np.asarray(gather.matrix(leaf, base.sites[path], index), np.float32)


def kernels(base: Base) -> Unread:
    """{layer: (in, out) float32} of every adaptable weight, each read when it is asked for.

    Stacked weights are split: "h/attn/q/kernel" (L, in, out) gives "h/0/attn/q", "h/1/attn/q"...
    """
    flat = tree.flatten(base.params)
    size = lambda path: base.sites[path].matrix_shape(flat[path].shape)[1:]
    places = base.layers.items()
    readers = {layer: functools.partial(kernel, base, path, i) for layer, (path, i) in places}
    return Unread(readers, {layer: size(path) for layer, (path, _) in places})
