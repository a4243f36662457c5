"""From which rank on does LoRA reach the linear model's minimum? Ranks, outputs and examples.

    python -m lorax.run --config=configs/spurious_minima.py

With K outputs and N examples of 64 inputs: r (r + 1) / 2 > K N is enough (Jang et al.,
arXiv:2402.11867), or r (64 + K) - r^2 > 1.35 K N (Park, arXiv:2605.03724). One linear layer, whose
model is linear in dW, learns the labels of a teacher of full rank by squared error; as N is at most
64, the linear model's minimum is 0. Twenty teachers and starts. experiments/spurious_minima reads
it.
"""

from lorax.config import default

OUTPUTS = (4, 16, 64)
EXAMPLES = (2, 4, 8, 16, 32, 64)
RANKS = (1, 2, 4, 8, 16, 32, 64)


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"{arg!r} given, but this study has one size")
    config = default()
    config.task.name = "planted"
    config.task.examples = 64
    config.method.targets = ("re:.*/kernel",)
    config.method.scaling, config.method.alpha = "fixed", 1.0
    config.train.lr = 0.03
    config.train.schedule = "cosine"
    config.train.warmup = 0
    config.train.steps = 1500
    config.train.clip = 0.0
    config.eval.every = 1500
    config.eval.batch_size = 64
    config.eval.examples = 64
    config.eval.test = 0
    points = [
        (f"random:mlp-64-{outputs}", rank, n, n)
        for outputs in OUTPUTS
        for n in EXAMPLES
        for rank in RANKS
        if rank <= outputs
    ]
    sweep = config.sweep
    sweep.base, sweep.rank, sweep.n_train, sweep.batch_size = zip(*points, strict=True)
    sweep.zip = (("base", "rank", "n_train", "batch_size"), ("data_seed", "seed"))
    sweep.data_seed = sweep.seed = tuple(range(20))
    config.analysis.report = False
    return config
