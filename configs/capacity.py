"""When does a rank run out? LoRA of rank 1, 4, 16 and full fine-tuning over many steps of new data.

    python -m lorax.run --config=configs/capacity.py

"LoRA Without Regret" (Thinking Machines 2025): each rank follows full fine-tuning until its
capacity binds, at a number of steps that grows with the rank. Each rank has its own best of five
learning rates, full fine-tuning of four. Here: experiments/capacity.

    --config=configs/capacity.py:stories
    --config=configs/capacity.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, tune, two_digits


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.train.schedule = "constant"
    config.train.steps = max(config.train.steps, 500)
    config.eval.every = config.train.steps // 10
    lr = config.train.lr / 2
    config.sweep.rank = (1, 4, 16)
    config.sweep.seed = (0, 1, 2)
    config.sweep.full_lr = tuple(two_digits(lr * factor) for factor in (0.1, 0.2, 0.4, 0.8))
    tune(config, lr)
    return config
