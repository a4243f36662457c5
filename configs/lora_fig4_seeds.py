"""Do two seeds find the same subspace? Figure 4 of LoRA (arXiv:2106.09685).

    python -m lorax.run --config=configs/lora_fig4_seeds.py

phi(i, j) between seeds at one large rank, beside two Gaussian matrices. Published: q shares more
directions than v, the Gaussian control none. phi depends on the learning rate, and
experiments/subspaces takes table 6's members at their best rates. This trains four seeds at one
rate: a minute on two cores.

    --config=configs/lora_fig4_seeds.py:stories
    --config=configs/lora_fig4_seeds.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("q", "v")
    config.method.rank = largest_rank(arg)
    config.sweep.seed = (0, 1, 2, 3)
    return config
