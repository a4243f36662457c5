"""Does the instrument find the rank that was planted?

    python -m lorax.run --config=configs/calibration_rank.py
    python -m lorax.run --config=configs/calibration_rank.py:noise
    python -m lorax.run --config=configs/calibration_rank.py:spectrum
    python -m lorax.run --config=configs/calibration_rank.py:deep
    python -m lorax.run --config=configs/calibration_rank.py:adalora

A linear layer of 64 x 64 is changed by an update of rank r*, and LoRA with ten ranks is trained to
find it. Without noise the knee of the loss (`lorax.analysis.calibration.knee`) must be r* for every
r* and every seed. `noise` adds noise to the labels; 1.0 is as large as the planted signal.
`spectrum` plants singular values that halve from one to the next, so that the last ones hardly
count; `deep` plants rank r* in each of two and of three kernels with ReLU between them; `adalora`
gives AdaLoRA a budget equal to the sum of two kernels' ranks, which it must divide as planted.

Two minutes on two cores; `noise` six, `deep` seven. experiments/calibration has the results: the
knee is r* in 140 of 140 runs with a flat spectrum, and AdaLoRA's division is right in 49 of 50.
Groups differ only in the planted update, so they share one program.
"""

from lorax.config import default

SEEDS = (0, 1, 2, 3, 4)  # of the data and of the adapter, together


def get_config(arg=None):
    if arg not in (None, "noise", "spectrum", "deep", "adalora"):
        raise ValueError(f"{arg!r} is no variant; there is noise, spectrum, deep, adalora")
    config = default()
    config.base = "random:mlp-64-64"
    config.task.name = "planted"
    config.task.examples = 4096
    config.method.targets = ("re:.*/kernel",)
    # The scale is the same for all ranks: s = 1. With alpha / r the small ones take larger steps.
    config.method.scaling, config.method.alpha = "fixed", 1.0
    config.train.lr = 0.03
    config.train.schedule = "cosine"
    config.train.steps = 200
    config.train.batch_size = 256
    config.train.clip = 0.0
    config.eval.every = 1000
    config.eval.batch_size = 1024
    config.eval.examples = 1024
    config.eval.test = 0  # nothing is chosen by these rows: all of them are for the estimates

    sweep = config.sweep
    sweep.planted_rank = (1, 2, 4, 8, 16)
    sweep.rank = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    sweep.data_seed = sweep.seed = SEEDS
    sweep.zip = (("data_seed", "seed"),)
    if arg == "noise":
        sweep.noise = (0.1, 0.3, 1.0)
    if arg == "spectrum":
        config.task.spectrum = "geometric"
        sweep.planted_rank = (2, 3, 4, 8)
    if arg == "deep":
        sweep.base = ("random:mlp-32-32-32", "random:mlp-32-32-32-32")
        sweep.planted_rank = (1, 2, 4, 8)
        config.train.steps = 1000
    if arg == "adalora":
        config.base = "random:mlp-32-32-32"
        config.method.name = "adalora"
        config.method.alpha, config.method.orthogonal = 12.0, 0.1
        config.method.target_rank = 3  # of each kernel on average: 6 in all
        config.method.tinit, config.method.tfinal, config.method.every = 200, 330, 10
        config.train.steps = 1000
        sweep.rank = (12,)
        sweep.planted_rank = ((1, 5), (2, 4), (3, 3), (4, 2), (5, 1))
        sweep.noise = (0.0, 0.3)
        config.train.parallel = "none"  # a group is one member, and a small one
    return config
