"""The command line that looks at adapters and carries them from one format to another."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import synthetic
from quick import jit
from support import data, require

import lorax
from lorax import adapters, convert, models, ops, quant, tree
from lorax.adapters import peft_methods
from lorax.analysis import factor_svd
from lorax.interop import hf, loralib, peft
from lorax.interop.peft import Adapter, Factors
from lorax.models.families import FAMILIES
from lorax.models.load import skeleton
from lorax.models.saving import stored_dtypes
from lorax.quant import nf4

MNLI = "adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz"
WIDTH = 16


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def draw(*shape, seed=0):
    return 0.3 * np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with the configuration of a GPT-2 and random weights."""
    directory = tmp_path_factory.mktemp("models")
    sizes = dict(n_embd=WIDTH, n_head=2, n_layer=2, vocab_size=40, n_positions=12)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    base = lorax.load(f"random:{directory}")
    lorax.models.save(directory, base)
    return directory, base


@pytest.fixture
def adapter(base, tmp_path):
    """A PEFT directory for it."""
    own = {
        "h/0/attn/q": Factors(draw(WIDTH, 2), draw(2, WIDTH), 2.0),
        "h/1/mlp/down": Factors(draw(4 * WIDTH, 20), draw(20, WIDTH), 0.5),
        "wte": Factors(draw(40, 2), draw(2, WIDTH), 1.0),
    }
    weights = {"ln_f/bias": draw(WIDTH), "ln_f/scale": 1 + draw(WIDTH, seed=1)}
    peft.save(tmp_path / "adapter", Adapter(own, weights, {}), base[1].sources, "x", dropout=0.25)
    return tmp_path / "adapter"


# -------------------------------------------------------------------------------------------- show


