"""lm-eval's tasks on a base with an adapter: against lm-eval's model of transformers and PEFT."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from support import require

import lorax
from lorax import adapters, config, methods
from lorax.train import benchmarks, loop, prepare

CHOICE = """
task: which
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = ["The Vaults is a", "name : Zizzi | food :", "Near the river there is", "It serves"]
CHOICES = ["pub near Burger King .", "cheap Italian food", "family friendly place by the river"]


@pytest.fixture(scope="module")
def base():
    return lorax.load("gpt2-nano")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A folder in PEFT's format whose adapter changes a lot."""
    method = lorax.method("lora", rank=4, targets=("all-linear",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    noise = lambda x: x + 0.05 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    state = methods.State(jax.tree.map(noise, state.trainable), state.constants)
    folder = tmp_path_factory.mktemp("adapter")
    assert not adapters.save(folder, adapters.from_training(base, method, state), "gpt2-nano")
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    """(a task of choices, a task of texts), as YAML files with their rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": q, "choices": CHOICES, "answer": i % 3} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("ROWS", str(tmp_path / "rows.jsonl")))
    return str(tmp_path / "choice.yaml"), str(tmp_path / "written.yaml")


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.filterwarnings("ignore")
def test_likelihoods_and_texts_are_those_of_lm_eval(base, adapter):
    """Also of texts without a context, and of one longer than the model reads."""
    for name in ("lm_eval", "torch", "peft"):
        require(name)
    import peft
    import transformers
    from lm_eval.models.huggingface import HFLM

    from lorax.tasks import harness

    folder = pathlib.Path(lorax.__file__).parent / "assets/gpt2-nano"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model, adapter)
    end = {"eos_token": base.tokenizer.id_to_token(base.vocabulary.end)}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **end)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    ours = harness.Model(base, adapters.load(adapter, base).bind(), batch_size=4)
    assert ours.max_length == theirs.max_length

    long = "The Vaults pub near Café Adriatic has a 5 star rating . " * 60
    pairs = [(q, f" {c}") for q in QUESTIONS for c in CHOICES]
    pairs += [("", CHOICES[0]), ("It serves ", "food"), (long, " and more")]
    found, expected = (m.loglikelihood(requests(*pairs)) for m in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
    texts = [(CHOICES[2],), (long,)]
    found, expected = (m.loglikelihood_rolling(requests(*texts)) for m in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
    settings = {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [(question, settings) for question in QUESTIONS]
    found, expected = (m.generate_until(requests(*asked)) for m in (ours, theirs))
    assert found == expected and any(found)


@pytest.mark.filterwarnings("ignore")
def test_members_do_tasks_after_training(files, tmp_path):
    require("lm_eval")
    c = config.default()
    c.train.update(steps=2, batch_size=2, seq_len=96, lr=3e-2, warmup=0)
    c.eval.update(every=2, examples=4, test=0, batch_size=4, harness=files[:1])
    c.task.n_train, c.sweep.seed = 16, (0, 1)
    said, workdir = [], tmp_path / "run"
    workdir.mkdir()
    groups = prepare.groups(config.members(c), said.append)
    terminal = loop.Terminal(said.append, lambda done, total: None, lambda row: None)
    rows, _ = loop.train(workdir, groups, terminal)
    from lorax.tasks import harness

    base = groups[0].base
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    for member in (0, 1):
        params = adapters.load(workdir / "adapters" / str(member), base).bind()
        again = harness.evaluate(base, params, files[:1], batch_size=4)
        assert set(again) == {"which_acc", "which_acc_norm"}
        for name, value in again.items():
            assert rows[member]["scores"][name] == pytest.approx(value, abs=1e-5)


def test_what_can_not_be_done_is_refused_before_training(base, files, monkeypatch, tmp_path):
    require("lm_eval")
    with pytest.raises(FileNotFoundError, match=r"eval.harness: mine.yaml: no such file"):
        benchmarks.check(base, ("mine.yaml",))
    bad = tmp_path / "bad.yaml"
    bad.write_text("task: bad\ndataset_path: json\noutput_type: none\n")
    with pytest.raises(ValueError, match=r"eval.harness: .*bad.yaml: "):
        benchmarks.check(base, (str(bad),))
    sampled = tmp_path / "sampled.yaml"
    sampled.write_text(pathlib.Path(files[1]).read_text().replace("6}", "6, do_sample: true}"))
    with pytest.raises(ValueError, match="eval.harness: written samples its texts; they can only"):
        benchmarks.check(base, (str(sampled),))
    with pytest.raises(ValueError, match="need a causal language model, and"):
        benchmarks.check(lorax.load("random:mlp-64-12-10"), files)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lorax.tasks.harness", raising=False)
    monkeypatch.delattr("lorax.tasks.harness", raising=False)
    with pytest.raises(ValueError, match=r"tasks need lm-eval: pip install lorax-research\[harn"):
        benchmarks.check(base, files)
