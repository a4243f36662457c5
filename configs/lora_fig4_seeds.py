"""Do two seeds find the same subspace? Figure 4 of LoRA (arXiv:2106.09685).

    python -m lorax.run --config=configs/lora_fig4_seeds.py

phi(i, j) between seeds at one large rank, beside two Gaussian matrices. Published: q shares more
directions than v, the Gaussian control none. Here: experiments/subspaces: phi(8, 8) is 0.50 and
0.54 (q, v), 0.06 by chance. Its members but one are table
6's; a minute on two cores.

    --config=configs/lora_fig4_seeds.py:stories --config.base=DIR --config.task.path=ZIP
    --config=configs/lora_fig4_seeds.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("q", "v")
    config.method.rank = largest_rank(arg)
    config.sweep.seed = (0, 1, 2, 3)
    return config
