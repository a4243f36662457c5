"""What `lorax.bench gpu` makes of its rows: shares, goals, and how paths should be chosen."""

import math

import pytest

from lorax.bench.gpu import tables
from lorax.quant import matmul

TERA = 1e12
CEILINGS = [
    {"case": "copy", "path": "float32", "ms": 1.0, "phases": [[4e9, 0]]},  # 4 TB/s
    {"case": "square product of 8", "path": "bfloat16", "ms": 1.0, "phases": [[0, 8e11]]},
    {"case": "square product of 8", "path": "float32", "ms": 1.0, "phases": [[0, 4e11]]},
]


def product(n, **ms):
    case = f"product 4096 x 4096, {n} row{'s' * (n != 1)}"
    phases = [[4e6, 0]]
    return [
        {"case": case, "path": path.replace("_", " "), "ms": each, "phases": phases}
        for path, each in ms.items()
    ]


def test_shares_are_of_what_was_measured():
    known = tables.rates(CEILINGS)
    assert known == (4 * TERA, 800 * TERA, 400 * TERA)
    least = lambda *phases, **more: tables.least_ms({"phases": list(phases), **more}, known)
    assert least([4e9, 0]) == pytest.approx(1)
    assert least([4e9, 16e11]) == pytest.approx(2)  # the slower of the two
    assert least([4e9, 0], [0, 8e11]) == pytest.approx(2)  # one after the other
    assert least([0, 8e11], dtype="float32") == pytest.approx(2)
    assert least() is None
    assert tables.least_ms({"phases": [[1, 1]]}, tables.rates([])) is None


def test_rows_of_a_case_stand_together_beside_its_first():
    rows = [*CEILINGS, *product(16, bf16=0.01, fused=0.004), *product(1, bf16=0.01)]
    rows += product(16, bitsandbytes=0.02)  # measured later, by the other process
    rows += [{"case": "product 4096 x 4096, 1 row", "path": "fused", "failed": "ValueError: x"}]
    lines = tables.lines(rows)[3:]
    assert [line.path for line in lines] == ["bf16", "fused", "bitsandbytes", "bf16", "fused"]
    assert lines[1].relative == pytest.approx(0.4) and lines[1].share == pytest.approx(0.25)
    assert lines[2].relative == pytest.approx(2)
    assert lines[4].ms is None and lines[4].remark == "ValueError: x"


def test_goals_are_those_of_the_path_that_is_taken():
    rows = [*CEILINGS, *product(16, bf16=0.01, fused=0.0061, two_passes=0.001)]
    rows += product(2048, bf16=0.01, two_passes=0.0115)
    goals = {(line.case, line.path): line.goal for line in tables.lines(rows) if line.goal}
    case = "product 4096 x 4096, {} rows".format
    assert goals == {
        (case(16), "fused"): "<= 0.60 missed",
        (case(2048), "two passes"): "<= 1.15 met",
    }
    decoded = {"case": "decode 4096 x 4096", "path": "p", "ms": 1.0, "phases": [[3.2e9, 0]]}
    assert tables.lines([*CEILINGS, decoded])[-1].goal == ">= 75% met"


def test_classes_are_the_lines_of_the_table_and_say_what_was_faster():
    rows = product(1, fused=1.0, two_passes=2.0) + product(256, fused=1.0, two_passes=2.0)
    rows += product(512, fused=3.0, two_passes=2.0) + product(2048, two_passes=2.0)
    found = {c.rows: c for c in tables.classes(rows)}
    assert list(found) == ["1", "2-64", "65-512", "513-1024", "> 1024"]
    assert [c.takes for c in found.values()] == [path for _, path in matmul.PATHS]
    assert found["1"].hint == "is the fastest where measured"
    assert found["65-512"].hint == "faster: two passes at 512 (4096 x 4096)"
    assert found["2-64"].hint == found["> 1024"].hint == "not measured"


def test_the_table_covers_every_number_of_rows():
    mosts = [most for most, _ in matmul.PATHS]
    assert mosts == sorted(mosts) and mosts[-1] == math.inf
    assert {matmul.path(n) for n in (1, 2, 64, 512)} == {matmul.FUSED}
    assert {matmul.path(n) for n in (513, 1024, 10**6)} == {matmul.TWO_PASSES}


def test_every_goal_is_measured():
    from lorax.bench.gpu.sizes import FULL

    assert set(tables.GOALS) <= set(FULL.rows)
    classes = [matmul.PATHS.index(next(p for p in matmul.PATHS if n <= p[0])) for n in FULL.rows]
    assert set(classes) == set(range(len(matmul.PATHS)))


def test_a_summary_names_what_is_missing():
    failed = {"name": "a", "status": "failed", "why": "ValueError: x", "rows": []}
    machine = {"name": "X1", "versions": {"jax": "0.10"}}
    results = {"machine": machine, "small": True, "measurements": [failed]}
    texts = [part for part in tables.summary(results) if isinstance(part, str)]
    assert "a: failed: ValueError: x" in texts and texts[-1].startswith("small shapes")
