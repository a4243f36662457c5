"""The report of one run, written into its directory."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from threadpoolctl import threadpool_limits

from lorax.analysis import calibration, runs, settings_compared, tables
from lorax.report import notes, page, selection
from lorax.report.bases import Kernels
from lorax.report.page import Section
from lorax.report.pages import dimension
from lorax.report.sections import (
    base_weights,
    citation,
    evidence,
    forgetting,
    losses,
    members,
    outcome,
    samples,
    setup,
    several_axes,
    shared_directions,
    spectra,
    texts,
    training,
    user_statistics,
)
from lorax.report.sections.outcome import Sweep

LEAD = "Low-rank adaptation: what was learned, and in how many directions."
NO_UPDATES = "the report of a search for the intrinsic dimension shows no updates; leave it out"


def write(
    run_directory: str | os.PathLike,
    base_kernels: Kernels | None = None,
    no_kernels: str = "the base model's kernels were not given",
    layers: int | None = None,
    base: str | None = None,
    also: Sequence[str] = (),
    share: pathlib.Path | None = None,
    answer: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Analyse a run directory and write its report. Returns the path of report.html.

    Args:
      run_directory: see `lorax.analysis.runs`; the run need not be finished.
      base_kernels: frozen kernels (in, out) by path ("h/0/attn/q"), for the amplification table.
      no_kernels: why there are none; the page shows this reason instead.
      layers: in how many layers, evenly spaced, the updates are compared with the base; by default
        the config's analysis.layers, whose default is all.
      base: the value of --base, if the kernels are not from the run's config; for the command that
        redraws the page.
      also: statistics of every update, each as "FILE.py:function". For statistics that only the
        run's config names (analysis.also), the page shows the numbers stored in analysis/.
      share: write the page as one file here instead (`lorax.report.page.save`).
      answer: the run's answer (`lorax.analysis.answer`), if it has just been computed.

    A section that fails is replaced by its error (`lorax.report.page.save`). Raises what
    `lorax.analysis.runs.load` raises.
    """
    # The matrices are many and small, so BLAS threads would only wait for each other.
    with threadpool_limits(1, user_api="blas"):
        run = runs.load(run_directory)
        statistics = tables.read_statistics(also)
        if dimension.is_search(run):
            if also:
                raise ValueError(f"analysis.also: {NO_UPDATES}")
            return dimension.write(run, base, share)
        command = page.command([run.directory], base=base, layers=layers, also=also)
        analysis = run.config.get("config", {}).get("analysis") or {}
        layers = analysis.get("layers") if layers is None else layers
        arguments = (base_kernels, no_kernels, layers, command, statistics)
        found, first = outcome.answered(run, answer)
        make = lambda: of_sweep(outcome.read(run, found), first, *arguments)
        sections = page.attempt("What was run", make)
        name = run.directory.resolve().name
        return page.save(run.directory, name, LEAD, sections, command, share)


def of_sweep(
    of: Sweep,
    first: list[Section],
    kernels: Kernels | None,
    no_kernels: str,
    layers: int | None,
    command: str,
    statistics: Sequence[tables.Statistic] = (),
) -> list[Section]:
    """All sections on a sweep, in their order. first: the answer. command: redraws the page. The
    other arguments are those of `write`."""
    run, table, by, attempt = of.run, of.table, of.by, page.attempt
    updates, svds, missing, failed = {}, {}, {}, []
    sigmas, ranks = pd.DataFrame(), pd.DataFrame()
    try:
        usable = table[~table["status"].isin(runs.WITHOUT_RESULT)]
        updates, missing = tables.updates(run, usable.index)
        svds = tables.update_svds(updates)  # once, for all sections
        sigmas, ranks = tables.spectra(updates, svds)
    except Exception as error:
        updates, failed = {}, [Section("Updates", "", error=error)]

    planted = attempt("Calibration", evidence.planted, run, table, sigmas, ranks)
    facts = attempt("What was run", setup.facts, run, table, by, command)
    settings = {"settings.csv": of.settings.drop(columns="line")}
    facts[0] = facts[0]._replace(files=settings)
    listed = attempt("Members", members.members, run, table, by, of.scores)
    by_adapters = outcome.axes_of_adapters(of)
    curves = attempt("Learning curves", losses.learning, run, table, by_adapters)
    # Losses of several planted tasks can't be compared.
    if planted and len(calibration.tasks(table)) > 1:
        return [*planted, *facts, *listed, *curves]
    listed += attempt("All members", several_axes.parallel, of)
    sections = [
        *first,
        *facts,
        *attempt("Loss", losses.curve, of),
        *attempt("Loss by two axes", several_axes.maps, of),
        *attempt("Loss against parameters", several_axes.sizes, of),
        *attempt("Methods", losses.methods, of, ranks),
        *attempt(forgetting.TITLE, forgetting.section, run, table),
        *attempt("Which matrices matter", evidence.evidence, run, table),
        *planted,
        *listed,
        *curves,
        *attempt(texts.TITLE, texts.texts, run, table),
        *attempt(samples.TITLE, samples.samples, run, table, by),
        *failed,
    ]
    if updates:
        arguments = (of, updates, svds, sigmas, ranks, kernels, no_kernels, layers, statistics)
        sections += attempt("Updates", _of_updates, *arguments)
    if missing:
        items = [f"{table['name'][member]}: {why}" for member, why in missing.items()]
        lead = "<p>Members whose update can't be analysed:</p>"
        sections.append(Section("Not analysed", lead + page.listing(items)))
    sections.append(notes.section(notes.LOSSES, notes.UPDATES))
    return sections + attempt("Cite this run", citation.citation, run)


