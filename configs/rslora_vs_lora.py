"""s = alpha / r or alpha / sqrt(r)? LoRA against rsLoRA (arXiv:2312.03732) from rank 4 up.

    python -m lorax.run --config=configs/rslora_vs_lora.py

At one learning rate the first steps of alpha / r coincide at every rank ("LoRA Without Regret",
Thinking Machines 2025); those of alpha / sqrt(r) part. alpha is such that both agree at r = 4.
Here: experiments/scaling.

    --config=configs/rslora_vs_lora.py:stories
    --config=configs/rslora_vs_lora.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale

#: rank, scaling, alpha: s = 4 at r = 4 for both
RANKS = {None: (4, 16, 64, 128), "stories": (4, 8, 16, 32), "gpt2-medium": (4, 16, 64, 256)}


def get_config(arg=None):
    config = scale(arg)
    config.train.warmup = 0  # the first steps are what the claim is about
    config.train.schedule = "constant"
    config.train.steps = 60
    config.eval.every = 5
    config.eval.examples = 64
    points = [(r, scaling, alpha) for scaling, alpha in (("lora", 16.0), ("rslora", 8.0))
              for r in RANKS[arg]]  # fmt: skip
    sweep = config.sweep
    sweep.rank, sweep.scaling, sweep.alpha = zip(*points, strict=True)
    sweep.zip = (("rank", "scaling", "alpha"),)
    sweep.seed = (0, 1, 2, 3, 4)
    return config
