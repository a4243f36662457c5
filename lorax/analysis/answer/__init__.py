"""The answer of a sweep: which setting to use, how sure that is, and what to run next.

The candidates are compared with the best of them on the test rows, paired by seed and by row
(`lorax.analysis.compare`). The answer is the cheapest, by trainable parameters, that is shown to be
as good as the best within delta, a share of what the best improves on the base. What each
candidate has at its best (its learning rate, say) was chosen on the validation rows; everything
else is equal, or said. `answer` returns all of it as a dictionary, which analysis/answer.json holds
and from which the terminal and the report take their words.
"""

import json
import os
import pathlib
from typing import Any

from lorax import rundir
from lorax.analysis import compare, runs
from lorax.analysis.answer import along_axes, decision, next_run, parts, use
from lorax.analysis.answer.candidates import Field, fields, plain
from lorax.analysis.answer.decision import Rule
from lorax.analysis.answer.words import lines, listed
from lorax.files import read_json, write_bytes

__all__ = ["answer", "as_json", "fields", "lines", "read", "write"]

#: Keys of the shown setting that stand at the top of the answer.
SHOWN = ("setting", "words", "trainable_params", "value", "interval", "gain", "members")


def answer(run: runs.Run) -> dict[str, Any]:
    """The answer of a run, of values that JSON has; docs/reports.md lists its keys.

    Where members can't be compared (another base, task or number of training examples), "setting"
    is None and "conditions" has an answer for each condition. Raises ValueError for a metric
    (`config.analysis.metric`) that the run has not measured.
    """
    asked = run.config.get("config", {}).get("analysis") or {}
    rule = Rule(asked.get("delta", compare.SHARE), asked.get("margin"), asked.get("level", 0.95))
    found = [_of_field(field, rule) for field in fields(run, asked.get("metric") or "loss")]
    if len(found) == 1:
        return found[0]
    differ = listed(found[0]["condition"])
    why = f"settings that differ in {differ} can't be compared, so each has its own answer"
    return {"setting": None, "verdict": "conditions", "why": why, "conditions": found}


def write(run: runs.Run) -> dict[str, Any]:
    """`answer` of a run, written to its analysis/answer.json."""
    found = answer(run)
    write_bytes(rundir.answer(run.directory), as_json(found))
    return found


def as_json(found: dict[str, Any]) -> bytes:
    """An answer as analysis/answer.json holds it: axes stay in their order."""
    return (json.dumps(found, indent=2, allow_nan=False) + "\n").encode()


def read(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The answer that a run directory holds; None if there is none."""
    file = rundir.answer(pathlib.Path(directory))
    return read_json(file) if file.exists() else None


def _of_field(field: Field, rule: Rule) -> dict[str, Any]:
    """The answer of one condition."""
    found = {
        "condition": plain(field.condition, field.condition),
        "metric": field.metric.name,
        "unit": field.metric.unit,
        "higher_is_better": field.metric.sign < 0,
        "split": field.metric.split,
        "finished": field.run.status.get("state") not in rundir.UNFINISHED,
        "axes": {"compared": list(field.sizes), "at_its_best": list(field.tuned)},
        "seeds": len(field.seeds),
        "rows": len(field.weights) if len(field.weights) > 1 else None,
        "excluded": parts.excluded(field),
        "diverged": parts.diverged(field),
    }
    if not field.candidates["eligible"].any():
        why = "no setting has been measured with all its seeds"
        return found | {"setting": None, "verdict": "nothing measured", "why": why}
    draws = decision.bootstraps(field, rule.level)
    choice = decision.choose(field, draws, rule)
    shown = choice.best if choice.chosen is None else choice.chosen
    rows = [parts.candidate(field, draws, choice, n) for n in range(len(field.candidates))]
    numeric = [axis for axis in field.axes if along_axes.numeric(field, axis)]
    effects = (along_axes.main_effect(field, draws, axis) for axis in field.axes)
    found |= {
        "verdict": choice.verdict,
        "why": choice.why,
        "delta": choice.delta,
        **{name: rows[shown][name] for name in SHOWN},
        "baseline": parts.baseline(field, draws),
        "best": rows[choice.best],
        "chosen": None if choice.chosen is None else rows[choice.chosen],
        "settings": rows,
        "undecided": decision.undecided(field, choice, rule),
        "full": parts.full(field, draws, shown),
        "neighbours": [parts.neighbours(field, draws, axis, shown) for axis in numeric],
        "edges": [parts.edge(field, draws, choice, axis) for axis in numeric],
        "effects": [effect for effect in effects if effect is not None],
        "scale_spread": parts.scale_spread(field),
        "adapters": parts.adapters(field, shown),
    }
    found["next"] = next_run.proposal(field, found)
    return found | {"commands": use.commands(field.run, found["adapters"])}
