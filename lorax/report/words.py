"""Settings, axes and amounts in words."""

from typing import Any

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.runs import is_missing
from lorax.report.page import show


def mean(row: pd.Series) -> str:
    """Mean and standard error of a setting (a row of `runs.settings`)."""
    spread = f" ± {row['se']:.3f}" if np.isfinite(row["se"]) else ""
    return f"{row['mean']:.3f}{spread}"


def setting(row: pd.Series, by: runs.Axes) -> str:
    """A setting as its values on the sweep's axes and of what was tuned: "r = 4 with alpha=8"."""
    main = by.main or "rank"
    value = "none" if cell(main, row[main]) is None else show(cell(main, row[main]))
    name = "r" if main == "rank" else axis(main)
    others = ", ".join(filter(None, [row["line"], runs.fields(row, by.tuned)]))
    return f"{name} = {value}" + (f" with {others}" if others else "")


def task(config: dict[str, Any]) -> str:
    """The name of a config's task; "" if it has none."""
    named = config.get("task", "")
    return named.get("name", "") if isinstance(named, dict) else named


def axis(name: str) -> str:
    """The name of a field in words."""
    return {"lr": "learning rate", "n_train": "training examples"}.get(name, name.replace("_", " "))


def cell(name: str, value: Any) -> Any:
    """A field's value for a table."""
    return runs.MISSING.get(name) if is_missing(value) else value


def listed(column: pd.Series) -> str:
    """The distinct values of a column of members, in order."""
    values = (cell(column.name, value) for value in column)
    return ", ".join(dict.fromkeys(show(value) for value in values if not is_missing(value)))


def status(member: pd.Series) -> str:
    """A member's status and, if it ended before the last step, where. member: of `runs.summary`."""
    end = {"diverged": "diverged_at", "stopped": "stopped_at"}.get(member["status"])
    return member["status"] + (at_step(member[end]) if end else "")


def at_step(step: Any) -> str:
    """ " at step 50"; "" for a missing step."""
    return "" if is_missing(step) else f" at step {int(step)}"


def duration(seconds: Any) -> str:
    """ "2 min 5 s", or hours and minutes from one hour on; "" for a missing value."""
    if is_missing(seconds):
        return ""
    minutes, seconds = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def plural(count: int) -> str:
    """The "s" after the name of `count` things."""
    return "" if count == 1 else "s"
