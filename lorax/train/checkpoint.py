"""Checkpoints that are complete or refused: orbax writes them, a manifest of hashes seals them."""

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from lorax import hosts, tree
from lorax.errors import of_machine
from lorax.files import read_json, write_json

KEEP = 2
MANIFEST = "manifest.json"


def save(directory: Path, step: int, state, meta: dict) -> None:
    """Write `directory/<step>` and keep the last two.

    state: a tree of arrays. meta: JSON, e.g. the size of metrics.jsonl so far. The folder gets its
    final name only once all files and their SHA-256 hashes are written. Of a program's processes
    (`lorax.hosts`) each writes the shards that it has, and the first one the rest.
    Raises OSError (a full disk); earlier checkpoints are then untouched, and this one is removed
    completely.
    """
    partial, target = directory / f".{step}.partial", directory / str(step)
    try:
        if hosts.first():
            _make_room(partial, target, state)
        hosts.meet(f"{target} begins")
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = state if hosts.are_many() else jax.device_get(state)
            checkpointer.save(partial.absolute() / "state", arrays)
        if hosts.first():
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
    for old in steps(directory)[:-KEEP] if hosts.first() else ():
        shutil.rmtree(directory / str(old), ignore_errors=True)


def _make_room(partial: Path, target: Path, state) -> None:
    """Remove what an earlier attempt has left. Raises OSError if the disk is too full."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(partial.parent).free
    if tree.nbytes(state) > free:  # orbax would report it in 200 lines
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, intact or not, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def restore(directory: Path, like, warn) -> tuple[int, object, dict] | None:
    """(step, state, meta) of the newest intact checkpoint, or None without any.

    like: a tree of arrays or `jax.ShapeDtypeStruct` with the state's structure; with several
    processes their shardings say which of them reads what, whatever the processes and shardings
    were that wrote it. If so many members as `like` has were not stored (their axis is filled up to
    a multiple of the devices), the state has as many as were, on every process. warn: called with
    one line for every checkpoint that is skipped because it is incomplete or corrupt.
    """
    step = hosts.of_first(_newest, directory, warn)
    if step is None:
        return None
    path = directory / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = path.absolute() / "state"
        if hosts.are_many():
            like = _as_stored(like, checkpointer.metadata(stored).item_metadata.tree)
        else:  # NumPy arrays, also of shards that several processes have written
            like = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like)
        state = checkpointer.restore(stored, like)
    return step, state, hosts.of_first(read_json, path / MANIFEST)["meta"]


def _newest(directory: Path, warn) -> int | None:
    """The step of the newest intact checkpoint."""
    for step in reversed(steps(directory)):
        path = directory / str(step)
        fault = _fault(path)
        if not fault:
            return step
        warn(f"checkpoint {path} is not whole ({fault}); using the one before it")
    return None


def _as_stored(like, metadata):
    """The tree `like` for so many members as a checkpoint has: whole on every device, if `like`
    has another number."""
    members = jax.tree.leaves(metadata, is_leaf=lambda x: hasattr(x, "shape"))[0].shape[0]
    if members == jax.tree.leaves(like)[0].shape[0]:
        return like

    def stored(x):
        whole = NamedSharding(x.sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((members, *x.shape[1:]), x.dtype, sharding=whole)

    return jax.tree.map(stored, like)


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
