"""From members to files: what the loop adds to the programs it calls."""

import json
import shutil

import pytest

from lorax import config
from lorax.train import loop


@pytest.fixture
def members():
    c = config.default()
    c.train.update(steps=6, batch_size=4, seq_len=96, lr=1e-2, warmup=0, parallel="none")
    c.eval.update(every=2, examples=8, batch_size=8)
    c.task.n_train = 64
    c.sweep.seed = (0, 1)
    return c


def train(workdir, c):
    """(rows, what was said) of a run, or of its continuation."""
    said = []
    groups = loop.prepare(config.members(c), said.append)
    terminal = loop.Terminal(said.append, lambda done, total: None, lambda row: None)
    return loop.train(workdir, groups, terminal)[0], said


def contents(workdir):
    """Metrics, and the bytes of the adapters."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    files = sorted((workdir / "adapters").rglob("*.safetensors"))
    assert files
    return lines, {str(f.relative_to(workdir)): f.read_bytes() for f in files}


def test_an_offloaded_optimiser_resumes_bit_for_bit(members, tmp_path):
    members.train.offload = "optimizer"
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    train(whole, members)
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "checkpoints/0-0/6")
    shutil.rmtree(torn / "adapters")
    _, said = train(torn, members)
    assert any("continues at step 4 of 6" in line for line in said)
    assert contents(torn) == contents(whole)


def test_groups_that_are_done_keep_their_lines_when_a_later_one_continues(members, tmp_path):
    members.train.steps = 4
    members.sweep.seed, members.sweep.method = (), ("lora", "bitfit")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    train(whole, members)
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "checkpoints/1-0/4")
    train(torn, members)
    assert contents(torn) == contents(whole)
    shutil.rmtree(torn / "checkpoints/0-0/4")  # what comes after it is cut off, and done again
    train(torn, members)
    assert contents(torn) == contents(whole)
