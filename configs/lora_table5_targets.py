"""Which matrices should a fixed budget go to? Table 5 of LoRA (arXiv:2106.09685).

    python -m lorax.run --config=configs/lora_table5_targets.py

q, k, v or o alone at rank 8, two of them at 4, all four at 2: the same number of parameters.
Published (GPT-3, WikiSQL): 70.4, 70.0, 73.0, 73.2 alone, 71.4 for q, k and 73.7 for q, v and for
all four. Each set has its own best of five learning rates, on which the order of the best depends.
Here: experiments/targets.

    --config=configs/lora_table5_targets.py:stories
    --config=configs/lora_table5_targets.py:minilm (SST-2; minilm-cola; minilm-random)
    --config=configs/lora_table5_targets.py:smollm2 (E2E; smollm2-random)
    --config=configs/lora_table5_targets.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, tune


def get_config(arg=None):
    config = scale(arg)
    sweep = config.sweep
    sweep.targets = (("q",), ("k",), ("v",), ("o",), ("q", "k"), ("q", "v"), ("q", "k", "v", "o"))
    sweep.rank = (8, 8, 8, 8, 4, 4, 2)
    sweep.zip = (("targets", "rank"),)
    sweep.seed = (0, 1, 2)
    tune(config, 2e-2 if arg is None else None)
    return config
