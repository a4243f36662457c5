"""Small runs of methods from outside the package."""

import json

import numpy as np

import lorax
from lorax import config
from lorax.train import loop, prepare


def small(name):
    """A config that trains three short steps of a method."""
    c = config.default()
    c.method.name, c.task.n_train = name, 64
    c.train.steps, c.train.batch_size, c.train.seq_len, c.train.warmup = 3, 2, 100, 0
    c.eval.update(every=3, examples=2, test=2, batch_size=2)
    c.train.parallel = "none"
    return c


def trained(c, folder):
    """The run directory of a config, without its report."""
    folder.mkdir()
    groups = prepare.groups(config.members(c), lambda line: None)
    quiet = loop.Terminal(*[lambda *_: None] * 3)
    rows, _ = loop.train(folder, groups, quiet)
    lines = [json.dumps(row) for group in groups for row in prepare.describe(group)]
    (folder / "members.jsonl").write_text("\n".join(lines))
    (folder / "config.json").write_text("{}")
    (folder / "status.json").write_text("{}")
    return lorax.runs.load(folder)


def assert_same_update(one, other):
    assert one.keys() == other.keys()
    for path in one:
        dw = [f.s * (f.a @ f.b) for f in (one[path], other[path])]
        np.testing.assert_allclose(*dw, rtol=0, atol=1e-4 * np.abs(dw[1]).max(), err_msg=path)