def shown(text: str) -> dict[str, list[str]]:
    """{layer: the other cells of its row} of the table on the terminal."""
    lines = [line.strip("│ \n").split("│") for line in text.splitlines() if "│" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize(
    ("path", "options", "count"),
    [(MNLI, ("--alpha", 16), 24), ("adapters/peft_gpt2_lora", (), 36)],
)
def test_the_spectrum_of_every_layer_of_the_real_adapters(path, options, count, tmp_path, capsys):
    assert run("show", data(path), *options, "--csv", tmp_path / "sigma.csv") == 0
    rows = shown(capsys.readouterr().out)
    assert len(rows) == count
    loaded = loralib.load(data(path), 16) if options else peft.load(data(path))
    lines = (tmp_path / "sigma.csv").read_text().splitlines()
    assert lines[0] == "path,index,sigma" and len(lines) == 1 + 8 * count
    table = [line.split(",") for line in lines[1:]]
    for layer, (a, b, s, _) in loaded.factors.items():
        _, sigma, _ = factor_svd(a, b, s)
        written = [float(x) for name, _, x in table if name == layer]
        np.testing.assert_allclose(written, sigma, rtol=1e-6)
        cells = rows[layer]
        assert cells[:3] == [f"{a.shape[0]} x {b.shape[1]}", "8", f"{s:g}"]
        np.testing.assert_allclose([float(x) for x in cells[-1].split()], sigma, rtol=6e-3)
        np.testing.assert_allclose(float(cells[3]), np.linalg.norm(s * a @ b), rtol=1e-3)


def test_with_its_base_an_adapter_is_shown_by_our_paths(base, tmp_path, capsys):
    tensors = {"transformer.h.1.attn.c_attn.lora_A": draw(4, WIDTH)}
    tensors |= {"transformer.h.1.attn.c_attn.lora_B": draw(2 * WIDTH, 2)}
    np.savez(tmp_path / "x.npz", **tensors)
    assert run("show", tmp_path / "x.npz", "--alpha", 32, "--base", base[0]) == 0
    assert list(shown(capsys.readouterr().out)) == ["h/1/attn/q", "h/1/attn/v"]


def test_long_spectra_are_cut_and_full_weights_named(adapter, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **{"x.lora_A": draw(20, 40), "x.lora_B": draw(30, 20)})
    assert run("show", tmp_path / "x.npz", "--alpha", 1) == 0
    assert shown(capsys.readouterr().out)["x"][-1].endswith(" ... 4 more")
    assert run("show", adapter / "adapter_model.safetensors") == 0
    assert "trained in full: ln_f/bias 16\n" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- peft


def test_a_checkpoint_of_the_authors_becomes_one_of_peft(base, tmp_path, capsys):
    module = "transformer.h.1.attn.c_attn"
    A, B = draw(4, WIDTH), draw(2 * WIDTH, 2)
    safetensors.numpy.save_file(
        {f"{module}.lora_A": A, f"{module}.lora_B": B}, tmp_path / "x.safetensors"
    )
    out = tmp_path / "new" / "out"
    assert run("peft", tmp_path / "x.safetensors", out, "--base", base[0], "--alpha", 32) == 0
    assert capsys.readouterr().out == f"{out}: 2 adapted matrices\n"
    assert sorted(file.name for file in out.iterdir()) == [peft.CONFIG, peft.WEIGHTS]
    stored = safetensors.numpy.load_file(out / peft.WEIGHTS)
    update = 16 * stored[f"base_model.model.{module}.lora_B.weight"]
    update = update @ stored[f"base_model.model.{module}.lora_A.weight"]  # (3 d, d)
    want = np.zeros((3 * WIDTH, WIDTH))
    want[:WIDTH], want[2 * WIDTH :] = 16 * B[:WIDTH] @ A[:2], 16 * B[WIDTH:] @ A[2:]
    np.testing.assert_allclose(update, want, rtol=0, atol=1e-5)
    config = json.loads((out / peft.CONFIG).read_text())
    assert config["lora_alpha"] / config["r"] == 16 and config["task_type"] == "CAUSAL_LM"


def test_the_authors_mnli_adapter_becomes_one_of_peft_with_its_head(tmp_path):
    if "roberta" not in FAMILIES:
        pytest.skip("no roberta")
    roberta = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "pad_token_id": 1}
    roberta |= {"max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265}
    (tmp_path / "config.json").write_text(json.dumps(roberta))
    out = tmp_path / "out"
    assert run("peft", data(MNLI), out, "--base", tmp_path, "--alpha", 16) == 0
    config = json.loads((out / peft.CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    stored = safetensors.numpy.load_file(out / peft.WEIGHTS)
    with np.load(data(MNLI)) as theirs:
        assert len(stored) == len(theirs.files)
        for key in theirs.files:
            name = key if "lora" not in key else f"{key}.weight"
            np.testing.assert_array_equal(stored[f"base_model.model.{name}"], theirs[key])


def test_peft_to_peft_keeps_everything(base, adapter, tmp_path):
    assert run("peft", adapter, tmp_path / "again", "--base", base[0]) == 0
    first, again = (peft.load(directory) for directory in (adapter, tmp_path / "again"))
    assert list(first.factors) == list(again.factors) and list(first.weights) == list(again.weights)
    assert again.config == first.config | {"base_model_name_or_path": str(base[0])}
    assert (adapter / peft.WEIGHTS).read_bytes() == (tmp_path / "again" / peft.WEIGHTS).read_bytes()


# ------------------------------------------------------------------------------------------- merge


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_with_what_was_merged(base, adapter, tmp_path, capsys):
    torch, transformers = require("torch"), require("transformers")
    directory, ours = base
    assert run("merge", directory, adapter, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "3 matrices merged; largest rounding error" in text
    assert 0 < float(text.split("error ")[1].split()[0]) < 1e-7
    tokens = np.arange(12, dtype=np.int32)[None] + 3
    bound = adapters.bind(ours, peft.load(adapter))
    expected = jit(functools.partial(lorax.apply, ours.module))(bound, tokens)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.ptp(logits) > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------- other methods

OTHERS = {
    "adalora": dict(rank=2, targets=("q", "o")),
    "vera": dict(rank=4, targets=("v", "up"), full=("norms",)),
    "ia3": dict(),
    "ln-tuning": dict(),
    "prompt": dict(tokens=3),
    "prefix": dict(tokens=2),
}


@pytest.fixture
def other(base, tmp_path):
    """name -> (PEFT directory of one of `OTHERS` off its start, method, state)."""

    def make(name):
        method = lorax.method(name, **OTHERS[name])
        state = method.init(jax.random.key(0), base[1].params, base[1].sites)
        moved = jax.tree.map(lambda x: x + draw(*x.shape), state.trainable)
        state = state._replace(trainable=moved)
        peft_methods.save(tmp_path / name, method, state, base[1], "x")
        return tmp_path / name, method, state

    return make


def logits_of(ours, params):
    tokens = np.arange(9, dtype=np.int32)[None] + 3
    return jit(functools.partial(lorax.apply, ours.module))(params, tokens)


@pytest.mark.parametrize("name", ["adalora", "vera", "ia3", "ln-tuning"])
def test_other_methods_are_shown_and_merged(name, other, base, tmp_path, capsys):
    directory, method, state = other(name)
    assert run("show", directory, "--base", base[0], "--csv", tmp_path / "sigma.csv") == 0
    text = capsys.readouterr().out
    rows = shown(text)
    updates = method.delta(*state, base[1].params, base[1].sites)
    matrices = {path: x for path, x in updates.items() if path in base[1].sites}
    assert len(rows) == 2 * len(matrices)
    for path, update in matrices.items():
        for i in (0, 1):
            cells = rows[path.removesuffix("/kernel").replace("h/", f"h/{i}/")]
            np.testing.assert_allclose(float(cells[3]), np.linalg.norm(update[i]), rtol=1e-3)
    table = [line.split(",") for line in (tmp_path / "sigma.csv").read_text().splitlines()[1:]]
    squares = sum(float(sigma) ** 2 for _, _, sigma in table)
    np.testing.assert_allclose(squares, sum(np.sum(x**2) for x in matrices.values()), rtol=1e-4)
    if name in ("vera", "ln-tuning"):
        assert ("trained in full: ln_f/bias" in text) == (name == "vera")
        assert ("changed as well: ln_f/bias 16\n" in text) == (name == "ln-tuning")
    assert run("merge", base[0], directory, tmp_path / "out") == 0
    assert "merged" in capsys.readouterr().out
    merged = lorax.load(str(tmp_path / "out"))
    bound = method.bind(*state, base[1].params, sites=base[1].sites)
    want = logits_of(base[1], bound)
    np.testing.assert_allclose(logits_of(merged, merged.params), want, rtol=0, atol=1e-5)
    assert np.abs(want - logits_of(base[1], base[1].params)).max() > 1e-3


def test_methods_of_low_rank_become_lora(other, base, tmp_path):
    directory, method, state = other("adalora")
    assert run("peft", directory, tmp_path / "lora", "--base", base[0]) == 0
    assert json.loads((tmp_path / "lora" / peft.CONFIG).read_text())["peft_type"] == "LORA"
    bound = adapters.bind(base[1], peft.load(tmp_path / "lora", base[1].sources))
    want = logits_of(base[1], method.bind(*state, base[1].params, sites=base[1].sites))
    np.testing.assert_allclose(logits_of(base[1], bound), want, rtol=0, atol=1e-5)


def test_virtual_tokens_are_shown_and_not_merged(other, base, tmp_path, capsys):
    directory, _, _ = other("prompt")
    assert run("show", directory, "--base", base[0]) == 0
    assert "no change of weights: wte/prompt 3 x 16\n" in capsys.readouterr().out
    assert run("merge", base[0], directory, tmp_path / "out") == 2
    assert "prompt: is no change of weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ia3", "show {own}", "ia3: IA3: no update .* without its base"),
        ("ia3", "show {own} --alpha 3 --base {base}", "alpha: .* already has a scale"),
        ("ia3", "peft {own} {tmp}/out --base {base}", "ia3 has no low-rank update"),
        ("prefix", "peft {own} {tmp}/out --base {base}", "prefix has no low-rank update"),
    ],
)
def test_what_other_methods_can_not_do_is_one_line(
    name, arguments, words, other, base, tmp_path, capsys
):
    own, _, _ = other(name)
    places = dict(tmp=tmp_path, own=own, base=base[0])
    assert run(*(word.format(**places) for word in arguments.split())) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- what must fit together

ENCODER = dict(
    model_type="bert", vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=12,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=32, eos_token_id=3,
)  # fmt: skip


def model(where, config, dtype="float32"):
    """A model directory with random weights."""
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
    base = skeleton(str(where))
    flat = {path: draw(*leaf.shape) for path, leaf in tree.flatten(base.params).items()}
    written = config | {"torch_dtype": dtype}
    hf.write(where, written, base.sources, flat, dict.fromkeys(flat, jnp.dtype(dtype)))
    return where


def lora(where, modules, config=None, **weights):
    """A directory as PEFT writes it: {module: (A, B)}, and tensors that were trained in full."""
    where.mkdir()
    tensors = {f"{peft.PREFIX}{name}": x for name, x in weights.items()}
    for module, (a, b) in modules.items():
        tensors[f"{peft.PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{peft.PREFIX}{module}.lora_B.weight"] = b
    safetensors.numpy.save_file(tensors, where / peft.WEIGHTS)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}
    (where / peft.CONFIG).write_text(json.dumps(fields | (config or {})))
    return where


