"""How a base is divided over a mesh: by its words, on whole blocks, and never an axis that does not
divide."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lorax import ops, quant, sharding, tree
from lorax.models.load import skeleton
from lorax.sharding import Shape


def llama(directory, **changes):
    """A Llama of shapes alone, whose axes 4 x 2 devices divide."""
    fields = dict(
        model_type="llama", vocab_size=64, hidden_size=128, intermediate_size=256,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields | changes))
    return skeleton(str(directory))


def specs_of(base, shape):
    return tree.flatten(sharding.specs(base.params, base.sites, shape))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fsdp=4,tensor=2", Shape(1, 4, 2)),
        (" tensor = 2 , member=3", Shape(3, 1, 2)),
        ("fsdp=1", Shape()),
    ],
)
def test_a_mesh_is_read_from_text(text, shape):
    assert sharding.parse(text) == shape
    assert sharding.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "data=2", "fsdp=2,fsdp=2", "fsdp=2.5", "4"])
def test_text_that_is_no_mesh_is_named(text):
    with pytest.raises(ValueError, match=r"train\.mesh: .* given, must be auto or sizes of member"):
        sharding.parse(text)


def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(ValueError, match="fsdp=4,tensor=4 needs 16 devices, and there are 8"):
        sharding.mesh(Shape(1, 4, 4))


def test_every_word_has_its_rule(tmp_path):
    specs = specs_of(llama(tmp_path), Shape(1, 4, 2))
    assert any(path.startswith("lm_head") for path in specs)
    for path, spec in specs.items():
        word = path.split("/")[-2]
        if word in ("q", "k", "v", "gate", "up"):
            assert spec == P(None, "fsdp", "tensor"), path
        elif word in ("o", "down"):
            assert spec == P(None, "tensor", "fsdp"), path
        elif word == "lm_head":
            assert spec == P("fsdp", "tensor")
        elif path.endswith("embedding"):
            assert spec == P("tensor", "fsdp")
        else:
            assert path.endswith("scale") and spec == P(), path


def test_an_axis_that_does_not_divide_is_left_out(tmp_path):
    specs = specs_of(llama(tmp_path, vocab_size=63), Shape(1, 4, 2))
    embedding = next(spec for path, spec in specs.items() if path.endswith("embedding"))
    assert embedding == P(None, "fsdp")


def test_large_arrays_without_a_site_are_divided_too():
    shape = jax.ShapeDtypeStruct
    params = {
        "mask": {"w": shape((2048, 4096), np.float32)},
        "norm": {"w": shape((64,), np.float32)},
    }
    assert sharding.specs(params, {}, Shape(1, 4, 2)) == {
        "mask": {"w": P(None, "fsdp")},
        "norm": {"w": P()},
    }


def test_axes_of_heads_and_of_windows():
    sites = {
        "q/kernel": ops.Site("linear", 0, (0,), (1, 2)),
        "conv/kernel": ops.Site("conv", 0, (0, 1, 2), (3,)),
    }
    shape = lambda *n: {"kernel": jax.ShapeDtypeStruct(n, np.float32)}
    params = {"q": shape(64, 3, 32), "conv": shape(4, 4, 8, 16)}
    assert tree.flatten(sharding.specs(params, sites, Shape(1, 4, 2))) == {
        "q/kernel": P("fsdp", None, "tensor"),  # 2 devices don't divide 3 heads
        "conv/kernel": P(None, None, "fsdp", "tensor"),
    }


@pytest.mark.parametrize("double", [False, True])
def test_codes_are_divided_on_whole_rows_and_blocks(tmp_path, double):
    base = llama(tmp_path)
    coded = jax.eval_shape(
        lambda p: quant.quantize(p, "nf4", double, sites=base.sites), base.params
    )
    base = base.replace(params=coded)
    specs = specs_of(base, Shape(1, 4, 2))
    leaf = specs[next(path for path in specs if path.endswith("down/kernel"))]
    assert leaf.codes == P(None, "fsdp", "tensor")
    assert (leaf.absmax.codes if double else leaf.absmax) == leaf.codes
    structure = jax.tree.structure
    assert structure(sharding.specs(base.params, base.sites, Shape(1, 4, 2))) == structure(coded)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((512, 6), P("tensor", "fsdp")),
        ((512, 7), P(None, "fsdp")),
        ((320, 6), P("tensor", None)),  # five blocks
        ((100, 32), P("tensor")),  # 16 outputs, 25 blocks: no axis of outputs
        ((100, 30), P(None)),
    ],
)
def test_codes_that_the_mesh_does_not_divide(shape, spec):
    leaf = quant.quantise(jnp.ones(shape))
    divided = leaf.specs(("fsdp", "tensor"), Shape(1, 4, 2)._asdict())
    assert divided.codes == divided.absmax == spec


def test_arrays_go_to_their_devices():
    mesh = sharding.mesh(Shape(1, 4, 2))
    sites = {"up/kernel": ops.Site("linear", 0, (0,), (1,))}
    params = {"up": {"kernel": jnp.arange(64.0).reshape(8, 8)}}
    placed = jax.device_put(params, sharding.shardings(params, sites, mesh))
    kernel = placed["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(kernel, params["up"]["kernel"])
