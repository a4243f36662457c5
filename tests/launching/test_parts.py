"""The files of parts, and which part is tried again."""

from lorax import config, rundir
from lorax.launching import parts


def settings():
    c = config.default()
    c.sweep.rank = (1, 2)
    c.sweep.targets = (("q", "v"), ("all-linear",))
    return c


def test_a_part_is_read_as_it_was_written(tmp_path):
    members = config.members(settings())
    lines = {0: parts.written(members)}
    part = parts.Part((1, 3), 1, {"platform": "cpu", "devices": 2}, lines, ("--config=x.py",), "/")
    here = parts.directory(tmp_path, 7)
    parts.write(here, part)
    assert parts.directories(tmp_path) == [here] and parts.run_of(here) == tmp_path
    again = parts.read(here)
    assert again._replace(groups={}) == part._replace(groups={})
    assert parts.members_of(settings(), again.groups[0]) == members


def test_a_part_is_tried_again_as_long_as_it_gets_on(tmp_path):
    attempts = parts.Attempts(2)
    assert attempts.again(tmp_path) and not attempts.again(tmp_path)
    rundir.checkpoints(tmp_path, "0-0").joinpath("10").mkdir(parents=True)
    assert attempts.again(tmp_path) and not attempts.again(tmp_path)