def arguments_of(command, own, base, out):
    return {
        "show": ("show", own, "--base", base),
        "peft": ("peft", own, out, "--base", base),
        "merge": ("merge", base, own, out),
    }[command]


TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: Heads, and the task types of adapters for them.
HEADS = {
    "GPT2": {"CAUSAL_LM"},
    "BertForMaskedLM": set(),
    "BertForSequenceClassification": {"SEQ_CLS"},
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """{head: (model directory, the model, module to adapt)}."""
    where, found = tmp_path_factory.mktemp("heads"), {}
    gpt2 = dict(n_embd=8, n_head=2, n_layer=2, vocab_size=20, n_positions=12, model_type="gpt2")
    for name in HEADS:
        config = gpt2 if name == "GPT2" else ENCODER | {"architectures": [name]}
        module = "transformer.h.0.attn.c_proj"
        if name != "GPT2":
            module = "bert.encoder.layer.0.attention.self.query"
        base = model(where / name, config)
        found[name] = base, lorax.load(str(base)), module
    return found


@pytest.mark.parametrize("task", [*TASKS, None])
@pytest.mark.parametrize("head", HEADS)
def test_a_task_whose_head_is_not_there_is_refused(head, task, heads, tmp_path, capsys):
    base, ours, module = heads[head]
    own = lora(tmp_path / "own", {module: (draw(2, 8), draw(8, 2))}, {"task_type": task})
    right = task in {*HEADS[head], "FEATURE_EXTRACTION", None}
    for command in ("show", "peft", "merge") if not right else ("peft",):
        out = tmp_path / command
        assert run(*arguments_of(command, own, base, out)) == (0 if right else 2)
        err = capsys.readouterr().err
        assert out.exists() == right
        if not right:
            assert f"adapter_config.json: task_type {task!r}: " in err
            assert "FEATURE_EXTRACTION" in err and err.count("\n") == 1
    adapter = peft.load(own, ours.sources)
    for make in (adapters.bind, adapters.merge, lambda b, a: adapters.mixed(b, [a], [0])):
        if right:
            make(ours, adapter)
        else:
            with pytest.raises(ValueError, match=f"task_type '{task}'"):
                make(ours, adapter)


@pytest.mark.parametrize("task", ["TOKEN_CLS", None])
def test_a_classifier_of_tokens_is_not_taken_for_one_of_texts(task, tmp_path, capsys):
    base = model(tmp_path / "base", ENCODER | {"architectures": ["BertForMaskedLM"]})
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["BertForTokenClassification"]}
    (base / "config.json").write_text(json.dumps(config))
    module = "bert.encoder.layer.0.attention.self.query"
    head = {"classifier.weight": draw(3, 8), "classifier.bias": draw(3)}
    own = lora(tmp_path / "own", {module: (draw(2, 8), draw(8, 2))}, {"task_type": task}, **head)
    for command in ("show", "peft", "merge"):
        assert run(*arguments_of(command, own, base, tmp_path / "out")) == 2
        words = f"task_type {task!r}" if task else "no task_type; .*BertForTokenClassification"
        assert re.search(words, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


def test_a_task_without_its_head_is_refused_on_a_loaded_base(heads, tmp_path):
    _, ours, module = heads["GPT2"]
    own = lora(tmp_path / "own", {module: (draw(2, 8), draw(8, 2))}, {"task_type": "SEQ_CLS"})
    with pytest.raises(ValueError, match="adapter_config.json: task_type 'SEQ_CLS'"):
        adapters.load(own, ours)


def test_other_methods_are_refused_for_a_task_without_its_head(other, base, tmp_path, capsys):
    directory, _, _ = other("ia3")
    config = json.loads((directory / peft.CONFIG).read_text())
    (directory / peft.CONFIG).write_text(json.dumps(config | {"task_type": "TOKEN_CLS"}))
    assert run("merge", base[0], directory, tmp_path / "out") == 2
    assert "task_type 'TOKEN_CLS'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="task_type 'TOKEN_CLS'"):
        peft_methods.load(directory, base[1])


@pytest.mark.parametrize("command", ["show", "peft", "merge"])
@pytest.mark.parametrize(
    ("module", "a", "b", "words"),
    [
        ("layers.0.self_attn.q_proj", (2, 64), (64, 2), "h/0/attn/q: .* do not fit .* 16 x 16"),
        ("layers.0.self_attn.q_proj", (2, 16), (32, 2), "h/0/attn/q: .* do not fit .* 16 x 16"),
        ("layers.2.self_attn.q_proj", (2, 16), (16, 2), "has no such layer|no such module"),
    ],
)
def test_shapes_and_layers_are_checked_and_not_names_alone(
    module, a, b, words, command, tmp_path, capsys
):
    base = model(tmp_path / "base", LLAMA)
    own = lora(tmp_path / "own", {f"model.{module}": (draw(*a), draw(*b))})
    assert run(*arguments_of(command, own, base, tmp_path / "out")) == 2
    text = capsys.readouterr()
    assert re.search(words, text.err) and text.err.count("\n") == 1 and not text.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["show", "peft", "merge"])
