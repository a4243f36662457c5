"""The first section on a sweep: its answer, how sure it is, and what to do with it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from lorax.analysis import answer, runs
from lorax.analysis.answer import words as said
from lorax.report import page
from lorax.report.page import Section

TITLE = "Answer"


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


def read(run: runs.Run, found: Mapping[str, Any] | None = None) -> Sweep:
    """The tables that the sections of a run are made from. found: its answer
    (`lorax.analysis.answer`); without one, or with several, the best setting is marked."""
    table = runs.summary(run)
    by, scores = runs.axes(run, table), runs.scores(run)
    settings = runs.settings(table, by, scores)
    best = runs.best_setting(settings)
    base = float(table["base_loss"].mean()) if runs.agree(table["base_loss"]) else float("nan")
    members = (found or {}).get("members") or []
    chosen = best
    if members:
        first = table.loc[members[0]]
        chosen = settings[runs.alike(settings, first, by.names or ("rank",))].iloc[0]
    return Sweep(run, table, by, scores, settings, best, chosen, base)


def axes_of_adapters(sweep: Sweep) -> runs.Axes:
    """The axes of the members without those of full fine-tuning, which stand beside the sweep; of
    all members if nothing else differs then."""
    table = sweep.table[sweep.table["method"] != "full"]
    if not 0 < len(table) < len(sweep.table):
        return sweep.by
    by = runs.axes(sweep.run, table)
    return sweep.by if by.main is None else by


def without_full(sweep: Sweep) -> Sweep:
    """The sweep of the members that `axes_of_adapters` are for."""
    by = axes_of_adapters(sweep)
    if by is sweep.by:
        return sweep
    table = sweep.table[sweep.table["method"] != "full"]
    settings = runs.settings(table, by, sweep.scores)
    best = runs.best_setting(settings)
    return sweep._replace(table=table, by=by, settings=settings, best=best)


def answered(
    run: runs.Run, found: dict[str, Any] | None = None
) -> tuple[dict[str, Any] | None, list[Section]]:
    """(the answer of a run, its section with analysis/answer.json); (None, a section with the
    error) if that failed. found: the answer, if already computed."""
    try:
        found = answer.answer(run) if found is None else found
        files = {"answer.json": answer.as_json(found)}
        return found, [section(found)._replace(files=files)]
    except Exception as error:  # show the rest of the page
        return None, [Section(TITLE, "", error=error)]


def section(found: Mapping[str, Any]) -> Section:
    """The section on an answer, from what analysis/answer.json holds."""
    if "conditions" not in found:
        return Section(TITLE, _of_condition(found))
    parts = [page.paragraph(f"{found['why'][0].upper()}{found['why'][1:]}.")]
    for one in found["conditions"]:
        parts.append(f"<h3>{page.escape(said.in_words(one['condition']))}</h3>")
        parts.append(_of_condition(one))
    return Section(TITLE, "".join(parts))


def _of_condition(found: Mapping[str, Any]) -> str:
    """The answer for members that can be compared."""
    first, *more = said.sentences(found)
    text = f"<p><strong>{page.escape(first)}</strong></p>"
    text += page.paragraph(" ".join(more)) if more else ""
    text += "".join(map(page.paragraph, answer.lines(found)[1:2]))
    parts = [f'<div class="answer">{text}</div>', *map(page.note, caveats(found))]
    if found["setting"] is None:
        return "".join(parts)
    return "".join([*parts, _settings(found), _effects(found), _next(found), _use(found)])


def caveats(found: Mapping[str, Any]) -> list[str]:
    """What the answer can't say, or leaves out."""
    notes = []
    if not found["finished"]:
        notes.append("This run is not finished, so all numbers are provisional.")
    if found["diverged"]:
        notes.append(f"Diverged: {', '.join(found['diverged'])}. Their settings are not eligible.")
    short = [row for row in found["excluded"] if "seeds" in row["why"]]
    if short:
        listed = "; ".join(f"{row['words']}: {row['why']}" for row in short)
        notes.append(f"Not eligible, because seeds are missing: {listed}.")
    if found["setting"] is None:
        return notes
    if found["split"] == "eval":
        notes.append(
            "This run has no test rows: the numbers are from the evaluation rows, on which the "
            "best values were chosen as well, so they are slightly optimistic."
        )
    if not found["baseline"]["same_for_all"] and found["baseline"]["value"] is not None:
        notes.append(
            "Members start from different losses before training; the gains are over the median."
        )
    if found["scale_spread"]:
        notes.append(
            f"The scale s of the update differs between ranks by up to a factor of "
            f"{found['scale_spread']:.4g}, so differences between ranks mix capacity with scale. "
            "To separate the two, tune the learning rate at every rank (sweep.tune), or set "
            "config.method.scaling to rslora (α/√r) or fixed (one s for all)."
        )
    return notes


