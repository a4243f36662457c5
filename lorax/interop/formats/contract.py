"""What every reader of adapter files returns."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.tensors import Stored


class Update(NamedTuple):
    """The update of one matrix in a file.

    Its tensors are read when `read` is called, and are not kept.

    layer: the module as the file names it, without the names of tensors: "unet.down_blocks.0.
        attentions.0.transformer_blocks.0.attn1.to_q"; a flattened name of kohya's as it is.
    kind: "LoRA", "LoCon" (of a convolution), "LoHa", "LoKr", "DoRA", "full"...
    shape: (in, out) of dW as a matrix. That of a convolution is (in kh kw, out), where row
        i kh kw + y kw + x is the input channel i at (y, x).
    rank: the most that the rank of dW can be, from the shapes in the file: r of LoRA, r^2 of LoHa.
    scale: s, which dW contains.
    source: where s is from: "tensor alpha / r", "config lora_alpha / r", "default 1: the file has
        none".
    dtype: of the tensors, as safetensors call it: "F16".
    read: returns `Factors` (float32) for an update of low rank, otherwise dW (in, out) float32.
        Numbers that are NaN or infinite are returned as they are. Raises ValueError that names the
        file if its tensors can't be read.
    warnings: what a reader of the numbers must know, a line each.
    kernel: (kh, kw) of a convolution, () of other matrices.
    stored: the tensors of a LoHa, a LoKr or weights trained in full, by LyCORIS's words
        (`updates`); {} for updates with factors.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    source: str
    dtype: str
    read: Callable[[], Factors | np.ndarray]
    warnings: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()
    stored: Mapping[str, Stored] = {}


class Found(NamedTuple):
    """What a file holds.

    format: "PEFT", "kohya", "diffusers", "MLX"...
    path: the file or directory that was read.
    beside: {name: shape} of other trained tensors: biases, norms, heads.
    config: what the file says about itself, as it says it: its base, ranks, alpha, trigger words.
    notes: what is true of the file as a whole, a line each.
    changes: those of `beside` that are differences of biases and norms, by LyCORIS's words.
    """

    format: str
    path: Path
    updates: tuple[Update, ...]
    beside: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()
    changes: Mapping[str, Stored] = {}
