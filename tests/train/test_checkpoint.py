import errno
import itertools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import tree
from lorax.train import checkpoint


def state(x):
    return {"a": {"w": jnp.full((3, 4), x, jnp.float32)}, "n": (jnp.int32(x), jnp.arange(3))}


@pytest.fixture
def three(tmp_path):
    for step in (0, 10, 20):
        checkpoint.save(tmp_path, step, state(step), {"offset": step})
    return tmp_path


def restore(directory):
    said = []
    return checkpoint.restore(directory, tree.shapes(state(0)), said.append), said


def test_round_trip_is_exact_and_the_last_two_are_kept(three):
    assert checkpoint.steps(three) == [10, 20]
    (step, restored, meta), said = restore(three)
    assert step == 20 and meta == {"offset": 20} and not said
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state(20)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path / "absent") == (None, [])


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit": flip,
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found_named_and_passed_over(three, damage):
    for i in itertools.count():
        checkpoint.save(three, 20, state(20), {"offset": 20})
        written = files(three / "20")  # how many there are differs from one write to the next
        if i >= len(written):
            assert i >= 4
            break
        DAMAGE[damage](written[i])
        (step, restored, _), said = restore(three)
        assert step == 10 and len(said) == 1
        assert str(three / "20") in said[0] and "is not whole" in said[0]
        np.testing.assert_array_equal(restored["a"]["w"], state(10)["a"]["w"])


def test_a_write_that_fails_leaves_the_others(three, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(three, 30, state(30), {})
    assert checkpoint.steps(three) == [10, 20]
    assert restore(three)[0][0] == 20


def test_a_full_disk_is_the_systems_error_and_leaves_nothing(three, monkeypatch):
    """As the system says it, not with orbax's words: a run that stops so can be continued."""
    free = checkpoint.shutil.disk_usage(three)._replace(free=10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError) as caught:
        checkpoint.save(three, 30, state(30), {})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(three / "30")
    assert sorted(p.name for p in three.iterdir()) == ["10", "20"]


def test_a_write_that_the_system_refuses_under_way_is_the_systems_error(three):
    """Orbax raises a ValueError with kilobytes of its own settings."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            checkpoint.save(three, 30, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and len(str(caught.value)) < 200
    assert sorted(p.name for p in three.iterdir()) == ["10", "20"]
    assert restore(three)[0][0] == 20


def test_a_killed_write_is_invisible(three):
    (three / ".30.partial").mkdir()
    (three / ".30.partial" / "junk").write_bytes(b"half")
    assert restore(three)[0][0] == 20
    checkpoint.save(three, 30, state(30), {})
    assert checkpoint.steps(three) == [20, 30] and not (three / "30" / "junk").exists()
