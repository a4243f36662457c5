"""A task of your own: sums to complete, scored by the share of sums that come out right.

    python -m lorax.run --config=docs/examples/task.py
    python -m lorax.run --config=docs/examples/task.py --config.task.examples=4000
    python -m lorax.run --config=configs/gpt2_rank_sweep.py \\
        --config.task.name=docs/examples/task.py:sums
    python -m lorax.plan --config=docs/examples/task.py

The study sweeps rank x seed on gpt2-nano. After training every member completes 32 sums, and the
metric scores them: `correct` and `digits` stand beside the loss in tables and report. 100 steps are
few: test losses of 1.43 and 1.44 at rank 1, 1.33 and 1.32 at rank 8, and sums that have the right
number of digits (`digits` 0.69 to 0.81) but are mostly wrong (`correct` 0 to 0.09).
"""

import random

from lorax import tasks
from lorax.config import default


def sums(seed: int, examples: int = 1000):
    """Sums of two numbers below 50, spelled digit by digit. seed, examples: of `config.task`."""
    draw = random.Random(seed)
    numbers = [(a, b) for a in range(50) for b in range(50)]
    draw.shuffle(numbers)
    validation, test, rest = numbers[:64], numbers[64:128], numbers[128:]
    return tasks.pairs(
        train=(spell(*draw.choice(rest)) for _ in range(examples)),
        eval=[spell(a, b) for a, b in validation],
        test=[spell(a, b) for a, b in test],
        metric=right_sums,
    )


def spell(a: int, b: int) -> tuple[str, str]:
    """(3, 14) -> ("3 + 1 4 =", "1 7"): prompt and completion."""
    digits = lambda n: " ".join(str(n))
    return f"{digits(a)} + {digits(b)} =", digits(a + b)


def right_sums(texts, references) -> dict[str, float]:
    """Share of sums that are right, and of those with the right number of digits."""
    both = zip(texts, references, strict=True)
    pairs = [(text.split(), right[0].split()) for text, right in both]
    return {
        "correct": sum(text == right for text, right in pairs) / len(pairs),
        "digits": sum(len(text) == len(right) for text, right in pairs) / len(pairs),
    }


def get_config(arg=None):
    config = default()
    config.task.name = sums
    config.task.examples = 1000
    config.train.batch_size = 16
    config.train.seq_len = 24
    config.train.steps = 100
    config.train.lr = 5e-3
    config.eval.every = 50
    config.eval.examples = 64
    config.eval.generate = 32
    config.eval.new_tokens = 8
    config.sweep.rank = (1, 8)
    config.sweep.seed = (0, 1)
    return config
