"""What a step costs on a mesh: bytes of the arrays that are placed, and sums done by hand."""

import jax
import numpy as np
import pytest

from lorax import config, sharding, tree
from lorax.devices import DEVICES, Device, of_kind
from lorax.meshes import Shape
from lorax.models import shapes as architectures
from lorax.models.load import skeleton
from lorax.planning.shapes import quantised
from lorax.train import mesh_costs
from lorax.train.mesh_costs import Load

L, D, F, V, KV = 2, 64, 192, 512, 32
FIELDS = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": F,
}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", FIELDS)


def load_of(members=1, quant=False, **changes):
    """Eight rows of 16 tokens in float32 on the tiny Llama; 1,000 bytes are trained."""
    train = config.default().train
    train.update({"batch_size": 8, "seq_len": 16} | changes)
    base = skeleton("random:tiny")
    base = quantised(base, "nf4", False) if quant else base
    return Load(base, train, 16, False, members, members, 1000, 4000, 4)


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("shape", [Shape(1, 4, 2), Shape(2, 4, 1), Shape(1, 1, 8)])
def test_bytes_of_a_device_are_those_of_the_arrays_on_it(shape, quant):
    base = load_of(quant=quant).base
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), base.params)
    mesh = sharding.mesh(shape)
    placed = jax.device_put(params, sharding.shardings(base.params, base.sites, mesh))
    for device in mesh.devices.flat:
        parts = [s.data for x in jax.tree.leaves(placed) for s in x.addressable_shards
                 if s.device == device]  # fmt: skip
        assert sum(x.nbytes for x in parts) == mesh_costs.nbytes(base, shape)
    assert mesh_costs.nbytes(base, Shape()) == tree.nbytes(base.params)
    assert mesh_costs.nbytes(base, shape) < tree.nbytes(base.params) / 2


LAYER = 4 * (2 * D * D + 2 * D * KV + 3 * D * F)  # bytes of the kernels of one layer
HEAD = 4 * V * D


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("full", 1)])
def test_traffic_by_hand(remat, again):
    # A sweep of 4 members, two at a time, that gathers for each of two parts of a batch.
    load = load_of(4, remat=remat, accumulate=2)._replace(width=2)
    moved = mesh_costs.traffic(load, Shape(1, 4, 1))
    # Forward, backward and with remat again without down; the loss makes its gradients at once.
    once = L * (2 * LAYER + again * (LAYER - 4 * D * F)) + HEAD
    assert moved.weights == once * 3 / 4 * 2 * 2
    assert moved.gradients == 2 * 3 / 4 * 4 * 1000 * 2
    assert moved.activations == 3 / 4 * 4 * (4 * 8 * 16 / 4) * D  # rows of the embedding
    moved = mesh_costs.traffic(load, Shape(2, 1, 2))
    tokens = 2 * 8 * 16
    assert moved.weights == moved.gradients == 0
    # Of a layer: o and down forward, o again with remat, and q, k, v, gate, up backward.
    reduced = 2 * 1 / 2 * 4 * tokens * D * (L * (7 + again) + 2)  # and embedding and head
    assert moved.activations == reduced
    both = mesh_costs.traffic(load, Shape(1, 4, 2))
    assert both.weights == once / 2 * 3 / 4 * 2 * 2  # tensor leaves half of each weight to gather
    assert both.activations == reduced * 2 / 4 + 3 / 4 * 4 * (4 * 8 * 16 / 4) * D


def test_one_layer_is_gathered_at_a_time():
    load = load_of()
    assert mesh_costs.gathered(load.base, Shape(1, 4, 1)) == max(LAYER, HEAD)
    assert mesh_costs.gathered(load.base, Shape(1, 4, 2)) == max(LAYER, HEAD) // 2
    assert mesh_costs.gathered(load.base, Shape(8, 1, 1)) == 0


FLAT = Device(0, 1e12, 1e12, 1e15, "", 8, 8, 1e9, 1e8, "")


def test_time_is_a_roofline_of_the_same_sums():
    load = load_of()
    once = mesh_costs.seconds(load, Shape(), FLAT)
    assert once.compute == 2 * 2 * (L * LAYER + HEAD) / 4 * 8 * 16 / 1e12
    assert once.communication == 0 and once.memory == 2 * (L * LAYER + HEAD) / 1e15
    divided = mesh_costs.seconds(load, Shape(1, 4, 2), FLAT)
    assert divided.compute == pytest.approx(once.compute / 8)
    moved = mesh_costs.traffic(load, Shape(1, 4, 2))
    assert divided.communication == pytest.approx(sum(moved) / 1e9)
    assert divided.overlapped == divided.communication
    assert divided.apart == divided.communication + divided.compute


