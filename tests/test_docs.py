"""README, CONTRIBUTING and docs/: every command and example works, every link leads somewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import pages
import pytest
import quick
import yaml
from pages import PAGES, ROOT
from support import few

import lorax
from lorax import convert, generate, launch, listing, tasks
from lorax.bench import __main__ as bench
from lorax.report import __main__ as report
from lorax.xray import __main__ as xray

# ------------------------------------------------------------------------- commands, by their kind

#: Commands that no test runs, and where they are run or why not.
ELSEWHERE = {
    r"python3 -m venv \.venv .* pip install -e \. .*": "the gate installs; the study is run below",
    r"python3 -m venv \.venv .* pip install -e \"\.\[test\]\" && pytest -n 2": "the gate",
    r"pip install -e \"\.\[(\w+)\]\"": "the gate; the extra is looked up below",
    r"pytest( tests/\w+)?( -n 2)?( -m \w+)?( --cov=lorax)?": "this is pytest",
    r"\.ci/run": "the gate",
    r"pip (download|install) --no-deps .* -r docs/gpu_wheels\.txt": "the list is read below",
    r"mkdocs (serve|build --strict)": "the gate",
    r"(srun|mpirun|gcloud) .*": "a cluster; tests/train/test_hosts.py starts several processes",
    r"kubectl apply -f docs/examples/jobset_mesh\.yaml": "a cluster",
    r"tensorboard --logdir \S+": "TensorBoard is not installed with lorax",
}
TESTED = ("run", "launch", "runs", "plan", "report", "convert", "generate", "bench", "xray")
STUDY = "python -m lorax.run --config=configs/gpt2_rank_sweep.py"
SMALL = (
    *("--config.train.steps=2", "--config.train.batch_size=2", "--config.train.seq_len=100"),
    *("--config.train.warmup=0", "--config.eval.every=2", "--config.eval.examples=8"),
    "--config.eval.test=8",
    *("--config.eval.batch_size=8", "--config.task.n_train=32", "--config.analysis.report=False"),
)
#: What a reader fills in, or downloads; such a command is parsed, up to the file that is missing.
PLACEHOLDERS = re.compile(r"\b(BASE|ADAPTER|DIR|DIR_OR_HUB_ID|OUT|FILE)\b|\.zip|\.npz|oasst1|GLUE/")
#: More than ten seconds each.
LONG = re.compile(r"lorax\.report |--out=|lorax\.bench|lorax\.plan .*(--table|--device|65b|175b)")

COMMANDS = {command: where for where, command in pages.commands()}
of = lambda module: [c for c in COMMANDS if f"{c} ".startswith(f"python -m lorax.{module} ")]
arguments = lambda command: shlex.split(command)[3:]
parameters = lambda commands: [
    pytest.param(c, marks=[pytest.mark.slow] * bool(LONG.search(c)), id=f"{COMMANDS[c]} {c[16:60]}")
    for c in commands
]


def quickly(**more) -> dict[str, str]:
    """The environment of a command with the devices that a person has, compiled quickly."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    flags = " ".join(f"--{name}={value}" for name, value in quick.OPTIONS.items())
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | more


def python(*words, cwd, **more):
    """A command in a process of its own, as `quickly` has it."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=quickly(), capture_output=True, text=True, **more
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder like a clone in which README's first command was run, in a few steps."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "docs", "experiments", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    done = python(*shlex.split(STUDY)[1:], *SMALL, "--workdir=runs/gpt2_rank_sweep", cwd=folder)
    assert done.returncode == 0, done.stderr
    for name in ("methods_compare", "seed0", "seed1"):  # runs that others are compared with
        shutil.copytree(folder / "runs/gpt2_rank_sweep", folder / "runs" / name)
    return folder


def test_every_command_is_known():
    """A new command is run by one of the tests below, or has its line in `ELSEWHERE`."""
    tested = {command for name in TESTED for command in of(name)}
    known = re.compile("|".join(ELSEWHERE))
    others = [command for command in COMMANDS if command not in tested]
    assert not [f"{COMMANDS[c]}: {c}" for c in others if not known.fullmatch(c)]
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in COMMANDS), f"no such: {pattern}"


PARSE = """
import json, os, sys
from lorax import command_line, hosts, plan, run
for argv in json.load(sys.stdin):
    if not os.fork():
        _, argv = hosts.flags(argv)
        sys.argv = argv
        try:
            settings, members, workdir = command_line.read(argv)
            print("ok", len(members), workdir)
        except Exception as error:
            print("failed", " ".join(str(error).split()))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_every_run_launch_and_plan_is_a_config_with_members():
    """The commands' own parser reads them, and the config's own checks pass; nothing is trained."""
    asked = [c for c in (*of("run"), *of("plan")) if "--table" not in c]
    words = {command: arguments(command) for command in asked}
    launched = {command: launch.read(arguments(command)) for command in of("launch")}
    words |= {c: flags for c, (_, options, flags) in launched.items() if options}  # not --help
    asked = list(words)
    lines = json.dumps([["lorax", *words[command]] for command in asked])
    done = python("-c", PARSE, cwd=ROOT, input=lines)
    answers = done.stdout.splitlines()
    assert done.returncode == 0 and len(answers) == len(asked), done.stderr
    pairs = zip(asked, answers, strict=True)
    assert not [f"{COMMANDS[c]}: {c}: {said}" for c, said in pairs if said[:2] != "ok"]


