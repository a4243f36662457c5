"""How little data does adaptation take? LoRA, full fine-tuning and a prefix on 100 examples and up.

    python -m lorax.run --config=configs/n_train.py

After LoRA (arXiv:2106.09685), table 16: on 100 examples of MNLI LoRA has 63.8, full fine-tuning
60.2, prefixes 37.6 and 48.3; on all 392,000 it is 91.7, 89.5, 88.6 and 89.6. Every method and size
has the best of three learning rates. Here: experiments/little_data.

    --config=configs/n_train.py:stories
    --config=configs/n_train.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits


def get_config(arg=None):
    config = scale(arg)
    config.method.tokens = 8
    # A small set is soon memorised: the step of the best validation loss is tested.
    config.eval.every = config.train.steps // 5
    config.eval.keep = "best"
    lr = config.train.lr
    rates = [("lora", lr), ("full", lr / 5), ("prefix", lr * 30)]
    points = [(method, two_digits(rate * f)) for method, rate in rates for f in (0.4, 1, 2.5)]
    sweep = config.sweep
    sweep.method, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "lr"),)
    sweep.n_train = (100, 1000, None)
    sweep.seed = (0, 1, 2)
    return config
