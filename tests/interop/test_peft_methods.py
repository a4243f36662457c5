"""Methods other than LoRA in PEFT's format: PEFT computes with our files what we do, we with its.

PEFT itself has no LoHa and no LoKr of GPT-2's Conv1D, so those two have LLaMA alone.
"""

import copy
import functools
import json
import resource
import types

import decoders
import jax
import numpy as np
import parity
import pytest
import safetensors.numpy
from mutated import survives
from peft_files import as_running
from quick import jit
from support import few, require

import lorax
from lorax import methods, tree
from lorax.adapters import peft_methods
from lorax.interop import peft as peft_files
from lorax.interop.peft.config import ANY, FIELDS

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
    "gralora": Case(
        "llama", "gralora", QVD | dict(rank=4, alpha=6), "GraloraConfig",
        LLAMA | dict(r=4, alpha=6),
    ),
    "gralora-conv1d": Case(
        "gpt2", "gralora", dict(targets=("o", "up"), rank=8, blocks=4), "GraloraConfig",
        dict(target_modules=["attn.c_proj", "c_fc"], r=8, gralora_k=4, alpha=3),
    ),
    "oft": Case(
        "llama", "oft", QVD | dict(block_size=8, neumann=5), "OFTConfig",
        LLAMA | dict(oft_block_size=8),
    ),
    "oft-exact": Case(
        "llama", "oft", QVD | dict(block_size=4), "OFTConfig",
        LLAMA | dict(oft_block_size=3, use_cayley_neumann=False),
    ),
    "oft-phi": Case(
        "phi3", "oft", dict(targets=("o", "down"), block_size=4, neumann=3), "OFTConfig",
        dict(target_modules=["qkv_proj", "o_proj"], r=4, oft_block_size=0),
    ),
    "fourierft": Case(
        "llama", "fourierft", QVD | dict(frequencies=30, spectral_scale=60.0), "FourierFTConfig",
        LLAMA | dict(n_frequency=30, scaling=60.0, n_frequency_pattern={"down_proj": 50}),
    ),
    "fourierft-conv1d": Case(
        "gpt2", "fourierft", dict(targets=("o", "up"), frequencies=30, places_seed=3),
        "FourierFTConfig", dict(target_modules=["attn.c_proj", "c_fc"], n_frequency=30),
    ),
    "hra": Case("llama", "hra", QVD | dict(rank=4), "HRAConfig", LLAMA | dict(r=4)),
    "hra-phi": Case(
        "phi3", "hra", dict(targets=("o", "down"), rank=3), "HRAConfig",
        dict(target_modules=["qkv_proj", "o_proj"], r=5),
    ),
    "randlora": Case(
        "llama", "randlora", QVD | dict(rank=6, alpha=60), "RandLoraConfig",
        LLAMA | dict(r=6, randlora_alpha=60),
    ),
    "randlora-conv1d": Case(
        "gpt2", "randlora", dict(targets=("o", "up"), rank=4, alpha=20), "RandLoraConfig",
        dict(target_modules=["attn.c_proj", "c_fc"], r=4, randlora_alpha=50, sparse=True),
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
    "prefix-gemma": Case("gemma", "prefix", dict(tokens=4), "PrefixTuningConfig", TOKENS),
    "prefix-phi": Case("phi3", "prefix", dict(tokens=4), "PrefixTuningConfig", TOKENS),
    "prompt": Case("gpt2", "prompt", dict(tokens=4), "PromptTuningConfig", TOKENS),
    "prompt-llama": Case("llama", "prompt", dict(tokens=4), "PromptTuningConfig", TOKENS),
    "prompt-gemma": Case("gemma2", "prompt", dict(tokens=4), "PromptTuningConfig", TOKENS),
    "vera-phi": Case(
        "phi3", "vera", dict(targets=("q", "v", "o", "up"), rank=12), "VeraConfig",
        dict(target_modules=["qkv_proj", "gate_up_proj", "o_proj"], r=12),
    ),
    "ia3-phi": Case(
        "phi3", "ia3", dict(targets=("k", "v", "down")), "IA3Config",
        dict(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "miss": Case(
        "llama", "miss", QVD | dict(rank=6), "MissConfig", LLAMA | dict(r=6)
    ),
    "miss-mini": Case(
        "llama", "miss", QVD | dict(rank=4, mini_rank=4), "MissConfig",
        LLAMA | dict(r=4, mini_r=4, init_weights="mini"),
    ),
    "miss-phi": Case(
        "phi3", "miss", dict(targets=("q", "v", "up"), rank=5), "MissConfig",
        dict(target_modules=["qkv_proj", "gate_up_proj"], r=5),
    ),
    "hira": Case(
        "llama", "hira", QVD | dict(rank=3), "HiraConfig", LLAMA | dict(r=3)
    ),
    "hira-fused": Case("gpt2", "hira", QVO | dict(rank=3), "HiraConfig", GPT2 | dict(r=3)),
    "shira": Case("llama", "shira", QVD | dict(rank=2), "ShiraConfig", LLAMA | dict(r=2)),
    "shira-phi": Case(
        "phi3", "shira", dict(targets=("q", "v", "up"), rank=2), "ShiraConfig",
        dict(target_modules=["qkv_proj", "gate_up_proj"], r=2),
    ),
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
#: Cases that come back with other arrays which compute the same: every part of a fused module has
#: a pair of its own beside the one of the whole modules, and a norm of one layer comes with its
#: stack.
OTHERWISE = ("shira-phi", "vera-fused", "vera-phi", "tied-beside", "ln-tuning-some")
TWICE = ("loha-patterns", "lokr-both", "prefix-gpt2", "prompt-llama", "ln-tuning-some")
TWICE += ("vera-phi", "ia3-phi", "prefix-phi", "prefix-gemma", "miss-mini")
TWICE += ("gralora-conv1d", "oft-phi", "fourierft-conv1d", "hra-phi", "randlora-conv1d")
TWICE += ("hira", "miss-phi", "shira")
#: Methods of which PEFT has one adapter in a model, without a name.
TOKENS_OF_THEIR_OWN = ("prefix", "prompt", "llama-adapter")
QUICK = [name for name in CASES if name not in TWICE]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> (its directory, our base, a function that gives transformers' model)."""
    tmp = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(family):
        transformers = require("transformers")
        base, _ = parity.pair(family, tmp / family)
        return tmp / family, base, transformers.AutoModelForCausalLM.from_pretrained

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
@pytest.mark.parametrize("name", few(CASES, QUICK))
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
    again, own = peft_methods.load(tmp_path, base)
    assert again.name == case.name
    if name in OTHERWISE:
        assert_close(parity.logits(base, again, own), expected)
    else:
        assert_same_state(own, state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", few(CASES, QUICK))
def test_we_compute_with_pefts_file_what_it_does(name, made, tmp_path):
    """And PEFT with what we make of that."""
    peft, case = require("peft"), CASES[name]
    directory, base, reference = made(case.family)
    model = peft.get_peft_model(reference(directory), getattr(peft, case.config)(**case.options))
    model.eval()
    before = torch_logits(model, case)
    parity.disturb(model)
    expected = torch_logits(model, case)
    assert np.abs(expected - before).max() > 5e-3
    model.save_pretrained(tmp_path / "theirs")
    method, state = peft_methods.load(tmp_path / "theirs", base)
    assert_close(parity.logits(base, method, state), expected)
    if case.name not in (*TOKENS_OF_THEIR_OWN, "shira"):  # whose places are in no state dict
        running = as_running(tmp_path / "theirs", model, tmp_path / "running")
        assert_same_state(peft_methods.load(running, base)[1], state)
    peft_methods.save(tmp_path / "ours", method, state, base, str(directory))
    again = peft.PeftModel.from_pretrained(reference(directory), tmp_path / "ours").eval()
    assert_close(torch_logits(again, case), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", few(["llama", "gpt2"], ["gpt2"]))
def test_pefts_pruned_triplets_are_read_with_the_scale_of_all(family, made, tmp_path):
    """A rank that PEFT's allocator has cut, also to nothing, and what it leaves in rank_pattern."""
    torch, peft = require("torch"), require("peft")
    directory, base, reference = made(family)
    options = LLAMA if family == "llama" else GPT2
    options = options | dict(init_r=3, target_r=1, total_step=6, deltaT=1, lora_alpha=9)
    config = peft.AdaLoraConfig(**options, task_type="CAUSAL_LM")
    model = peft.get_peft_model(reference(directory), config)
    parity.disturb(model)
    with torch.no_grad():  # nothing is left of what never counts
        for name, p in model.named_parameters():
            if "layers.0" in name or "h.0" in name:
                p.mul_(0 if "lora_E" in name else 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    for step, tokens in enumerate(torch.tensor(parity.batches()[:7]).long()):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None and ("layers.0" in name or "h.0" in name):
                p.grad.zero_()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    kept = json.loads((tmp_path / peft_files.CONFIG).read_text())["rank_pattern"]
    ranks = [sum(mask) for mask in kept.values()]
    assert 0 in ranks and sum(ranks) == len(ranks)
    method, state = peft_methods.load(tmp_path, base)
    assert method.hp["rank"] == max(ranks)
    assert_close(parity.logits(base, method, state), parity.logits_torch(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["adalora", "loha", "lokr", "vera", "miss", "hira", "shira", "gralora", "hra"]
)
def test_a_member_of_a_sweep_is_stored_without_its_padding(name, made, tmp_path):
    _, base, _ = made("llama")
    method, own = trained(Case("llama", name, dict(rank=2, targets=("q", "v")), "", {}), base)
    wide = methods.resolve(("q", "v", "down"), base.sites)
    padded = method.init(jax.random.key(0), base.params, base.sites, targets=wide, pad=5)
    flat = {path: 0 * leaf for path, leaf in tree.flatten(padded.trainable).items()}
    for path, leaf in tree.flatten(own.trainable).items():
        flat[path] = flat[path].at[tuple(map(slice, leaf.shape))].set(leaf)
    padded = padded._replace(trainable=tree.unflatten(flat))
    files = []
    for i, state in enumerate((padded, own)):
        peft_methods.save(tmp_path / str(i), method, state, base, "x")
        files.append((tmp_path / str(i) / peft_files.WEIGHTS).read_bytes())
    assert files[0] == files[1]
    again, state = peft_methods.load(tmp_path / "0", base)
    assert again.hp["rank"] == 2
    assert_same_state(state, own)


@pytest.mark.parametrize("name", ["adalora", "loha", "lokr", "vera", "ia3", "prefix"])
def test_bfloat16_is_stored_exactly(name, made, tmp_path):
    _, base, _ = made("llama")
    method, state = trained(CASES[name], base)
    state = methods.State(jax.tree.map(lambda x: x.astype("bfloat16"), state[0]), state[1])
    peft_methods.save(tmp_path, method, state, base, "x")
    _, again = peft_methods.load(tmp_path, base)
    wide = jax.tree.map(lambda x: x.astype("float32"), state.trainable)
    assert_same_state(again, methods.State(wide, state.constants))


FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=48, bias=True)
FALCON |= dict(new_decoder_architecture=True, num_kv_heads=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", few(["loha", "adalora", "vera", "ia3"], ["vera"]))
def test_interleaved_parts_of_a_torch_linear_are_joined(name, tmp_path):
    """Falcon's query_key_value, whose columns go by groups of heads."""
    torch, peft, transformers = require("torch"), require("peft"), require("transformers")
    torch.manual_seed(0)
    reference = transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON)).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    reference.save_pretrained(tmp_path / "base")
    base = lorax.load(str(tmp_path / "base"))
    hp = dict(targets=("q", "v", "o")) | ({} if name == "ia3" else dict(rank=3))
    method, state = trained(Case("falcon", name, hp, "", {}), base)
    expected = parity.logits(base, method, state)
    peft_methods.save(tmp_path / "x", method, state, base, str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(reference, tmp_path / "x").eval()
    assert_close(parity.logits_torch(model), expected)
    again, own = peft_methods.load(tmp_path / "x", base)
    assert_close(parity.logits(base, again, own), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ia3", "ln-tuning"])
def test_a_classifier_brings_its_head(name, tmp_path):
    torch, peft, transformers = require("torch"), require("peft"), require("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    sizes |= dict(vocab_size=48, max_position_embeddings=32, num_labels=3)
    config = transformers.BertConfig(**sizes)
    reference = transformers.BertForSequenceClassification(config).eval()
    reference.save_pretrained(tmp_path / "base")
    base = lorax.load(str(tmp_path / "base"), head="classification", labels=3)
    hp = dict(targets=("k", "v", "down")) if name == "ia3" else {}
    method, state = trained(Case("bert", name, hp | dict(full=("classifier",)), "", {}), base)
    peft_methods.save(tmp_path / "x", method, state, base, str(tmp_path / "base"))
    stored = json.loads((tmp_path / "x" / peft_files.CONFIG).read_text())
    assert stored["task_type"] == "SEQ_CLS" and stored["modules_to_save"][-1] == "classifier"
    expected = parity.logits(base, method, state)
    tokens = torch.tensor(parity.batches()[0, :, :-1]).long()
    model = peft.PeftModel.from_pretrained(reference, tmp_path / "x").eval()
    with torch.no_grad():
        assert_close(model(input_ids=tokens).logits.numpy(), expected)
    assert_same_state(peft_methods.load(tmp_path / "x", base)[1], state)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("family", "name", "hp", "words"),
    [
        ("gpt2", "loha", dict(rank=2), "c_attn: PEFT has no LoHa of GPT-2's Conv1D"),
        ("gpt2", "lokr", dict(rank=2), "c_attn: PEFT has no LoKr of GPT-2's Conv1D"),
        ("gpt2", "lokr", dict(targets=("up",)), "c_fc: PEFT has no LoKr of GPT-2's Conv1D"),
        ("gpt2", "shira", dict(rank=2), "c_attn: PEFT has no SHiRA of GPT-2's Conv1D"),
        ("gpt2", "miss", dict(rank=2), "c_attn: PEFT has no MiSS of GPT-2's Conv1D"),
        ("phi3", "miss", dict(rank=2, mini_rank=2), "outputs of all .*qkv_proj share in PEFT"),
        ("gpt2", "llama-adapter", {}, "llama-adapter: PEFT has the same for llama, mistral, not"),
        ("gpt2", "oft", dict(block_size=4), "c_attn: PEFT has no OFT of GPT-2's Conv1D"),
        (
            "phi3",
            "oft",
            dict(block_size=4),
            "q, h/0/attn/v: PEFT turns the input of .*qkv_proj once",
        ),
        ("gpt2", "hra", {}, "c_attn: PEFT has no HRA of GPT-2's Conv1D"),
        (
            "gpt2",
            "fourierft",
            dict(frequencies=9),
            "c_attn: PEFT has one FourierFT of h/0/attn/q, ",
        ),
        ("gpt2", "randlora", dict(rank=4), "c_attn: PEFT has one RandLoRA of h/0/attn/q, "),
        ("gpt2", "gralora", {}, "c_attn: PEFT has one GraLoRA of h/0/attn/q, h/0/attn/k, "),
        ("llama", "llama-adapter", dict(layers=(0,)), "adapts the last layers alone"),
        ("llama", "prefix", dict(layers=(0,)), "a prefix in all layers or in none"),
        ("llama", "prompt", dict(full=("norms",)), "PEFT stores no weights beside it"),
        ("llama", "houlsby", {}, "houlsby: lorax does not write it in PEFT's format"),
        ("llama", "pfeiffer", {}, "pfeiffer: lorax does not write it in PEFT's format"),
        ("llama", "full", {}, "full: lorax does not write it in PEFT's format"),
        ("gpt2", "bitfit", {}, "bitfit: lorax does not write it in PEFT's format"),
        (
            "llama",
            "dora",
            dict(rank=2),
            "dora: lorax does not write it in PEFT's format; store it as LoRA",
        ),
        ("llama", "adalora", dict(rank=2, alpha=-1.0), "method.alpha: -1.0 given"),
        ("gpt2", "ia3", dict(full=("re:ln_f/bias",)), "ia3: PEFT trains no biases beside it"),
        ("gpt2", "ia3", dict(targets=("k",), feedforward=("k",)), "scales the input of all"),
        (
            "llama",
            "vera",
            dict(rank=2, targets=("embed",)),
            r"none of the linear layers, lm_head, model.layers.\{}",
        ),
    ],
)
def test_what_peft_can_not_store_is_refused_and_leaves_nothing(
    family, name, hp, words, made, tmp_path
):
    _, base, _ = made(family)
    method, state = trained(Case(family, name, hp, "", {}), base)
    with pytest.raises(ValueError, match=words):
        peft_methods.save(tmp_path, method, state, base, "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adalora", "loha", "vera"])
def test_an_adapter_that_does_nothing_is_no_file(name, made, tmp_path):
    """All arrays zero, as a sweep has it for what a member does not adapt."""
    _, base, _ = made("llama")
    method = lorax.method(name, rank=2)
    state = method.init(jax.random.key(0), base.params, base.sites)
    nothing = jax.tree.map(lambda x: 0 * x, state.trainable)
    with pytest.raises(ValueError, match=f"{name}: nothing to save"):
        peft_methods.save(tmp_path, method, state._replace(trainable=nothing), base, "x")


@pytest.fixture(scope="module")
def stored(made, tmp_path_factory):
    """name of a case -> (its base, {file's name: bytes} of what we make of it)."""

    @functools.cache
    def make(name):
        _, base, _ = made(CASES[name].family)
        directory = tmp_path_factory.mktemp(name)
        peft_methods.save(directory, *trained(CASES[name], base), base, "x")
        return base, {file.name: file.read_bytes() for file in directory.iterdir()}

    return make


def edited(stored, name, directory, config=None, tensors=lambda tensors: tensors):
    """(the base, the case's directory with other fields and tensors)."""
    base, files = stored(name)
    fields = json.loads(files[peft_files.CONFIG]) | (config or {})
    (directory / peft_files.CONFIG).write_text(json.dumps(fields))
    changed = tensors(safetensors.numpy.load(files[peft_files.WEIGHTS]))
    safetensors.numpy.save_file(changed, directory / peft_files.WEIGHTS)
    return base


LAST_LAYER = dict(LLAMA, layers_to_transform=[1])
EACH = ("adalora", "loha", "lokr", "vera", "ia3", "ln-tuning", "prefix", "prompt", "llama-adapter")
EACH += ("miss", "hira", "shira", "gralora")
EACH += ("oft", "fourierft", "hra", "randlora")


@pytest.mark.parametrize("name", EACH)
def test_a_damaged_file_is_named(name, stored, tmp_path):
    base, files = stored(name)
    for file, content in files.items():
        other = next(f for f in files if f != file)
        (tmp_path / other).write_bytes(files[other])
        for broken in (content[: len(content) // 2], b"\x00" * 64, b"", b"[]", b"{"):
            (tmp_path / file).write_bytes(broken)
            with pytest.raises(ValueError, match=file):
                peft_methods.load(tmp_path, base)
        (tmp_path / file).unlink()
        with pytest.raises(FileNotFoundError, match=file):
            peft_methods.load(tmp_path, base)


@pytest.mark.filterwarnings("ignore:.*no fields of")
@pytest.mark.parametrize("name", EACH)
def test_many_damaged_files_are_refused_in_bounded_memory(name, stored, tmp_path):
    base, files = stored(name)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    read = lambda: peft_methods.load(tmp_path, base)
    read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        survives(tmp_path / file, read, 120, name=str(tmp_path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**19


@pytest.mark.parametrize("name", EACH)
def test_wrong_shapes_and_unknown_modules_are_named(name, stored, tmp_path):
    def longer(key):
        wider = lambda x: np.concatenate([x, x[..., :1]], axis=-1)
        return lambda tensors: tensors | {key: wider(tensors[key])}

    def renamed(tensors):
        return {
            key.replace("model.layers.1.", "model.layers.7.x."): x for key, x in tensors.items()
        }

    keys = sorted(safetensors.numpy.load(stored(name)[1][peft_files.WEIGHTS]))
    for key in {keys[0], keys[len(keys) // 2], keys[-1]}:
        base = edited(stored, name, tmp_path, tensors=longer(key))
        with pytest.raises(ValueError, match=f"^{tmp_path}"):
            peft_methods.load(tmp_path, base)
    if CASES[name].family == "llama" and len(keys) > 1:
        base = edited(stored, name, tmp_path, tensors=renamed)
        with pytest.raises(ValueError, match="layers.7.x"):
            peft_methods.load(tmp_path, base)
    base = edited(stored, name, tmp_path, tensors=lambda tensors: {"x": np.ones(3)})
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        peft_methods.load(tmp_path, base)
    base = edited(stored, name, tmp_path, tensors=lambda tensors: tensors | {"x": np.ones(3)})
    with pytest.raises(ValueError, match="x"):
        peft_methods.load(tmp_path, base)


@pytest.mark.parametrize("name", EACH)
def test_a_config_of_nonsense_is_read_or_named(name, stored, tmp_path):
    """Every field in turn is something else: no other error than one that names file and field."""
    own = json.loads(stored(name)[1][peft_files.CONFIG])
    fields = FIELDS[own["peft_type"]]
    for field in own:
        for value in ("x", -1, {"a": "b"}, 10**30, float("nan"), None, [], 2**31 - 1, True):
            if fields[field].fits(value) and fields[field] is ANY:
                continue
            base = edited(stored, name, tmp_path, {field: value})
            try:
                peft_methods.load(tmp_path, base)
            except ValueError as error:
                assert str(error).startswith(str(tmp_path)), (field, value)
                assert field in str(error) or field in ("r", "decompose_both"), (field, value)
            else:
                assert fields[field].fits(value), (field, value)


@pytest.mark.filterwarnings("ignore:.*no fields of")
@pytest.mark.parametrize(
    ("name", "config", "tensors", "words"),
    [
        ("loha", {"peft_type": "BOFT"}, {}, "'BOFT' can't be read; supported are LORA, AD"),
        ("loha", {"peft_type": "LORA"}, {}, "'LORA' given; .* LORA by lorax.interop.peft"),
        ("loha", {"peft_type": "VERA"}, {}, "holds no tensors of VERA"),
        ("loha", {"r": 7, "rank_pattern": {}}, {}, "has rank 7 here and 3 in"),
        ("adalora", {"init_r": 7}, {}, "rank 4, but 7 in adapter_config.json, init_r"),
        ("lokr", {"rank_pattern": {"q_proj": 1}}, {}, "one rank can be read, not {"),
        ("ia3", {"feedforward_modules": []}, {}, r"down_proj, not in .*should be \(16, 1\), "),
        ("ia3", {"feedforward_modules": ["0.mlp.down_proj", "v_proj"]}, {}, "ia3_l should be"),
        ("vera", {}, {"base_model.vera_A": None}, "save with save_projection=True"),
        ("vera", {"r": 7}, {}, "adapter_config.json: r: 7, but 24 in vera_A"),
        ("vera", {"target_modules": ["q_proj"]}, {}, "target_modules: .* leaves out .*_proj"),
        ("loha", LAST_LAYER, {}, r"layers_to_transform: \[1\] leaves out model.layers.0"),
        ("hira", {"r": 7}, {}, "rank 3, but 7 in adapter_config.json, r or rank_pattern"),
        ("shira", {"r": 1}, {}, r"_proj, r 1: shira_weight should be \(56\), it is \(112,\)"),
        ("miss", {"r": 7}, {}, r"_proj, r 7: miss_block should be \(7, 16\), it is \(6, 16\)"),
        ("miss", {"init_weights": "bat"}, {}, "init_weights: 'bat' given; it should be true, "),
        ("ia3", {"exclude_modules": ["v_proj"]}, {}, "exclude_modules: .* leaves out .*v_proj"),
        ("ia3", {"modules_to_save": ["lm_head"]}, {}, "lm_head.weight is missing"),
        ("gralora", {"hybrid_r": 2}, {}, "hybrid_r: 2 given; GRALORA can only be read without it"),
        ("gralora", {"r": 6}, {}, r"gralora_A should be \(2, 20, 6\), it is \(2, 20, 4\)"),
        ("gralora", {"gralora_k": 4}, {}, r"gralora_A should be \(4, 10, 4\), it is"),
        ("gralora", {"gralora_k": 3}, {}, "r: 4, which gralora_k, 3, must divide"),
        ("oft", {"use_cayley_neumann": None}, {}, "use_cayley_neumann is missing: the"),
        ("oft", {"peft_version": "0.17.1"}, {}, "peft_version: '0.17.1' given; with use_"),
        ("oft", {"peft_version": None}, {}, "peft_version: None given; with use_cayley_neumann"),
        ("oft", {"num_cayley_neumann_terms": 1}, {}, "num_cayley_neumann_terms: 1 given, no rota"),
        ("oft", {"oft_block_size": 4}, {}, "oft_block_size: 4 given, .*, but .* blocks of 8"),
        ("oft", {"r": 2}, {}, "r: 2 and oft_block_size: 8 given; one must be 0"),
        ("oft", {"coft": True}, {}, "coft: True given; OFT can only be read without it"),
        ("oft", {"block_share": True}, {}, "block_share: True given; OFT can only be read without"),
        ("fourierft", {"n_frequency": 31}, {}, r"n_frequency 31 .*_spectrum should be \(31\)"),
        ("hra", {"apply_GS": True}, {}, "apply_GS: True given; HRA can only be read without it"),
        ("hra", {"r": 3}, {}, r"r 3 in .*: hra_u should be \(40, 3\), it is \(40, 4\)"),
        ("randlora", {"r": 5}, {}, r"r 5 .*: randlora_A should be \(5, 1, 16\), it is"),
        ("randlora", {}, {"base_model.randlora_A": None}, "save with save_projection=True"),
        ("ln-tuning", {"target_modules": ["norm"]}, {}, "target_modules: .* leaves out"),
        ("adalora", {"trainable_token_indices": [1]}, {}, "trainable_token_indices: "),
        ("prefix", {"num_virtual_tokens": 5}, {}, "num_virtual_tokens: 5 given, the tensors and"),
        ("prefix", {"num_layers": 3}, {}, "num_layers: 3 given, the tensors and the base have 2"),
        ("prefix", {"num_attention_heads": 8}, {}, "num_attention_heads: 8 given"),
        ("prefix", {"num_transformer_submodules": 2}, {}, "num_transformer_submodules: 2 given"),
        ("prompt", {"num_virtual_tokens": 5}, {}, "num_virtual_tokens: 5 given"),
        ("prompt", {"num_transformer_submodules": 2}, {}, "num_transformer_submodules: 2 given"),
        ("llama-adapter", {"adapter_len": 5}, {}, "adapter_len: 5 given"),
        ("llama-adapter", {"adapter_layers": 2}, {}, "adapter_layers: 2 given"),
        ("llama-adapter", {"target_modules": "attn"}, {}, "target_modules: 'attn' given"),
    ],
)  # fmt: skip
def test_fields_and_tensors_that_contradict_each_other_are_named(
    name, config, tensors, words, stored, tmp_path
):
    less = lambda own: {key: x for key, x in own.items() if key not in tensors}
    base = edited(stored, name, tmp_path, config, less)
    with pytest.raises(ValueError, match=words):
        peft_methods.load(tmp_path, base)


@pytest.mark.parametrize("name", ["adalora", "loha", "vera", "ia3", "ln-tuning"])
def test_several_adapters_and_names_that_stand_there_twice_are_named(name, stored, tmp_path):
    def both(tensors):
        (key, x), *_ = ((k, x) for k, x in tensors.items() if k.startswith("base_model.model."))
        start, _, end = key.partition(".weight")
        return tensors | {f"{start}.other{'.weight' * bool(_)}{end}": x}

    def twice(tensors):
        key, x = next((k, x) for k, x in tensors.items() if k.startswith("base_model.model."))
        return tensors | {key.removeprefix("base_model.model."): 1 + x}

    for change, words in ((both, "several adapters, one without a name, other"), (twice, "twice")):
        base = edited(stored, name, tmp_path, tensors=change)
        with pytest.raises(ValueError, match=f"{peft_files.WEIGHTS}: .*{words}"):
            peft_methods.load(tmp_path, base)


@pytest.mark.filterwarnings("ignore")
def test_a_projected_prefix_is_read_as_what_it_became(made, tmp_path):
    """PEFT stores a prefix behind its projection, and computes with it without one."""
    peft = require("peft")
    directory, base, reference = made("llama")
    options = TOKENS | dict(prefix_projection=True, encoder_hidden_size=8)
    model = peft.get_peft_model(reference(directory), peft.PrefixTuningConfig(**options)).eval()
    parity.disturb(model)
    model.save_pretrained(tmp_path)
    method, state = peft_methods.load(tmp_path, base)
    assert_close(parity.logits(base, method, state), parity.logits_torch(model))


def test_a_rotation_of_an_unknown_version_is_refused(stored, tmp_path):
    base = edited(stored, "oft", tmp_path)
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    for field, words in (
        ("oft_block_size", "from before PEFT 0.14"),
        ("use_cayley_neumann", "add"),
    ):
        less = {key: value for key, value in config.items() if key != field}
        (tmp_path / peft_files.CONFIG).write_text(json.dumps(less))
        with pytest.raises(ValueError, match=f"{field} is missing: .*{words}"):
            peft_methods.load(tmp_path, base)


def test_a_sweeps_rotation_is_stored_in_blocks_of_its_own_size(made, tmp_path):
    """Computed in blocks of 8 beside a wider member, stored in blocks of 4."""
    _, base, _ = made("llama")
    method = lorax.method("oft", block_size=4)
    state = method.init(jax.random.key(0), base.params, base.sites, pad=8)
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    state = state._replace(trainable=jax.tree.map(noise, state.trainable))  # also where masked
    peft_methods.save(tmp_path, method, state, base, "x")
    again, own = peft_methods.load(tmp_path, base)
    assert again.hp["block_size"] == 4
    shapes = {x.shape[1:] for x in jax.tree.leaves(own.trainable)}
    assert shapes == {(4, 6)}
    assert_close(parity.logits(base, again, own), parity.logits(base, method, state))


def test_places_of_no_entry_are_named(stored, tmp_path):
    def first(value, dtype):
        def changed(tensors):
            key = next(key for key in sorted(tensors) if key.endswith("shira_indices"))
            places = tensors[key].astype(dtype)
            places[:, 0] = places[:, 1] if value is None else value
            return tensors | {key: places}

        return changed

    for value, dtype, words in (
        (0.5, np.float32, "not all are whole numbers"),
        (-1, np.int32, "not all are in 16 x 40"),
        (99, np.float32, "not all are in 16 x 40"),
        (None, np.int32, "a place comes twice"),
    ):
        base = edited(stored, "shira", tmp_path, tensors=first(value, dtype))
        with pytest.raises(ValueError, match=f"shira_indices: {words}"):
            peft_methods.load(tmp_path, base)


def test_a_copy_of_random_bases_that_differs_is_named(stored, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.randlora_A"
    other = lambda tensors: tensors | {key: 1 + tensors["base_model.randlora_A"]}
    base = edited(stored, "randlora", tmp_path, tensors=other)
    with pytest.raises(ValueError, match="q_proj: randlora_A is not that of all modules, base_mod"):
        peft_methods.load(tmp_path, base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", few(["qwen3", "smollm3", "olmo2", "granite-multipliers"], ["smollm3"])
)
def test_pefts_prefix_is_ours_in_newer_decoders(name, tmp_path):
    """Norms and rotation of keys, or neither, come before the prefix joins them."""
    peft = require("peft")
    model = copy.deepcopy(decoders.reference(name))
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(**TOKENS)).eval()
    parity.disturb(model)
    model.save_pretrained(tmp_path)
    base = lorax.load(str(decoders.saved(name)))
    method, state = peft_methods.load(tmp_path, base)
    expected = decoders.logits(model)
    bound = method.bind(*state, base.params, sites=base.sites)
    got = jit(functools.partial(lorax.apply, base.module))(bound, decoders.TOKENS)
    assert np.abs(got - decoders.logits(decoders.reference(name))).max() > 0.1
    assert_close(got, expected)


def test_one_kronecker_product_of_q_k_and_v_can_not_be_read(made, tmp_path):
    _, base, _ = made("gpt2")
    key = "base_model.model.transformer.h.0.attn.c_attn.lokr_w"
    tensors = {f"{key}1": np.ones((6, 4), np.float32), f"{key}2": np.ones((8, 4), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / peft_files.WEIGHTS)
    (tmp_path / peft_files.CONFIG).write_text('{"peft_type": "LOKR"}')
    with pytest.raises(ValueError, match="one Kronecker product for h/0/attn/q, h/0/attn/k, h/0"):
        peft_methods.load(tmp_path, base)
