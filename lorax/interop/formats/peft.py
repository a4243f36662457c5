"""PEFT's files, read without their numbers: `lorax.interop.peft` has the layout."""

from lorax.interop.formats import fused, updates
from lorax.interop.formats.contract import Found
from lorax.interop.formats.opened import Opened, same
from lorax.interop.peft.config import CONFIG, check_targets, read_config, scale_of
from lorax.interop.peft.files import own_names
from lorax.interop.peft.lora import FACTOR
from lorax.interop.places import natural

_WORDS = {"A": "lora_down", "B": "lora_up"}


def recognises(opened: Opened) -> bool:
    """Whether a config of PEFT's is beside the file."""
    return "peft_type" in opened.config


def read(opened: Opened) -> Found:
    """The updates of LoRA and DoRA. Raises as `lorax.interop.peft.load`."""
    config_file = opened.file.parent / CONFIG
    config = read_config(config_file)
    if config["peft_type"] != "LORA":
        raise ValueError(f"{config_file}: peft_type {config['peft_type']!r} given; LORA is read")
    modules: dict[str, dict] = {}
    beside = {}
    for name, tensor in own_names(opened.tensors, opened.file, same).items():
        if match := FACTOR.fullmatch(name):
            word = _WORDS.get(match["side"], "magnitude")
            modules.setdefault(match["module"], {})[word] = tensor
        else:
            beside[name] = tensor.shape
    check_targets(config, modules, config_file)
    source = "config lora_alpha / sqrt r" if config.get("use_rslora") else "config lora_alpha / r"
    scale = lambda layer, rank: (scale_of(config, layer, rank, config_file), source)
    names = sorted(modules, key=natural)
    found = [updates.Module(layer, modules[layer], scale, opened.file) for layer in names]
    return Found("PEFT", opened.path, fused.updates_of(found), beside, config)
