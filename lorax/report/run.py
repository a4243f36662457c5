"""The report of one run, into its own directory."""

import os
import pathlib

import pandas as pd
from threadpoolctl import threadpool_limits

from lorax.analysis import calibration, runs, updates
from lorax.report import against_base, notes, page, search, similarity, sweep
from lorax.report import updates as of_updates
from lorax.report.bases import Kernels
from lorax.report.page import Section
from lorax.report.sweep import Sweep

LEAD = "Low-rank adaptation: what was learned, and in how many directions."


def write(
    run_directory: str | os.PathLike,
    base_kernels: Kernels | None = None,
    no_kernels: str = "the base model's kernels were not given",
) -> pathlib.Path:
    """Analyse a run directory and write its report; the path of report.html.

    Args:
      run_directory: see `lorax.analysis.runs`; the run need not be finished.
      base_kernels: frozen kernels (in, out) by path ("h/0/attn/q"), for the amplification table.
      no_kernels: why there are none, said in their place.

    Raises what `lorax.analysis.runs.load` raises.
    """
    # The matrices are small and many: threads of the linear algebra only wait for each other.
    with threadpool_limits(1, user_api="blas"):
        run = runs.load(run_directory)
        if search.is_search(run):
            return search.write(run)
        sections = of_sweep(sweep.read(run), base_kernels, no_kernels)
        return page.save(run.directory, run.directory.resolve().name, LEAD, sections)


def of_sweep(of: Sweep, kernels: Kernels | None, no_kernels: str) -> list[Section]:
    """All sections on a sweep, in their order."""
    run, table, by = of.run, of.table, of.by
    usable = table[table["status"] != "diverged"]
    found, missing = updates.adapters(run, usable.index)
    dense = updates.deltas(run, missing)
    missing = {member: why for member, why in missing.items() if member not in dense}
    sigmas, ranks = updates.spectra(found, dense)

    planted = sweep.planted(run, table, sigmas, ranks)
    facts = sweep.facts(run, table, by)
    listed = [sweep.members(table, of.scores), sweep.learning(run, table, by.main)]
    settings = {"settings.csv": of.settings.drop(columns="line")}
    # Of several planted tasks no loss says anything of another.
    if planted and len(calibration.tasks(table)) > 1:
        return [*planted, facts._replace(files=settings), *listed]
    sections = [
        sweep.answer(of)._replace(files=settings),
        facts,
        sweep.curve(of),
        *sweep.methods(of, ranks),
        *sweep.evidence(run, table),
        *planted,
        *listed,
    ]
    if found:
        sections += _of_updates(of, found, sigmas, ranks, kernels, no_kernels)
    if missing:
        items = [f"{table['name'][member]}: {why}" for member, why in missing.items()]
        lead = "<p>Members without LoRA factors that could be read:</p>"
        sections.append(Section("Not analysed", lead + page.listing(items)))
    return [*sections, notes.section(notes.NOTES)]


def _of_updates(
    of: Sweep, found: dict, sigmas: pd.DataFrame, ranks: pd.DataFrame, kernels, no_kernels: str
) -> list[Section]:
    """Sections on what was learned."""
    main = of.main
    # What the figures show: the best setting's neighbours along the main axis.
    shown = of.table.loc[[m for m in found if _on_line(of.table.loc[m], of.answer, of.by)]]
    line = "" if of.answer is None else of.answer.best["line"]
    sections = []
    if len(shown):
        labelled = [of_updates.label(rows, shown, main) for rows in (sigmas, ranks)]
        sections.append(of_updates.spectra(labelled[0], main, line))
        sections.append(of_updates.ranks(labelled[1], main))
        sections[0] = sections[0]._replace(files={"spectra.csv": sigmas, "ranks.csv": ranks})
    comparisons = [] if main == "method" else similarity.of_sweep(shown, found)
    absent = similarity.absent_of_sweep(comparisons)
    sections.append(similarity.section(comparisons, absent))
    reason = no_kernels
    if kernels is not None and (of.run.config.get("config", {}).get("sweep") or {}).get("base"):
        kernels, reason = None, "the members of this sweep do not share a base model"
    if kernels is None:
        sections.append(Section("Amplification", page.paragraph(f"Not computed: {reason}.")))
        return sections
    try:
        sections.append(against_base.amplification(found, kernels, shown, main))
    except (KeyError, ValueError) as error:
        text = f"Not computed: the base's kernels do not fit the adapters: {error.args[0]}."
        sections.append(Section("Amplification", page.paragraph(text)))
    return sections


def _on_line(member: pd.Series, answer: runs.Answer | None, by: runs.Axes) -> bool:
    """Whether the member differs from the best setting in the main axis and the seed alone."""
    if answer is None:
        return True
    return all(_same(member[name], answer.best[name]) for name in by.others)


def _same(x, y) -> bool:
    return x == y or (pd.isna(x) and pd.isna(y))
