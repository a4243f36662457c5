"""Does a small rank find what a large one finds? Figure 3 of LoRA (arXiv:2106.09685).

    python -m lorax.run --config=configs/lora_fig3_subspace.py

phi(i, j) between the directions of r = 8 and of r = 64, on q and v of every layer. Published: the
top direction is shared (phi above 0.5), the others are not. phi depends on the learning rate, and
experiments/subspaces takes table 6's members at their best rates. This trains two ranks at one
rate: a minute and a half on two cores.

    --config=configs/lora_fig3_subspace.py:stories
    --config=configs/lora_fig3_subspace.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("q", "v")
    config.sweep.rank = (8, largest_rank(arg))
    config.sweep.seed = (0, 1, 2)
    return config
