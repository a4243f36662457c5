"""The shipped diffusion model draws the digits that it was trained on, and diffusers opens it."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import require

import lorax
from lorax import diffusion, sampling, tree
from lorax.models.directories import ASSETS
from lorax.tasks import noisy_images, vision

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base():
    return lorax.load("dit-digits", unroll=1)


def test_it_is_as_small_as_it_says(base):
    assert tree.count(base.params) == 234_772
    assert sum(p.stat().st_size for p in (ASSETS / "dit-digits").iterdir()) < 600_000
    assert base.sha256 and diffusion.read(base.directory) == diffusion.Schedule()
    with open(ROOT / "experiments/dit_digits/curve.csv") as file:
        held_out = list(csv.DictReader(file))[-1]["held_out_squared_error"]
    readme = (ROOT / "experiments/dit_digits/README.md").read_text()
    assert f"{float(held_out):.4f}" in readme and f"{tree.count(base.params):,}" in readme


def test_it_draws_what_it_is_asked_for(base):
    train, _ = vision.digit_sets()
    classes = np.repeat(np.arange(9), 12)
    images = sampling.sample(base, classes, steps=20, batch_size=108)
    score = noisy_images.accuracy_of(*train)
    assert score(images, classes)["sample_accuracy"] >= 0.9
    assert score(images, (classes + 1) % 9)["sample_accuracy"] < 0.1


def test_diffusers_opens_it():
    diffusers = require("diffusers")
    model = diffusers.DiTTransformer2DModel.from_pretrained(ASSETS / "dit-digits")
    assert model.num_parameters() == 234_772
    scheduler = diffusers.DDIMScheduler.from_pretrained(ASSETS / "dit-digits")
    assert diffusion.from_diffusers(dict(scheduler.config)) == diffusion.Schedule()


@pytest.mark.slow
def test_it_is_made_by_its_script(tmp_path):
    """With fewer steps than the shipped one."""
    flags = f"--output={tmp_path / 'model'}", f"--workdir={tmp_path}", "--steps=250"
    command = [sys.executable, "-m", "experiments.dit_digits.pretrain", *flags]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1,293 training images, 324 held out" in said and "sample_accuracy" in said
    made = lorax.load(str(tmp_path / "model"))
    assert tree.count(made.params) == 234_772
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "curve.csv").is_file()