def _of_updates(
    of: Sweep,
    updates: dict,
    svds: dict,
    sigmas: pd.DataFrame,
    ranks: pd.DataFrame,
    kernels,
    why: str,
    layers: int | None,
    statistics: Sequence[tables.Statistic],
) -> list[Section]:
    """Sections on what was learned. Beside adapters, full fine-tuning is not shown."""
    of, sections = outcome.without_full(of), []
    updates, main = (
        {member: updates[member] for member in updates if member in of.table.index},
        of.main,
    )
    sigmas, ranks = (rows[rows["member"].isin(of.table.index)] for rows in (sigmas, ranks))
    shown = of.table.loc[_shown(of, updates)]
    if kernels is not None and (of.run.config.get("config", {}).get("sweep") or {}).get("base"):
        kernels, why = None, "the members of this sweep do not share a base model"
    measured = user_statistics.of_run(of.run, updates, statistics, kernels, why)
    if len(shown):
        first = runs.fields(shown.iloc[0], of.by.others)
        where = first if of.best is None else of.best["line"]
        where = "each method's best setting" if main == "method" else where
        labelled = [selection.label(rows, shown, main) for rows in (sigmas, ranks)]
        title = "Spectra of the updates"
        sections += page.attempt(title, spectra.spectra, labelled[0], main, where)
        sections[0] = sections[0]._replace(files={"spectra.csv": sigmas, "ranks.csv": ranks})
        also = user_statistics.headings(measured, main)
        sections += page.attempt("Effective rank", spectra.ranks, labelled[1], main, also)
        sections += user_statistics.sections(measured, shown, main, statistics)
    sections += page.attempt("Subspace similarity", _similarity, of, updates, svds, shown)
    arguments = (updates, kernels, why, shown, main, layers, svds)
    sections += page.attempt(base_weights.TITLE, base_weights.sections, *arguments)
    title = "During training"
    return sections + page.attempt(title, training.sections, of.run, shown, main)


def _similarity(of: Sweep, members: dict, svds: dict, shown: pd.DataFrame) -> Section:
    """The directions that updates of several members share."""
    main, axes = of.main, of.by.names
    of_sweep = shared_directions.of_sweep
    comparisons = [] if main == "method" else of_sweep(shown, members, axes, svds)
    absent = shared_directions.absent_of_sweep(comparisons, main, of.table, shown)
    return shared_directions.section(comparisons, absent)


def _shown(of: Sweep, members: Iterable[int]) -> list[int]:
    """The members that figures of updates show: those that differ from the best setting only in
    the main axis and the seed, or each method's best."""
    if of.main == "method":
        best = settings_compared.best_of_methods(of.settings)
        of_best = [
            settings_compared.of_setting(of.table, setting, of.by) for _, setting in best.iterrows()
        ]
        return [member for member in members if any(same[member] for same in of_best)]
    # If nothing has been evaluated, there is no best setting: take the first member's.
    best = of.table.loc[min(members)] if of.best is None else of.best
    table = of.table.loc[sorted(set(members) & set(runs.averaged(of.table, of.by)))]
    return list(table.index[runs.alike(table, best, of.by.others)])
