"""The scaling on paper is what its script computes, and follows from few sums."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments/many_devices"


@pytest.fixture(scope="module")
def simulate():
    spec = importlib.util.spec_from_file_location("simulate", FOLDER / "simulate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_figure_are_what_the_script_makes(simulate, tmp_path, capsys):
    simulate.main(tmp_path)
    for name in ("parts.csv", "sharded.csv", "gather.csv"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), name
    assert (tmp_path / "many_devices.png").stat().st_size > 10_000
    printed = {line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    for page in (FOLDER / "README.md", FOLDER.parents[1] / "docs/many_machines.md"):
        shown = {line for line in page.read_text().splitlines() if " s, " in line and "%" in line}
        assert shown and {line for line in shown if line.startswith("| ")} <= printed, page


def test_parts_start_as_often_as_there_are_devices(simulate):
    rows = {row["devices"]: row for row in simulate.parts(100, 30.0, 10.0)}
    assert rows[1]["seconds"] == 1030 and rows[1]["efficiency"] == 1
    assert rows[8]["seconds"] == 30 + 13 * 10 and rows[1000]["seconds"] == 40
    assert rows[1000]["efficiency"] == pytest.approx(1030 / 1000 / 40)


def test_a_product_hides_its_gather_from_so_many_tokens_on(simulate):
    (h200,) = (r for r in simulate.gather() if (r["device"], r["stored"]) == ("h200", "bfloat16"))
    assert h200["linked"] == pytest.approx(989.5e12 / 450e9)  # 2 n / bandwidth = 2 n tokens / rate


def test_a_measurement_is_of_one_command(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("measure", FOLDER / "measure.py")
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    asked = []
    monkeypatch.setattr(measure, "seconds", lambda words: asked.append(words) or 1.0)
    measure.main(tmp_path)
    lines = (tmp_path / "measured.csv").read_text().splitlines()
    assert lines == ["members,seconds", "1,1.00", "2,1.00", "4,1.00", "8,1.00"]
    config = measure.ROOT / "configs/gpt2_rank_sweep.py"
    assert shutil.which(asked[0][0]) and json.dumps(asked[0]).count(str(config)) == 1
