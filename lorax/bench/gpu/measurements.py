"""What is measured, the most valuable first, so that a short run has what matters."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lorax.bench.gpu import models, products, torch_models
from lorax.bench.gpu.sizes import Sizes

JAX, TORCH = "jax", "torch"


class Measurement(NamedTuple):
    """side: whose process runs it. seconds: about what it takes on a large GPU, compilation
    included, guessed until one has been measured. run() -> its rows (`rows.row`)."""

    name: str
    side: str
    seconds: float
    run: Callable[[], Iterator[dict]]


def measurements(sizes: Sizes) -> list[Measurement]:
    """In the order in which they run. torch's stand together: another process has to start."""
    first, *others = sizes.kernels
    of_jax = [
        ("ceilings", 12, products.ceilings),
        *_products(first, sizes.rows[:4]),  # the first also draws the weights
        (products.decode_case(first), 8, products.decode, first),
        ("QLoRA step", 60, models.llama_step, models.NF4),
        (f"sweep of {sizes.members[0]}", 30, models.sweep, sizes.members[0]),
        ("LoRA step, bfloat16", 20, models.step, "bfloat16"),
        ("generation", 20, models.generation),
        *(row for shape in others for row in _products(shape, sizes.rows[:4])),
        *((products.decode_case(shape), 8, products.decode, shape) for shape in others),
        (f"sweep of {sizes.members[1]}", 40, models.sweep, sizes.members[1]),
        ("mixed batch, prompts", 15, models.mixed_batch, sizes.prompt),
        ("mixed batch, next token", 15, models.mixed_batch, 1),
        ("LoRA step, float32", 20, models.step, "float32"),
        ("QLoRA generation", 25, models.llama_generation),
    ]
    of_torch = [
        ("LoRA step, bfloat16, torch", 10, torch_models.step, "bfloat16"),
        ("QLoRA step, torch", 25, torch_models.llama_step, models.NF4),
        *(
            (f"{products.product_case(first, n)}, torch", 5, torch_models.product, first, n)
            for n in sizes.rows[:4]
        ),
        ("generation, torch", 10, torch_models.generation),
        ("mixed batch, prompts, torch", 8, torch_models.mixed_batch, sizes.prompt),
        ("mixed batch, next token, torch", 8, torch_models.mixed_batch, 1),
        ("LoRA step, float32, torch", 8, torch_models.step, "float32"),
        ("LoRA step of the LLaMA in bfloat16, torch", 15, torch_models.llama_step, models.BF16),
    ]
    later = [
        *(row for shape in sizes.kernels for row in _products(shape, sizes.rows[4:])),
        *((f"kernels alone, {shape[0]} x {shape[1]}", 20, products.on_device, shape)
          for shape in sizes.kernels),
        ("LoRA step of the LLaMA in bfloat16", 50, models.llama_step, models.BF16),
    ]  # fmt: skip
    return [
        Measurement(name, side, seconds, functools.partial(run, sizes, *given))
        for side, part in ((JAX, of_jax), (TORCH, of_torch), (JAX, later))
        for name, seconds, run, *given in part
    ]


def _products(shape: tuple[int, int], rows: tuple[int, ...]) -> list[tuple]:
    return [(products.product_case(shape, n), 12, products.product, shape, n) for n in rows]
