"""`lorax.xray`: what is printed of files is what their dense updates say."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from small_files import WIDTH, kohya

from lorax import spectrum
from lorax.analysis.measures import overlap, sums
from lorax.interop import formats
from lorax.interop.adapter import Factors
from lorax.xray import defects, keeping, together
from lorax.xray.__main__ import main
from lorax.xray.command import named
from lorax.xray.measured import measure, measure_one, unread


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def run(*arguments):
    return main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------ of one matrix


def test_singular_values_without_directions_are_those_of_the_dense_product():
    a, b = draw(40, 6), draw(6, 24) * 10.0 ** -np.arange(6)[:, None]
    expected = np.linalg.svd(-0.5 * a.astype(np.float64) @ b, compute_uv=False)[:6]
    np.testing.assert_allclose(spectrum.factor_sigma(a, b, -0.5), expected, rtol=0, atol=1e-8)
    wide = draw(4, 9), draw(9, 5)  # a rank above both sizes
    dense = np.linalg.svd(wide[0].astype(np.float64) @ wide[1], compute_uv=False)
    np.testing.assert_allclose(spectrum.factor_sigma(*wide), dense, rtol=1e-7)
    padded = np.pad(a, ((0, 0), (0, 3))), np.pad(b, ((0, 3), (0, 0)))  # no a^T a = l l^T
    np.testing.assert_allclose(
        spectrum.factor_sigma(*padded, -0.5), [*expected, 0, 0, 0], rtol=0, atol=1e-8
    )


def test_singular_values_of_many_rows_and_of_numbers_that_are_none():
    """The last block of rows is shorter than the others."""
    a, b = draw(2 * spectrum.BLOCK + 5, 3), draw(3, 40)
    dense = a.astype(np.float64) @ b
    expected = np.linalg.svd(dense, compute_uv=False)[:3]
    np.testing.assert_allclose(spectrum.factor_sigma(a, b), expected, rtol=1e-7)
    for bad in (np.nan, np.inf, -np.inf):
        b[1, -1] = bad
        assert np.isnan(spectrum.factor_sigma(a, b)).all()
        assert np.isnan(spectrum.dense_sigma(b)).all() and len(spectrum.dense_sigma(b)) == 3


def test_singular_values_of_a_dense_update():
    rank_3 = draw(40, 3) @ draw(3, 24)
    for matrix in (draw(40, 24), draw(24, 40), rank_3, np.zeros((4, 5), np.float32)):
        expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        found = spectrum.dense_sigma(matrix)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-7 * expected[0])
    assert spectrum.numerical_rank(spectrum.dense_sigma(rank_3), rank_3.shape) == 3


def test_where_squares_lose_the_update_its_factors_are_taken_apart():
    """A B is 1e-9 of |A| |B|: below what Gram matrices can say."""
    u, v = (np.linalg.qr(draw(n, 2, seed=1).astype(np.float64))[0] for n in (16, 12))
    a, b = u * [1.0, 1e-9], np.array([[1e-9], [1.0]]) * v.T
    np.testing.assert_allclose(spectrum.factor_sigma(a, b), [1e-9, 1e-9], rtol=1e-6)


def test_numbers_of_a_file_are_those_of_its_dense_updates(tmp_path):
    file, dense = kohya(tmp_path / "a.safetensors", layers=2)
    found = formats.read(file)
    measured = list(measure(found.updates))
    assert [one.update.layer for one in measured] == [update.layer for update in found.updates]
    for one in measured:
        sigma = np.linalg.svd(dense[one.update.layer], compute_uv=False)
        np.testing.assert_allclose(one.sigma, sigma[: len(one.sigma)], rtol=0, atol=1e-6)
        assert one.norm == pytest.approx(np.linalg.norm(dense[one.update.layer]), rel=1e-6)
        assert one.factored and not one.bad and not one.idle


def test_loha_of_a_small_rank_is_measured_by_its_factors(tmp_path):
    sides = {"w1_a": (24, 2), "w1_b": (2, 20), "w2_a": (24, 3), "w2_b": (3, 20)}
    tensors = {f"lora_te_x.hada_{side}": draw(*shape) for side, shape in sides.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    (one,) = measure(formats.read(tmp_path / "a.safetensors").updates)
    w1, w2 = (tensors[f"lora_te_x.hada_w{n}_a"] @ tensors[f"lora_te_x.hada_w{n}_b"] for n in "12")
    sigma = np.linalg.svd((w1 * w2).astype(np.float64), compute_uv=False)[:6]
    assert one.shape == (20, 24, 6)
    np.testing.assert_allclose(one.sigma, sigma, rtol=1e-5)


def test_memory_does_not_grow_with_the_number_of_matrices(tmp_path, monkeypatch):
    for module in ("measured", "together"):
        monkeypatch.setattr(f"lorax.xray.{module}.WORKERS", 1)
    tensors = {}
    for n in range(24):
        key = f"lora_te_text_model_encoder_layers_{n}_mlp_fc1"
        tensors[f"{key}.lora_down.weight"] = draw(16, 512, seed=n)
        tensors[f"{key}.lora_up.weight"] = draw(512, 16, seed=n)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    updates = formats.read(tmp_path / "a.safetensors").updates

    def peak(count: int) -> int:
        tracemalloc.start()
        files = {name: unread(list(measure(updates[:count]))) for name in "ab"}
        for _ in together.compare(files, together.common(files)):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)  # imports
    assert peak(24) < 1.5 * peak(2)


# ------------------------------------------------------------------------------------------ defects


def test_dead_bad_and_double_matrices_are_found(tmp_path):
    file, _ = kohya(tmp_path / "a.safetensors", layers=4)
    tensors = safetensors.numpy.load_file(file)
    key = lambda n, side: f"lora_te_text_model_encoder_layers_{n}_mlp_fc1.lora_{side}.weight"
    tensors[key(0, "up")][:] = 0
    tensors[key(1, "down")][0, 0] = np.nan
    tensors[key(1, "up")][0, 0] = np.inf
    for side in ("up", "down"):
        tensors[key(3, side)] = tensors[key(2, side)]
    query = key(0, "down").replace("mlp_fc1", "self_attn_q_proj")
    tensors[query.replace("layers_0", "layers_1")] = tensors[query]  # one A, two B
    safetensors.numpy.save_file(tensors, file)
    measured = list(measure(formats.read(file).updates))
    found = defects.defects(measured, {one.update.layer: 1 for one in measured})
    layer = lambda n, name="mlp_fc1": next(
        x.update.layer for x in measured if x.update.layer.endswith(f"layers_{n}_{name}")
    )
    assert found.bad == {layer(1): 2}
    assert found.dead == {layer(0): "B is 0, as before the first training step"}
    assert found.duplicates == [[layer(2), layer(3)]]
    assert found.shared == [[layer(0, "self_attn_q_proj"), layer(1, "self_attn_q_proj")]]


def test_matrices_with_equal_rows_at_both_ends_are_no_duplicates():
    a, b = draw(8, 2), draw(2, 8)
    other = a.copy()
    other[4] += 1
    update = lambda layer, a: formats.Update(
        layer, "LoRA", (8, 8), 2, 1.0, "", "F32", lambda: Factors(a, b, 1.0)
    )
    measured = [measure_one(update("x", a)), measure_one(update("y", other))]
    assert measured[0].marks == measured[1].marks
    found = defects.defects(measured, {"x": 2, "y": 2})
    assert found.duplicates == found.shared == []


# ---------------------------------------------------------------------------------------- shrinking


def test_fewest_directions_of_an_error():
    sigmas = {"a": np.array([3.0, 2.0, 0.1]), "b": np.array([1.0, 0.5])}
    shapes = {"a": (10, 20), "b": (5, 5)}
    whole = np.sqrt(9 + 4 + 0.01 + 1 + 0.25)
    for error in (0.0, 0.02, 0.2, 0.3, 1.0):
        ranks = keeping.within(sigmas, error)
        made = keeping.error_of(sigmas, ranks)
        assert made <= error + 1e-12
        kept = sorted(x for layer, rank in ranks.items() for x in sigmas[layer][:rank])
        every = sorted(x for sigma in sigmas.values() for x in sigma)
        assert kept == every[len(every) - len(kept) :]  # the largest of all
        if kept:  # one fewer is too few
            assert np.hypot(made * whole, kept[0]) / whole > error
    choices = {choice.words: choice for choice in keeping.kept(sigmas, shapes)}
    assert choices["rank 1"].parameters == 30 + 10 and "rank 4" not in choices
    assert choices["rank 1"].error == pytest.approx(np.sqrt(4 + 0.01 + 0.25) / whole)
    assert keeping.kept({"a": np.zeros(2)}, {"a": (2, 2)}) == []


# ------------------------------------------------------------------------------------ several files


@pytest.mark.parametrize("kinds", ["factors", "dense", "both"])
def test_a_sum_is_that_of_the_dense_updates(kinds):
    factors = [(draw(20, 3, seed=n), draw(3, 12, seed=n), 0.5 + n) for n in range(3)]
    dense = [s * a.astype(np.float64) @ b for a, b, s in factors]
    given = [
        x if kinds == "dense" or (kinds == "both" and n) else factors[n]
        for n, x in enumerate(dense)
    ]
    found = sums.summed([sums.directions(x) for x in given])
    total = sum(dense)
    assert found.norm == pytest.approx(np.linalg.norm(total), rel=1e-6)
    for i, dw in enumerate(dense):
        u = np.linalg.svd(dw)[0][:, :3]
        others = total - dw
        square = np.sum(dw**2)
        assert found.kept[i] == pytest.approx(np.sum(dw * total) / square, rel=1e-6)
        added = np.linalg.norm(u.T @ others) / square**0.5
        assert found.disturbed[i] == pytest.approx(added, rel=1e-6)
        chance = np.linalg.norm(others) * np.sqrt(3 / 20) / square**0.5
        assert found.by_chance[i] == pytest.approx(chance, rel=1e-6)


def test_an_update_and_its_negative_leave_nothing():
    a, b = draw(9, 2), draw(2, 7)
    found = sums.summed([sums.directions((a, b, s)) for s in (1.0, -1.0, 0.0)])
    np.testing.assert_allclose(found.kept[:2], 0, atol=1e-9)
    np.testing.assert_allclose(found.disturbed[:2], 1)
    assert found.norm == pytest.approx(0, abs=1e-6) and np.isnan(found.kept[2])


def test_pairs_of_files_and_chance(tmp_path):
    paths = {name: kohya(tmp_path / f"{name}.safetensors", 2, n)[0] for n, name in enumerate("ab")}
    files = {
        name: unread(list(measure(formats.read(path).updates))) for name, path in paths.items()
    }
    matrices = together.common(files)
    assert len(matrices) == 4
    pairs = [pair for of_matrix, _ in together.compare(files, matrices) for pair in of_matrix]
    for pair, matrix in zip(pairs, matrices, strict=True):
        one, two = (files[name][layer] for name, layer in matrix.items())
        dense = [f.s * f.a.astype(np.float64) @ f.b for f in (one, two)]
        cosine = np.sum(dense[0] * dense[1]) / np.prod([np.linalg.norm(x) for x in dense])
        assert pair.cosine == pytest.approx(cosine, abs=1e-7)
        phi = overlap.update_similarity(one[:3], two[:3])[-1, -1]
        assert pair.phi_in == pytest.approx(phi, abs=1e-7)
        assert pair.chance_in == 4 / WIDTH
    (row,) = together.whole(pairs)
    assert abs(row.cosine) < 5 * row.chance  # independent files


def test_names_of_one_matrix_in_two_formats_are_equal():
    dotted = "down_blocks.0.attentions.1.attn1.to_q"
    flat = "lora_unet_down_blocks_0_attentions_1_attn1_to_q"
    assert together.same_matrix(f"unet.{dotted}") == together.same_matrix(flat)
    gguf, dotted = "blk.3.attn_q", "model.layers.3.self_attn.q_proj"
    assert together.same_matrix(gguf) == together.same_matrix(f"base_model.model.{dotted}")


# -------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table_of_each_file_and_of_both(tmp_path, capsys):
    one, dense = kohya(tmp_path / "one.safetensors", layers=2)
    two, _ = kohya(tmp_path / "two.safetensors", layers=2, seed=1)
    assert run(one, two) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "one: kohya: 4 LoRA; rank 4, F32"
    assert "scale: 0.5 in 4 matrices: tensor alpha / r" in said
    (layer, *_) = dense
    row = next(line.split() for line in lines if line.startswith(layer))
    assert row[1:6] == [str(WIDTH), "x", str(WIDTH), "4", "0.5"]
    assert float(row[10]) == pytest.approx(np.linalg.norm(dense[layer]), rel=1e-3)
    for words in ("Shrunk to", "Directions in common", "In the sum of all"):
        assert words in said


def test_many_matrices_are_cut_and_it_says_so(tmp_path, capsys):
    file, _ = kohya(tmp_path / "a.safetensors", layers=25)
    assert run(file) == 0
    said = capsys.readouterr().out
    assert "10 smaller matrices, " in said and "are left out: --all" in said
    assert run(file, "--all") == 0
    assert "left out" not in capsys.readouterr().out


def test_a_mistake_is_one_line(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"x")
    file, _ = kohya(tmp_path / "b.safetensors", layers=1)
    page = [file, "--out", tmp_path / "page"]
    for arguments in (
        ["nothing"],
        [tmp_path / "a.pt"],
        [file, file],
        [file, "--layers=2"],
        [*page, "--base=./nothing"],
        [*page, "--layers=-1"],
    ):
        assert run(*arguments) == 2
        out, said = capsys.readouterr()
        assert said.startswith("lorax: ") and said.count("\n") == 1
        assert not out and not (tmp_path / "page").exists()  # refused before the work


def test_a_file_of_weights_has_no_table(tmp_path, capsys):
    tensors = {"model.layers.0.mlp.up_proj.weight": draw(4, 4)}
    safetensors.numpy.save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "MLX: no update that the file alone has" in said and "||dW||" not in said


def test_names_of_files_can_be_told_apart(tmp_path):
    assert named(["x/style.safetensors", "x/face"]) == ["style", "face"]
    assert named(["x/adapter.safetensors", "y/adapter.safetensors"]) == [
        "x/adapter.safetensors",
        "y/adapter.safetensors",
    ]


def test_the_table_needs_no_jax(tmp_path):
    file, _ = kohya(tmp_path / "a.safetensors", layers=1)
    heavy = ("jax", "pandas", "altair", "scipy", "sklearn", "torch", "huggingface_hub")
    heavy += ("rich.progress", "transformers", "yaml", "h5py", "gguf", "orbax", "tensorstore")
    code = f"import sys; from lorax.xray.__main__ import main; main([{str(file)!r}]); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