def test_what_leaves_a_host_takes_the_network():
    assert mesh_costs.bandwidth(FLAT, 1, 8) == mesh_costs.bandwidth(FLAT, 2, 4) == 1e9
    assert mesh_costs.bandwidth(FLAT, 1, 16) == 8e8  # eight cards of a host together
    assert mesh_costs.bandwidth(FLAT, 4, 8) == 2e8 and mesh_costs.bandwidth(FLAT, 8, 4) == 1e8


def test_members_spread_first_and_the_base_is_divided_where_it_must_be():
    h200 = DEVICES["h200"]
    ranked = lambda members, devices=8: mesh_costs.ranked(load_of(members), devices, h200)
    assert ranked(8)[0] == Shape(8, 1, 1) and ranked(80)[0] == Shape(8, 1, 1)
    assert all(shape.size <= 8 for shape in ranked(3))
    assert {shape.tensor for shape in ranked(8)} == {1, 2}  # two heads of keys
    assert {shape.fsdp for shape in ranked(8, 64)} == {1, 2, 4, 8}  # eight rows
    # Where computing takes longest, the smallest fsdp that fits comes first.
    slow = h200._replace(full=1e9)
    assert mesh_costs.ranked(load_of(8), 8, slow)[:3] == [
        Shape(8, 1, 1), Shape(4, 2, 1), Shape(2, 4, 1)
    ]  # fmt: skip


def test_the_fastest_mesh_that_fits_is_chosen():
    load, slow = load_of(8), DEVICES["h200"]._replace(full=1e9)
    within = lambda most: lambda shape: mesh_costs.estimate(load, shape) <= most
    choose = lambda most: mesh_costs.choose(load, 8, slow, within(most))
    sizes = {shape: mesh_costs.estimate(load, shape) for shape in mesh_costs.shapes(load, 8)}
    assert choose(max(sizes.values())) == Shape(8, 1, 1) and choose(min(sizes.values()) - 1) is None
    assert choose(sizes[Shape(4, 2, 1)]) == Shape(4, 2, 1)
    whole, kept = (mesh_costs.estimate(load_of(8, remat=r), Shape()) for r in ("full", "none"))
    assert tree.nbytes(load.base.params) + 8 * load.state < whole < kept


def test_a_base_that_fits_is_not_divided():
    load, slow = load_of(8), DEVICES["h200"]._replace(full=1e9)
    needs = lambda shape: mesh_costs.estimate(load._replace(members=1), shape)
    divide = lambda limit: mesh_costs.divide(load, 8, slow, limit)
    assert divide(needs(Shape())) is None and mesh_costs.divide(load, 1, slow, 1) is None
    assert divide(needs(Shape()) - 1) == Shape(4, 2, 1)
    assert divide(1) == min(mesh_costs.shapes(load, 8), key=needs)
    few = mesh_costs.divide(load_of(1), 16, DEVICES["h200"], 1, all_=True)
    assert few.size == 16  # of several processes none may be without a part


def test_an_evaluation_passes_once_and_reduces_nothing_of_gradients():
    load = load_of(remat="full")._replace(backward=False)
    moved = mesh_costs.traffic(load, Shape(1, 4, 1))
    assert moved[:2] == ((L * LAYER + HEAD) * 3 / 4, 0)
    assert mesh_costs.traffic(load, Shape(1, 1, 2)).activations == 4 * 8 * 16 * D * (L * 2 + 1)
    copied = load_of()._replace(copied=True)
    moved = mesh_costs.traffic(copied, Shape(1, 8, 1))
    assert moved == (0, 2 * 7 / 8 * 1000, 0)  # no weights
    alone = mesh_costs.seconds(copied, Shape(), FLAT).compute
    assert mesh_costs.seconds(copied, Shape(1, 8, 1), FLAT).compute == alone / 8


def test_devices_are_known_by_the_name_that_jax_has():
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "TPU v5 lite": "tpu-v5e"}
    names |= {"TPU v5": "tpu-v5p", "cpu": "cpu", "NVIDIA H100 80GB HBM3": "h100", "other": "h100"}
    assert {kind: of_kind(kind) for kind in names} == {k: DEVICES[v] for k, v in names.items()}
