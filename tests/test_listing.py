"""`python -m lorax.runs`: what is in run directories, whatever state they are in."""

import json
import os
import subprocess
import sys

import pytest

import lorax
from lorax import listing, rundir
from lorax.files import write_json
from lorax.launching import state as launched

COMMAND = "python -m lorax.run --config=study.py"


def begun(directory, state="finished", command=COMMAND, losses=(2.5, 2.25), when=0, **status):
    """A run of as many members as there are losses; None: not measured."""
    directory.mkdir(parents=True)
    rundir.write_config(directory, {"config": {}, "command": command})
    name = lambda i: {"member": i, "name": f"rank={2**i}", "method": "lora"}
    rundir.write_members(directory, map(name, range(len(losses))))
    rows = {
        str(i): {"status": "finished", "eval_loss": loss}
        for i, loss in enumerate(losses)
        if loss is not None
    }
    whole = {"state": state, "members": rows, "wall_seconds": 42.0} | status
    (directory / rundir.STATUS).write_text(json.dumps(whole))
    for file in directory.iterdir():
        os.utime(file, (1e9 + 60 * when,) * 2)
    return directory


def listed(capsys, *arguments):
    assert listing.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_newest_is_first_with_its_best_setting(tmp_path, capsys):
    begun(tmp_path / "old", when=1)
    new = begun(tmp_path / "deeper/new", when=2)
    found = json.loads("\n".join(listed(capsys, tmp_path, "--json")))
    assert [run["directory"] for run in found] == [str(new), str(tmp_path / "old")]
    run = found[0]
    assert run["members"] == {"total": 2, "done": 2, "diverged": 0, "stopped": 0}
    assert run["best"] == {"setting": "rank=2", "metric": "loss", "split": "eval", "value": 2.25}
    assert run["state"] == "finished" and run["seconds"] == 42 and run["command"] == COMMAND
    lines = listed(capsys, tmp_path)
    assert lines[1] == str(new) and lines[2].split()[:4] == ["finished", "2/2", "42", "s"]
    assert lines[2].endswith("eval loss 2.25: rank=2") and len(lines) == 5


def test_a_loss_of_zero_is_the_lowest(tmp_path, capsys):
    run = begun(tmp_path / "run", losses=(1e-9, 0.0))
    assert listed(capsys, run)[-1].endswith("eval loss 0: rank=2")


def test_what_the_answer_says_is_the_best(tmp_path, capsys):
    run = begun(tmp_path / "run")
    answer = {"setting": {"rank": 1, "lr": 0.01}, "metric": "bleu", "split": "test", "value": 30.5}
    (run / "analysis").mkdir()
    (run / "analysis/answer.json").write_text(json.dumps(answer | {"verdict": "chosen"}))
    assert listed(capsys, run)[-1].endswith("test bleu 30.5: rank=1,lr=0.01")
    (run / "analysis/answer.json").write_text(json.dumps({"setting": None}))
    assert listed(capsys, run)[-1].endswith(":46")  # nothing is the best: the line ends in a time


def test_states(tmp_path, capsys):
    begun(tmp_path / "killed", "running", losses=(3.0, None), when=4)
    full = begun(tmp_path / "full", "stopped", reason="No space left on device", when=3)
    begun(tmp_path / "going", "running", losses=(None, None), when=2)
    bad = begun(tmp_path / "bad", when=1)
    (bad / rundir.STATUS).write_text('{"state": ')
    os.utime(bad / rundir.STATUS, (1e9,) * 2)
    (tmp_path / "no_run").mkdir()
    with rundir.locked(tmp_path / "going"):
        os.utime(tmp_path / "going" / rundir.LOCK, (1e9,) * 2)
        found = json.loads("\n".join(listed(capsys, tmp_path, "--json")))
        lines = listed(capsys, tmp_path)
    assert [r["state"] for r in found] == ["interrupted", "stopped", "running", "damaged"]
    text = "\n".join(lines)
    assert "1/2" in text and "0/2" in text and "eval loss 3: rank=1" in text
    assert lines[lines.index(str(full)) + 2] == "  No space left on device"
    assert f"{bad}/status.json" in text and max(map(len, lines[2::2])) <= listing.WIDTH


def test_parts_of_a_launched_run(tmp_path, capsys):
    """From files alone; those that wait or are done are together, the others one by one."""
    run = begun(tmp_path / "run", "running", losses=(None,) * 3)
    parts = [run / "parts" / str(i) for i in range(11)]
    for part in parts:
        part.mkdir(parents=True)
        launched.launch(part)
    for part in (*parts[:4], parts[10]):
        with launched.recorded(part):
            pass
    rows = {"1": {"status": "finished", "eval_loss": 2.0}}
    rundir.write_status(parts[0], "finished", rows, 1.0, {})
    for part, state, tries in ((parts[4], "running", 1), (parts[5], "running", 2)):
        write_json(part / launched.WORKER, {"state": state, "host": "gpu7", "tries": tries})
    stopped = {"state": "stopped", "host": "gpu8", "tries": 2, "reason": "device lost"}
    write_json(parts[6] / launched.WORKER, stopped)
    write_json(parts[7] / launched.WORKER, stopped)
    launched.end(parts[7], "device lost; see its log")
    with rundir.locked(run):
        lines = listed(capsys, run)
        (found,) = json.loads("\n".join(listed(capsys, run, "--json")))
    assert lines[-6:] == [
        "  parts 0-3, 10: done",
        "  parts 8-9: waiting",
        "  part 4: running on gpu7",
        "  part 5: trying again on gpu7, worker 2",
        "  part 6: trying again, worker 3: device lost",
        "  part 7: failed: device lost; see its log",
    ]
    assert "1/3" in lines[2] and "eval loss 2: rank=2" in lines[2]
    assert [part["part"] for part in found["parts"]] == list(range(11))
    rundir.write_status(run, "finished", {}, 1.0, {})
    assert not [line for line in listed(capsys, run) if line.startswith("  part")]


def test_what_was_set_is_shown_where_the_name_does_not_say_it(tmp_path, capsys):
    command = f"{COMMAND} --config.train.steps=5 --noconfig.analysis.report --config.base 'a b'"
    expected = {"train.steps": "5", "analysis.report": "false", "base": "a b"}
    assert listing.overrides(command) == expected and listing.overrides("lorax.run(config)") == {}
    assert len(listed(capsys, begun(tmp_path / "study-steps=5", command=command))) == 3
    for name, more in (("mine", " --workdir=runs/mine"), ("study-0123456789", "")):
        lines = listed(capsys, begun(tmp_path / name, command=command + more))
        assert lines[-1] == "  train.steps=5 analysis.report=false base=a b"


def test_no_runs_and_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert listed(capsys) == ["no runs in runs"]
    assert listing.main(["nowhere"]) == 2
    assert capsys.readouterr().err == (
        "lorax: nowhere: no such directory; expected a run or runs\n"
    )


@pytest.mark.parametrize("first", ["", "import lorax.runs; ", "from lorax import runs; "])
def test_the_name_is_a_command_and_a_module(first, tmp_path):
    code = f"{first}import lorax; print(lorax.runs.load.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "lorax.analysis.runs\n", done.stderr
    assert lorax.runs.load.__module__ == "lorax.analysis.runs"


def test_it_does_not_wait_for_pandas_or_jax(tmp_path):
    code = "import sys; from lorax import listing; listing.main(sys.argv[1:]); print("
    code += "[name for name in ('jax', 'pandas', 'ml_collections') if name in sys.modules])"
    words = [sys.executable, "-c", code, str(begun(tmp_path / "run"))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stderr
