"""Where do parameters count for more, in attention or in the feed-forward layers?

    python -m lorax.run --config=configs/mlp_vs_attention.py

"LoRA Without Regret" (Thinking Machines 2025) and Biderman et al. (arXiv:2405.09673): with the same
number of parameters the feed-forward layers win, all layers are about as good. Each has its own
best of five learning rates. Here: experiments/layers.

    --config=configs/mlp_vs_attention.py:stories
    --config=configs/mlp_vs_attention.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, tune

#: ranks of attention and mlp that make as many parameters within 1%, of all-linear 6 to 10% fewer
RANKS = {"stories": (11, 7, 4)} | dict.fromkeys((None, "minilm", "gpt2-medium"), (10, 8, 4))


def get_config(arg=None):
    config = scale(arg)
    sweep = config.sweep
    sweep.targets = (("attention",), ("mlp",), ("all-linear",))
    sweep.rank = RANKS[arg]
    sweep.zip = (("targets", "rank"),)
    sweep.seed = (0, 1, 2)
    tune(config)
    return config
