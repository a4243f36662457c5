"""The section on what was run: the base, the task, the axes, the commands."""

import pandas as pd

from lorax.analysis import runs
from lorax.report import page, words
from lorax.report.page import Section


def facts(run: runs.Run, table: pd.DataFrame, by: runs.Axes, redraw: str) -> Section:
    """What was run: base, task, axes, device, versions, and the command that repeats it. redraw:
    the command that redraws the page."""
    config = run.config.get("config", {})
    task = words.task(config)
    seeds = table["seed"].nunique()
    steps = run.status.get("steps", table["final_step"].max())
    varied = "; ".join(f"{words.axis(name)}: {words.listed(table[name])}" for name in by.names)
    targets = words.listed(table["targets"]) if "targets" in table else ""
    methods = words.listed(table["method"])
    base = config.get("base") or "an unnamed base"
    lead = (
        f"{len(table)} member{words.plural(len(table))} ({methods}) of {base}, trained on "
        f"{task or 'an unnamed task'} for {steps} steps with {seeds} seed{words.plural(seeds)}"
        + (f", over {varied}." if varied else ", all with the same setting.")
    )
    command = run.config.get("command")
    command = " ".join(command) if isinstance(command, list) else command
    versions = run.config.get("versions") or {}
    known = {
        "Base": config.get("base"),
        "Base weights (sha256)": run.config.get("base_sha256"),
        "Task": task,
        "Targets": targets,
        "Steps": steps,
        "Members": f"{len(table)} ({(table['status'] == 'finished').sum()} finished, "
        f"{(table['status'] == 'diverged').sum()} diverged{_stopped(table)})",
        "Tuned": "; ".join(f"{words.axis(n)}: {words.listed(table[n])}" for n in by.tuned),
        "Seeds": words.listed(table["seed"]),
        "Device": run.config.get("device"),
        "Wall time": words.duration(run.status.get("wall_seconds")),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Git revision": run.config.get("git"),
        "Command": command,
        "Redraw this page": redraw,
        "Resolved config": page.Link("config.json", "config.json"),
    }
    code, commands = ("Git revision", "Base weights (sha256)"), ("Command", "Redraw this page")
    return Section("What was run", page.paragraph(lead) + page.facts(known, code, commands))


def _stopped(table: pd.DataFrame) -> str:
    """ ", 9 stopped in favour of better values"; "" if none were."""
    count = (table["status"] == "stopped").sum()
    return f", {count} stopped in favour of better values" if count else ""
