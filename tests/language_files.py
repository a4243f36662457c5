"""Adapter files of language models' trainers, written by the libraries of their containers."""

import json

import numpy as np
import pytest
import safetensors.numpy


def draw(*shape) -> np.ndarray:
    """The same array for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def dense(update) -> np.ndarray:
    """dW (in, out) float64 of an update that says the right shape and rank."""
    a, b, s, _ = update.read()
    assert a.shape[1] == update.rank and (len(a), b.shape[1]) == update.shape
    return s * a.astype(np.float64) @ b


def directory(path, tensors, config=None, name="adapter_model.safetensors"):
    """A directory with a safetensors file and, if it is given, adapter_config.json."""
    safetensors.numpy.save_file(tensors, path / name)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def gguf_file(path, tensors, alpha=6.0, arch="llama", kind="adapter", quantised=None):
    """As llama.cpp's converter writes it. quantised: a type for all tensors that are stored so."""
    gguf = pytest.importorskip("gguf")
    file = path / "adapter.gguf"
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_array("general.tags", ["text", "a list"])
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, x in tensors.items():
        x = x if quantised is None else gguf.quants.quantize(x, quantised)
        writer.add_tensor(name, x, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def keras_file(path, layers, rank=3):
    """{index: (a, b)} as keras-hub's `save_lora_weights` stores them."""
    h5py = pytest.importorskip("h5py")
    file = path / "some.lora.h5"
    with h5py.File(file, "w") as opened:
        opened.create_group("lora/vars")["rank"] = rank
        for index, (a, b) in layers.items():
            group = opened.create_group(f"lora/{index}").create_group("vars")
            group["lora_kernel_a"], group["lora_kernel_b"] = a, b
    return file


def orbax_files(path, tree, **custom):
    """A checkpoint of a tree, with what its writer says about it."""
    ocp = pytest.importorskip("orbax.checkpoint")
    ocp.PyTreeCheckpointer().save(path, tree, custom_metadata=custom or None)
    return path


def nested(**leaves) -> dict:
    """A tree from {"a__b__c": leaf}."""
    tree = {}
    for name, leaf in leaves.items():
        *keys, last = name.split("__")
        place = tree
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree
