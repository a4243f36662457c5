"""Checkpoints that are complete or refused: orbax writes them, a manifest of hashes seals them."""

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from lorax import tree
from lorax.errors import of_machine
from lorax.files import read_json, write_json

KEEP = 2
MANIFEST = "manifest.json"


def save(directory: Path, step: int, state, meta: dict) -> None:
    """Write `directory/<step>` and keep the last two.

    state: a tree of arrays. meta: JSON, e.g. the size of metrics.jsonl so far. The folder gets its
    final name only once all files and their SHA-256 hashes are written.
    Raises OSError (a full disk); earlier checkpoints are then untouched, and this one is removed
    completely.
    """
    directory.mkdir(parents=True, exist_ok=True)
    partial, target = directory / f".{step}.partial", directory / str(step)
    shutil.rmtree(partial, ignore_errors=True)
    if tree.nbytes(state) > shutil.disk_usage(directory).free:  # orbax would report it in 200 lines
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial.absolute() / "state", jax.device_get(state))
        manifest = {"step": step, "meta": meta, "sha256": _hashes(partial)}
        write_json(partial / MANIFEST, manifest | {"seal": _seal(manifest)})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except Exception as error:  # orbax wraps system errors in a ValueError or others
        shutil.rmtree(partial, ignore_errors=True)
        cause = of_machine(error)
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(target)) from error
        raise
    for old in steps(directory)[:-KEEP]:
        shutil.rmtree(directory / str(old), ignore_errors=True)


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, intact or not, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def restore(directory: Path, like, warn) -> tuple[int, object, dict] | None:
    """(step, state, meta) of the newest intact checkpoint, or None without any.

    like: a tree of arrays or `jax.ShapeDtypeStruct` with the state's structure. warn: called with
    one line for every checkpoint that is skipped because it is incomplete or corrupt.
    """
    for step in reversed(steps(directory)):
        path = directory / str(step)
        fault = _fault(path)
        if fault:
            warn(f"checkpoint {path} is not whole ({fault}); using the one before it")
            continue
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(path.absolute() / "state", like)
        return step, state, read_json(path / MANIFEST)["meta"]
    return None


def _fault(path: Path) -> str | None:
    if not (path / MANIFEST).exists():
        return f"no {MANIFEST}"
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError:
        return f"{MANIFEST} is damaged"
    if manifest.pop("seal", None) != _seal(manifest):
        return f"{MANIFEST} has changed"
    expected, actual = manifest["sha256"], _hashes(path)
    actual.pop(MANIFEST, None)
    for name in expected:
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != expected[name]:
            return f"{name} has changed"
    return None


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hashes(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# Orbax logs every save at INFO and some of its defaults at WARNING; neither is of interest here.
# `save` reports failed writes.
logging.getLogger("absl").setLevel(logging.CRITICAL)
