"""How much rank does it take to teach a diffusion model one new class?

    python -m lorax.run --config=configs/diffusion_rank.py

dit-digits, a diffusion transformer of 234,772 parameters, has learned scikit-learn's digits 0 to 8
and has never seen a 9. LoRA on all attention, feed-forward and modulation layers teaches it to
denoise 9s, at ranks 1 to 16 with three seeds. Each rank's rate is chosen by halving among three
with the first seed. Every member then makes 40 images of a 9 of the same noise, and
`sample_accuracy` is the share that a classifier takes for one; the digits 0 to 8 are evaluated too,
to see what is forgotten.

Expected: all ranks are alike. Losses of 0.0872 (rank 1) to 0.0866 (rank 8), where the base has
0.1085; 86 to 89% of the images are recognised, of the base's 10%; the loss on the old digits rises
by 0.026 to 0.029. Whether rank 1 is as good as the best three seeds don't decide. Four minutes of
CPU time, the report included.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    config.base = "dit-digits"
    config.task.name = "diffusion"
    config.task.classes = (9,)
    config.task.class_dropout = 0.0  # images are made without guidance
    config.method.targets = ("attention", "mlp", "modulation")
    config.train.batch_size = 32
    config.train.steps = 200
    config.eval.every = 50
    config.eval.examples = 10_000  # all
    config.eval.test = 0  # 36 images of a 9 are too few to be cut in two
    config.eval.batch_size = 36
    config.eval.also = (("old", {"name": "diffusion", "classes": tuple(range(9))}),)
    config.eval.samples = 40
    config.sweep.rank = (1, 2, 4, 8, 16)
    config.sweep.lr = (1e-3, 3e-3, 1e-2)
    config.sweep.seed = (0, 1, 2)
    config.sweep.tune = "lr"
    config.halving.seeds = 1
    return config
