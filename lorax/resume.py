"""Whether a run directory may be continued with a config."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from lorax import config, rundir

#: Values in effect in runs that began before lorax had these keys; their config.json lacks them. A
#: key that is not listed had no effect then, as its default has now.
BEFORE = {"eval.test": 0, "eval.keep": "last"}

#: Defaults that a run's config.json may have where it would say None now, and means the same.
FORMER = {"train.b1": 0.9, "train.b2": 0.999, "train.eps": 1e-8}


def check_same_config(workdir: Path, settings: ConfigDict, launched: bool = False) -> list[str]:
    """The keys of `config.REVISABLE` in which the config differs from that of the directory's run.

    launched: whether workers are to train it (`lorax.launch`). Raises ValueError if the directory
    holds a run of another config or of the other command, or if new values of these keys can no
    longer take effect.
    """
    _check_command(workdir, launched)
    if not (workdir / rundir.CONFIG).exists():
        return []
    try:
        stored = rundir.read_config(workdir)["config"]
        older = worded_plainly(stored)
        older |= add_lacking(stored, json.loads(config.default().to_json()))
    except (ValueError, KeyError, AttributeError):
        file = workdir / rundir.CONFIG
        raise ValueError(f"workdir: {file} is damaged; delete {workdir} to start again") from None
    different = differences(stored, json.loads(settings.to_json()))
    others = [key for key in different if key not in config.REVISABLE]
    if others and set(others) <= older.keys() and rundir.has_begun(workdir):
        flags = " ".join(f"--config.{key}={older[key]}" for key in others)
        raise ValueError(
            f"workdir: {workdir} holds a run that began before lorax had {', '.join(others)}; "
            f"continue it with {flags}, or name another --workdir"
        )
    if others and rundir.has_begun(workdir):
        raise ValueError(
            f"workdir: {workdir} holds a run of another config (it differs in "
            f"{', '.join(others)}); name another --workdir or delete it"
        )
    kept = any((workdir / name).exists() for name in (rundir.CHECKPOINTS, rundir.PARTS))
    if different and rundir.has_finished(workdir) and not kept:
        raise ValueError(
            f"workdir: {workdir} holds a finished run with other {', '.join(different)}, and its "
            f"checkpoints are gone; name another --workdir"
        )
    return different


def _check_command(workdir: Path, launched: bool) -> None:
    """Raises ValueError if the run was begun by the other one of lorax.run and lorax.launch."""
    has_parts = (workdir / rundir.PARTS).exists()
    if rundir.has_finished(workdir) or has_parts == launched or not rundir.has_begun(workdir):
        return
    command = "lorax.launch" if has_parts else "lorax.run"
    raise ValueError(
        f"workdir: {workdir} holds a run that python -m {command} began; continue it with that, or "
        "name another --workdir"
    )


def worded_plainly(stored: dict) -> dict:
    """Mark that a run on conversations which began when lorax used no template of the base uses
    none; returns the key that was set, if any."""
    task = stored["task"]
    if task.get("name") != "instruct" or task.get("template") or "columns" in task:
        return {}
    task["template"] = "plain"
    return {"task.template": "plain"}


def add_lacking(stored: dict, default: dict, prefix: str = "") -> dict:
    """Add the keys of a default config that a stored one lacks to it, with the values of `BEFORE`
    or their defaults; returns those of `BEFORE` that were added."""
    added = {}
    for name, value in default.items():
        key = f"{prefix}.{name}".strip(".")
        if isinstance(value, dict) and isinstance(stored.setdefault(name, {}), dict):
            added |= add_lacking(stored[name], value, key)
        elif name not in stored:
            stored[name] = BEFORE.get(key, value)
            added |= {key: BEFORE[key]} if key in BEFORE else {}
    return added


def differences(old, new, prefix: str = "") -> list[str]:
    """The keys ("train.lr") in which two configs of config.json differ."""
    if isinstance(old, dict) or isinstance(new, dict):
        old, new = (side if isinstance(side, dict) else {} for side in (old, new))
        return [
            difference
            for key in sorted({*old, *new})
            for difference in differences(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))
        ]
    blank = (None, [])  # a key that one of the two does not have, and its default
    same = old == new or (old in blank and new in blank)
    return [] if same or (new is None and old == FORMER.get(prefix)) else [prefix]