#: Commands on the examples of docs/, which have tests of their own.
EXAMPLE = re.compile(
    "|".join(f"docs/examples/{f.stem}.py|runs/{f.stem}/" for f in ROOT.glob("docs/examples/*.py"))
)
#: Of one process among several: tests/train/test_hosts.py starts them all.
RUNS = [
    c for c in of("run")
    if not PLACEHOLDERS.search(c) and not EXAMPLE.search(c) and "--coordinator" not in c
]  # fmt: skip
#: Without those that differ from another one only in their directory.
STUDIES = {re.sub(r" --workdir=\S+", "", command): command for command in reversed(RUNS)}.values()


@pytest.fixture(scope="module")
def studies():
    """Arguments of a command -> [exit code, output] of its study, made small (tests/studies.py)."""
    words = [sys.executable, "-W", "ignore:os.fork:RuntimeWarning", str(ROOT / "tests/studies.py")]
    process = subprocess.Popen(
        words, cwd=ROOT, env=quickly(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip

    def study(words: list[str]) -> list:
        process.stdin.write(json.dumps(words) + "\n")
        return json.loads(process.stdout.readline())

    with process:
        yield study
        process.stdin.close()


#: Of these the gate runs one of each kind: what a study measures or how it is made differs from the
#: others. The rest, which all have members (above), is soak: their configs differ in settings that
#: have tests of their own.
KINDS = re.compile(
    r"(table5_targets|table7_amplification|calibration_rank|dimension_digits|methods_compare)\.py$"
    r"|train\.epochs=|sweep\.tune=lr|eval\.generate=64$|analysis\.cka=|init=loftq$"
)
SOME = [*filter(KINDS.search, STUDIES)]


def test_some_studies_of_each_kind_run():
    assert len(SOME) == 10, SOME


@pytest.mark.parametrize(
    "command", few([*STUDIES], [], SOME), ids=lambda c: f"{COMMANDS[c]} {c[34:]}"
)
def test_a_study_runs(command, studies, tmp_path):
    code, said = studies([*arguments(command), f"--workdir={tmp_path / 'run'}"])
    assert code == 0, said


def test_the_examples_that_are_run_are_files_with_tests_of_their_own():
    names = {name for c in COMMANDS for name in re.findall(r"docs/examples/(\w+)\.py", c)}
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert names and not [name for name in names if f"{name}.py" not in tests]


@pytest.mark.parametrize("command", parameters(of("plan")))
def test_a_plan_is_made(command, workspace):
    if PLACEHOLDERS.search(command) or EXAMPLE.search(command):
        pytest.skip("parsed above; its parts are tested with the example")
    done = python("-m", "lorax.plan", *arguments(command), cwd=workspace)
    assert done.returncode == 0 and done.stdout.count("\n") > 10, done.stderr


def in_process(main, command, workspace, monkeypatch, capsys):
    """The exit code of a command, run here, and what it wrote to stderr."""
    monkeypatch.chdir(workspace)
    return main(arguments(command)), capsys.readouterr().err


@pytest.mark.parametrize("command", parameters(of("report")))
def test_a_report_is_drawn(command, workspace, monkeypatch, capsys):
    if PLACEHOLDERS.search(command) or EXAMPLE.search(command):
        pytest.skip("its parts are tested with the example")
    code, said = in_process(report.main, command, workspace, monkeypatch, capsys)
    assert code == 0, said


@pytest.mark.parametrize("command", of("runs"))
def test_runs_are_listed(command, workspace, monkeypatch, capsys):
    code, said = in_process(listing.main, command, workspace, monkeypatch, capsys)
    assert code == 0, said


READERS = {"convert": convert.main, "generate": generate.main, "xray": xray.main}


@pytest.mark.parametrize("command", parameters([c for name in READERS for c in of(name)]))
def test_an_adapter_is_read(command, workspace, monkeypatch, capsys):
    main = next(READERS[name] for name in READERS if command in of(name))
    if EXAMPLE.search(command):
        pytest.skip("tested with the example")
    if "--base merged" in command and not (workspace / "merged").exists():
        merge = "python -m lorax.convert merge gpt2-nano runs/gpt2_rank_sweep/adapters/6 merged"
        assert merge in COMMANDS
        in_process(convert.main, merge, workspace, monkeypatch, capsys)
    if "merge gpt2-nano" in command:
        shutil.rmtree(workspace / "merged", ignore_errors=True)
    code, said = in_process(main, command, workspace, monkeypatch, capsys)
    if PLACEHOLDERS.search(command):
        last = said.splitlines()[-1]
        assert code == 2 and last.startswith("lorax: "), said  # parsed: the file is missing
    else:
        assert code == 0, said


@pytest.mark.parametrize("command", few(of("bench"), [], of("bench")[-2:]))
def test_a_bench_measures(command, workspace):
    """The smallest model in one round; what takes minutes or needs torch is known by name."""
    names = [word for word in arguments(command) if not word.startswith("--")]
    options = [word for word in arguments(command) if word.startswith("--")]
    assert set(names) <= {*bench.BENCHES, bench.GPU}
    if names == [bench.GPU]:
        options += ["--small", "--only=ceilings"]
    else:
        names, options = ["sweep"], [*options, "--shapes=d64", "--rounds=1"]
    done = python("-m", "lorax.bench", *names, *options, cwd=workspace)
    assert done.returncode == 0, done.stderr


def test_an_extra_that_is_named_is_there():
    text = (ROOT / "setup.cfg").read_text()
    extras = text[text.index("[options.extras_require]") :].split("\n\n")[0]
    install = re.compile(r"pip install -e \"\.\[(\w+)\]\"")
    named = {extra for page in PAGES for extra in install.findall(page.read_text())}
    assert named >= {"cuda", "docs", "eval", "parity", "test"}
    assert not [extra for extra in named if not re.search(rf"^{extra} = ", extras, re.M)]


def test_wheels_for_a_gpu_are_what_lorax_or_a_comparison_needs():
    """Each line is a package, and every one of setup.cfg's that `lorax.bench` imports is there."""
    lines = (ROOT / "docs/gpu_wheels.txt").read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]+", name) for name in names)
    code = "import sys, lorax.bench.__main__, lorax.bench.gpu.worker; print(sorted(sys.modules))"
    loaded = python("-c", code, cwd=ROOT).stdout
    for name in ("einops", "safetensors", "tokenizers", "ml_collections", "threadpoolctl", "grain"):
        assert name in names and f"'{name}'" in loaded
    others = ("pandas", "altair", "sklearn", "vl_convert", "tensorboardX", "torch")
    assert not [name for name in others if f"'{name}'" in loaded]


# ----------------------------------------------------------------------------------------- examples

EXAMPLES = [
    pytest.param(block, marks=[pytest.mark.slow] * ("lorax.run(" in block.text), id=block.where)
    for block in pages.blocks()
    if block.language == "python"
]
#: What an example trains, made smaller.
STEPS = "config.train.steps = 150"
FEW = (
    "config.train.update(steps=2, batch_size=2); config.eval.update(every=2, examples=8, test=8);"
    "config.task.n_train = 32; config.analysis.report = False"
)
#: What a snippet takes for granted.
PRELUDE = "from lorax import methods, ops, tasks, tree\n"


@pytest.mark.parametrize("block", EXAMPLES)
def test_an_example_runs(block, workspace, monkeypatch, registry):
    monkeypatch.chdir(workspace)
    assert "lorax.run(" not in block.text or STEPS in block.text
    code = PRELUDE + block.text.replace(STEPS, FEW)
    with jax.numpy_dtype_promotion("standard"):  # as a person has it; optax needs it
        exec(compile(code, block.where, "exec"), {"__name__": "example"})


def test_the_loop_of_the_readme_is_the_example():
    text = (ROOT / "docs/examples/loop.py").read_text()
    (block,) = (b.text for b in pages.of_page(ROOT / "README.md") if "optax" in b.text)
    assert block in text


def test_records_of_all_forms_are_read(tmp_path):
    (block,) = (block for block in pages.blocks() if block.language == "json")
    (tmp_path / "train.jsonl").write_text(block.text)
    (tmp_path / "eval.jsonl").write_text(block.text)
    base = lorax.load("gpt2-nano")
    task = tasks.build({"name": "instruct", "path": str(tmp_path)}, base.vocabulary, 128)
    assert tasks.size(task.train) == tasks.size(task.eval) == 5


def test_code_is_in_a_language_that_a_test_runs():
    assert {block.language for block in pages.blocks()} <= {"sh", "python", "json", "text"}


# ---------------------------------------------------------------------------- links, size, citation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in pages.anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8000


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    guides = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [guide for guide in guides if guide not in menu]


def test_the_guide_names_every_part_of_the_package():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| in `lorax/`") : text.index("| beside it")]
    named = set(re.findall(r"`(\w+(?:\.py|/))`", table))
    parts = {path.name + "/" * path.is_dir() for path in (ROOT / "lorax").glob("[a-z]*")}
    assert named - {"lorax/", "contract.py"} == parts


def test_the_citation_is_valid():
    """The fields that the Citation File Format 1.2.0 requires, and none that it does not have."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert required <= set(citation)
    optional = {"abstract", "keywords", "license", "repository-code", "type", "url", "version"}
    assert set(citation) <= required | optional | {"date-released", "doi", "identifiers"}
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(set(author) & {"name", "family-names"} for author in citation["authors"])
    assert citation["version"] == lorax.__version__
