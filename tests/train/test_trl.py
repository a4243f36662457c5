"""Training beside TRL's SFTTrainer with PEFT: the same rows, start and settings."""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from quick import jit
from support import require

from lorax import adapters, config, methods, tasks
from lorax.train import batches, optim, prepare, stacks
from lorax.train import step as train_step

STEPS, LENGTH, BATCH, LR = 20, 24, 4, 3e-2

#: Changes of lorax's config; the same in TRL's words; number of rows.
RUNS = {
    "linear": (
        {"schedule": "linear", "warmup_ratio": 0.12, "clip": 0.05, "weight_decay": 0.1},
        {"lr_scheduler_type": "linear", "warmup_steps": 0.12, "max_grad_norm": 0.05}
        | {"weight_decay": 0.1},
        30,
    ),
    "short": (  # the last batch has one row in one part of two
        {"schedule": "cosine", "warmup": 2, "accumulate": 2, "last_batch": "short"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "gradient_accumulation_steps": 2},
        77,
    ),
    "packed": (
        {"schedule": "constant", "accumulate": 2, "b2": 0.95, "eps": 1e-6},
        {"lr_scheduler_type": "constant_with_warmup", "gradient_accumulation_steps": 2}
        | {"adam_beta2": 0.95, "adam_epsilon": 1e-6, "packing": True},
        30,
    ),
}


def rows(n: int, packed: bool) -> dict[str, np.ndarray]:
    """Texts of different lengths that count in threes, the first tokens being prompts; two to a row
    if `packed`."""
    rng, shape = np.random.default_rng(1), (n, LENGTH + 1)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for row in range(n):
        begin = 0
        for segment in range(1, 2 + packed):
            first, size, prompt = rng.integers((1, 6, 1), (parity.VOCABULARY, 12, 5))
            at = slice(begin, begin + size)
            tokens[row, at] = (first + 3 * np.arange(size)) % parity.VOCABULARY
            mask[row, begin + prompt : at.stop] = 1
            segments[row, at], begin = segment, at.stop
    return {"tokens": tokens, "mask": mask} | ({"segments": segments} if packed else {})


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_losses_and_adapters_are_those_of_sft_trainer(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ours, theirs, n = RUNS[name]
    base, model = parity.pair("llama", tmp_path / "base")
    member, task = prepared(base, ours, rows(n, name == "packed"), tmp_path / "base")
    (method,) = stacks.build_methods([member], base)
    stack = stacks.stack([member], [method], base)
    one = jax.tree.map(lambda x: x[0], tuple(stack[2:]))
    trained = lambda t: adapters.from_training(base, method, methods.State(t, one[0]))
    adapters.save(tmp_path / "start", trained(one[2].trainable))

    made = batches.train_batches(stack, task, 0, STEPS)
    state, logs = train(base, method, member.config.train, one, made)
    trainer = sft_trainer(model, tmp_path, sequence(made), theirs)
    assert trainer.train().global_step == STEPS
    history = [line for line in trainer.state.log_history if "loss" in line]
    np.testing.assert_allclose(logs["loss"], [x["loss"] for x in history], rtol=1e-4)
    assert logs["loss"][-3:].mean() < logs["loss"][:3].mean() - 0.4
    np.testing.assert_allclose(logs["grad_norm"], [x["grad_norm"] for x in history], rtol=1e-3)

    trainer.model.save_pretrained(tmp_path / "end")
    adapters.save(tmp_path / "ours", trained(state.trainable))
    read = lambda folder: adapters.load(tmp_path / folder, base).adapter.factors
    start, end, own = map(read, ("start", "end", "ours"))
    assert end.keys() == own.keys()
    for layer, factors in end.items():
        np.testing.assert_allclose(own[layer].a, factors.a, atol=2e-4)
        np.testing.assert_allclose(own[layer].b, factors.b, atol=2e-4)
        assert np.abs(start[layer].b - factors.b).max() > 5e-3


def prepared(base, changes: dict, train_rows: dict, directory):
    """(member, task) of 20 steps of LoRA on all linear layers, by one epoch where that is 20."""
    c = config.default()
    c.base = str(directory)
    c.method.update(name="lora", rank=4, alpha=8.0, targets=("all-linear",))
    c.train.update(steps=STEPS, batch_size=BATCH, seq_len=LENGTH, lr=LR, warmup=0)
    c.train.update(changes)
    if c.train.last_batch == "short":
        c.train.steps = 0
        c.train.epochs = 1
    task = tasks.Task("rows", train_rows, train_rows, "")
    members = config.members(c)
    given = lambda *_: task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "task_of", given)
        patch.setattr(prepare.tasks, "check_base", lambda *_: None)
        (member,) = prepare.with_steps(members, lambda c: base, {}, lambda line: None)
    assert member.config.train.steps == STEPS
    return member, task


def train(base, method, section, one, made):
    """(state after all steps, logs (STEPS,)). one: constants, hyper and state of the member."""
    constants, hyper, state = one
    program = train_step.Program(base.module, method, base.sites, section, False, False)
    run = jit(functools.partial(train_step.train_steps, program))
    first = {name: jnp.asarray(x[0]) for name, x in made.items()}
    state, logs = run(base.params, constants, hyper, state, first)
    return state, {name: np.asarray(x) for name, x in logs.items()}


