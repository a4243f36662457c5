"""The main job from the outside: `python -m lorax.run` as a person starts, kills and repeats it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lorax import config, convert, generate
from lorax.analysis import answer, runs, tables
from lorax.command_line import FLAGS, summary
from lorax.run import formats
from lorax.run import main as run_main

ROOT = Path(__file__).parents[1]
CONFIG = "configs/gpt2_rank_sweep.py"
SMALL = (
    '--config.sweep.rank=(1,3)',
    "--config.sweep.lr=(2e-3,1e30)",
    "--config.sweep.seed=(0,)",
    "--config.sweep.full_lr=()",
    "--config.method.targets=('q','v')",
    "--config.eval.generate=0",
    "--config.train.steps=12",
    "--config.train.batch_size=4",
    "--config.train.warmup=0",
    "--config.eval.every=2",
    "--config.eval.examples=8",
    "--config.eval.test=8",
    "--config.task.n_train=64",
    "--config.analysis.trajectory=True",
    "--config.analysis.cka=8",
)  # fmt: skip


def command(*arguments):
    return [sys.executable, "-m", "lorax.run", *arguments]


def environment():
    # The tests' eight devices are not what a person has. Processes compile the same programs.
    more = {"PYTHONUNBUFFERED": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | more


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = run(f"--config={CONFIG}", f"--workdir={workdir}", *SMALL)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_the_run_directory_is_the_designs(finished):
    workdir, done = finished
    for name in ("config.json", "members.jsonl", "metrics.jsonl", "status.json", "report.html"):
        assert (workdir / name).stat().st_size, name
    assert sorted(p.name for p in (workdir / "adapters").iterdir()) == ["0", "1", "2", "3"]
    assert {p.name for p in (workdir / "adapters/0").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert list((workdir / "figures").glob("*.csv")) and list((workdir / "analysis").glob("*.csv"))
    assert list((workdir / "tb").rglob("events.out.tfevents.*"))
    assert sorted(p.name for p in (workdir / "checkpoints/0-0").iterdir()) == ["10", "12"]
    loaded = runs.load(workdir)
    assert loaded.status["state"] == "finished"
    assert set(loaded.config["versions"]) >= {"jax", "flax", "optax"}
    assert re.fullmatch("[0-9a-f]{64}", loaded.config["base_sha256"])
    lines = done.stdout.splitlines()
    assert "report.html" in done.stdout and "4 members" in lines[0]
    compiling = lines.index("group 0: compiling for 4 members ...")
    assert lines[compiling + 1].startswith("group 0: 4 members, ")
    assert any(line.startswith("step 12/12: best ") for line in lines)


def test_it_ends_with_its_answer_whose_commands_run(finished):
    workdir, done = finished
    found = answer.read(workdir)
    assert done.stdout.splitlines()[-3:] == answer.lines(found)
    assert found["verdict"] == "undecided" and found["next"]["changes"]["seed"] == [0, 1, 2]
    mains = {"show": convert.main, "merge": convert.main, "generate": generate.main}
    for name, main in mains.items():
        assert main(shlex.split(found["commands"][name])[3:]) == 0
    (merged,) = workdir.glob("merged-*")
    assert (merged / "model.safetensors").exists() and str(merged) in found["commands"]["merge"]
    compile(found["commands"]["peft"], "snippet", "exec")


def test_metrics_are_sound(finished):
    loaded = runs.load(finished[0])
    evals = loaded.metrics.query("split == 'eval'")
    assert evals.groupby("member").size().tolist() == [7] * 4
    at_start = evals.query("step == 0")["loss"]
    assert at_start.nunique() == 1  # an adapter starts as its base
    last = evals.query("step == 12").set_index("member")["loss"]
    names = loaded.members.set_index("name")["member"]
    assert last[names["rank=1,lr=0.002,seed=0"]] < at_start.iloc[0]


def test_a_diverged_member_is_recorded_and_the_others_finish(finished):
    workdir, done = finished
    status = json.loads((workdir / "status.json").read_text())["members"]
    states = {name["name"]: status[str(name["member"])] for name in members(workdir)}
    for name, state in states.items():
        diverged = "1e+30" in name
        assert state["status"] == ("diverged" if diverged else "finished"), name
        assert (state["diverged_at"] is not None) == diverged
    assert "diverged at step" in done.stdout
    assert "iverged" in (workdir / "report.html").read_text()


def members(workdir):
    return [json.loads(line) for line in (workdir / "members.jsonl").read_text().splitlines()]


def test_what_was_watched_lies_beside_the_other_numbers(finished):
    """config.analysis.trajectory and .cka, as the report reads them."""
    analysis = finished[0] / "analysis"
    head = "member,step,path,layer,target,norm,effective,stable,energy90,overlap_final"
    lines = (analysis / "trajectory.csv").read_text().splitlines()
    assert lines[0] == head and len(lines) == 1 + 4 * 7 * 8  # members, evaluations, matrices
    alike = pd.read_csv(analysis / "cka.csv")
    assert list(alike.columns) == ["member", "layer", "cka"]
    learnt = [row["member"] for row in members(finished[0]) if "1e+30" not in row["name"]]
    assert list(alike["member"].unique()) == learnt
    assert list(alike["layer"]) == [0, 1, 2, 3] * len(learnt)
    assert alike["cka"].between(0.5, 0.99999).all()


def test_trainable_parameters_equal_the_formula(finished):
    for row in members(finished[0]):
        assert row["trainable_params"] == 4 * 2 * row["rank"] * (128 + 128)
        factors = runs.load(finished[0]).adapter(row["member"])
        assert len(factors) == 8
        assert sum(f.a.size + f.b.size for f in factors.values()) == row["trainable_params"]


def test_a_finished_run_says_so_and_is_left_alone(finished):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    again = run(f"--config={CONFIG}", f"--workdir={workdir}", *SMALL)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert again.stdout.splitlines()[-3:] == finished[1].stdout.splitlines()[-3:]  # the answer
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def result(workdir):
    files = [*workdir.glob("adapters/*/*"), *workdir.glob("trajectory/*/*")]
    files += [workdir / "analysis" / f"{name}.csv" for name in ("trajectory", "cka")]
    files += [workdir / "metrics.jsonl"]
    return {p.relative_to(workdir): p.read_bytes() for p in files if p.exists()}


def kill_when(workdir, ready, arguments):
    """Start the run and kill it (SIGKILL) as soon as ready(workdir)."""
    with subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        limit = time.monotonic() + 200
        while process.poll() is None and not ready(workdir) and time.monotonic() < limit:
            time.sleep(0.005)
        assert process.poll() is None, process.stdout.read().decode()
        process.send_signal(signal.SIGKILL)


def test_killed_and_damaged_and_continued_is_bit_identical(finished, tmp_path):
    workdir = tmp_path / "killed"
    arguments = (f"--config={CONFIG}", f"--workdir={workdir}", *SMALL)
    exists = lambda step: lambda d: (d / "checkpoints/0-0" / str(step)).exists()
    kill_when(workdir, lambda d: (d / "members.jsonl").exists(), arguments)  # nothing trained
    kill_when(workdir, exists(2), arguments)  # just after a checkpoint
    partial = lambda d: any((d / "checkpoints/0-0").glob(".*.partial"))
    kill_when(workdir, lambda d: exists(6)(d) and partial(d), arguments)  # within one
    newest = max((workdir / "checkpoints/0-0").glob("[0-9]*"), key=lambda p: int(p.name))
    victim = next(p for p in sorted(newest.rglob("d/*")) if p.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    with open(workdir / "metrics.jsonl", "ab") as file:
        file.write(b'{"member": 0, "step": 99')  # a torn line
    last = run(*arguments)
    assert last.returncode == 0, last.stderr
    assert f"checkpoint {newest} is not whole" in last.stdout and "continues at step" in last.stdout
    assert result(workdir) == result(finished[0])


def test_another_config_in_the_same_workdir_is_refused(finished):
    other = run(f"--config={CONFIG}", f"--workdir={finished[0]}", *SMALL, "--config.train.steps=14")
    assert (
        other.returncode == 2
        and "train.steps" in other.stderr
        and len(other.stderr.splitlines()) == 1
    )


MISTAKES = {
    "key": (["--config.train.stepz=5"], "no key 'train.stepz'; did you mean 'train.steps'?"),
    "group": (["--config.trian.steps=5"], "no key 'trian.steps'; did you mean 'train.steps'?"),
    "type": (["--config.train.steps=many"], "train.steps"),
    "axis type": (["--config.sweep.rank=('a',)"], "sweep.rank"),
    "rank": (["--config.sweep.rank=(1,500)"], "at most 128"),
    "target": (["--config.method.targets=('qq',)"], "'qq' matches nothing"),
    "scaling": (["--config.method.scaling=rslorra"], "rslora"),
    "base": (["--config.base=gpt2-nanoo"], "did you mean 'gpt2-nano'"),
    "task": (["--config.task.name=restaurant"], "restaurants"),
    "path": (["--config.task.name=e2e", "--config.task.path=/no/such.zip"], "task.path"),
    "seq_len": (["--config.train.seq_len=1024"], "256 positions"),
    "flag": (["--confg.train.steps=5"], "confg"),
    "argument": (["train.steps=5"], "unexpected argument"),
    "None": (["--config.train.lr=None"], "train.lr"),
    "None and more": (["--config.quant=nf4", "--config.quant=None"], "'nf4' and None given"),
    "workdir": (["--workdir=README.md"], "README.md"),
}


@pytest.fixture
def start(monkeypatch):
    """start(*arguments): the exit code of the command in this process, where absl would keep the
    flags of the config that it has seen."""
    monkeypatch.chdir(ROOT)

    def started(*arguments):
        argv = ["lorax.run", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks
        return run_main(argv)

    yield started
    for name in [name for name in FLAGS if name.startswith("config.")]:
        delattr(FLAGS, name)


@pytest.mark.filterwarnings("ignore:the load_module.*:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_one_clear_line_and_exit_code_2(mistake, start, tmp_path, capfd):
    arguments, says = MISTAKES[mistake]
    if mistake != "workdir":
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    assert start(f"--config={CONFIG}", *arguments) == 2
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 1 and says in said.err, said.err
    assert "Traceback" not in said.out
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [("no/such.py", "no/such.py"), ("README.md", "README.md"), (None, "--config is missing")],
)
def test_a_wrong_config_file_is_one_clear_line(config, says):
    done = run(*([f"--config={config}"] if config else []))
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_shows_examples():
    done = run("--help")
    assert done.returncode == 0 and "--config=configs/gpt2_rank_sweep.py" in done.stdout
    assert (
        "--config.method.dtype           of the trained parameters (default: float32)"
        in done.stdout
    )


def test_the_first_line_names_the_methods_that_are_trained():
    settings = config.default()
    line = summary(settings, config.members(settings))
    assert line.startswith("1 member (one setting) of lora on ")
    settings.sweep.method, settings.sweep.rank = ("lora", "full", "lora"), (1, 8, 4)
    settings.sweep.zip = (("method", "rank"),)
    assert "(3 points of (method, rank)) of lora, full on " in summary(
        settings, config.members(settings)
    )


def test_default_workdir_depends_on_the_overrides():
    code = "import sys; from lorax import command_line; print(command_line.read(sys.argv)[2])"
    ask = lambda *more: subprocess.run(
        [sys.executable, "-c", code, f"--config={CONFIG}", *more],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert ask("--config.eval.generate=8") == "runs/gpt2_rank_sweep"
    asked = ask("--config.sweep.rank=(4,)", "--config.sweep.lr=(3e-3, 1e-2)")
    assert asked == "runs/gpt2_rank_sweep-lr=0.003+0.01,rank=4"


def test_members_write_texts_that_are_scored(tmp_path):
    done = run(
        f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *SMALL[:1], *SMALL[2:],
        "--config.eval.generate=5", "--config.eval.new_tokens=6", "--config.analysis.report=False",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = runs.load(tmp_path / "run")
    for member in ("0", "1"):
        lines = (tmp_path / "run/texts" / f"{member}.jsonl").read_text().splitlines()
        texts = [json.loads(line) for line in lines]
        assert len(texts) == 5 and all(t["prompt"].endswith("=>") and t["text"] for t in texts)
        assert loaded.status["members"][member]["scores"]["nist"] >= 0
    assert {"nist"} <= set(runs.summary(loaded)) and "nist" in done.stdout


def test_a_classifier_learns_sentences_and_its_metric_is_logged(tmp_path):
    """A little RoBERTa of random weights, whose head and embeddings are trained beside LoRA."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "good",
        "fine",
        "bad",
        "poor",
        "a",
        "film",
        "is",
        "it",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    base = tmp_path / "base"
    base.mkdir()
    tokenizer.save(str(base / "tokenizer.json"))
    config = dict(
        model_type="roberta", vocab_size=12, hidden_size=32, num_hidden_layers=2, pad_token_id=1,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=20, type_vocab_size=1,
        architectures=["RobertaForMaskedLM"], eos_token_id=2, bos_token_id=0,
    )  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    glue = tmp_path / "SST-2"
    glue.mkdir()
    rows = [(f"a film is {w}", int(w in ("good", "fine"))) for w in words[4:8]] * 16
    text = "sentence\tlabel\n" + "".join(f"{s}\t{label}\n" for s, label in rows)
    for name in ("train", "dev"):
        (glue / f"{name}.tsv").write_text(text)
    workdir = tmp_path / "run"
    done = run(
        "--config=configs/glue_roberta.py:sst2", f"--config.base=random:{base}",
        f"--config.task.path={glue}", f"--workdir={workdir}", "--config.sweep.seed=(0,1)",
        "--config.method.full=('embed',)", "--config.train.steps=60", "--config.train.seq_len=8",
        "--config.train.batch_size=16", "--config.train.accumulate=2", "--config.eval.every=20",
        "--config.train.warmup=4", "--config.train.lr=1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = runs.load(workdir)
    evals = loaded.metrics.query("split == 'eval' and step == 60")
    assert (evals["accuracy"] == 1).all() and "accuracy" in done.stdout
    first = loaded.metrics.query("split == 'eval' and step == 0")
    assert (first["accuracy"] < 1).all()
    stored = json.loads((workdir / "adapters/0/adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_CLS" and "classifier" in stored["modules_to_save"]


@pytest.mark.soak  # two programs and a report
def test_methods_that_peft_has_leave_its_files_and_others_say_why(tmp_path):
    done = run(
        f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *SMALL[2:],
        "--config.sweep.rank=(2,)", "--config.sweep.lr=(2e-3,)",
        "--config.sweep.method=('ia3','lokr')", "--config.train.steps=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "only in lorax's own format" in line]
    assert "method=lokr" in line and "PEFT has no LoKr of GPT-2's Conv1D" in line
    peft = {"adapter_model.safetensors", "adapter_config.json"}
    own = {"state.safetensors", "method.json", "delta.safetensors"}
    for member, files in (("0", own | peft), ("1", own)):
        stored = {file.name for file in (tmp_path / "run/adapters" / member).iterdir()}
        assert stored == files
    assert (tmp_path / "run/report.html").stat().st_size
    found, missing = tables.updates(runs.load(tmp_path / "run"), (0, 1))
    assert sorted(found) == [0, 1] and not missing  # dW as it is stored, without factors
    assert not any(tables.has_factors(updates) for updates in found.values())


STUDY = """
from lorax.config import default

def get_config(arg=None):
    c = default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-32-10", "digits", ("re:.*/kernel",)
    c.method.rank = 4
    c.train.update(steps=100, batch_size=64, lr=2e-2, warmup=0)
    c.eval.update(every=50, batch_size=100, examples=360)
    c.sweep.method = ("full", "lora")
    return c
"""


def test_a_network_of_random_weights_learns_images(tmp_path):
    study, workdir = tmp_path / "digits.py", tmp_path / "run"
    study.write_text(STUDY)
    done = run(f"--config={study}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "1,437 train, 180 eval and 180 test images of scikit-learn's digits" in done.stdout
    loaded = runs.load(workdir)
    last = loaded.metrics.query("split == 'eval' and step == 100").set_index("member")["accuracy"]
    first = loaded.metrics.query("split == 'eval' and step == 0")["accuracy"]
    assert last[0] > 0.9 and last[1] > 0.85 and first.nunique() == 1 and first.max() < 0.3
    assert loaded.status["members"]["0"]["scores"]["accuracy"] == last[0]
    assert [row["trainable_params"] for row in members(workdir)] == [2410, 4 * (96 + 42)]
    stored = lambda member: {p.name for p in (workdir / "adapters" / member).iterdir()}
    assert stored("0") == {"state.safetensors", "method.json", "delta.safetensors"}
    assert stored("1") == {"adapter_model.safetensors", "adapter_config.json"}
    assert {*loaded.adapter(1)} == {"dense_1", "head"}
    assert (workdir / "report.html").stat().st_size and list((workdir / "figures").glob("*.csv"))


SEARCH = """
from lorax.config import default

def get_config(arg=None):
    c = default()
    c.base, c.task.name, c.method.name = "random:mlp-64-16-10", "digits", "subspace"
    c.train.update(steps=8, batch_size=64, warmup=0)
    c.eval.update(every=2, batch_size=120, examples=360)
    c.sweep.dim, c.sweep.lr = (8, 64), (0.3, 1e30)
    c.search.update(threshold=0.9, baseline_lr=(1e-2,), seeds=(0, 1), points=2, rounds=1)
    c.search.metric = "accuracy"
    return c
"""


@pytest.mark.soak
def test_a_search_that_is_killed_in_its_second_round_is_bit_identical(tmp_path):
    (tmp_path / "search.py").write_text(SEARCH)
    arguments = lambda name: (f"--config={tmp_path / 'search.py'}", f"--workdir={tmp_path / name}")
    whole = run(*arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    assert "6 members" in whole.stdout.splitlines()[0] and "search: round 1 of 1" in whole.stdout
    assert "Intrinsic dimension (d90)" in whole.stdout
    listed = members(tmp_path / "whole")
    assert [m["member"] for m in listed] == list(range(len(listed))) and len(listed) > 6
    assert [m["method"] for m in listed[:6]] == ["subspace"] * 4 + ["full"] * 2
    groups = [m["group"] for m in listed]
    assert groups[:6] == [0] * 4 + [1] * 2 and set(groups[6:]) == {2}
    settings = [(m["method"], m["dim"], m["lr"], m["seed"]) for m in listed if "dim" in m]
    assert len(set(settings)) == len(settings)
    status = json.loads((tmp_path / "whole/status.json").read_text())
    assert set(status["members"]) == {str(m["member"]) for m in listed}
    page = (tmp_path / "whole/report.html").read_text()
    assert page.index("Intrinsic dimension") < page.index("What was run")

    killed = tmp_path / "killed"
    in_round_1 = lambda d: (d / "checkpoints/2-0/2").exists()
    kill_when(killed, in_round_1, arguments("killed"))
    assert json.loads((killed / "status.json").read_text())["state"] == "running"
    last = run(*arguments("killed"))
    assert last.returncode == 0, last.stderr
    assert "group 2: continues at step" in last.stdout and not last.stderr
    assert result(killed) == result(tmp_path / "whole")
    read = lambda name, file: (tmp_path / name / file).read_bytes()
    for file in ("members.jsonl", "analysis/intrinsic.csv", "analysis/intrinsic_points.csv"):
        assert read("killed", file) == read("whole", file)


def test_a_search_goes_by_what_the_task_measures(tmp_path):
    (tmp_path / "search.py").write_text(SEARCH)
    done = run(
        f"--config={tmp_path / 'search.py'}", "--config.search.metric=acuracy",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 2 and "search.metric: 'acuracy' given" in done.stderr
    assert "measures loss" in done.stderr and not (tmp_path / "run").exists()


def test_what_is_said_of_the_adapters_is_so(tmp_path):
    for n in range(3):
        (tmp_path / str(n)).mkdir()
    assert formats(tmp_path) == "lorax's own format"
    (tmp_path / "1" / "adapter_config.json").write_text("{}")
    assert formats(tmp_path) == "PEFT format, but 2 of 3 in lorax's own format only"
    for n in (0, 2):
        (tmp_path / str(n) / "adapter_config.json").write_text("{}")
    assert formats(tmp_path) == "PEFT format"
