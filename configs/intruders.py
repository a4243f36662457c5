"""Does LoRA put new directions into the weights where full fine-tuning turns the old ones?

    python -m lorax.run --config=configs/intruders.py

Shuttleworth et al. (arXiv:2410.21228): intruder dimensions come with LoRA and hardly with full
fine-tuning; fewer at a high rank with alpha = 2 r, at every rank with alpha = 8; the effective rank
of dW is far below full fine-tuning's. Here: experiments/intruders and
experiments/effective_rank, 8 minutes on two busy cores: 75 of 240 against none (stories, 15
minutes: 48 of 350 against 0.7), and as many for random directions of the same singular values.

    --config=configs/intruders.py:stories
    --config=configs/intruders.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    lr = config.train.lr / 2
    ranks = (1, 8, largest_rank(arg))
    # alpha times the learning rate is the same everywhere, as in the paper
    points = [("lora", r, 8.0, lr) for r in ranks]
    points += [("lora", r, 2.0 * r, lr * 8 / (2 * r)) for r in ranks]
    points += [("full", 8, 8.0, lr / 10)]
    points = [
        (method, r, alpha, rate * factor) for method, r, alpha, rate in points for factor in (1, 3)
    ]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.alpha, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "rank", "alpha", "lr"),)
    sweep.seed = (0, 1, 2)
    return config
