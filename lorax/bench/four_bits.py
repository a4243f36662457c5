"""NF4 on a CPU against bitsandbytes: quantising, dequantising, products."""

import importlib.util

import jax
import numpy as np

from lorax import quant
from lorax.bench import timing


def bench_nf4(shapes: list[str], rounds: int) -> list[timing.Row]:
    """A 4096 x 4096 weight in NF4 with blocks of 64: quantising, dequantising, and its product with
    1 to 4096 rows in float32, against bitsandbytes and the product with the unquantised weight."""
    if not importlib.util.find_spec("bitsandbytes"):
        raise SystemExit("bench nf4 compares with bitsandbytes: pip install bitsandbytes torch")
    import bitsandbytes
    import torch

    n, rng = 4096, np.random.default_rng(0)
    w = rng.standard_normal((n, n)).astype(np.float32)  # (out, in)
    ours, theirs = jax.numpy.asarray(w.T), torch.tensor(w)
    leaf = quant.quantise(ours)
    codes, state = bitsandbytes.functional.quantize_4bit(theirs, quant_type="nf4")
    # Its layer repacks the codes for evaluation.
    layer = bitsandbytes.nn.Linear4bit(n, n, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(theirs, quant_type="nf4", requires_grad=False)
    layer = layer.to("cpu").eval()
    decode = jax.jit(quant.Quantised.rows_of_outputs)
    sides = {
        "quantise": lambda: quant.quantise(ours).codes,
        "quantise, theirs": lambda: bitsandbytes.functional.quantize_4bit(theirs, quant_type="nf4"),
        "dequantise": lambda: decode(leaf),
        "dequantise, theirs": lambda: bitsandbytes.functional.dequantize_4bit(codes, state),
    }
    rows = []
    with torch.no_grad():
        seconds = timing.measure({name: timing.timed(run) for name, run in sides.items()}, rounds)
        for name in ("quantise", "dequantise"):
            theirs_in = seconds[f"{name}, theirs"]
            rows.append(
                timing.row(f"NF4, 4096 x 4096, {name}", seconds[name], theirs_in, "bitsandbytes")
            )
        product = jax.jit(lambda x, leaf: leaf.product(x, 0))
        dense = jax.jit(lambda x, w: x @ w)
        for count in (1, 16, 256, 4096):
            x = rng.standard_normal((count, n)).astype(np.float32)
            rows_in, theirs_in = jax.numpy.asarray(x), torch.tensor(x)
            against = {
                "bitsandbytes, matmul_4bit": lambda x=theirs_in: bitsandbytes.matmul_4bit(
                    x, codes.t(), state
                ),
                "bitsandbytes, layer in evaluation": lambda x=theirs_in: layer(x),
                "JAX, float32 weight": lambda x=rows_in: dense(x, ours),
            }
            sides = {"lorax": lambda x=rows_in: product(x, leaf)} | against
            seconds = timing.measure(
                {name: timing.timed(run) for name, run in sides.items()}, rounds
            )
            for name in against:
                label = f"NF4, product with {count} rows"
                rows.append(timing.row(label, seconds["lorax"], seconds[name], name))
    return rows
