"""How much rank does a task need? LoRA of rank 1 to 64 beside full fine-tuning.

    python -m lorax.run --config=configs/gpt2_rank_sweep.py

After LoRA (arXiv:2106.09685) tables 6 and 18 and section 7.2, on every linear layer of gpt2-nano
and a data-to-text task, with three seeds. The scale is alpha / sqrt(r) (rsLoRA, arXiv:2312.03732):
with it one learning rate is near the best at every rank (LOG.md), so the curve shows the rank.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    config.method.targets = ("all-linear",)
    config.method.scaling = "rslora"
    config.method.alpha = 4.0
    config.train.batch_size = 8
    config.train.steps = 110
    config.train.lr = 1e-2
    config.eval.every = 55
    config.eval.examples = 64
    config.eval.test = 256
    config.eval.generate = 8
    config.analysis.delta = 0.02  # what the answer may lose of the best rank's gain
    config.sweep.rank = (1, 8, 32, 64)
    config.sweep.seed = (0, 1, 2)
    config.sweep.full_lr = (4e-3,)
    return config
