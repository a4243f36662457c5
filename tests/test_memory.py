"""What memory is left, by whoever limits it."""

import pytest

from lorax import memory

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(files) -> `free` of a machine with 8 GB free and files {path: content}."""
    monkeypatch.setattr(
        memory.resource, "getrlimit", lambda _: (memory.resource.RLIM_INFINITY,) * 2
    )

    def free(files):
        files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GB // 1024} kB\n"} | files
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(str(content))
        found = memory.free(tmp_path)
        return round(found.bytes / GB, 2), found.limit

    return free


def test_without_a_limit_it_is_what_the_machine_has(machine):
    assert machine({}) == (8, "are free")
    assert machine({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})[0] == 8


@pytest.mark.parametrize("where", ["", "job/"])
def test_a_container_of_version_2(machine, where):
    group = "sys/fs/cgroup/" + where
    found = machine(
        {
            "proc/self/cgroup": "0::/job/step\n",
            group + "memory.max": 3 * GB,
            group + "memory.current": 2 * GB,
            group + "memory.stat": f"anon 1\ninactive_file {GB}\n",  # given back when it is wanted
        }
    )
    assert found == (2, "are left by the container's limit (cgroup)")


def test_a_container_of_version_1(machine):
    group = "sys/fs/cgroup/memory/job/"
    found = machine(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n",
            group + "memory.limit_in_bytes": 4 * GB,
            group + "memory.usage_in_bytes": 3 * GB,
            group + "memory.stat": "total_inactive_file 0\n",
        }
    )
    assert found == (1, "are left by the container's limit (cgroup)")


def test_the_process_own_limit(machine, monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (5 * GB, -1))
    found = machine({"proc/self/status": f"Name: x\nVmSize:\t{2 * GB // 1024} kB\n"})
    assert found == (3, "are left by ulimit -v")
    assert machine({"proc/self/status": f"VmSize:\t{6 * GB // 1024} kB\n"})[0] == 0


def test_this_machine_has_some():
    assert memory.free().bytes > 0
