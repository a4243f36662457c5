"""How many dimensions does a network need to read digits? d90 of 8 x 8 images, on a laptop's CPU.

    python -m lorax.run --config=configs/intrinsic_dimension_digits.py

Training in random subspaces (Li et al. 2018, arXiv:1804.08838) of growing dimension d, compared
with full fine-tuning and LoRA; d90 is the smallest d with 90% of full fine-tuning's accuracy. The
first round is a grid of d at three learning rates and one seed, the second tries dimensions inside
the bracket with three seeds. The images come with scikit-learn. Two minutes; expected: d90 = 120 of
8,970.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    config.base = "random:mlp-64-64-64-10"  # 8,970 parameters
    config.task.name = "digits"
    config.method.name = "subspace"
    config.method.targets = ("all-linear",)  # LoRA's
    config.train.batch_size = 64
    config.train.steps = 600
    config.train.schedule = "constant"
    config.train.warmup = 0
    config.train.clip = 0.0
    config.eval.every = 300
    config.eval.examples = 10_000  # all
    config.eval.test = 0  # 360 images are too few to be cut in two
    config.eval.batch_size = 64
    config.sweep.dim = (10, 25, 63, 160, 400, 1000)
    config.sweep.lr = (1e-2, 3e-2, 1e-1)
    config.search.threshold = 0.9
    config.search.metric = "accuracy"
    config.search.baseline_lr = (1e-3, 3e-3)
    config.search.seeds = (0, 1, 2)
    config.search.lora_ranks = (1, 2, 4)
    return config