def _settings(found: Mapping[str, Any]) -> str:
    """The settings that are compared."""
    level = f"{found['interval']['level']:.0%}"
    header = ["setting", "parameters", f"{said.called(found)} [{level}]"]
    header += [f"worse than the best by [{level}]", "verdict"]
    rows, classes = [], []
    for row in [*found["settings"], *filter(None, [_full_row(found)])]:
        reached = "–" if row["value"] is None else said.amount_of(row)
        behind = "–" if row["behind"] is None else said.with_interval(row["behind"])
        rows.append([row["words"], row["trainable_params"], reached, behind, row["verdict"]])
        classes.append("chosen" if row["setting"] == found["setting"] else "")
    rule = page.aid(f"The answer is {found['delta']['rule']}.")
    return rule + page.table(header, rows, "The settings that are compared.", classes=classes)


def _full_row(found: Mapping[str, Any]) -> dict[str, Any] | None:
    full = found["full"]
    if full is None:
        return None
    words = said.in_words(full["setting"])
    return full | {"words": words, "behind": None, "verdict": "for comparison"}


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return "–"
    return f"{found['low']:.4f} to {found['high']:.4f}"


def _effects(found: Mapping[str, Any]) -> str:
    """The main effect of each axis, if there are several."""
    effects = found["effects"]
    if len(found["axes"]["compared"] + found["axes"]["at_its_best"]) < 2 or not effects:
        return ""
    unit = f" ({found['unit']})" if found["unit"] else ""
    rows = []
    for effect in effects:
        means = zip(effect["values"], effect["means"], strict=True)
        averaged = f"{effect['settings']} settings of {said.listed(effect['averaged_over'])}"
        averaged += f"; {effect['left_out']} incomplete ones left out" * bool(effect["left_out"])
        rows.append(
            [effect["axis"], page.Fixed(effect["range"]["value"]), _interval(effect["range"])]
            + ["; ".join(f"{runs.in_words(v)}: {said.amount(x)}" for v, x in means), averaged]
        )
    header = ["axis", f"effect{unit}", "interval", f"mean {said.called(found)}", "averaged over"]
    caption = (
        "Main effects: the largest mean less the smallest. Each mean is over the settings of the "
        "other axes that were measured at every value of the axis."
    )
    return page.fold("Main effect of each axis", page.table(header, rows, caption))


def _next(found: Mapping[str, Any]) -> str:
    """What to run next."""
    proposed = found["next"]
    if not proposed["changes"]:
        return ""
    why = page.escape(proposed["why"])
    if proposed["command"] is None:
        return page.paragraph(answer.lines(found)[2])
    return f"<p>Run next ({why}):</p>{page.command_block(proposed['command'])}"


def _use(found: Mapping[str, Any]) -> str:
    """The adapters of the answer, and what to do with the first."""
    if not found["adapters"]:
        return ""
    link = lambda folder: f'<a href="{page.escape(folder)}/">{page.escape(folder)}</a>'
    links = ", ".join(map(link, found["adapters"]))
    titles = {
        "generate": "Complete a prompt",
        "merge": "Merge it into the base",
        "show": "Show its updates",
        "peft": "Load it with PEFT (Python)",
    }
    blocks = "".join(
        f"<p>{title}:</p>{page.command_block(found['commands'][name])}"
        for name, title in titles.items()
        if name in found["commands"]
    )
    best = "; the first has the lowest validation loss" * (len(found["adapters"]) > 1)
    text = f"<p>Adapters of {page.escape(found['words'])}{best}: {links}.</p>"
    return text + (page.fold("Use the adapter", blocks) if blocks else "")
