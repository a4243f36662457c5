"""What a run says: on anything but a terminal, lines."""

import json

import pytest
from synthetic import make_run

from lorax import rundir, terminal
from lorax.analysis import runs
from lorax.terminal import Evaluation, Evaluations, Screen

MEMBERS = {i: {"name": f"rank={2**i}", "steps": 100} for i in range(3)}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: clock[0] is its time in seconds."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_asking_for_colour_does_not_make_a_pipe_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks ask their subprocesses
    with Screen() as screen:
        for done in range(11):
            screen.progress(done, 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0].strip() for line in lines] == [str(n) for n in range(0, 101, 10)]
    assert "\x1b" not in "".join(lines)


def test_an_evaluation_is_a_line():
    shown = lambda step, **losses: terminal.evaluated(
        Evaluation(step, {int(k[1]): x for k, x in losses.items()}), MEMBERS
    )
    assert shown(0, m0=3.0, m1=3.0) == "step 0/100: eval loss 3.0000, before training"
    line = shown(50, m0=3.0, m1=2.5, m2=None)  # one has diverged
    assert line == "step 50/100: best 2.5000 (rank=2), median 2.7500"
    assert shown(50, m2=2.0) == "step 50/100: eval loss 2.0000"
    assert shown(50, m0=None, m1=None) == "step 50/100: no finite loss"
    long = {0: {"name": "alpha=16," * 9, "steps": 1000}, 1: MEMBERS[1]}
    line = terminal.evaluated(Evaluation(1000, {0: 1.0, 1: 2.0}), long)
    assert len(line + ", 12 min left") <= 80


def test_quick_evaluations_do_not_flood(clock, capsys):
    """An hour with an evaluation every second; and one with an evaluation every five minutes."""
    for seconds, most in ((1, 200), (300, 24)):
        with Screen() as screen:
            screen.terminal([{"member": i} | row for i, row in MEMBERS.items()])
            for second in range(0, 3601, seconds):
                clock[0] += seconds
                screen.progress(second, 3600, Evaluation(second // 36, {0: 1.0, 1: 2.0}))
        lines = capsys.readouterr().out.splitlines()
        assert 12 <= len(lines) <= most and all(line.startswith("step ") for line in lines)
        assert lines[0].startswith("step 0/") and lines[-1].startswith("step 100/100: best 1.0")


def test_the_loss_that_all_parts_start_from_is_said_once(capsys):
    with Screen() as screen:
        screen.terminal([{"member": i} | row for i, row in MEMBERS.items()])
        for done, step, loss in ((0, 0, 3.0), (5, 50, 2.0), (5, 0, 3.0), (10, 50, 1.0)):
            screen.progress(done, 10, Evaluation(step, {0: loss, 1: loss}))
    said = capsys.readouterr().out
    assert said.count("before training") == 1 and said.count("step 50/") == 2


def test_evaluations_are_read_as_they_are_written(tmp_path):
    row = lambda step, member, loss, split="eval": {
        "member": member, "step": step, "split": split, "loss": loss
    }  # fmt: skip
    rundir.append_metrics(tmp_path, [row(0, 0, 9.0)])  # by an earlier start of the run
    evaluations = Evaluations(tmp_path)
    assert evaluations.newest() is None
    rundir.append_metrics(tmp_path, [row(5, 0, 3.0), row(5, 1, None), row(6, 0, 1.0, "train")])
    assert evaluations.newest() == (5, {0: 3.0, 1: None})
    assert evaluations.newest() is None
    rundir.cut_metrics(tmp_path, 0)
    rundir.append_metrics(tmp_path, [row(2, 1, 4.0)])
    assert evaluations.newest() == (2, {1: 4.0})


def test_a_run_that_ended_within_a_line_goes_on(tmp_path):
    row = {"member": 0, "step": 5, "split": "eval", "loss": 3.0}
    end = rundir.append_metrics(tmp_path, [row])
    with open(tmp_path / rundir.METRICS, "a") as file:
        file.write('{"member": 0, "st')  # the disk was full
    evaluations = Evaluations(tmp_path)
    rundir.cut_metrics(tmp_path, end)
    rundir.append_metrics(tmp_path, [row | {"step": 10}, row | {"step": 15}])
    assert evaluations.newest() == (15, {0: 3.0})
    rundir.append_metrics(tmp_path, [row | {"step": 20}])
    assert evaluations.newest() == (20, {0: 3.0})


def test_thirty_six_members_with_three_axes_are_a_table_of_80_columns(tmp_path, capsys):
    run = make_run(
        tmp_path, (1, 2, 16), (0, 1, 2), (8.0, 16.0), (1e-3, 1e-2), diverged=(4,), adapters=False
    )
    status = json.loads((run / "status.json").read_text())
    names = ("accuracy", "bleu", "nist", "meteor", "rouge")
    for row in status["members"].values():
        row["scores"] = dict.fromkeys(names, 0.5)
    (run / "status.json").write_text(json.dumps(status))
    with Screen() as screen:
        screen.table(runs.load(run))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    head, *_, last = (line.split() for line in lines[2:] if line and "─" not in line)
    assert head[:5] == ["rank", "alpha", "lr", "parameters", "eval"] and "accuracy" in head
    assert len([line for line in lines if "0.5000" in line]) == 12
    means = [float(line.split()[4]) for line in lines if "0.5000" in line]
    assert means[:-1] == sorted(means[:-1])
    assert last[-2:] == ["1", "diverged"] and "2" in last  # its two other seeds have a loss


def test_a_setting_of_one_member_says_where_it_ended(tmp_path):
    rows = terminal.settings(runs.load(make_run(tmp_path, (1, 2), (0,), diverged=(1,))))
    assert [(row["rank"], row["status"]) for row in rows] == [("1", ""), ("2", "diverged at 50")]
    assert "seeds" not in rows[0] and rows[1]["eval loss"] == "-"


def test_scores_of_generated_texts_stand_beside_a_test_loss(tmp_path):
    directory = make_run(tmp_path, (1,), (0,))
    status = json.loads((directory / "status.json").read_text())
    scored = {"scores": {"bleu": 0.25, "accuracy": 0.5}, "test_scores": {"accuracy": 0.75}}
    status["members"]["0"] |= scored
    (directory / "status.json").write_text(json.dumps(status))
    with open(directory / "metrics.jsonl", "a") as file:
        for step, loss in ((0, 3.0), (100, 1.5)):
            line = {"member": 0, "step": step, "split": "test", "loss": loss}
            file.write(json.dumps(line) + "\n")
    (row,) = terminal.settings(runs.load(directory))
    assert (row["test loss"], row["bleu"], row["accuracy"]) == ("1.5000", "0.2500", "0.7500")
