"""How does memory grow with the rank and fall with the length? Random strings, five ranks.

    python -m lorax.run --config=configs/memory_law.py

arXiv:2605.30260: the reduction of the loss goes as C r^a l^-b + c with the rank r and the length l.
64 strings of 16 to 128 tokens, LoRA of rank 1 to 16 on all linear layers, each at its best of five
rates by halving, two seeds. Rates race for half of the steps: a rate that is ahead early is too
large at the end. experiments/memory_law reads it.

    --config=configs/memory_law.py:stories
"""

from lorax.scales import scale, two_digits


def get_config(arg=None):
    config = scale(arg)
    config.task.name, config.task.path = "random_strings", None
    config.task.examples = 64
    config.method.targets = ("all-linear",)
    config.train.batch_size = 16
    config.train.steps = 300
    config.train.schedule = "cosine"
    config.train.warmup = 20
    config.eval.every = 20
    config.eval.test = 0
    sweep = config.sweep
    sweep.axes = {"train.seq_len": (16, 32, 64, 128)}
    sweep.rank = (1, 2, 4, 8, 16)
    sweep.lr = tuple(two_digits(config.train.lr * factor) for factor in (0.125, 0.25, 0.5, 1, 2))
    sweep.tune = "lr"
    sweep.seed = (0, 1)
    config.halving.rungs = (0.5,)
    return config
