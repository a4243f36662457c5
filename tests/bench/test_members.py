"""What many members cost: rows of the table, and the process that measures."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lorax.bench import __main__ as bench
from lorax.bench import members


def test_a_ratio_below_1_says_that_it_grows_faster_than_the_members(monkeypatch):
    def costs(n):  # seconds and MB: linear, but for the report, which grows with the square
        each = np.full(len(members.PHASES), 0.002 * n)
        each[members.PHASES.index("report")] = 0.001 * n**2
        return np.stack([each, 0.1 * each], 1)

    monkeypatch.setattr(members, "_costs", costs)
    rows = members.bench_members([], 2, (40, 80, 160))
    assert len(rows) == len(members.PHASES) * 2 * 2
    found = {row.name: row for row in rows}
    row = found["plan, CPU time a member of 80"]
    assert (row.value, row.unit, row.baseline, row.against) == (2.0, "ms", 2.0, "of 40")
    assert row.ratio == pytest.approx(1)
    assert found["report, CPU time a member of 160"].ratio == pytest.approx(0.5)
    assert found["export, memory a member of 160"].value == pytest.approx(0.2)


@pytest.mark.parametrize("given", ["3", "48", "48,48", "200,48", "0,4", "48,x"])
def test_numbers_of_members_that_cannot_be(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["members", f"--members={given}"])
    assert f"--members: '{given}' given, must be" in capsys.readouterr().err


@pytest.mark.slow
def test_each_phase_is_measured(tmp_path):
    command = [sys.executable, "-m", "lorax.bench.member_costs", "4", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert tuple(found) == members.PHASES and all(seconds > 0 for seconds, _ in found.values())
    assert (tmp_path / "report.html").exists() and (tmp_path / "adapters/3").exists()
