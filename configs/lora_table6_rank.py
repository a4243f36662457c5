"""How much rank does adaptation need? Table 6 of LoRA (arXiv:2106.09685).

    python -m lorax.run --config=configs/lora_table6_rank.py

Rank 1 to 64 on q, on q and v, and on all of attention. Published (GPT-3): accuracy is flat from
r = 1 or 2 on (WikiSQL, q and v: 73.4, 73.3, 73.7, 73.8, 73.5), and q alone stays below
(68.8 to 70.5). Each setting has its own best of five learning rates. Here: experiments/rank.

    --config=configs/lora_table6_rank.py:stories
    --config=configs/lora_table6_rank.py:minilm (SST-2, q and q, v; minilm-cola; minilm-random)
    --config=configs/lora_table6_rank.py:smollm2 (E2E, q and q, v; smollm2-random)
    --config=configs/lora_table6_rank.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale, tune


def get_config(arg=None):
    config = scale(arg)
    config.sweep.targets = (("q",), ("q", "v"), ("q", "k", "v", "o"))
    config.sweep.rank = (1, 2, 4, 8, largest_rank(arg))
    config.sweep.seed = (0, 1, 2)
    if arg and arg.startswith(("minilm", "smollm2")):  # their steps take long
        config.sweep.targets, config.sweep.rank = (("q",), ("q", "v")), (1, 4, 8, 64)
    tune(config, 2e-2 if arg is None else None)
    return config
