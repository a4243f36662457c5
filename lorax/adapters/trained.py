"""`Trained`: one interface for trained adapters of any method, from any file."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from lorax import methods
from lorax.adapters import binding, merging, states
from lorax.adapters.training import factored
from lorax.interop.adapter import Adapter, Dense, Factors
from lorax.models import Base


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A trained adapter on its base.

    base: the model that it was trained on. adapter: the update as low-rank factors with any weights
    trained in full, or None for a method whose update has no factors. method, state: the method and
    its arrays; None for LoRA and DoRA from files, which hold only factors.
    """

    base: Base
    adapter: Adapter | None
    method: methods.Method | None = None
    state: methods.State | None = None

    def __repr__(self):
        return f"Trained({self.name!r} on {self.base.name!r}, {len(self.updates)} matrices)"

    @property
    def name(self) -> str:
        """The method's name, as for `lorax.method`."""
        if self.method is not None:
            return self.method.name
        return "dora" if self.adapter.has_lengths else "lora"

    @functools.cached_property
    def content(self) -> Adapter | Dense:
        """Updates by layer, other changes, and facts in words."""
        if self.adapter is not None:
            return self.adapter
        return states.dense(self.base, self.method, self.state)

    @property
    def updates(self) -> dict[str, Factors] | dict[str, np.ndarray]:
        """{layer: `Factors` of dW, or dW (in, out) float32 for a method without factors}; {} for a
        method that does not change weights, such as a prefix."""
        return self.content.updates

    def bind(self) -> dict:
        """The base's parameters with the update in them, for `lorax.apply`."""
        if self.adapter is not None:
            return binding.bind(self.base, self.adapter)
        return self.method.bind(*self.state, self.base.params, sites=self.base.sites)

    def merge(self, dtypes: Mapping[str, np.dtype] | None = None) -> merging.Merged:
        """Plain parameters with the update added. dtypes: {path: dtype} to round the sums of
        low-rank updates to, if not the base's.

        Raises ValueError for a method that does not change weights, and as `adapters.merge`.
        """
        if self.adapter is not None:
            return merging.merge(self.base, self.adapter, dtypes)
        params = methods.merge(self.method, self.state, self.base.params, self.base.sites)
        return merging.Merged(params, merging.replaced(self.base, params), {})

    @property
    def whole(self) -> set[str]:
        """Paths of the parameters that were trained in full."""
        if self.adapter is not None:
            return set(self.adapter.weights)
        return set(methods.joined(self.state.trainable))


def from_training(base: Base, method: methods.Method, state: methods.State) -> Trained:
    """The `Trained` of a method and state after training on a base."""
    adapter = None if method.factors is None else factored(base, method, state)
    return Trained(base, adapter, method, state)
