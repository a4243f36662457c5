"""Which directory a name means, and the files of weights in it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax.interop import hf
from lorax.interop.hf import Source
from lorax.models.directories import find


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_pipeline_means_the_model_that_denoises(part, tmp_path):
    write(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    for name in (part, "text_encoder", "vae"):
        write(tmp_path / name / "config.json", {})
    assert find(str(tmp_path)) == tmp_path / part
    assert find(str(tmp_path / "text_encoder")) == tmp_path / "text_encoder"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a directory without config.json"):
        find(str(tmp_path))
    write(tmp_path / "model_index.json", {})
    write(tmp_path / "vae" / "config.json", {})
    with pytest.raises(FileNotFoundError, match="a pipeline without unet or transformer.* vae$"):
        find(str(tmp_path))
    named = "no model.safetensors or diffusion_pytorch_model.safetensors"
    with pytest.raises(FileNotFoundError, match=named):
        hf.weight_files(tmp_path)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("config", "name"),
    [({"model_type": "x"}, "model"), ({"_class_name": "X"}, "diffusion_pytorch_model")],
)
def test_weights_have_the_names_of_their_library(config, name, shards, tmp_path, monkeypatch):
    values = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(3)}
    sources = {path: Source(f"{path}.weight") for path in values}
    if shards:
        monkeypatch.setattr(hf, "FILE", 50)
        save_file(
            {"old": values["w0"]}, tmp_path / f"{name}.safetensors"
        )  # read first if it stayed
    hf.write(tmp_path, config, sources, values)
    parts = [f"-{i:05}-of-00002" for i in (1, 2)] if shards else [""]
    files = [tmp_path / f"{name}{part}.safetensors" for part in parts]
    assert hf.weight_files(tmp_path) == files and all(file.exists() for file in files)
    read = hf.parameters(tmp_path, sources, {path: (2, 3) for path in values})
    for path, value in values.items():
        np.testing.assert_array_equal(read[path].read((slice(None), slice(None))), value)
    if not shards:
        return
    index = tmp_path / f"{name}.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    write(index, {"weight_map": where | {"w0.weight": where["w2.weight"]}})
    with pytest.raises(ValueError, match=f"w0.weight is in .*, and {index.name} says in"):
        hf.tensors(tmp_path)
