"""A sweep that Ray or submitit launches is that of one machine."""

import pytest
from launching import sweeps
from support import require

from lorax.launching import state

PACKAGES = {"ray": "ray", "slurm": "submitit"}


@pytest.fixture(params=sweeps.ENGINES)
def engine(request):
    """The flags of an engine, whose package is there."""
    require(PACKAGES[request.param])
    return sweeps.ENGINES[request.param]


@pytest.mark.slow
def test_a_sweep_is_that_of_one_machine(engine, single, tmp_path):
    config, expected = single
    sweeps.lorax("launch", config, tmp_path / "run", *engine)
    sweeps.same(expected, tmp_path / "run")
    assert [found["state"] for found in state.read_all(tmp_path / "run")] == ["done"] * 2


@pytest.mark.soak
def test_the_default_study_is_that_of_one_machine(engine, default_study, tmp_path):
    sweeps.lorax("launch", sweeps.DEFAULT, tmp_path / "run", *sweeps.SHORT, *engine)
    sweeps.same(default_study, tmp_path / "run")


@pytest.mark.parametrize(
    "times", [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.soak)]
)
def test_a_sweep_whose_workers_are_killed_is_that_of_one_machine(engine, single, tmp_path, times):
    sweeps.repeated_while_killed(single, tmp_path, *engine, times=times)
