"""Which factor has to be trained, a or b? LoRA, b alone (LoRA-FA) and a alone.

    python -m lorax.run --config=configs/which_factor.py

Zhu et al. (arXiv:2402.16842): training b with a random frozen a is about as good as LoRA, training
a with a random frozen b is worse. Attention's matrices are as wide as they are high; down's input
is four times as wide as its output, up's output as its input: a factor that wins by its shape would
not win in both. Each at its best of eight rates by halving. experiments/which_factor reads it.

    --config=configs/which_factor.py:stories
    --config=configs/which_factor.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

FACTORS = tuple(2.0**k for k in range(-2, 6))  # of the rate: one factor alone wants larger ones


def get_config(arg=None):
    config = scale(arg)
    config.train.steps = 60
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 10
    config.eval.examples = 128
    config.eval.test = 128
    sweep = config.sweep
    sweep.method = ("lora", "lora-fa", "frozen-b")
    sweep.targets = (("attention",), ("down",), ("up",))
    sweep.rank = (4, 16)
    sweep.lr = tuple(two_digits(config.train.lr * factor) for factor in FACTORS)
    sweep.tune = "lr"
    sweep.seed = (0, 1, 2, 3, 4)
    return config
