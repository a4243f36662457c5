"""The section on texts: prompt, reference, base and members side by side, with their scores."""

import json

import pandas as pd
import pytest
from reading import Page
from synthetic import make_run

from lorax import report
from lorax.analysis import runs
from lorax.report.sections import texts

PROMPTS = [f"name = Inn {n} =>" for n in range(9)]
DECODING = {"new_tokens": 8, "beams": 1, "length_penalty": 1.0, "no_repeat_ngram": 0}


@pytest.fixture
def written(tmp_path):
    """A run of five members, the fourth diverged, whose others wrote texts."""
    directory = make_run(tmp_path / "run", (1, 2, 4, 8, 16), (0,), diverged=(3,))
    (directory / "texts").mkdir()
    for member in (0, 1, 2, 4):
        lines(directory, member, [f"<{member}> wrote {n}" for n in range(9)])
    of = {"base": "gpt2-nano", "quant": None, **DECODING}
    lines(directory, "base", [f"base {n}" for n in range(9)], **of)
    config = json.loads((directory / "config.json").read_text())
    config["config"]["eval"] = DECODING
    (directory / "config.json").write_text(json.dumps(config))
    rows = map(json.loads, (directory / "members.jsonl").read_text().splitlines())
    rows = [row | {"base": "gpt2-nano", "quant": None} for row in rows]
    (directory / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = json.loads((directory / "status.json").read_text())
    for member in (0, 1, 2, 4):
        scored = {"scores": {"bleu": 0.1 * member}, "base_scores": {"bleu": 0.05}}
        status["members"][str(member)] |= scored
    (directory / "status.json").write_text(json.dumps(status))
    return directory


def lines(directory, name, written, **about):
    rows = [
        {**about, "prompt": prompt, "text": text, "references": ["An inn.", "One inn."]}
        for prompt, text in zip(PROMPTS, written, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "texts" / f"{name}.jsonl").write_text(text)


def test_reference_base_and_members_stand_side_by_side(written, undrawn):
    page = Page(report.write(written).read_text())
    assert not page.open and "Texts" in page.headings
    rows = page.table("prompt", "reference", "base")
    assert len(rows) == texts.PROMPTS and rows[-1]["prompt"] == PROMPTS[-1]
    best, *_, worst = [name for name in rows[0] if "loss" in name]
    assert best.startswith("2: rank=4, loss 1.190") and worst.startswith("0: rank=1")
    assert rows[-1][best] == "<2> wrote 8" and rows[-1]["base"] == "base 8"
    assert rows[0]["reference"] == "An inn. / One inn."
    scores = page.table("by", "validation loss", "bleu")
    assert [row["bleu"] for row in scores][:2] == ["0.050", "0.200"] and len(scores) == 5
    stored = pd.read_csv(written / "analysis" / "texts.csv")
    assert len(stored) == 36 and set(stored["member"]) == {0, 1, 2, 4}


def test_other_members_are_folded_and_none_is_dropped(written):
    run = runs.load(written)
    (section,) = texts.texts(run, runs.summary(run))
    assert "<summary>The other member</summary>" in section.content
    for member in (0, 1, 2, 4):
        assert f"&lt;{member}&gt; wrote 0" in section.content


def test_a_run_without_texts_has_no_section(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1,), seeds=(0,)))
    assert texts.texts(run, runs.summary(run)) == []


def test_another_decoding_of_the_base_is_not_shown(written):
    of = {"base": "gpt2-nano", "quant": None, **DECODING, "beams": 4}
    lines(written, "base", ["beam"] * 9, **of)
    assert runs.load(written).base_texts(0) == {}
