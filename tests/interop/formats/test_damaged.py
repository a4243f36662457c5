"""Damaged files of every format: a reader returns, or refuses the file with one clear line."""

import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from format_files import written
from language_files import directory, draw, gguf_file, keras_file, nested, orbax_files
from mutated import survives
from peft_files import UNTIED

import lorax.interop.peft
from lorax.interop import formats, reading
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


def checkpoint(path):
    """loralib's of a layer that is not fused."""
    file = written(path, {"q.lora_A": draw(R, D), "q.lora_B": draw(D, R), "q.bias": draw(D)})
    return file, [file]


def own(path):
    (path / "method.json").write_text('{"name": "full", "hp": {}}')
    written(path, {"h/0/attn/q": draw(D, D)}, "delta.safetensors")
    return path, [path / "delta.safetensors", path / "method.json"]


def peft(path):
    factors = {f"h/0/attn/{part}": Factors(PAIR[1], PAIR[0], 2.0) for part in "qv"}
    lorax.interop.peft.save(path, factors, UNTIED, "gpt2")
    return path, [path / "adapter_model.safetensors", path / "adapter_config.json"]


def lycoris(path):
    """LoKr in diffusers' file, whose header is a LoKrConfig."""
    name, shapes = "unet.mid_block.attentions.0.proj_in", {"w1": (4, 4), "w2_a": (4, 1)}
    tensors = {f"{name}.lokr_{word}": draw(*x) for word, x in shapes.items()}
    tensors[f"{name}.lokr_w2_b"] = draw(1, 4)
    config = {"r": 1, "alpha": 2, "decompose_factor": 4, "alpha_pattern": {"proj_in": 3}}
    metadata = json.dumps({f"unet.{field}": value for field, value in config.items()})
    file = written(
        path, tensors, "pytorch_lora_weights.safetensors", lora_adapter_metadata=metadata
    )
    return path, [file]


def of_peft(kind, words, name=None, **config):
    """Another method of PEFT's: a maker of two modules, with a name for its tests."""

    def make(path):
        tensors = {
            f"base_model.model.{module}.{word}": draw(*shape)
            for module in ("conv_in", "conv_out")
            for word, shape in words.items()
        }
        targets = {"peft_type": kind, "target_modules": ["conv_in", "conv_out"]}
        directory(path, tensors, targets | config)
        return path, [path / "adapter_model.safetensors", path / "adapter_config.json"]

    make.__name__ = name or kind.lower()
    return make


adalora = of_peft("ADALORA", {"lora_A": (R, D), "lora_B": (D, R), "lora_E": (R, 1)}, init_r=R)
loha = of_peft(
    "LOHA",
    {"hada_w1_a": (R, D), "hada_w1_b": (R, D), "hada_w2_a": (R, D), "hada_w2_b": (R, D)}
    | {"hada_t1": (R, R, 3, 3), "hada_t2": (R, R, 3, 3)},
    r=R, alpha=2, use_effective_conv2d=True, rank_pattern={"conv_in": R},
)  # fmt: skip
lokr = of_peft(
    "LOKR", {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2": (4, 4, 3, 3)},
    r=1, alpha=2, decompose_both=True, decompose_factor=4,
)  # fmt: skip
dora = of_peft(
    "LORA",
    {"lora_A.weight": (R, D, 3, 3), "lora_B.weight": (D, R, 1, 1)}
    | {"lora_magnitude_vector": (1, D, 1, 1)},
    "dora", r=R, use_dora=True,
)  # fmt: skip
experts = of_peft(
    "LORA",
    {"experts.lora_A.weight": (2 * R, D), "experts.lora_B.weight": (D, 2 * R)},
    "experts", r=R, target_parameters=["experts.down_proj"], target_modules=[],
)  # fmt: skip


def flux(path):
    """XLabs's names beside those of ComfyUI, with full weights and biases."""
    tensors = {"diffusion_model.double_blocks.0.img_attn.qkv.diff": draw(D, D)}
    tensors |= {"diffusion_model.conv_in.lora_up.weight": draw(D, R, 1, 1)}
    tensors |= {"diffusion_model.conv_in.lora_down.weight": draw(R, D, 3, 3)}
    tensors |= {"diffusion_model.conv_in.diff_b": draw(D)}
    file = written(path, tensors)
    return file, [file]


def gemma(path):
    pair = {"a": draw(D, R), "b": draw(R, 4, 4)}
    tree = {f"params__layer_0__attn__q_einsum__lora__{side}": x for side, x in pair.items()}
    folder = orbax_files(path / "gemma", nested(**tree))
    return folder, [folder / "_METADATA", *sorted(folder.glob("d/*"))]


FORMATS = [
    adalora,
    loha,
    lokr,
    dora,
    experts,
    lycoris,
    flux,
    gemma,
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
    """n damaged copies of each file of an adapter are read as a whole, and written if they can."""
    place, files = make(path)

    def read():
        for update in formats.read(place).updates:
            update.read()
        found = formats.read(place, as_stored=True)
        for name in ("kohya", "diffusers", "peft"):
            with tempfile.TemporaryDirectory() as out:
                try:
                    formats.WRITERS[name](Path(out, "a.safetensors"), found)
                except ValueError as error:
                    if "can't hold it" not in str(error):
                        raise

    for file in files:
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


@pytest.mark.filterwarnings("ignore:.*no fields of")
@pytest.mark.parametrize("make", [peft, dora, experts, checkpoint, own, diffusers])
def test_many_damaged_files_are_read_whole_or_refused(tmp_path, make):
    """As `lorax.adapters.load` reads them, without a base."""
    place, files = make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        survives(file, lambda: reading.read(place), 2000, name=str(tmp_path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**19
