"""Methods other than LoRA in PEFT's format: PEFT computes with our files what we do, we with its.

PEFT itself has no LoHa and no LoKr of GPT-2's Conv1D, so those two have LLaMA alone.
"""

import functools
import json
import types

import jax
import numpy as np
import parity
import pytest
import safetensors.numpy
from support import require

import lorax
from lorax import methods, peft_methods, tree

LLAMA = dict(target_modules=["q_proj", "v_proj", "down_proj"])
GPT2 = dict(target_modules=["c_attn", "attn.c_proj", "c_fc"])
QVD, QVO = dict(targets=("q", "v", "down")), dict(targets=("q", "v", "o"))
BUDGET = dict(init_r=4, target_r=2, lora_alpha=6, total_step=10)
TOKENS = dict(num_virtual_tokens=4, task_type="CAUSAL_LM")
LAST = dict(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM", target_modules="self_attn")


class Case(types.SimpleNamespace):
    """family of models; name, hp: of our method; config, options: PEFT's of a like one."""

    def __init__(self, family, name, hp, config, options):
        super().__init__(family=family, name=name, hp=hp, config=config, options=options)
        self.virtual = 4 if name == "prompt" else 0


CASES = {
    "adalora": Case(
        "llama", "adalora", QVD | dict(rank=4, alpha=6), "AdaLoraConfig", LLAMA | BUDGET
    ),
    "adalora-fused": Case(
        "gpt2", "adalora", QVO | dict(rank=3), "AdaLoraConfig", GPT2 | BUDGET
    ),
    "loha": Case(
        "llama", "loha", QVD | dict(rank=3, alpha=6), "LoHaConfig", LLAMA | dict(r=3, alpha=5)
    ),
    "loha-patterns": Case(
        "llama", "loha", QVD | dict(rank=3, scaling="rslora"), "LoHaConfig",
        LLAMA | dict(r=3, alpha=5, rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 7}),
    ),
    "lokr": Case(
        "llama", "lokr", QVD | dict(rank=4, alpha=2), "LoKrConfig", LLAMA | dict(r=4, alpha=2)
    ),
    "lokr-both": Case(
        "llama", "lokr", QVD | dict(rank=1, decompose_both=True, factor=4), "LoKrConfig",
        LLAMA | dict(r=1, alpha=2, decompose_both=True, decompose_factor=4),
    ),
    "vera": Case("llama", "vera", QVD | dict(rank=24), "VeraConfig", LLAMA | dict(r=24)),
    "vera-fused": Case(
        "gpt2", "vera", dict(targets=("q", "v", "o", "up"), rank=12), "VeraConfig",
        GPT2 | dict(r=12),
    ),
    "ia3": Case(
        "llama", "ia3", dict(targets=("k", "v", "down")), "IA3Config",
        dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3-fused": Case(
        "gpt2", "ia3", dict(targets=("k", "down"), layers=(1,)), "IA3Config",
        dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "ln-tuning": Case(
        "llama", "ln-tuning", {}, "LNTuningConfig",
        dict(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    ),
    "ln-tuning-some": Case(
        "gpt2", "ln-tuning", dict(layers=(0,)), "LNTuningConfig", dict(target_modules=["ln_2"])
    ),
    "prefix": Case("llama", "prefix", dict(tokens=4), "PrefixTuningConfig", TOKENS),
    "prefix-gpt2": Case("gpt2", "prefix", dict(tokens=4), "PrefixTuningConfig", TOKENS),
    "prompt": Case("gpt2", "prompt", dict(tokens=4), "PromptTuningConfig", TOKENS),
    "prompt-llama": Case("llama", "prompt", dict(tokens=4), "PromptTuningConfig", TOKENS),
    "llama-adapter": Case(
        "llama", "llama-adapter", dict(tokens=4, layers=(1,)), "AdaptionPromptConfig", LAST
    ),
    "saved-beside": Case(
        "llama", "loha", QVO | dict(rank=2, full=("re:norm/scale", "embed")), "LoHaConfig",
        LLAMA | dict(r=2, modules_to_save=["norm", "input_layernorm"]),
    ),
    "tied-beside": Case(
        "gpt2", "vera", QVO | dict(rank=4, full=("embed", "norms")), "VeraConfig",
        GPT2 | dict(r=4, bias="vera_only", modules_to_save=["ln_f"]),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> (its directory, our base, a function that gives transformers' model)."""
    tmp = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(family):
        transformers = require("transformers")
        base, _ = parity.pair(family, tmp / family)
        stem = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]
        return tmp / family, base, getattr(transformers, stem).from_pretrained

    return make


def trained(case, base):
    """(method, state) off the start: random numbers on all that is trained in an adapted layer."""
    method = lorax.method(case.name, **case.hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    rng, active = np.random.default_rng(3), case.hp.get("layers")
    flat = tree.flatten(state.trainable)
    for path, leaf in flat.items():
        noise = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        if active is not None and len(leaf) == parity.LAYERS:
            noise[[i for i in range(parity.LAYERS) if i not in active]] = 0
        flat[path] = leaf + noise
    return method, state._replace(trainable=tree.unflatten(flat))


def torch_logits(model, case):
    return parity.logits_torch(model)[:, case.virtual :]


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def assert_same_state(got, want):
    """Bit for bit."""
    for part, other in zip(got, want, strict=True):
        part, other = tree.flatten(part), tree.flatten(other)
        assert part.keys() == other.keys()
        for path, leaf in other.items():
            assert part[path].dtype == leaf.dtype
            np.testing.assert_array_equal(part[path], leaf, err_msg=path)


# --------------------------------------------------------------------------------- both directions


@pytest.mark.filterwarnings("ignore")  # what PEFT and transformers warn about is not ours
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_with_our_file_what_we_do(name, made, tmp_path):
    peft, case = require("peft"), CASES[name]
    directory, base, reference = made(case.family)
    method, state = trained(case, base)
    peft_methods.save(tmp_path, method, state, base, str(directory))
    expected = parity.logits(base, method, state)
    start = method.init(jax.random.key(0), base.params, base.sites)
    assert np.abs(parity.logits(base, method, start) - expected).max() > 1e-2
    model = peft.PeftModel.from_pretrained(reference(directory), tmp_path).eval()
    assert_close(torch_logits(model, case), expected)
    # and back: the same method and, where no modules were joined, the same arrays
    again, own = peft_methods.load(tmp_path, base)
    assert again.name == case.name
    assert_close(parity.logits(base, again, own), expected)
    assert peft_methods.kind_of(tmp_path) == peft_methods.TYPES[case.name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_we_compute_with_pefts_file_what_it_does(name, made, tmp_path):
    """And PEFT with what we make of that."""
    peft, case = require("peft"), CASES[name]
    directory, base, reference = made(case.family)
    model = peft.get_peft_model(reference(directory), getattr(peft, case.config)(**case.options))
    model.eval()
    before = torch_logits(model, case)
    parity.disturb(model)
    expected = torch_logits(model, case)
    assert np.abs(expected - before).max() > 1e-2
    model.save_pretrained(tmp_path / "theirs")
    method, state = peft_methods.load(tmp_path / "theirs", base)
    assert_close(parity.logits(base, method, state), expected)
    peft_methods.save(tmp_path / "ours", method, state, base, str(directory))
    again = peft.PeftModel.from_pretrained(reference(directory), tmp_path / "ours").eval()
    assert_close(torch_logits(again, case), expected)
