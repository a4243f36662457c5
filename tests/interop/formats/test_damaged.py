"""Damaged files of every format: a reader returns, or refuses the file with one clear line."""

import json
import resource

import numpy as np
import pytest
from format_files import written
from language_files import directory, draw, gguf_file, keras_file, nested, orbax_files
from mutated import survives
from peft_files import UNTIED

import lorax.interop.peft
from lorax.interop import formats
from lorax.interop.adapter import Factors

R, D = 3, 16
PAIR = draw(R, D), draw(D, R)


def mlx(path):
    config = {"lora_parameters": {"rank": R, "scale": 20.0}}
    tensors = {"q.lora_a": PAIR[1], "q.lora_b": PAIR[0], "e.lora_a": draw(2, R, D)}
    directory(path, tensors | {"e.lora_b": draw(2, D, R)}, config, "adapters.safetensors")
    return path, [path / "adapters.safetensors", path / "adapter_config.json"]


def llama_cpp(path):
    names = [f"blk.0.attn_q.weight.lora_{side}" for side in "ab"]
    file = gguf_file(path, dict(zip(names, PAIR, strict=True)))
    return file, [file]


def torchtune(path):
    names = [f"layers.0.attn.q_proj.lora_{side}.weight" for side in "ab"]
    directory(path, dict(zip(names, PAIR, strict=True)), {"r": R, "lora_alpha": 8})
    (path / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 2}')
    names = "adapter_model.safetensors", "adapter_config.json", "config.json"
    return path, [path / name for name in names]


def megatron(path):
    names = [
        f"layers.0.self_attention.linear_qkv.adapter.linear_{way}.weight" for way in ("in", "out")
    ]
    directory(path, dict(zip(names, PAIR, strict=True)))
    (path / "run_config.yaml").write_text("peft: {_target_: lora.LoRA, dim: 3, alpha: 32}")
    return path, [path / "adapter_model.safetensors", path / "run_config.yaml"]


def tinker(path):
    names = [f"base_model.model.layers.0.experts.w1.lora_{side}.weight" for side in "AB"]
    pair = draw(1, R, D), draw(3, D, R)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 8}
    directory(path, dict(zip(names, pair, strict=True)), config)
    return path, [path / "adapter_model.safetensors"]


def keras_hub(path):
    file = keras_file(path, {0: (PAIR[1], PAIR[0]), 1: (draw(4, D, R), PAIR[0])})
    return file, [file]


def orbax(path):
    tree = nested(layers__0__q__w_lora_a=PAIR[1], layers__0__q__w_lora_b=PAIR[0])
    folder = orbax_files(path / "checkpoint", tree)
    return folder, [folder / "_METADATA", folder / "manifest.ocdbt", *sorted(folder.glob("d/*"))]


def kohya(path):
    """Of every kind, and a module of three that are stored as one."""
    kinds = {
        "lora": {"lora_down.weight": (R, D), "lora_up.weight": (D, R), "dora_scale": (D, 1)},
        "tucker": {"lora_down.weight": (R, D, 1, 1), "lora_up.weight": (D, R, 1, 1)}
        | {"lora_mid.weight": (R, R, 3, 3)},
        "loha": {"hada_w1_a": (D, R), "hada_w1_b": (R, D), "hada_w2_a": (D, R)}
        | {"hada_w2_b": (R, D), "dora_scale": (1, D)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, R), "lokr_w2_b": (R, 4)},
        "norm": {"w_norm": (D,), "b_norm": (D,)},
    }
    tensors = {
        f"lora_unet_{name}.{word}": draw(*shape)
        for name, words in kinds.items()
        for word, shape in ({"alpha": (1,)} | words).items()
    }
    up = np.kron(np.eye(3, dtype=np.float32), draw(4, 1))
    tensors |= {"lora_unet_qkv.lora_up.weight": up, "lora_unet_qkv.lora_down.weight": draw(3, D)}
    file = written(path, tensors, ss_network_dim="3")
    return file, [file]


def diffusers(path):
    tensors = {f"unet.{x}.attn.to_q.lora_A.weight": PAIR[0] for x in "ab"}
    tensors |= {f"unet.{x}.attn.to_q.lora_B.weight": PAIR[1] for x in "ab"}
    tensors |= {
        "unet.a.attn.to_k.lora_A.weight": PAIR[0],
        "unet.a.attn.to_k.lora_B.weight": PAIR[1],
    }
    metadata = json.dumps({"unet.r": R, "unet.lora_alpha": 8, "unet.rank_pattern": {"b": R}})
    file = written(
        path, tensors, "pytorch_lora_weights.safetensors", lora_adapter_metadata=metadata
    )
    return path, [file]


def loralib(path):
    tensors = {"q.lora_A": draw(2 * R, D), "q.lora_B": draw(2 * D, R), "q.bias": draw(D)}
    file = written(path, tensors)
    return file, [file]


def own(path):
    (path / "method.json").write_text('{"name": "full", "hp": {}}')
    written(path, {"h/0/attn/q": draw(D, D)}, "delta.safetensors")
    return path, [path / "delta.safetensors", path / "method.json"]


def peft(path):
    factors = {f"h/0/attn/{part}": Factors(PAIR[1], PAIR[0], 2.0) for part in "qv"}
    lorax.interop.peft.save(path, factors, UNTIED, "gpt2")
    return path, [path / "adapter_model.safetensors", path / "adapter_config.json"]


FORMATS = [
    kohya,
    diffusers,
    peft,
    loralib,
    own,
    mlx,
    llama_cpp,
    torchtune,
    megatron,
    tinker,
    keras_hub,
    orbax,
]


def damaged(path, make, n):
    """n damaged copies of each file of an adapter are read as a whole."""
    place, files = make(path)
    for file in files:
        read = lambda: [update.read() for update in formats.read(place).updates]
        survives(file, read, n, 10**5 if file.suffix == ".h5" else 4096, str(path))


@pytest.mark.filterwarnings("ignore:.*no fields of")  # of PEFT's configs
@pytest.mark.parametrize("make", FORMATS)
def test_damaged_files_are_refused_in_a_line(tmp_path, make):
    damaged(tmp_path, make, 15)


@pytest.mark.filterwarnings("ignore:.*no fields of")  # of PEFT's configs
@pytest.mark.parametrize("make", FORMATS)
def test_many_damaged_files_are_refused_in_bounded_memory(tmp_path, make):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    damaged(tmp_path, make, 2000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**19
