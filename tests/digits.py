"""A small sweep on 8 x 8 digits; a run of a config without a report, and what it wrote."""

import json

from lorax import config, rundir
from lorax.analysis import runs
from lorax.train import loop, prepare

BASE = "random:mlp-64-10"


def digits(**axes):
    c = config.default()
    c.base, c.task.name, c.method.targets = BASE, "digits", ("re:.*/kernel",)
    c.method.rank, c.task.n_train = 2, 32
    c.train.update(steps=6, batch_size=8, warmup=0, parallel="none", schedule="constant", lr=1e-2)
    c.eval.update(every=2, examples=50, batch_size=32)
    for axis, values in axes.items():
        c.sweep[axis] = values
    return c


def trained(workdir, c) -> runs.Run:
    """A run, or its continuation."""
    workdir.mkdir(exist_ok=True)
    groups = prepare.groups(config.members(c), lambda line: None)
    rows, _ = loop.train(workdir, groups, loop.Terminal(*[lambda *_: None] * 3))
    rundir.write_members(workdir, [line for g in groups for line in prepare.describe(g)])
    rundir.write_config(workdir, {"config": json.loads(c.to_json())})
    rundir.write_status(workdir, "trained", rows, 0.0, {})
    return runs.load(workdir)


def contents(workdir):
    """Metrics, and the bytes of adapters and rows."""
    files = [f for name in ("adapters", "rows") for f in sorted((workdir / name).rglob("*.*"))]
    files = [f for f in files if f.suffix in (".safetensors", ".npz")]
    assert {f.suffix for f in files} == {".safetensors", ".npz"}
    return (workdir / "metrics.jsonl").read_bytes(), {
        str(f.relative_to(workdir)): f.read_bytes() for f in files
    }
