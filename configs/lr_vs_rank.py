"""Does the best learning rate depend on the rank? LoRA at five rates and full fine-tuning at five.

    python -m lorax.run --config=configs/lr_vs_rank.py

"LoRA Without Regret" (Thinking Machines 2025): with s = alpha / r the best rate moves by less than
a factor of two from r = 4 to 512, and is about ten times that of full fine-tuning.
Here: experiments/learning_rate, 12 minutes on two busy cores: 5.3e-3 at r = 4, 7.7e-3 at r = 64,
2.6 to 5.2 times full fine-tuning's (stories, 21 minutes: 3.2e-3, 3.7e-3 at r = 32, 2.1 to 2.8).

    --config=configs/lr_vs_rank.py:stories
    --config=configs/lr_vs_rank.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale, two_digits

FACTORS = (0.1, 0.3, 1, 3, 10)  # of the learning rate


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.train.steps //= 2
    config.train.schedule = "constant"
    config.train.lr = {"gpt2-medium": 5e-4}.get(arg, 5e-3)
    config.eval.every = config.train.steps
    ranks = (1, 4, 16, largest_rank(arg))
    lr = config.train.lr
    rates = [two_digits(lr * factor) for factor in FACTORS]
    points = [("lora", r, rate) for r in ranks for rate in rates]
    points += [("full", 8, rate / 10) for rate in rates]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "rank", "lr"),)
    sweep.seed = (0, 1, 2)
    return config
