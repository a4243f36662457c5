"""How much rank does a task need? LoRA of rank 1 to 64 on q and v, two seeds, one compiled program.

    python -m lorax.run --config=configs/gpt2_rank_sweep.py

After LoRA (arXiv:2106.09685) tables 6 and 18 and section 7.2, on gpt2-nano and a data-to-text task.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    config.train.batch_size = 8
    config.train.steps = 150
    config.train.lr = 1e-2  # the best of 2e-3, 5e-3 and 1e-2 at ranks 1, 8 and 64
    config.eval.examples = 128
    config.sweep.rank = (1, 2, 4, 8, 16, 64)
    config.sweep.seed = (0, 1)
    return config
