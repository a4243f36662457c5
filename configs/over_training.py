"""How does dW grow over training: its rank, and where it lies among the directions of W?

    python -m lorax.run --config=configs/over_training.py

Two claims read this run. experiments/rank_grows (Biderman et al., arXiv:2405.09673, section 4.6):
the number of directions with 90% of dW's energy grows over training. experiments/drift_to_principal
(SDC-LoRA, ACL Findings 2026): dW moves from minor to principal directions of W. Full fine-tuning
and LoRA of half the width, ten seeds, singular values at eight steps.

    --config=configs/over_training.py:stories
    --config=configs/over_training.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.train.steps = 120
    config.train.schedule = "constant"
    config.train.warmup = 0
    config.eval.every = 15
    config.eval.examples = 32  # the loss is only a check here
    config.eval.test = 0
    config.analysis.trajectory = True
    config.analysis.subspaces = 8
    lr = config.train.lr
    points = [("full", 8, lr / 10), ("lora", largest_rank(arg), lr / 2)]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "rank", "lr"),)
    sweep.seed = tuple(range(10))
    return config
