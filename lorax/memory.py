"""How much memory this process has, and how much it may still allocate: the smallest of what the
machine, the container (cgroup) and the process's own limit (`ulimit -v`) leave."""

import resource
from pathlib import Path
from typing import NamedTuple


class Free(NamedTuple):
    """bytes: how many may still be allocated. limit: a phrase that names the limit."""

    bytes: int
    limit: str


def free(root: str = "/") -> Free:
    """The memory that is left. root: the folder of proc/ and sys/."""
    root = Path(root)
    limits = [Free(_field(root / "proc/meminfo", "MemAvailable:") * 1024, "are free")]
    for folder, limit, used, idle in _groups(root):
        most = _number(folder / limit)
        if most is not None:
            # Cached files count as used, but are dropped when memory is needed.
            taken = (_number(folder / used) or 0) - _field(folder / "memory.stat", idle)
            limits.append(Free(max(most - taken, 0), "are left by the container's limit (cgroup)"))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        taken = _field(root / "proc/self/status", "VmSize:") * 1024
        limits.append(Free(max(most - taken, 0), "are left by ulimit -v"))
    return min(limits)


def check() -> None:
    """Raises MemoryError if JAX itself does not fit; JAX would end the process without a message.
    Measured on two cores; more cores start more threads."""
    left = free()
    needs = 2.2e9 if "ulimit" in left.limit else 0.6e9  # of addresses, or of memory
    if left.bytes < needs:
        raise MemoryError(
            f"JAX needs at least {needs / 1e9:.1f} GB and {left.bytes / 1e9:.1f} GB {left.limit}"
        )


def of_process(field: str) -> int:
    """Bytes of this process as Linux counts them: "VmRSS" now, "VmHWM" at the peak; 0 elsewhere."""
    return 1024 * _field(Path("/proc/self/status"), f"{field}:")


def _groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """(folder, file names of its limit and usage, name of its cache in memory.stat) of the
    process's cgroup and its parents, for versions 1 and 2."""
    groups = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):
            top = top / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif controllers:
            continue
        group = top / path.strip("/")
        folders = [f for f in (group, *group.parents) if f.is_relative_to(top)]
        groups += [(folder, *names) for folder in folders]
    return groups


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _field(file: Path, name: str) -> int:
    """The number after a name in a file of lines "name number"; 0 if there is none."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)
