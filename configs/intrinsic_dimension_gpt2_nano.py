"""How many dimensions does fine-tuning a language model need? d90 of gpt2-nano on `restaurants`.

    python -m lorax.run --config=configs/intrinsic_dimension_gpt2_nano.py

After Aghajanyan et al. 2020 (arXiv:2012.13255): fine-tuning in a random subspace of all parameters
(DID) and with a scale per layer (SAID), compared with full fine-tuning and LoRA; the last column is
LoRA's number of parameters for the same loss. d90 is the smallest d with 90% of full fine-tuning's
decrease of the loss. With a folder of checkpoints, d90 over pretraining:

    python -m experiments.gpt2_nano.pretrain --data=DIR --output=CHECKPOINTS/final \\
        --checkpoints=CHECKPOINTS
    python -m lorax.run --config=configs/intrinsic_dimension_gpt2_nano.py:CHECKPOINTS

Ten and twelve minutes on two cores. Expected: 110,000 for DID, 63,000 for SAID
(experiments/intrinsic_dimension).
"""

from pathlib import Path

from lorax.config import default


def get_config(arg=None):
    config = default()
    config.method.name = "subspace"
    config.method.targets = ("all-linear",)  # LoRA's
    config.train.batch_size = 8
    config.train.steps = 100
    config.eval.every = 100
    config.eval.examples = 128
    config.sweep.dim = (16_000, 64_000, 256_000)
    config.sweep.lr = (1e-2, 3e-2)
    config.search.threshold = 0.9
    config.search.metric = "loss"
    config.search.baseline_lr = (4e-3,)
    config.search.seeds = (0, 1, 2)
    config.search.points = 1
    if arg is None:
        config.sweep.method = ("subspace", "said")
        config.search.lora_ranks = (4, 16, 64)
    else:
        config.search.seeds = (0, 1)
        steps = lambda path: int(path.name.removeprefix("step"))
        config.sweep.base = tuple(map(str, sorted(Path(arg).glob("step*"), key=steps)))
        config.sweep.base += ("gpt2-nano",)
    return config
