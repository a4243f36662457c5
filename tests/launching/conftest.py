"""What tests of engines share: the run that they must repeat."""

import pytest
from launching import sweeps


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """The small sweep on one machine: (its config script, its run directory)."""
    folder = tmp_path_factory.mktemp("single")
    config = sweeps.study(folder)
    sweeps.lorax("run", config, folder / "run")
    return config, folder / "run"


@pytest.fixture(scope="session")
def default_study(tmp_path_factory):
    """The run directory of the default study, in few steps, on one machine."""
    directory = tmp_path_factory.mktemp("default") / "run"
    sweeps.lorax("run", sweeps.DEFAULT, directory, *sweeps.SHORT)
    return directory
