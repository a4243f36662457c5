"""The first section on a sweep: its answer, and how well the data support it."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.report import page, words
from lorax.report.page import Section


class Sweep(NamedTuple):
    """A run, and the tables of its losses."""

    run: runs.Run
    table: pd.DataFrame  # from `runs.summary`
    by: runs.Axes
    scores: list[str]
    settings: pd.DataFrame  # from `runs.settings`
    best: pd.Series | None  # the row of settings with the lowest mean
    chosen: pd.Series | None  # the row that is the answer
    base: float  # the base's eval loss; NaN if unknown, or if it differs between members

    @property
    def main(self) -> str:
        """The field on the x axis of its curve."""
        return self.by.main or "rank"


def read(run: runs.Run) -> Sweep:
    """The tables that the sections of a run are made from."""
    table = runs.summary(run)
    by, scores = runs.axes(run, table), runs.scores(run)
    settings = runs.settings(table, by, scores)
    best = runs.best_setting(settings)
    losses = table["base_loss"].dropna()
    same = len(losses) > 0 and np.ptp(losses) <= 1e-3 * losses.abs().max()
    base = float(losses.mean()) if same else float("nan")
    return Sweep(run, table, by, scores, settings, best, best, base)


def answer(sweep: Sweep) -> Section:
    """The result in a sentence, how well the data support it, and its caveats: diverged members, an
    unfinished run, a scale that differs between ranks."""
    run, table, by, settings, base = sweep.run, sweep.table, sweep.by, sweep.settings, sweep.base
    headline = page.escape(_headline(by, sweep.best, base))
    parts = [f'<div class="answer"><p><strong>{headline}</strong></p>']
    if sweep.best is not None:
        parts.append(f"<p>{page.escape(_strength(by, settings, sweep.best))}</p>")
    parts.append("</div>")
    if run.status.get("state") in rundir.UNFINISHED:
        parts.append(page.note("This run is not finished, so all numbers are provisional."))
    diverged = table[table["status"] == "diverged"]
    if len(diverged):
        names = ", ".join(
            f"{m['name']}{words.at_step(m['diverged_at'])}" for _, m in diverged.iterrows()
        )
        parts.append(page.note(f"Diverged, and excluded from every mean and analysis: {names}."))
    parts.append(_scale_note(by, settings))
    if np.isnan(base) and table["base_loss"].notna().any():
        text = "The base's loss before training differs between members, so it is not drawn."
        parts.append(page.note(text))
    return Section("Answer", "".join(parts))


def _headline(by: runs.Axes, best: pd.Series | None, base: float) -> str:
    if best is None:
        return "No setting has a final eval loss for all its seeds yet."
    unadapted = f"; base {base:.3f}" if np.isfinite(base) else ""
    if by.main is None:
        return f"One setting: final eval loss {words.mean(best)}{unadapted}."
    which = f"Lowest final eval loss at {words.setting(best, by)}"
    return f"{which}: {words.mean(best)}{unadapted}."


def _strength(by: runs.Axes, settings: pd.DataFrame, best: pd.Series) -> str:
    n = int(best["n"])
    if n < 2:
        return "One seed, so there is no error bar. Sweep over seeds to find out."
    text = f"± is the standard error of the mean over n = {n} seeds"
    text += f"; with {n} values it is only a rough estimate" * (n < 4) + "."
    if by.main == "rank" and best["rank"] == settings["rank"].max() and len(settings) > 1:
        text += " The best rank is the largest one tried; a larger one may do better."
    if by.others:
        text += (
            " The best setting was chosen on the same eval set, so its loss is slightly optimistic."
        )
    return text


def _scale_note(by: runs.Axes, settings: pd.DataFrame) -> str:
    scales = settings["scale"].dropna()
    if by.main != "rank" or not len(scales) or (scales <= 0).any():
        return ""
    spread = max(
        (rows["scale"].max() / rows["scale"].min() for _, rows in settings.groupby("line")),
        default=1.0,
    )
    if spread < 1 + 1e-6:
        return ""
    text = (
        f"The scale s of the update differs between ranks by up to a factor of {spread:.4g}, so "
        "differences between ranks mix capacity with scale. To separate the two, set "
        "<code>--config.method.scaling=fixed</code> (one s for all) or <code>rslora</code> (α/√r), "
        "sweep over <code>scaling</code>, or sweep the learning rate at every rank."
    )
    return f'<p class="note">{text}</p>'
