"""MLX's adapters, by the layout of mlx_lm/tuner, against dense references."""

import numpy as np
import pytest
from language_files import dense, directory, draw

from lorax.interop import formats

CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0}}


def written(path, tensors, config=CONFIG):
    return directory(path, tensors, config, "adapters.safetensors")


def test_linear_layers_and_embeddings_have_our_orientation(tmp_path):
    tensors = {"model.layers.3.self_attn.q_proj.lora_a": draw(12, 4).astype(np.float16)}
    tensors["model.layers.3.self_attn.q_proj.lora_b"] = draw(4, 8).astype(np.float16)
    tensors |= {"model.embed_tokens.lora_a": draw(30, 4), "model.embed_tokens.lora_b": draw(4, 12)}
    found = formats.read(written(tmp_path, tensors))
    assert found.format == "MLX" and found.notes == ("the last 2 layers of the base were adapted",)
    by_layer = {update.layer: update for update in found.updates}
    q = by_layer["model.layers.3.self_attn.q_proj"]
    assert q[1:7] == ("LoRA", (12, 8), 4, 20.0, "config lora_parameters.scale", "F16")
    assert by_layer["model.embed_tokens"].shape == (30, 12)
    for layer, update in by_layer.items():
        a, b = (tensors[f"{layer}.lora_{side}"].astype(np.float64) for side in "ab")
        np.testing.assert_allclose(dense(update), 20 * a @ b, rtol=1e-6)


def test_dora_has_lengths_of_columns_and_of_an_embedding_of_rows(tmp_path):
    tensors = {"q.lora_a": draw(12, 4), "q.lora_b": draw(4, 8), "q.m": draw(8)}
    tensors |= {"embed.lora_a": draw(30, 4), "embed.lora_b": draw(4, 12), "embed.m": draw(30)}
    found = formats.read(written(tmp_path, tensors, CONFIG | {"fine_tune_type": "dora"}))
    embed, q = sorted(found.updates)
    assert (q.kind, embed.kind) == ("DoRA", "DoRA")
    np.testing.assert_array_equal(q.read().m, tensors["q.m"])
    assert embed.read().m is None and "rows" in embed.warnings[0]
    assert found.beside == {"embed.m": (30,)}


def test_experts_lie_the_other_way_round(tmp_path):
    a, b = draw(3, 4, 12), draw(3, 8, 4)
    tensors = {"mlp.switch_mlp.up_proj.lora_a": a, "mlp.switch_mlp.up_proj.lora_b": b}
    updates = formats.read(written(tmp_path, tensors)).updates
    assert [one.layer for one in updates] == [f"mlp.switch_mlp.up_proj.{e}" for e in range(3)]
    for e, update in enumerate(updates):
        assert (update.shape, update.rank) == ((12, 8), 4)
        want = 20 * (b[e].astype(np.float64) @ a[e]).T
        np.testing.assert_allclose(dense(update), want, rtol=1e-6, atol=1e-6)


def test_scale_is_not_divided_by_the_rank_but_in_early_2024(tmp_path):
    tensors = {"q.lora_a": draw(12, 4), "q.lora_b": draw(4, 8)}
    early = {"lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16.0}}
    (update,) = formats.read(written(tmp_path, tensors, early)).updates
    assert (update.scale, update.source) == (40.0, "config scale * alpha / rank")
    assert "early 2024" in update.warnings[0]
    (tmp_path / "adapter_config.json").unlink()
    (update,) = formats.read(tmp_path).updates
    assert (update.scale, update.source) == (1.0, "default 1: the file has none")
    assert update.warnings


def test_full_fine_tuning_has_no_updates(tmp_path):
    found = formats.read(written(tmp_path, {"q.weight": draw(8, 12)}, {"fine_tune_type": "full"}))
    assert found.updates == () and found.beside == {"q.weight": (8, 12)} and found.notes


@pytest.mark.parametrize(
    "tensors, config, named",
    [
        ({"q.lora_a": (12, 4), "q.lora_b": (5, 8)}, CONFIG, r"q: q.lora_a \(12, 4\), q.lora_b"),
        ({"q.lora_a": (12, 4)}, CONFIG, "q: needs both"),
        ({"q.lora_a": (12, 4), "q.lora_b": (4, 8), "q.lora_a_scales": (4,)}, CONFIG, "_scales"),
        ({"q.lora_a": (2, 4, 3), "q.lora_b": (3, 4, 3)}, CONFIG, "stacks of 2 and 3"),
        (
            {"q.lora_a": (12, 4), "q.lora_b": (4, 8)},
            {"lora_parameters": {"scale": "20"}},
            "lora_parameters.scale: '20' given",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, tensors, config, named):
    written(tmp_path, {name: draw(*shape) for name, shape in tensors.items()}, config)
    with pytest.raises(ValueError, match=named):
        formats.read(tmp_path)
