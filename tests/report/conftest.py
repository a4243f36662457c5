import pytest
from synthetic import kernels, make_run

from lorax import report
from lorax.report import charts


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which is most of the time: for tests that read the words."""
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks whose report is written, with figures that are not drawn."""
    directory = make_run(tmp_path_factory.mktemp("whole") / "run", ranks=(1, 2))
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_nothing(monkeypatch)
        report.write(directory, kernels())
    return directory


def draw_nothing(monkeypatch):
    monkeypatch.setattr(charts, "library", str)
