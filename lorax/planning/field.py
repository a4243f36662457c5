"""The field's models: trainable parameters by rank, full fine-tuning against LoRA and QLoRA."""

from collections.abc import Iterable
from typing import NamedTuple

from lorax import config, methods, tree
from lorax.models.load import skeleton
from lorax.planning import spread
from lorax.planning.roofline import on_device
from lorax.planning.shapes import quantised
from lorax.planning.tables import Table, bytes_text, count_text, seconds_text
from lorax.train import mesh_costs

RANKS = (1, 2, 4, 8, 16, 64, 256)

SIZES = {"7B": "llama-7b", "13B": "llama-13b", "70B": "llama2-70b", "180B": "falcon-180b"}

ADAPTED = ("llama-7b", "llama-13b", "llama2-70b", "falcon-7b", "falcon-40b", "falcon-180b")

_QV = ("q", "v")

#: architecture -> [(name, rank, targets, quantised)], compared with full fine-tuning
COMPARED = {
    "gpt3-175b": [("LoRA", 1, _QV, False), ("LoRA", 4, _QV, False)],
    **dict.fromkeys(
        ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "falcon-40b"),
        [("LoRA", 8, _QV, False), ("QLoRA", 64, ("all-linear",), True)],
    ),
    **dict.fromkeys(("roberta-base", "roberta-large"), [("LoRA", 8, _QV, False)]),
    "deberta-v2-xxlarge": [("LoRA", 16, _QV, False)],
}


def tables() -> Iterable[Table]:
    """The comparison tables, each as soon as it is computed."""
    share = lambda part, whole: f"{count_text(part)} {100 * part / whole:.2g}%"
    ranks = tuple(f"r = {r}" for r in RANKS)
    matrices, adapted = [], []
    for size, name in SIZES.items():
        d = architecture_of(name).params["embed"]["embedding"].shape[1]
        each = [share(2 * d * r, d * d) for r in RANKS]
        matrices.append((f"{size}, d = {d:,}", *each))
    yield Table("LoRA of one d x d matrix: trainable, of its parameters", ("", *ranks), matrices)

    for name in ADAPTED:
        base = architecture_of(name)
        whole = tree.count(base.params)
        for targets in (_QV, ("all-linear",)):
            count = lambda r, t=targets, b=base: methods.method("lora", rank=r, targets=t).count(
                b.params, b.sites
            )
            shown = (_fitting(count, r) for r in RANKS)
            each = ["-" if x is None else share(x, whole) for x in shown]
            adapted.append((f"{name}, {'+'.join(targets)}", *each))
    yield Table("LoRA: trainable, of all parameters", ("", *ranks), adapted)

    headings = ("", "trainable", "weights", "gradients", "Adam, 32 bits", "total")
    headings += ("Adam, 16 bits", "total", "checkpoint")
    lines = []
    for name in COMPARED:
        for label, row in compare(name).items():
            shown = [bytes_text(x) for x in row[1:]]
            lines.append((label, f"{row.trainable:,}", *shown))
    note = "All exact, without activations. Weights, gradients and checkpoints are in 16 bits, "
    note += (
        "QLoRA's frozen weights in NF4 with double quantisation. The LoRA paper says 1.2 TB for "
    )
    note += "GPT-3 without saying what it includes; the closest here is Adam in 16 bits, 1.27 TiB. "
    note += "QLoRA's 780 GB for LLaMA 65B match Adam in 32 bits."
    yield Table("Full fine-tuning, LoRA and QLoRA", headings, lines, note)
    yield on_devices()


#: (model, four bits) on numbers of devices -> parts of a batch (`train.accumulate`).
SPREAD = (("llama2-70b", "nf4"), ("llama2-70b", None), ("gpt3-175b", None))
DEVICE, PARTS = "h200", {1: 16, 8: 2, 64: 1}


def on_devices() -> Table:
    """Models that need several devices, on meshes that a run would choose."""
    headings = ("", "mesh", "base", "peak", "members", "received a step", "compute", "links")
    lines = []
    for name, four_bits in SPREAD:
        for devices, parts in PARTS.items():
            c = config.default()
            c.base, c.quant, c.double_quant = f"random:{name}", four_bits, True
            c.dtype = c.param_dtype = "bfloat16"
            c.method.rank, c.method.targets = 8, _QV
            c.train.update(batch_size=64, seq_len=2048, remat="full", accumulate=parts)
            c.eval.every = 1
            p = spread.plan(config.members(c), DEVICE, devices, "auto")
            on, received = on_device(p, DEVICE), mesh_costs.traffic(p.load, p.spread.shape)
            times = on.compute_seconds, on.communication_seconds, on.step_seconds, on.apart_seconds
            label = f"{name}, {'NF4' if four_bits else 'bfloat16'}, {devices} {DEVICE}"
            sizes = map(bytes_text, (p.weights, p.peak(1, p.at(1))))
            if on.fit_one_at_a_time == 0:
                times, shown = (), ["does not fit", *[""] * 5]
            else:
                shown = [f"{on.fit_one_at_a_time:,}", bytes_text(sum(received))]
            lines.append((label, str(p.spread.shape), *sizes, *shown, *map(seconds_text, times)))
    note = "LoRA r = 8 on q+v, a step of 64 rows of 2,048 tokens in 16, 2 and 1 parts, with remat. "
    note += "Base and peak: of training one member, bytes on each device. Members: that fit one "
    note += (
        "after another. The base is exact, all else is estimated: a roofline without latencies, "
    )
    note += "with communication overlapped (step) or not (apart)."
    return Table("On several devices", (*headings, "step", "apart"), lines, note)


class Training(NamedTuple):
    """Bytes of training without activations, in the order of the table; trainable: a number."""

    trainable: int
    weights: int
    gradients: int
    adam32: int
    total32: int
    adam16: int
    total16: int
    checkpoint: int


def compare(name: str) -> dict[str, Training]:
    """{what is trained: its bytes} of an architecture, everything but QLoRA's weights in 16 bits
    and Adam's two moments in 32 or 16."""
    base = architecture_of(name)
    whole = tree.count(base.params)
    rows = {f"{name}, full": (whole, 2 * whole)}
    for kind, rank, targets, packed in COMPARED[name]:
        method = methods.method("lora", rank=rank, targets=targets)
        weights = tree.nbytes(quantised(base, "nf4", True).params) if packed else 2 * whole
        label = f"{name}, {kind} r = {rank}, {'+'.join(targets)}"
        n = method.count(base.params, base.sites)
        rows[label] = n, weights + 2 * n
    return {
        label: Training(n, w, 2 * n, 8 * n, w + 10 * n, 4 * n, w + 6 * n, 2 * n)
        for label, (n, w) in rows.items()
    }


def _fitting(count, rank):
    """count(rank), or None if a matrix is too small for the rank."""
    try:
        return count(rank)
    except ValueError:
        return None


def architecture_of(name: str):
    return skeleton(f"random:{name}", param_dtype="bfloat16")
