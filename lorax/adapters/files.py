"""One load and one save for anything trained.

directories of PEFT's       LoRA, DoRA, and PEFT's other methods that lorax has
checkpoints of loralib      the LoRA authors' code, .npz or .safetensors
files of image models       diffusers', kohya's and ComfyUI's, onto one model of a pipeline
lorax's own format          any method; a user's method once the file that registers it has run
"""

import os
from pathlib import Path

from lorax import models
from lorax.adapters import binding, peft_methods, states
from lorax.adapters.task_types import check_task, task_type
from lorax.adapters.trained import Trained, from_training
from lorax.interop import peft, reading
from lorax.models import Base
from lorax.models.load import has_choice_of_head, skeleton


def load(
    path: str | os.PathLike,
    base: Base | str,
    alpha: float | None = None,
    weights: bool = True,
    unread: bool = False,
) -> Trained:
    """Read a trained adapter of any kind, onto its base.

    Args:
      path: a directory, or a checkpoint of loralib; see above.
      base: the model that it was trained on, or its name as for `lorax.load`. A name gives an
        encoder the classifier that the files have weights for.
      alpha: lora_alpha of a checkpoint of loralib, which does not hold it.
      weights: whether to load the weights of a base given by name. Without them the result can be
        inspected and saved, but neither bound nor merged. Methods other than low-rank factors
        always load them.
      unread: whether the weights of a base given by name stay in their files, to merge low-rank
        factors into one layer after the other as they are saved. Other methods load them.

    Raises FileNotFoundError, or ValueError that names the file and the field, tensor or layer that
    is damaged, can't be read, or does not fit the base; if possible before weights are loaded.
    """
    path = reading.located(path)
    reading.check_alpha(path, alpha)
    fields = head_fields(path, base) if isinstance(base, str) else {}
    shapes = skeleton(base, **fields) if isinstance(base, str) else base
    check_task(shapes, reading.task_type(path), f"{path / peft.CONFIG}: ")
    whole = lambda: models.load(base, **fields) if isinstance(base, str) else base
    match reading.format_of(path):
        case "lorax":
            return from_training(onto := whole(), *states.load(path, onto))
        case "loralib" | "images" | "LORA":
            adapter = reading.read(path, shapes.sources, alpha)
            try:
                binding.check(shapes, adapter)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if unread and isinstance(base, str):
                return Trained(models.unread(base, **fields), adapter)
            return Trained(whole() if weights else shapes, adapter)
        case _:
            return from_training(onto := whole(), *peft_methods.load(path, onto))


def head_fields(path: str | os.PathLike, name: str) -> dict:
    """Config fields for `lorax.load` that give an encoder the classifier that an adapter's files
    have weights for; {} if there is none.

    Raises ValueError for a classifier without a task type on a base with another head.
    """
    if ":" in name and not Path(name).is_dir():  # random weights or a function: unchanged
        return {}
    path = reading.located(path)
    labels = reading.classes(path) if has_choice_of_head(name) else None
    if not labels:
        return {}
    if reading.task_type(path) is None and reading.format_of(path) != "lorax":
        try:
            skeleton(name)
        except ValueError as error:
            raise ValueError(f"{path}: has a classifier, but no task_type; {error}") from None
    return {"head": "classification", "labels": labels}


# ------------------------------------------------------------------------------------------ writing


def save(directory: str | os.PathLike, trained: Trained, base_name: str | None = None) -> str:
    """Write a trained adapter, if possible so that PEFT reads it; "", or why PEFT can't.

    Low-rank updates become a LoRA adapter in PEFT's format. Any other method is written in lorax's
    own format, and additionally in PEFT's if PEFT has the method.

    base_name: what PEFT should load as the base model; by default the name that the base was loaded
    by. Raises ValueError for factors that PEFT can't store if there is no method to store instead.
    """
    if trained.adapter is not None:
        why = _attempt(save_as_lora, directory, trained, base_name)
        if not why:
            return ""
        if trained.method is None:
            raise ValueError(f"{trained.base.name}: {why}")
    states.save(directory, trained.method, trained.state, trained.base)
    if trained.adapter is None:
        why = _attempt(
            peft_methods.save, directory, trained.method, trained.state, trained.base, base_name
        )
    return why


def save_as_lora(
    directory: str | os.PathLike, trained: Trained, base_name: str | None = None
) -> None:
    """Write low-rank factors as a LoRA adapter in PEFT's format.

    Raises ValueError for a method without factors, and for what PEFT has no way to store.
    """
    base, adapter = trained.base, trained.adapter
    if adapter is None:
        raise ValueError(f"{trained.name} has no low-rank update, so it can't be stored as LoRA")
    settings = adapter.config if trained.method is None else trained.method.hp
    dropout = settings.get("lora_dropout", settings.get("dropout")) or 0
    kind = task_type(base, adapter.weights)
    peft.save(directory, adapter, base.sources, base_name or base.name, dropout, kind)


def _attempt(write, *arguments) -> str:
    """ "" if writing succeeds, else the reason. A full or broken disk raises OSError."""
    try:
        write(*arguments)
    except OSError:
        raise
    except Exception as error:  # the caller keeps what was learned in another format
        return str(error) if isinstance(error, ValueError) else repr(error)
    return ""
