"""A group of members as shapes: base, stack and batches as training has them, nothing allocated."""

import functools
import math

import jax

from lorax import quant, tasks
from lorax.calls import steps_per_call
from lorax.models.load import skeleton
from lorax.models.shapes import architecture
from lorax.tasks import kinds
from lorax.train import evidence, prepare, programs, stacks
from lorax.train.batches import axes
from lorax.train.prepare import base_settings


def shapes(members):
    """(`Base`, `stacks.Stack`) of a group, every array of both a `jax.ShapeDtypeStruct`.

    Raises ValueError or FileNotFoundError for what a user can mend.
    """
    c = members[0].config
    try:
        base = skeleton(c.base, **base_settings(c))
    except FileNotFoundError as error:
        known = c.base.rpartition("/")[2]
        hint = f" To plan without its files: --config.base=random:{known}"
        raise FileNotFoundError(f"{error}{hint * bool(architecture(known))}") from None
    tasks.check_base(c.task, base, c.train.seq_len)
    prepare.check_also(c, base)
    base = quantised(base, c.quant, c.double_quant) if c.quant else base
    for member in members:
        if evidence.is_automatic(member, stacks.hyperparameters(member, base)):
            raise ValueError(
                "method.rank, method.targets: 'auto' is decided by training batches, which a plan "
                "does not read; give a rank and targets"
            )
    built = stacks.build_methods(members, base)
    pad = stacks.padding(built, base)
    # All members have arrays of the same shapes.
    start = lambda params: stacks.start(members[0], built[0], base.replace(params=params), pad)
    return base, stacks.described(members, built, jax.eval_shape(start, base.params))


def with_steps(members, say=lambda line: None):
    """The members with the steps that their `train.epochs` makes; reads the rows, not the weights.

    Raises ValueError or FileNotFoundError if the rows can't be counted. say: prints a line.
    """

    def base_of(c):
        base = skeleton(c.base, **base_settings(c))
        lacks_tokenizer = tasks.kind_of(c.task).reads == "tokens" and base.vocabulary is None
        if lacks_tokenizer or c.task.name == "planted":
            why = "has no tokenizer to make rows with" if lacks_tokenizer else "is not loaded"
            raise ValueError(
                f"train.epochs: {c.train.epochs:g} given, but {c.base} {why}, so that a plan can't "
                "count the rows of this task; set train.epochs to 0 and train.steps to a number"
            )
        return base

    return prepare.with_steps(members, base_of, {}, functools.cache(say))


def one_member(trees):
    """The shapes of one member, of stacked ones."""
    return jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), trees)


def rows(c, base=None) -> dict:
    """The batches of one call of the training program, of one member: leaves (K, A, B, ...)."""
    lead = axes(c.train, steps_per_call(c.eval.every, c.train.offload))
    return tasks.batch_shapes(c.task, lead, c.train.seq_len, base)


def states_of_base(stacked: stacks.Stack, base) -> int:
    """Bytes of the base's states of the validation rows that a run keeps on each device for the KL
    of `eval.also`; 0 if it keeps none."""
    c = stacked.config
    kind, n = tasks.kind_of(c.task), tasks.measured(c.task, c.eval.examples)
    size = min(c.eval.batch_size, n)
    lead = math.ceil(n / size), size
    batches = tasks.batch_shapes(c.task, lead, c.train.seq_len, base)
    if not c.eval.also or not kinds.has_probabilities(kind, batches):
        return 0
    program = programs.program_of(stacked, base, 1, kind)
    return programs.states_bytes(program, base.params, batches, lead[0])


def quantised(base, kind: str, double: bool):
    """A base of shapes with its linear kernels, but heads, as `quant.quantize` holds them."""
    quantize = lambda params: quant.quantize(params, kind, double, sites=base.sites)
    return base.replace(params=jax.eval_shape(quantize, base.params))
