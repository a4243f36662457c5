"""How much rank does a task need? LoRA of rank 1 to 64 on q and v, two seeds, one compiled program.

    python -m lorax.run --config=configs/gpt2_rank_sweep.py

After LoRA (arXiv:2106.09685) tables 6 and 18 and section 7.2, on gpt2-nano and a data-to-text task.
Expect the evaluation loss to flatten well before the largest rank, and the updates of two ranks to
share few directions.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    config.sweep.rank = (1, 2, 4, 8, 16, 64)
    config.sweep.seed = (0, 1)
    return config
