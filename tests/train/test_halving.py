"""Halving in the training loop: who stops, what it costs, and that nothing else changes."""

import gc
import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from lorax import config, halving, rundir
from lorax.train import layouts, loop, part, prepare


def study(**axes):
    c = config.default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.train.update(steps=16, batch_size=8, warmup=0, parallel="none", width=1)
    c.eval.update(every=4, examples=20, batch_size=20)
    c.sweep.tune = "lr"
    for axis, values in axes.items():
        c.sweep[axis] = values
    return c


RATES = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)


def train(workdir, c, stop=lambda *_: None):
    """(rows, what was said) of a run, or of its continuation; its programs, by their size."""
    workdir.mkdir(exist_ok=True)
    members, said = config.members(c), []
    groups = prepare.groups(members, said.append)
    terminal = loop.Terminal(said.append, stop, lambda row: None)
    race = halving.race(c, members)
    return loop.train(workdir, groups, terminal, race=race)[0], said


def contents(workdir):
    """The lines of metrics.jsonl by member, and the bytes of the adapters."""
    lines = {}
    for line in (workdir / rundir.METRICS).read_text().splitlines():
        lines.setdefault(json.loads(line)["member"], []).append(json.loads(line))
    files = sorted((workdir / rundir.ADAPTERS).rglob("*.safetensors"))
    return lines, {str(f.relative_to(workdir)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The full grid: (rows, lines, adapters)."""
    c = study(rank=(1, 2), lr=RATES, seed=(0, 1))
    c.sweep.tune = None
    workdir = tmp_path_factory.mktemp("grid")
    return train(workdir, c)[0], *contents(workdir)


def fitted(monkeypatch):
    """A list of the programs that are compiled."""
    programs, fit = [], loop.fitting.fit
    monkeypatch.setattr(
        loop.fitting, "fit", lambda *given: programs.append(fit(*given)) or programs[-1]
    )
    return programs


def test_survivors_are_bit_for_bit_what_they_are_in_the_full_grid(grid, tmp_path, monkeypatch):
    rows_of_grid, lines_of_grid, adapters_of_grid = grid
    c = study(rank=(1, 2), lr=RATES, seed=(0, 1))
    programs = fitted(monkeypatch)
    rows, said = train(tmp_path / "run", c)
    (program,) = programs  # one for all legs: 20, 8 and 4 members
    assert program.layout.size == 4
    assert [line.split(":")[0] for line in said if "rung" in line] == [
        "rung 1 of 2, step 4",
        "rung 2 of 2, step 4",
    ]
    lines, adapters = contents(tmp_path / "run")
    finished = [i for i, row in rows.items() if row["status"] == "finished"]
    members = {m.index: m.point for m in config.members(c)}
    assert sorted((members[i]["rank"], members[i]["seed"]) for i in finished) == [
        (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    for i, row in rows.items():
        end = 16 if i in finished else 4
        assert lines[i] == [line for line in lines_of_grid[i] if line["step"] <= end]
        if i in finished:
            same = "status", "eval_loss", "scores", "diverged_at"
            assert [row[key] for key in same] == [rows_of_grid[i][key] for key in same]
        else:
            assert row["status"] == "stopped" and row["stopped_at"] == 4
            assert row["eval_loss"] is None and row["diverged_at"] is None
    kept = {f: x for f, x in adapters_of_grid.items() if int(f.split("/")[1]) in finished}
    assert adapters == kept and len(kept) == 4


def test_an_accelerator_has_a_program_for_each_leg(grid, tmp_path, monkeypatch):
    """As many members side by side as there are; the CPU's are the same within rounding."""
    monkeypatch.setattr(loop.layouts, "on_cpu", lambda: False)
    programs = fitted(monkeypatch)
    c = study(rank=(1, 2), lr=RATES, seed=(0, 1))
    c.train.width = 0
    rows, _ = train(tmp_path / "run", c)
    assert [program.layout.size for program in programs] == [20, 8, 4]
    done = [i for i, row in rows.items() if row["status"] == "finished"]
    assert len(done) == 4
    for i in done:
        assert rows[i]["eval_loss"] == pytest.approx(grid[0][i]["eval_loss"], rel=1e-5)


def test_the_best_at_a_rung_go_on_wherever_they_are_trained(grid, tmp_path):
    """The rungs' choices are those of the losses of the full grid, also where the values of a point
    need programs of their own; diverged ones are out."""
    c = study(rank=(1,), lr=(1e-2, 1e-1, 1e9))
    c.sweep.axes, c.sweep.tune = {"train.b1": (0.0, 0.5, 0.9)}, "train.b1"
    c.halving.keep = 0.5
    c.halving.rungs = (0.25, 0.5)
    c.train.clip, c.train.optimizer = 0.0, "sgd"
    rows, said = train(tmp_path / "run", c)
    lines, _ = contents(tmp_path / "run")
    members = config.members(c)
    assert len({config.group_key(m) for m in members}) == 3
    loss = lambda i, step: next(
        x["loss"] for x in lines[i] if (x["split"], x["step"]) == ("eval", step)
    )
    for rate in (1e-2, 1e-1):
        of = [m.index for m in members if m.point["lr"] == rate]
        first = sorted(of, key=lambda i: loss(i, 4))
        assert [rows[i].get("stopped_at") for i in first[2:]] == [4]
        second = sorted(first[:2], key=lambda i: loss(i, 8))
        assert rows[second[1]]["stopped_at"] == 8 and rows[second[0]]["status"] == "finished"
    diverged = [rows[m.index] for m in members if m.point["lr"] == 1e9]
    assert {row["status"] for row in diverged} == {"diverged"}
    assert {row["stopped_at"] for row in diverged} == {4}


def test_seeds_that_wait_are_trained_at_the_best_value(grid, tmp_path):
    rows_of_grid, lines_of_grid, _ = grid
    c = study(rank=(1, 2), lr=RATES, seed=(0, 1))
    c.halving.seeds, c.halving.rungs = 1, (0.25,)
    rows, _ = train(tmp_path / "run", c)
    lines, _ = contents(tmp_path / "run")
    members = config.members(c)
    for rank in (1, 2):
        raced = [m for m in members if m.point["rank"] == rank and m.point["seed"] == 0]
        done = [m for m in raced if rows[m.index]["status"] == "finished"]
        assert len(done) == 2  # 5 * 1/3, rounded
        best = min(done, key=lambda m: rows_of_grid[m.index]["eval_loss"])
        for m in members:
            if m.point["rank"] == rank and m.point["seed"] == 1:
                won = m.point["lr"] == best.point["lr"]
                assert rows[m.index]["status"] == ("finished" if won else "stopped")
                assert lines.get(m.index, []) == (lines_of_grid[m.index] if won else [])
                assert won or rows[m.index]["stopped_at"] == 0


@pytest.mark.parametrize("seeds", [None, 1])
def test_a_run_that_is_killed_at_any_moment_comes_to_the_same(tmp_path, monkeypatch, seeds):
    c = study(rank=(1, 2), lr=(1e-2, 1e-1, 1.0), seed=(0, 1))
    c.halving.rungs, c.halving.seeds = (0.25, 0.5), seeds
    whole = train(tmp_path / "whole", c)[0]
    calls = {"append_metrics": rundir.append_metrics, "save": part.save}
    killed_at = []
    for moment in (2, 7, 6, 5, 3):  # counted from where the last one was killed
        left = [moment]

        def killed(name, *given, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return calls[name](*given)

        with monkeypatch.context() as patched:
            patched.setattr(
                rundir, "append_metrics", lambda *given: killed("append_metrics", *given)
            )
            patched.setattr(part, "save", lambda *given: killed("save", *given))
            try:
                train(tmp_path / "torn", c)
            except KeyboardInterrupt:
                killed_at.append(moment)
    assert len(killed_at) > 3
    torn = train(tmp_path / "torn", c)[0]
    timeless = lambda rows: {
        i: {k: v for k, v in row.items() if k not in ("seconds", "step_ms")}
        for i, row in rows.items()
    }
    assert timeless(torn) == timeless(whole)
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")
    metrics = [(tmp_path / name / rundir.METRICS).read_bytes() for name in ("whole", "torn")]
    assert metrics[0] == metrics[1]


def test_progress_counts_what_is_left_after_the_rungs(tmp_path):
    c = study(rank=(1, 2), lr=RATES)
    seen = []
    train(tmp_path / "run", c, lambda done, total: seen.append((done, total)))
    race = halving.race(c, config.members(c))
    assert seen[-1] == (halving.all_steps(race),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def held() -> int:
    """Bytes of all arrays of this process, JAX's and NumPy's; `tracemalloc` has to run."""
    gc.collect()
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    host = tracemalloc.take_snapshot().filter_traces([arrays]).traces
    devices = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}
    return sum(trace.size for trace in host) + sum(devices.values())


def test_memory_holds_the_members_of_one_part(tmp_path, monkeypatch):
    """While it trains and at rungs, no more than the program's own figure, however many members."""
    c = study(rank=(16, 32), lr=RATES, seed=(0, 1))
    c.base, c.halving.rungs = "random:mlp-64-256-10", (0.25, 0.5)
    c.method.targets = ("re:(?!head).*/kernel",)
    programs, seen, fit, apart = [], [], loop.fitting.fit, part.apart

    def fitted(*given):
        programs.append(fit(*given))
        tracemalloc.start()  # compiling is slow with it
        seen.append(held())
        return programs[-1]

    monkeypatch.setattr(loop.fitting, "fit", fitted)
    monkeypatch.setattr(part, "apart", lambda *x: seen.append(held()) or apart(*x))
    try:
        train(tmp_path / "run", c, lambda *_: seen.append(held()))
    finally:
        tracemalloc.stop()
    (program,), (before, *during) = programs, seen
    assert len(during) > 15 and max(during) - before < program.bytes
    of_members = 20 * 3 * 4 * 32 * (64 + 256)  # their parameters and Adam's moments
    assert of_members > 1.5 * program.bytes


def test_a_checkpoint_that_a_leg_needs_is_gone(tmp_path, monkeypatch):
    c, apart = study(rank=(1, 2), lr=RATES), part.apart

    def lose(current, at):
        shutil.rmtree(rundir.checkpoints(current.workdir, current.name))
        return apart(current, at)

    monkeypatch.setattr(part, "apart", lose)
    with pytest.raises(ValueError, match="the checkpoint of step 4 is gone or damaged; the same"):
        train(tmp_path / "run", c)


@pytest.mark.parametrize(
    ("points", "shares", "most", "each"),
    [
        (12, 2, 8, 6),  # 60, 24 and 12 members: nothing stays empty
        (12, 1, 1, 12),
        (7, 1, 8, 7),
        (7, 1, 5, 4),  # 7 would run one at a time, and 35 don't
        (1, 1, 8, 1),  # 2 side by side would cost half as much again
        (1, 8, 8, 1),
    ],
)
def test_few_places_stay_empty(points, shares, most, each):
    """5 rates, of which 2 and then 1 go on."""
    legs = [(5 * points, 20), (2 * points, 20), (points, 120)]
    assert layouts.packed(legs, shares, -(-5 * points // shares), most) == each
