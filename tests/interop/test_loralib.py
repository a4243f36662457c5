"""Checkpoints of the LoRA authors' own code."""

import numpy as np
import pytest
import safetensors.numpy
from support import data

from lorax.interop import loralib
from lorax.interop.hf import Source
from lorax.models import gpt2

WIDTH = 6
GPT2 = gpt2.hf_tensors(gpt2.Config(n_embd=WIDTH, n_head=2))
MNLI = "adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz"
LAYER = "roberta.encoder.layer.{}.attention.self"
ROBERTA = {
    "h/attn/q/kernel": Source(f"{LAYER}.query.weight", (1, 0)),
    "h/attn/v/kernel": Source(f"{LAYER}.value.weight", (1, 0)),
    "head/pooler/kernel": Source("classifier.dense.weight", (1, 0)),
    "head/pooler/bias": Source("classifier.dense.bias"),
    "head/out/kernel": Source("classifier.out_proj.weight", (1, 0)),
    "head/out/bias": Source("classifier.out_proj.bias"),
}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def write(file, tensors):
    if file.suffix == ".npz":
        np.savez(file, **tensors)
    else:
        safetensors.numpy.save_file(tensors, file)
    return file


def dense(factors):
    return factors.s * factors.a @ factors.b


@pytest.mark.parametrize("sources", [ROBERTA, None], ids=["with base", "without"])
def test_the_authors_own_mnli_adapter(sources):
    loaded = loralib.load(data(MNLI), 16, sources)
    assert len(loaded.factors) == 24 and len(loaded.weights) == 4
    path, head = LAYER.format(11) + ".value", "classifier.out_proj.weight"
    with np.load(data(MNLI)) as stored:
        A, B, out = stored[f"{path}.lora_A"], stored[f"{path}.lora_B"], stored[head]
    if sources:
        path, head, out = "h/11/attn/v", "head/out/kernel", out.T
    assert list(loaded.factors)[-1] == path and loaded.factors[path].s == 2.0
    np.testing.assert_allclose(dense(loaded.factors[path]), (2 * B @ A).T, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(loaded.weights[head], out)


def merged_linear(A, B, enabled, alpha):
    """The update of loralib's MergedLinear (layers.py), (out, in): a convolution in groups, whose
    result lies in the rows of the enabled parts and zeros in the others."""
    rank = A.shape[0] // sum(enabled)
    groups = [
        B_i @ A_i
        for A_i, B_i in zip(np.split(A, sum(enabled)), np.split(B, sum(enabled)), strict=True)
    ]
    rows = [groups.pop(0) if on else np.zeros((WIDTH, A.shape[1])) for on in enabled]
    return alpha / rank * np.concatenate(rows)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("enabled", "fused"),
    [("q v", ("q", "v")), ("q k v", ("q", "v")), ("k", ("k",))],
    ids=["q v", "all", "k"],
)
def test_fused_layer_is_taken_apart(tmp_path, suffix, enabled, fused):
    n, key = len(enabled.split()), "module.transformer.h.3.attn.c_attn"
    A, B = draw(n * 2, WIDTH), draw(n * WIDTH, 2)
    plain = {
        f"transformer.h.0.mlp.c_fc.lora_{x}": draw(*s) for x, s in (("A", (3, 6)), ("B", (24, 3)))
    }
    file = write(tmp_path / f"x{suffix}", {f"{key}.lora_A": A, f"{key}.lora_B": B} | plain)
    loaded = loralib.load(file, 32, GPT2, fused).factors
    assert list(loaded) == ["h/0/mlp/up"] + [f"h/3/attn/{part}" for part in enabled.split()]
    want = merged_linear(A, B, [part in enabled for part in "qkv"], 32)
    zero = np.zeros((WIDTH, WIDTH))
    got = [dense(loaded[f"h/3/attn/{part}"]) if part in enabled else zero for part in "qkv"]
    np.testing.assert_allclose(np.concatenate(got, axis=1), want.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(loaded["h/0/mlp/up"].s, 32 / 3)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"h.0.attn.c_attn.lora_A": draw(4, 6)}, "need lora_A"),
        ({"h.0.attn.c_attn.lora_A": draw(4, 6), "h.0.attn.c_attn.lora_B": draw(8, 3)}, "need lora"),
        ({"x.lora_A": draw(2, 6), "x.lora_B": draw(6, 2)}, "no such module"),
        (
            {"h.0.mlp.c_fc.lora_A": draw(4, 6), "h.0.mlp.c_fc.lora_B": draw(8, 2)},
            "2 updates don't fit h/0/mlp/up",
        ),
        (
            {"h.0.attn.c_attn.lora_A": draw(2, 6), "h.0.attn.c_attn.lora_B": draw(6, 2)},
            "1 updates don't fit h/0/attn/q, h/0/attn/v",
        ),
        ({"ln_f.weight": draw(6)}, "no lora_A"),
        ({"ln_f.running_mean": draw(6)}, "ln_f.running_mean"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=f"x.npz: .*{words}"):
        loralib.load(write(tmp_path / "x.npz", tensors), 16, GPT2)


def test_a_fused_layer_needs_its_base(tmp_path):
    tensors = {"c_attn.lora_A": draw(4, 6), "c_attn.lora_B": draw(12, 2)}
    with pytest.raises(ValueError, match="2 updates of a fused layer"):
        loralib.load(write(tmp_path / "x.npz", tensors), 16)


def test_only_plain_arrays_are_read(tmp_path):
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "model.bin").write_bytes(b"")
    for name in ("pickled.npz", "one.npz", "torn.npz", "torn.safetensors", "model.bin"):
        with pytest.raises(ValueError, match=name):
            loralib.load(tmp_path / name, 16)
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        loralib.load(tmp_path / "nothing.npz", 16)
