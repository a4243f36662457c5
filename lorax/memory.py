"""How much memory this process may still take: the least of what the machine, the container that it
runs in (cgroup) and its own limit (`ulimit -v`) leave it."""

import resource
from pathlib import Path
from typing import NamedTuple


class Free(NamedTuple):
    """bytes: that may still be taken. limit: whose limit that is, e.g. "are free"."""

    bytes: int
    limit: str


def free(root: str = "/") -> Free:
    """What is left. root: where proc/ and sys/ lie."""
    root = Path(root)
    found = [Free(_field(root / "proc/meminfo", "MemAvailable:") * 1024, "are free")]
    for folder, limit, used, idle in _groups(root):
        most = _number(folder / limit)
        if most is not None:
            # The cache of files counts as used, and is given back when it is wanted.
            taken = (_number(folder / used) or 0) - _field(folder / "memory.stat", idle)
            found.append(Free(max(most - taken, 0), "are left by the container's limit (cgroup)"))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        taken = _field(root / "proc/self/status", "VmSize:") * 1024
        found.append(Free(max(most - taken, 0), "are left by ulimit -v"))
    return min(found)


def check() -> None:
    """Raises MemoryError where there is no room for JAX itself, which would end the process without
    a word that says so. Measured on two cores: more cores have more threads."""
    there = free()
    needs = 2.2e9 if "ulimit" in there.limit else 0.6e9  # of addresses, or of memory
    if there.bytes < needs:
        raise MemoryError(
            f"JAX and its kin need at least {needs / 1e9:.1f} GB and {there.bytes / 1e9:.1f} GB "
            f"{there.limit}"
        )


def _groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """(folder, names of its limit and use, and in memory.stat of its cache) of the process' own
    group and those around it, of cgroups of version 1 and 2."""
    found = []
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
        own = top / path.strip("/")
        found += [(folder, *names) for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _field(file: Path, name: str) -> int:
    """The number behind a name in a file of lines "name number"; 0 where there is none."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)