def sequence(made: dict) -> list[dict]:
    """The rows of all steps in their order, as TRL has them: without padding, -100 where nothing is
    to be learnt, and the lengths of the texts of a packed row."""
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in made.items()}
    told = []
    for i, (tokens, mask) in enumerate(zip(flat["tokens"], flat["mask"], strict=True)):
        if not mask.any():  # fills up a short batch
            continue
        last = int(np.flatnonzero(mask)[-1]) + 1
        row = {
            "input_ids": tokens[:last].tolist(),
            "labels": np.where(mask > 0, tokens, -100)[:last].tolist(),
        }
        if "segments" in flat:
            row["seq_lengths"] = np.bincount(flat["segments"][i])[1:].tolist()
        told.append(row)
    return told


def sft_trainer(model, folder, told: list[dict], arguments: dict):
    """TRL's trainer on rows in this order, from the adapter in `folder`/start."""
    trl, peft, datasets = require("trl"), require("peft"), require("datasets")
    transformers, tokenizers = require("transformers"), require("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(parity.VOCABULARY)}, "0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="0"
    )
    parts = arguments.get("gradient_accumulation_steps", 1)
    settings = trl.SFTConfig(
        str(folder / "trl"), learning_rate=LR, per_device_train_batch_size=BATCH // parts,
        num_train_epochs=1, train_sampling_strategy="sequential", logging_steps=1, report_to=[],
        save_strategy="no", bf16=False, use_cpu=True, activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, **arguments,
    )  # fmt: skip
    adapted = peft.PeftModel.from_pretrained(model, str(folder / "start"), is_trainable=True)
    return trl.SFTTrainer(
        adapted, settings, train_dataset=datasets.Dataset.from_list(told),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5, 40, 0.03, 0.1, 0.29])
def test_every_step_has_the_rate_of_transformers(schedule, warmup):
    torch, transformers = require("torch"), require("transformers")
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    ratio = warmup if 0 < warmup < 1 else 0.0
    steps = math.ceil(33 * warmup) if ratio else warmup  # TrainingArguments.get_warmup_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler(name, optimizer, steps, 33)
    section = config.default().train
    section.update(steps=33, schedule=schedule, warmup_ratio=ratio, warmup=0 if ratio else warmup)
    rates = []
    for _ in range(33):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    factor = optim.schedule(section)
    np.testing.assert_allclose([float(factor(step)) for step in range(33)], rates, atol=1e-6)


# ---------------------------------------------------------------------------------------- the pages

ROOT = Path(__file__).parents[2]
OLDER = {"warmup_ratio"}  # of transformers before version 5


def sft():
    spec = importlib.util.spec_from_file_location("sft", ROOT / "configs/sft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page() -> list[tuple[list[str], list[str]]]:
    """(names in TRL and PEFT, keys of lorax) of every line of the table in docs/trl.md."""
    text = (ROOT / "docs/trl.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return [tuple(re.findall(r"`(\w+(?:\.\w+)*)`", cell) for cell in line) for line in lines]


def docstring() -> list[tuple[list[str], list[str]]]:
    """The same of the table in the docstring of configs/sft.py, theirs with their values."""
    lines = re.findall(r"^    (\S.*?\S) {3,}(\S.*)$", sft().__doc__, re.MULTILINE)
    values = r"\w+(?:=(?:\"[^\"]*\"|[\w.-]+|\w+\(.*\)))?"
    theirs = lambda text: [x for x in re.findall(values, text) if x != "or"]
    ours = r"\w+(?:\.\w+)+|\b(?:dtype|param_dtype|quant)\b"
    return [(theirs(a), re.findall(ours, b)) for a, b in lines[1:]]


def test_every_key_of_the_tables_is_lorax_own():
    tables = page(), docstring()
    for table in tables:
        assert len(table) > 10 and all(theirs and ours for theirs, ours in table)
        for _, ours in table:
            for key in ours:
                config.check_key(key)
    of_page = {key for _, ours in page() for key in ours}
    assert {key for _, ours in docstring() for key in ours} <= of_page
    usual, changed = config.flat(config.default()), config.flat(sft().get_config("BASE,DATA"))
    assert {key for key in changed if changed[key] != usual[key]} <= of_page | {"task.name"}


def test_the_config_has_the_values_of_its_docstring():
    c = config.flat(sft().get_config("BASE,DATA"))
    assert (c["base"], c["task.name"], c["task.path"]) == ("BASE", "instruct", "DATA")
    given = {}
    for theirs, ours in docstring():
        pairs = zip(theirs, ours, strict=False)
        given |= {ours: theirs.partition("=")[2] for theirs, ours in pairs if "=" in theirs}
    numbers = {k: ast.literal_eval(v) for k, v in given.items() if re.match(r"[\d\"]", v)}
    parts, batch = numbers.pop("train.accumulate"), numbers.pop("train.batch_size")
    assert (c["train.accumulate"], c["train.batch_size"]) == (parts, parts * batch)
    assert (c["method.targets"],) == ((numbers.pop("method.targets"),),)
    assert {key: c[key] for key in numbers} == numbers and len(numbers) >= 10
    assert c["train.remat"] == "full" and c["eval.keep"] == "best" and c["task.packing"]


def test_every_name_of_the_tables_is_theirs():
    trl, peft, transformers = require("trl"), require("peft"), require("transformers")
    names = {
        field.name
        for kind in (trl.SFTConfig, peft.LoraConfig)
        for field in dataclasses.fields(kind)
    }
    names |= set(inspect.signature(trl.SFTTrainer).parameters)
    names |= set(inspect.signature(transformers.BitsAndBytesConfig).parameters)
    for table in (page(), docstring()):
        theirs = {name.partition("=")[0] for line, _ in table for name in line}
        assert theirs - names <= OLDER | {"BitsAndBytesConfig", "dtype"}
