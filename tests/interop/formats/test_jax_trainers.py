"""Adapters of keras-hub, gemma, tunix and MaxText, in containers that h5py and orbax wrote, against
dense references."""

import json

import numpy as np
import pytest
from language_files import dense, draw, keras_file, nested, orbax_files

from lorax.interop import formats

R, D, N, H, F = 3, 16, 4, 5, 24  # rank, width, heads, of a head, of the feed-forward part


def check(update, equation, a, b, s=1.0):
    """That dW is s times the einsum's kernel as a matrix."""
    want = np.einsum(equation, a.astype(np.float64), b).reshape(update.shape)
    np.testing.assert_allclose(dense(update), s * want, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------- keras-hub


def test_keras_hub_has_a_lora_for_each_head(tmp_path):
    plain, b = draw(D, R), draw(R, H)
    by_head, second = draw(N, D, R), draw(D, N, R)
    layers = {2: (plain, b), 10: (by_head, b), 11: (second, b)}
    found = formats.read(keras_file(tmp_path, layers))
    assert found.format == "keras-hub" and found.config == {"rank": R}
    assert "by index" in found.notes[0]
    first, *rest = found.updates
    assert [one.layer for one in found.updates] == [
        "2",
        *(f"{i}.{n}" for i in (10, 11) for n in range(N)),
    ]
    check(first, "dr,rh->dh", plain, b)
    for n, update in enumerate(rest[:N]):
        check(update, "dr,rh->dh", by_head[n], b)
        assert f"{N} heads" in update.warnings[0] and update.rank == R
    for n, update in enumerate(rest[N:]):
        check(update, "dr,rh->dh", second[:, n], b)


def test_keras_hubs_bfloat16(tmp_path):
    import ml_dtypes

    h5py = pytest.importorskip("h5py")
    a, b = draw(D, R).astype(ml_dtypes.bfloat16), draw(R, H)
    file = keras_file(tmp_path, {0: (a.view("V2"), b)})
    with h5py.File(file, "r+") as opened:
        opened["lora/0/vars/lora_kernel_a"].attrs["dtype"] = "bfloat16"
    (update,) = formats.read(file).updates
    assert update.dtype == "BF16/F32"
    check(update, "dr,rh->dh", a.astype(np.float32), b)


def test_keras_hub_does_not_read_other_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    file = keras_file(tmp_path, {0: (draw(D, R), draw(R, H))})
    (tmp_path / "other").write_bytes(bytes(4 * R * H))
    for place in ("external", "link"):
        with h5py.File(file, "r+") as opened:
            group = opened["lora/0/vars"]
            del group["lora_kernel_b"]
            if place == "link":
                group["lora_kernel_b"] = h5py.ExternalLink("other", "/x")
            else:
                external = [(str(tmp_path / "other"), 0, 4 * R * H)]
                group.create_dataset("lora_kernel_b", (R, H), np.float32, external=external)
        with pytest.raises(ValueError, match="lora_kernel_b is no tensor of this file"):
            formats.read(file)


# ------------------------------------------------------------------------------------------- orbax


def test_gemma_has_no_alpha_and_flattens_axes(tmp_path):
    import ml_dtypes

    q = draw(D, R).astype(ml_dtypes.bfloat16), draw(R, N, H).astype(ml_dtypes.bfloat16)
    out, block = (draw(N, H, R), draw(R, D)), (draw(N, H, R), draw(N, R, H))
    odd = draw(2, H, R), draw(R, F)
    tree = nested(
        layer_0__attn__q_einsum__lora__a=q[0],
        layer_0__attn__q_einsum__lora__b=q[1],
        layer_0__attn__attn_vec_einsum__lora__a=out[0],
        layer_0__attn__attn_vec_einsum__lora__b=out[1],
        layer_0__gate__lora__a=block[0],
        layer_0__gate__lora__b=block[1],
        layer_0__mlp__odd__lora__a=odd[0],
        layer_0__mlp__odd__lora__b=odd[1],
        layer_0__norm__scale=draw(D),
    )
    found = formats.read(orbax_files(tmp_path / "gemma", {"params": tree}))
    by_layer = {update.layer: update for update in found.updates}
    assert found.format == "gemma" and "1 other arrays" in found.notes[0]
    first = by_layer["layer_0.attn.q_einsum"]
    assert first[1:7] == ("LoRA", (D, N * H), R, 1.0, "1: gemma has no alpha", "BF16")
    check(first, "dr,rnh->dnh", *(x.astype(np.float32) for x in q))
    check(by_layer["layer_0.attn.attn_vec_einsum"], "nhr,rd->nhd", *out)
    assert by_layer["layer_0.attn.attn_vec_einsum"].warnings == ()
    check(by_layer["layer_0.mlp.odd"], "nhr,rf->nhf", *odd)
    assert "one input" in by_layer["layer_0.mlp.odd"].warnings[0]
    for n in range(N):
        check(by_layer[f"layer_0.gate.{n}"], "ir,rh->ih", block[0][n], block[1][n])


def test_tunix_has_no_alpha_in_the_arrays(tmp_path):
    q, up, out = (draw(D, R), draw(R, N, H)), (draw(D, R), draw(R, F)), (draw(N, H, R), draw(R, D))
    experts, one_b = (draw(2, D, R), draw(2, R, F)), (draw(2, D, R), draw(R, F))
    leaves = dict(attn__q_proj__w=q, mlp__up_proj__kernel=up, attn__o_proj__w=out, moe__wi=experts)
    leaves["mlp__gate_proj__w"] = one_b
    tree = {}
    for name, pair in leaves.items():
        for side, x in zip("ab", pair, strict=True):
            tree[f"layers__0__{name}_lora_{side}__value"] = x
    run = tmp_path / "run" / "100"
    orbax_files(run / "model_params", nested(**tree))
    orbax_files(run / "optimizer_state", nested(mu__layers__0__attn__q_proj__w_lora_a=draw(D, R)))
    found = formats.read(tmp_path / "run")
    assert found.format == "tunix"
    by_layer = {update.layer.removeprefix("layers.0."): update for update in found.updates}
    names = ["attn.o_proj", "attn.q_proj", "mlp.gate_proj.0", "mlp.gate_proj.1", "mlp.up_proj"]
    assert [*by_layer] == [*names, "moe.wi.0", "moe.wi.1"]
    check(by_layer["attn.q_proj"], "dr,rnh->dnh", *q)
    check(by_layer["mlp.up_proj"], "dr,rf->df", *up)
    check(by_layer["attn.o_proj"], "nhr,rd->nhd", *out)
    for e in range(2):
        check(by_layer[f"moe.wi.{e}"], "dr,rf->df", experts[0][e], experts[1][e])
        check(by_layer[f"mlp.gate_proj.{e}"], "dr,rf->df", one_b[0][e], one_b[1])
    assert {one.source for one in found.updates} == {"default 1: the file has none"}
    assert all("lora_alpha is not known" in one.warnings[0] for one in found.updates)


@pytest.mark.parametrize("axis", [0, 1])
def test_maxtexts_layers_lie_on_an_axis(tmp_path, axis):
    a, b = draw(D, 2, R), draw(R, 2, N, H)
    stored = (a, b) if axis else (a.swapaxes(0, 1), b.swapaxes(0, 1))
    place = "params__params__decoder__layers__self_attention__query__kernel_lora_"
    tree = nested(**{f"{place}{side}": x for side, x in zip("ab", stored, strict=True)})
    found = formats.read(orbax_files(tmp_path / "ck", tree, lora={"lora_rank": R, "lora_alpha": 6}))
    assert found.format == "MaxText" and found.config == {"lora_rank": R, "lora_alpha": 6}
    for i, update in enumerate(found.updates):
        assert update.layer == f"decoder.layers.self_attention.query.{i}"
        assert (update.scale, update.source) == (2.0, "config lora_alpha / lora_rank")
        check(update, "dr,rnh->dnh", a[:, i], b[:, i], 2.0)


def test_maxtexts_older_files(tmp_path):
    a, b = draw(N, 2, H, R), draw(R, 2, D)
    tree = nested(decoder__layers__self_attention__out={"lora_a.kernel": a, "lora_b.kernel": b})
    orbax_files(tmp_path / "0" / "items", {"params": tree, "opt_state": {}, "step": np.array(0)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": 6}))
    found = formats.read(tmp_path)
    assert found.format == "MaxText" and len(found.updates) == 2
    for i, update in enumerate(found.updates):
        assert update.source == "config lora_alpha / r"
        check(update, "nhr,rd->nhd", a[:, i], b[:, i], 2.0)


def test_names_that_lead_elsewhere_are_refused(tmp_path):
    folder = orbax_files(tmp_path / "ck", {"w": draw(D, D)})
    (folder / "_METADATA").write_text('{"tree_metadata": {"x": {"key_metadata": [{"key": ".."}]}}}')
    with pytest.raises(ValueError, match="not the name of an array"):
        formats.read(folder)


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path):
    folder = orbax_files(tmp_path / "ck", {"w": draw(D, D)})
    with pytest.raises(ValueError, match="no adapter in it"):
        formats.read(folder)
