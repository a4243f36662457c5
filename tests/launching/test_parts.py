"""The files of parts, and of rounds."""

import pytest

from lorax import config
from lorax.launching import parts


def settings():
    c = config.default()
    c.sweep.rank = (1, 2)
    c.sweep.targets = (("q", "v"), ("all-linear",))
    return c


def test_parts_and_rounds_are_read_as_they_were_written(tmp_path):
    members = config.members(settings())
    part = parts.Part((1, 3), 1, {"platform": "cpu", "devices": 2, "each": 2})
    here = parts.directory(tmp_path, 7)
    parts.write(here, part)
    assert parts.directories(tmp_path) == [here] and parts.run_of(here) == tmp_path
    assert parts.read(here) == part and not parts.is_done(here)
    lines = {0: parts.written(members, None)}
    assert parts.read_round(tmp_path, 1) is None
    common = parts.Round(lines, {0: 4}, {0: "ab"}, ("--config=x.py",), "/")
    parts.write_round(tmp_path, 1, common)
    again = parts.read_round(tmp_path, 1)
    assert again[1:] == common[1:] and list(again.groups) == [0]
    assert parts.members_of(settings(), again.groups[0]) == members


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "part.json").write_text('{"members": [1]}')
    with pytest.raises(ValueError, match="part.json: damaged; its keys should be members, round"):
        parts.read(tmp_path)