def test_weights_trained_in_full_are_checked_too(command, tmp_path, capsys):
    base = model(tmp_path / "base", LLAMA)
    own = lora(
        tmp_path / "own", {"model.layers.0.self_attn.q_proj": (draw(2, 16), draw(16, 2))},
        **{"model.norm.weight": draw(12)},
    )  # fmt: skip
    assert run(*arguments_of(command, own, base, tmp_path / "out")) == 2
    assert re.search(r"norm/scale: \(12,\) given, the base's has \(16,\)", capsys.readouterr().err)


# ---------------------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize(
    ("alpha", "b", "words"),
    [(0, draw(16, 2), "alpha is 0"), (4, 0 * draw(16, 2), "every B is 0")],
)
def test_an_adapter_that_changes_nothing_says_so(alpha, b, words, tmp_path, capsys):
    base = model(tmp_path / "base", LLAMA)
    modules = {"model.layers.0.self_attn.q_proj": (draw(2, 16), b)}
    own = lora(tmp_path / "own", modules, {"lora_alpha": alpha})
    for command in ("show", "peft", "merge"):
        assert run(*arguments_of(command, own, base, tmp_path / command)) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "nothing changes" in line]
        assert len(lines) == 1 and words in lines[0], command
    assert run("show", own) == 0 and words in capsys.readouterr().out


