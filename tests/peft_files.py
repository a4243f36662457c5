"""Adapters for tests of PEFT's format: a tiny GPT-2's places, and files as others write them."""

import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy

from lorax.interop.peft import Adapter, Factors
from lorax.models import gpt2

WIDTH, VOCABULARY, CONTEXT = 16, 40, 32
TINY = dict(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=CONTEXT)
UNTIED = gpt2.hf_tensors(gpt2.Config(**TINY, tie_word_embeddings=False))
TIED = gpt2.hf_tensors(gpt2.Config(**TINY))


def factor(n_in, rank, n_out, s, seed=0, m=False):
    rng = np.random.default_rng([seed, n_in, rank, n_out])
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return Factors(draw(n_in, rank), draw(rank, n_out), s, draw(n_out) if m else None)


def random_adapter(scale_v: float = 3.0) -> Adapter:
    """Every kind of place: fused q and v of different rank, k alone, plain, embedding, head; and
    parameters trained in full: a fused bias of a target, a bias of none, a whole module."""
    draw = lambda *shape: np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    factors = {
        "h/0/attn/q": factor(WIDTH, 2, WIDTH, 3.0, 1),
        "h/0/attn/v": factor(WIDTH, 3, WIDTH, scale_v, 2),
        "h/0/attn/o": factor(WIDTH, 2, WIDTH, 16 / 3),
        "h/1/attn/k": factor(WIDTH, 4, WIDTH, 2.0),
        "h/1/mlp/up": factor(WIDTH, 2, 4 * WIDTH, 0.5),
        "h/1/mlp/down": factor(4 * WIDTH, 1, WIDTH, 1.0),
        "wte": factor(VOCABULARY, 2, WIDTH, 0.25),
        "wpe": factor(CONTEXT, 2, WIDTH, 0.25),
        "lm_head": factor(WIDTH, 3, VOCABULARY, 1.5),
    }
    weights = {f"h/0/attn/{part}/bias": draw(i, WIDTH)[0] for i, part in enumerate("qkv", 1)}
    weights |= {"h/0/ln_1/bias": draw(4, WIDTH)[0]}
    weights |= {"ln_f/scale": draw(5, WIDTH)[0], "ln_f/bias": draw(6, WIDTH)[0]}
    return Adapter(factors, weights, {})


def dense(factor: Factors) -> np.ndarray:
    return factor.s * factor.a @ factor.b


def edit(directory: pathlib.Path, **fields) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def foreign(directory: pathlib.Path, tensors: dict, **config) -> pathlib.Path:
    """An adapter as another program would write it; tensors: by name below "base_model.model."."""
    directory.mkdir(parents=True)
    stored = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    (directory / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(stored))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def lora_of(module: str, n_in: int, n_out: int) -> dict[str, np.ndarray]:
    a, b, *_ = factor(n_in, 2, n_out, 1.0)
    keep = np.ascontiguousarray
    return {f"{module}.lora_A.weight": keep(a.T), f"{module}.lora_B.weight": keep(b.T)}


def assert_same(got: Adapter, want: Adapter) -> None:
    """Bit for bit, but for the names in the config."""
    assert set(got.factors) == set(want.factors) and set(got.weights) == set(want.weights)
    for path, factor in want.factors.items():
        for ours, theirs in zip(got.factors[path], factor, strict=True):
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=path)
    for path, weight in want.weights.items():
        np.testing.assert_array_equal(got.weights[path], weight, err_msg=path)


def as_running(directory: pathlib.Path, model, to: pathlib.Path) -> pathlib.Path:
    """A copy of what PEFT saved of a model, with the names that its tensors have in the model:
    "lora_A.default.weight", "modules_to_save.default.weight", "original_module.weight"."""
    shutil.copytree(directory, to)
    file = to / "adapter_model.safetensors"
    saved, here = safetensors.numpy.load_file(file), model.state_dict()
    own = ("lora_", "hada_", "lokr_", "vera_lambda_", "base_model.vera_", "ia3_", "ln_tuning_")
    own += ("miss_", "hira_", "shira_", "gralora_")
    own += ("oft_R", "fourierft_", "hra_", "randlora_")
    own += ("modules_to_save", "original_module")
    running = [key for key in here if any(word in key for word in own)]
    assert any(".default" in key for key in running)
    tensors = {key: np.ascontiguousarray(here[key].numpy()) for key in running}
    safetensors.numpy.save_file({key: x for key, x in saved.items() if key in here} | tensors, file)
    return to
