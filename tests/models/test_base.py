"""The table of a base: layer <-> parameter <-> tensor, and what a base says of itself."""

import numpy as np
import pytest

from lorax import models, tree
from lorax.models.base import Part
from lorax.models.load import skeleton

NAMES = ("gpt2-nano", "random:llama-7b", "random:falcon-7b", "random:roberta-base")
NAMES += ("random:deberta-v2-xxlarge", "random:mnist-lenet", "random:mnist-fc")


@pytest.fixture(scope="module", params=NAMES)
def base(request):
    return skeleton(request.param)


def test_every_layer_has_its_part_and_every_parameter_its_layers(base):
    flat = tree.flatten(base.params)
    for layer, part in base.layers.items():
        assert base.layers_of(part.path)[layer] == part.index
        assert len(part.index) == base.sites[part.path].stack
        name = f"{layer}/{part.path.rpartition('/')[2]}"
        assert base.parts[name] == part and base.parts_of(part.path)[name] == part.index
    sizes = dict.fromkeys(flat, 0)
    for part in base.parts.values():
        sizes[part.path] += np.prod(flat[part.path].shape[len(part.index) :], dtype=np.int64)
    assert sizes == {path: leaf.size for path, leaf in flat.items()}
    assert {*base.sources} == {*flat}


def test_every_layer_lies_in_a_tensor_that_leads_back_to_it(base):
    for layer, part in base.layers.items():
        last = part.path.rpartition("/")[2]
        source = base.places.of(f"{layer}/{last}")
        assert source.name == base.sources[part.path].name.format(*part.index)
        assert f"{layer}/{last}" in base.places.at(source.name)


def test_parts_of_a_value_are_its_layers():
    base = models.load("gpt2-nano")
    assert base.layers["h/3/attn/q"] == Part("h/attn/q/kernel", (3,))
    assert base.layers["wte"] == Part("wte/embedding", ())
    bias = tree.flatten(base.params)["h/attn/q/bias"]
    parts = base.parts_of("h/attn/q/bias", np.asarray(bias))
    assert [*parts] == [f"h/{i}/attn/q/bias" for i in range(4)]
    np.testing.assert_array_equal(np.stack([*parts.values()]), bias)
    kernels = models.kernels(base)
    assert kernels.keys() == base.layers.keys()
    np.testing.assert_array_equal(
        kernels["h/2/mlp/up"], tree.flatten(base.params)["h/mlp/up/kernel"][2]
    )


def test_what_a_base_reads(base):
    images = base.name.startswith("random:mnist")
    assert (base.input_shape is not None) == images
    assert base.causal == (base.family in ("gpt2", "llama", "falcon"))
    assert (base.positions is None) == images
    assert base.traits.outputs == (10 if images else None)


def test_a_base_prints_short():
    base = models.load("gpt2-nano")
    assert repr(base) == "Base('gpt2-nano', gpt2, 957,184 parameters, 3.8 MB, float32)"
    large = skeleton("random:llama-7b", param_dtype="bfloat16")
    assert repr(large).endswith("6,738,415,616 parameters, 13.48 GB, bfloat16)")
    assert repr(base.replace(name="other")).startswith("Base('other'")