def test_an_update_that_rounding_loses_says_so(tmp_path, capsys):
    base = model(tmp_path / "base", LLAMA, "bfloat16")
    modules = {"model.layers.0.self_attn.q_proj": (draw(2, 16), 1e-9 * draw(16, 2))}
    assert run("merge", base, lora(tmp_path / "own", modules), tmp_path / "out") == 0
    assert "nothing changes: every weight equals that of" in capsys.readouterr().out
    files = [where / "model.safetensors" for where in (base, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_method_that_changes_nothing_says_so(base, tmp_path, capsys):
    method = lorax.method("ia3")
    state = method.init(jax.random.key(0), base[1].params, base[1].sites)
    peft_methods.save(tmp_path / "own", method, state, base[1], "x")
    assert run("show", tmp_path / "own", "--base", base[0]) == 0
    assert "nothing changes: every update is 0" in capsys.readouterr().out
    assert run("merge", base[0], tmp_path / "own", tmp_path / "out") == 0
    assert "nothing changes" in capsys.readouterr().out


# ------------------------------------------------------------------------ numbers of merged models


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_weight_is_rounded_once_to_the_dtype_of_the_files(dtype, tmp_path, capsys):
    base = model(tmp_path / "base", LLAMA, dtype)
    a, b = draw(2, 16), draw(16, 2)
    own = lora(tmp_path / "own", {"model.layers.1.self_attn.q_proj": (a, b)})
    assert run("merge", base, own, tmp_path / "out") == 0
    error = float(capsys.readouterr().out.split("error ")[1].split()[0])
    assert 0 < error < 2**-8
    before, after = (
        safetensors.numpy.load_file(where / "model.safetensors")
        for where in (base, tmp_path / "out")
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = before[name].astype(np.float64) + 2 * (b.astype(np.float64) @ a.astype(np.float64))
    assert after[name].dtype == before[name].dtype
    near = after[name].astype(np.float64)
    step = lambda way: np.nextafter(after[name], after[name].dtype.type(way)).astype(np.float64)
    assert (np.abs(near - exact) <= np.abs(step(np.inf) - exact)).all()
    assert (np.abs(near - exact) <= np.abs(step(-np.inf) - exact)).all()
    assert all((before[key] == after[key]).all() for key in before.keys() - {name})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == dtype and config["eos_token_id"] == 3


@pytest.mark.parametrize("change", ["too large", "NaN"])
def test_no_merged_model_has_numbers_that_are_none(change, tmp_path, capsys):
    base = model(tmp_path / "base", LLAMA, "float16")
    size = 1e4 if change == "too large" else np.float32(1)
    modules = {"model.layers.1.self_attn.q_proj": (draw(2, 16), size * draw(16, 2))}
    own = lora(tmp_path / "own", modules, {"lora_alpha": 400})
    if change == "NaN":  # as factors would bring it that no file had
        ours = lorax.load(str(base))
        adapter = peft.load(own, ours.sources)
        adapter.factors["h/1/attn/q"].a[0, 0] = np.nan
        with pytest.raises(ValueError, match="h/1/attn/q: NaN or infinity"):
            adapters.merge(ours, adapter)
        return
    assert run("merge", base, own, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "h/1/attn/q: " in err and "too large for float16" in err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- bases in 4 bits


def in_4_bits(where, plain):
    """The model of a directory as transformers saves it with bitsandbytes, but for its embeddings
    and norms."""
    base = lorax.load(str(plain))
    linear = {path: site for path, site in base.sites.items() if site.kind == "linear"}
    coded = tree.flatten(quant.quantize(base.params, sites=linear))
    tensors = safetensors.numpy.load_file(plain / "model.safetensors")
    for path in linear:
        if "{}" not in (name := base.sources[path].name):
            continue
        for i in range(LLAMA["num_hidden_layers"]):
            key, leaf = name.format(i), jax.tree.map(lambda x, i=i: x[i], coded[path])
            state = {"blocksize": leaf.block, "dtype": str(tensors[key].dtype)}
            state = json.dumps(state | {"shape": tensors[key].shape}).encode()
            tensors[key] = np.asarray(leaf.codes).reshape(-1, 1)
            tensors[f"{key}.absmax"] = np.asarray(leaf.absmax).reshape(-1)
            tensors[f"{key}.quant_map"] = nf4.CODES["nf4"].values
            tensors[f"{key}.quant_state.bitsandbytes__nf4"] = np.frombuffer(state, np.uint8)
    where.mkdir()
    safetensors.numpy.save_file(tensors, where / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (where / "config.json").write_text(json.dumps(config))
    return where


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """(a model in bfloat16, the same in 4 bits, an adapter)."""
    where = tmp_path_factory.mktemp("coded")
    plain = model(where / "plain", LLAMA, "bfloat16")
    modules = {"model.layers.1.self_attn.q_proj": (draw(2, 16), draw(16, 2))}
    return plain, in_4_bits(where / "coded", plain), lora(where / "own", modules)


@pytest.mark.parametrize("options", [(), ("--onto", "decoded"), ("--onto", "{plain}")])
def test_a_base_in_4_bits_is_decoded_or_its_model_is_given(options, coded, tmp_path, capsys):
    plain, base, own = coded
    options = [option.format(plain=plain) for option in options]
    assert run("merge", base, own, tmp_path / "out", *options) == 0
    text = capsys.readouterr().out
    onto = plain if str(plain) in options else base
    assert ("were decoded to bfloat16" in text) == (onto == base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    back, ours = lorax.load(str(tmp_path / "out")), lorax.load(str(onto))
    merged = adapters.merge(ours, peft.load(own, ours.sources)).params
    plainly = lambda leaf, site: np.asarray(ops.dense(leaf, site)).astype(jnp.bfloat16)
    for path, leaf in tree.flatten(back.params).items():
        want = plainly(tree.flatten(merged)[path], ours.sites.get(path))
        np.testing.assert_array_equal(leaf, want.astype(np.float32))
    kinds = {
        x.dtype.name
        for x in safetensors.numpy.load_file(tmp_path / "out/model.safetensors").values()
    }
    assert kinds == {"bfloat16"}


def test_another_method_is_merged_into_decoded_weights(coded, tmp_path, capsys):
    _, where, _ = coded
    base = lorax.load(str(where))
    method = lorax.method("ia3")
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=jax.tree.map(lambda x: x + draw(*x.shape), state.trainable))
    peft_methods.save(tmp_path / "own", method, state, base, "x")
    assert run("merge", where, tmp_path / "own", tmp_path / "out") == 0
    assert "were decoded to bfloat16" in capsys.readouterr().out
    back = lorax.load(str(tmp_path / "out"))
    want = logits_of(base, method.bind(*state, base.params, sites=base.sites))
    np.testing.assert_allclose(logits_of(back, back.params), want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize(
    ("base", "onto", "words"),
    [
        ("{plain}", "decoded", "is not in 4 bits; leave --onto out"),
        ("{coded}", "{coded}", "is quantised too"),
        ("{coded}", "{other}", "is not the model that .* was quantised from: .* has shape"),
        ("{coded}", "{tmp}/nothing", "no directory"),
    ],
)
def test_an_onto_without_sense_is_one_line(base, onto, words, coded, tmp_path, capsys):
    other = model(tmp_path / "other", LLAMA | {"hidden_size": 32})
    places = dict(plain=coded[0], coded=coded[1], other=other, tmp=tmp_path)
    base, onto = base.format(**places), onto.format(**places)
    assert run("merge", base, coded[2], tmp_path / "out", "--onto", onto) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("show {tmp}/nothing", "adapter_config.json: no such file"),
        ("show {tmp}/nothing.npz --alpha 3", "nothing.npz: no such file"),
        ("show {tmp}/nothing.npz", "alpha: .* does not say"),
        ("show {adapter} --alpha 3", "alpha: .* already has a scale"),
        ("show {adapter} --base {tmp}/none", "no directory"),
        ("peft {adapter} {adapter} --base {base}", "already exists"),
        ("peft {tmp}/wide.npz {tmp}/out --alpha 3 --base {base}", "wide.npz: .*no such module"),
        ("merge {base} {adapter} {adapter}", "already exists"),
        ("merge {base} {tmp}/wide {tmp}/out", "h/0/attn/q: a .8, 1.* do not fit"),
        ("merge {base} {adapter}/adapter_config.json/x {tmp}/out", "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    arguments, words, base, adapter, tmp_path, capsys
):
    np.savez(tmp_path / "wide.npz", **{"x.lora_A": draw(1, 8), "x.lora_B": draw(8, 1)})
    wide = {"h/0/attn/q": Factors(draw(8, 1), draw(1, WIDTH), 1.0)}
    peft.save(tmp_path / "wide", wide, base[1].sources, "x")
    before = sorted(tmp_path.rglob("*"))
    places = dict(tmp=tmp_path, adapter=adapter, base=base[0])
    assert run(*(word.format(**places) for word in arguments.split())) == 2
    text = capsys.readouterr()
    assert text.err.startswith("lorax: ") and text.err.count("\n") == 1 and not text.out
    assert re.search(words, text.err), text.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "where"),
    [("show", "adapter"), ("peft", "adapter"), ("merge", "adapter"), ("merge", "base")],
)
def test_numbers_that_are_none_are_refused_before_anything_is_written(
    command, where, base, adapter, tmp_path, capsys
):
    """A NaN in an adapter, an infinity in the base: no spectrum, no model, one line."""
    own = shutil.copytree(base[0], tmp_path / "base")
    file = adapter / peft.WEIGHTS if where == "adapter" else own / "model.safetensors"
    tensors = {name: x.copy() for name, x in safetensors.numpy.load_file(file).items()}
    name = next(name for name in tensors if name.endswith(("lora_B.weight", "c_fc.weight")))
    tensors[name][0, 0] = np.nan if where == "adapter" else np.inf
    safetensors.numpy.save_file(tensors, file)
    given = {
        "show": ("show", adapter),
        "peft": ("peft", adapter, tmp_path / "out", "--base", own),
        "merge": ("merge", own, adapter, tmp_path / "out"),
    }[command]
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{file}: {name}: NaN or infinity in it" in error
    assert not (tmp_path / "out").exists()


def test_merging_reads_and_writes_one_layer_after_the_other(tmp_path, monkeypatch):
    """The file is that of a base in memory, and no buffer is larger than the embedding."""
    synthetic.make_adapter(tmp_path / "adapter", 0)
    trained = adapters.load(tmp_path / "adapter", lorax.load("gpt2-nano"))
    merged = trained.merge(stored_dtypes(trained.base))
    models.save(tmp_path / "whole", trained.base.replace(params=merged.params))
    seen, read = [], hf.Parameter.read

    def counted(self, index):
        seen.append(read(self, index))
        return seen[-1]

    monkeypatch.setattr(hf.Parameter, "read", counted)
    assert run("merge", "gpt2-nano", tmp_path / "adapter", tmp_path / "merged") == 0
    assert max(x.nbytes for x in seen) == 4 * 1024 * 128 and len(seen) > 4 * 12
    whole, layered = (tmp_path / name / hf.SINGLE for name in ("whole", "merged"))
    assert layered.read_bytes() == whole.read_bytes()
