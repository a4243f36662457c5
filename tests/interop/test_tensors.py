"""Weights as they come in: what is no weight is refused by file and tensor."""

import io
import json
import os
import struct
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lorax.files import LFS
from lorax.interop import loralib, peft, tensors
from lorax.interop.tensors import read_npz, read_npz_weights, read_safetensors

FACTORS = {"q.lora_A": np.ones((2, 3), np.float32), "q.lora_B": np.ones((4, 2), np.float32)}


def safetensor(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """A safetensors file of one tensor "x", of a type that numpy may not have."""
    about = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"x": about}).encode()
    return len(header).to_bytes(8, "little") + header + data


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


# ---------------------------------------------------------------------------- numbers that are none


def with_one(value, dtype=np.float32):
    """FACTORS with one number replaced."""
    B = np.ones((4, 2), dtype)
    B[3, 1] = value
    return FACTORS | {"q.lora_B": B}


NONE = {
    "nan": (with_one(np.nan), "NaN or infinity in it"),
    "inf": (with_one(-np.inf), "NaN or infinity in it"),
    "half": (with_one(np.inf, np.float16), "NaN or infinity in it"),
    "double": (with_one(1e300, np.float64), r"1e\+300 in it is too large for float32"),
    "int32": (with_one(1, np.int32), "(int32|I32) given where weights belong"),
    "uint8": (with_one(1, np.uint8), "(uint8|U8) given where weights belong"),
    "bool": (with_one(1, bool), "(bool|BOOL) given where weights belong"),
    "complex": (with_one(1, np.complex64), "(complex64|C64) given where weights belong"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("name", NONE)
def test_numbers_that_are_none_are_named(tmp_path, name, suffix):
    tensors, words = NONE[name]
    file = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(file, **tensors)
    else:
        safetensors.numpy.save_file(tensors, file)
    for read in (reader(suffix), lambda file: loralib.load(file, 16)):
        with pytest.raises(ValueError, match=f"x{suffix}: q.lora_B: {words}"):
            read(file)


def reader(suffix):
    return read_npz_weights if suffix == ".npz" else read_safetensors


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("F4", 0.5), ("I64", 8)]
)
def test_types_that_are_no_weights_are_named(tmp_path, dtype, size):
    file = tmp_path / peft.WEIGHTS
    file.write_bytes(safetensor(dtype, (2, 4), bytes(int(8 * size))))
    with pytest.raises(ValueError, match=f"{peft.WEIGHTS}: x: {dtype} given .*expected float32"):
        peft.read_tensors(file)


def test_floats_of_any_width_are_read_exactly(tmp_path):
    x = np.array([0, -1.5, 2.0**-7, 2.0**15], np.float32)
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        safetensors.numpy.save_file({"x": x.astype(dtype)}, tmp_path / "x.safetensors", {"a": "b"})
        found, metadata = read_safetensors(tmp_path / "x.safetensors")
        assert found["x"].dtype == np.float32 and metadata == {"a": "b"}
        np.testing.assert_array_equal(found["x"], x)


# ----------------------------------------------------------------------------------- damaged files

HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
ARCHIVES = {
    "empty": b"",
    "no archive": b"x" * 99,
    "one array": npy(HEADER % "(1,)", bytes(4)),
    "no array": npz(x=b"text"),
    "cut header": npz(x=npy("{'descr':")),
    "brackets": npz(x=npy("(" * 5000)),
    "quotes": npz(x=npy("'''")),
    "nothing of the kind": npz(x=npy("[]")),
    "huge": npz(x=npy(HEADER % "(100000000000000,)")),
    "too many digits": npz(x=npy(HEADER % "(999999999999999999999,)")),
    "negative": npz(x=npy(HEADER % "(-1,)")),
    "too short": npz(x=npy(HEADER % "(9,)", bytes(8))),
    "object": npz(x=npy(HEADER.replace("<f4", "|O") % "(1,)", b"\x80\x04N.")),
    "records": npz(x=npy(HEADER.replace("'<f4'", "[('a', '<f4')]") % "(0,)")),
    "dates": npz(x=npy(HEADER.replace("<f4", "<M8[s]") % "(0,)")),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_is_one_clear_error(tmp_path, name):
    file = tmp_path / "x.npz"
    file.write_bytes(ARCHIVES[name])
    with pytest.raises(ValueError, match="x.npz: ") as caught:
        read_npz_weights(file)
    assert len(str(caught.value)) < 400


def test_damaged_bytes_of_an_archive_are_one_clear_error(tmp_path):
    """Encryption, unknown compression, wrong checksums: whatever a byte can say."""
    whole = npz(x=npy(HEADER % "(2,)", bytes(8)))
    file = tmp_path / "x.npz"
    for place in range(len(whole)):
        for value in (0, 9, 255):
            file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                read_npz(file)
            except ValueError as error:
                assert str(error).startswith(f"{file}: ")


def test_an_archive_without_an_array_that_is_asked_for(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    assert set(read_npz(tmp_path / "x.npz", ["a"])) == {"a"}
    with pytest.raises(ValueError, match="x.npz: .*b"):
        read_npz(tmp_path / "x.npz", ["a", "b"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_pointer_of_git_lfs_as_weights_is_told(tmp_path, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(LFS + b".github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"x{suffix}: .*a Git LFS pointer.*git lfs pull"):
        reader(suffix)(file)
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        reader(suffix)(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: not a readable .*file"):
        reader(suffix)(tmp_path)


def test_files_written_array_by_array_have_the_bytes_of_safetensors(tmp_path):
    kinds = np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, bool
    arrays = {f"b/{i}": np.arange(3 * i).reshape(3, i).astype(kind) for i, kind in enumerate(kinds)}
    arrays |= {"a": np.array(1.5, np.float32), "é": np.arange(6, dtype=np.uint32)}
    tensors.write(tmp_path / "ours", {name: jnp.asarray(x) for name, x in arrays.items()})
    safetensors.numpy.save_file(arrays, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_parts_of_a_tensor_are_read_as_numpy_takes_them(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "parts.safetensors"
    whole = rng.standard_normal((3000, 3, 7)).astype(np.float16)
    safetensors.numpy.save_file({"before": np.ones(3, np.float32), "x": whole}, file)
    x = tensors.stored(file)["x"]
    everything = [range(n) for n in whole.shape]
    places = np.array([2, 3, 4, 900, 2998])
    for index in (
        everything,
        [range(5, 2000), *everything[1:]],
        [range(2500, 2503), range(1, 3), range(7)],
        [range(3000), range(3), range(2, 5)],
        [places, range(3), range(7)],
        [places, range(1, 2), np.array([6, 0])],
        [range(3000), range(3), range(1, 7, 2)],
        [range(10, 2990, 7), range(0, 3, 2), range(7)],
    ):
        np.testing.assert_array_equal(x.read(index), whole[np.ix_(*index)])
    np.testing.assert_array_equal(x.read(), whole)
    os.truncate(file, file.stat().st_size - 10)
    for index in (None, [range(2990, 3000), range(1), range(7)]):
        with pytest.raises(ValueError, match="parts.safetensors: it ends within x"):
            x.read(index)
