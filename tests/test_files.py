import errno
import re
import resource

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax import files


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes('\ufeff{"a": "é"}'.encode())
    assert files.read_text(file) == '{"a": "é"}'
    assert files.read_json(file) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": "\xe9"}', ":2: bad byte 0xe9; expected UTF-8"),
        (b'{\n"a" 1}', ":2: not JSON (Expecting ':' delimiter at character 5)"),
        (b"[" * 200_000, ":1: JSON nested too deep to be read"),
        (b'{"a": ' + b"9" * 5_000 + b"}", ":1: a number with too many digits to be read"),
        (b'{"a": "\\ud83d"}', ":1: \\ud83d is half of a character; expected both halves"),
        (b"[1]", ": a JSON object is expected, not a list"),
    ],
)
def test_json_from_outside_is_refused_by_file_and_line(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{file}{message}")):
        files.read_json(file)


def test_both_halves_of_a_character_are_one():
    assert files.parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"


def test_a_pointer_of_git_lfs_is_told_from_the_file_itself(tmp_path):
    pointer, real = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    real.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert "git lfs pull" in files.pointer_hint(pointer) and not files.pointer_hint(real)


def test_a_full_disk_is_the_systems_error_in_whatever_words(tmp_path):
    """safetensors has an exception of its own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            arrays = {"a": np.zeros(10_000, np.float32)}
            files.atomically(tmp_path / "x", lambda file: save_file(arrays, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())
