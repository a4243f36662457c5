"""Does LoRA learn less and forget less? Loss on the task against loss on the pretraining text.

    python -m lorax.run --config=configs/forgetting.py

Biderman et al. (arXiv:2405.09673): LoRA stays behind full fine-tuning on the new task and forgets
less of what the base knew, at rates tuned alike. What forgetting depends on: on the KL from the
base on the new task, and neither on the norm of the update nor on its rank (arXiv:2509.04259).
Every setting has four rates, a factor of two apart, and five evaluations of a constant rate, so
that each is also what a run stopped there would be: full fine-tuning with early stopping is the
control. experiments/less_forgetting and experiments/forgetting_law read it.

gpt2-nano was pretrained on stories and plays, the last twentieth of each left out: those rows are
the evaluation rows of task `text`. $LORAX_DATA has both files (docs/data.md).

    --config=configs/forgetting.py:stories
"""

from lorax.scales import data, largest_rank, scale, two_digits

STORIES = ("stories", {"name": "text", "path": data("tinystories/tinystories_sample.txt")})
PLAYS = ("plays", {"name": "text", "path": data("tinyshakespeare/input.txt")})
FACTORS = (0.25, 0.5, 1, 2)  # of the rate
FULL = 0.2  # full fine-tuning's rate, as a share of LoRA's


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.train.steps = 120
    config.train.schedule = "constant"
    config.train.warmup = 10
    config.eval.every = 24
    config.eval.examples = 64  # of each of up to three tasks
    config.eval.test = 0  # every evaluation counts here, not one after the last step
    config.eval.also = (STORIES, PLAYS) if config.base.endswith("gpt2-nano") else (STORIES,)
    points = [("lora", rank, 1.0) for rank in (4, 16, largest_rank(arg))] + [("full", 8, FULL)]
    points = [(*point, factor) for point in points for factor in FACTORS]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.lr = zip(
        *[(m, r, two_digits(config.train.lr * part * f)) for m, r, part, f in points], strict=True
    )
    sweep.zip = (("method", "rank", "lr"),)
    sweep.seed = (0, 1, 2, 3, 4, 5)
    return config
