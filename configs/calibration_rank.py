"""Does the instrument find the rank that was planted?

python -m lorax.run --config=configs/calibration_rank.py
python -m lorax.run --config=configs/calibration_rank.py:noise
python -m lorax.run --config=configs/calibration_rank.py:spectrum
python -m lorax.run --config=configs/calibration_rank.py:adalora
"""

from lorax.config import default

SEEDS = (0, 1, 2, 3, 4)


def get_config(arg=None):
    config = default()
    config.base = "random:mlp-64-64"
    config.task.name = "planted"
    config.task.examples = 4096
    config.method.targets = ("re:.*/kernel",)
    config.method.scaling, config.method.alpha = "fixed", 1.0
    config.train.lr = 0.03
    config.train.batch_size = 256
    config.train.steps = 200
    config.train.schedule = "cosine"
    config.train.clip = 0.0
    config.eval.every = 200
    config.eval.batch_size = 1024
    config.eval.examples = 1024
    config.sweep.rank = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    config.sweep.planted_rank = (1, 2, 4, 8, 16)
    config.sweep.seed = config.sweep.data_seed = SEEDS
    config.sweep.zip = (("data_seed", "seed"),)
    if arg == "noise":
        config.sweep.noise = (0.1, 0.3, 1.0)
    elif arg == "spectrum":
        config.sweep.planted_rank = (2, 4, 8)
        config.task.spectrum = "geometric"
    elif arg == "adalora":
        config.base = "random:mlp-32-32-32"
        config.method.name = "adalora"
        config.method.target_rank = 3
        config.method.tinit, config.method.tfinal, config.method.every = 200, 330, 10
        config.method.orthogonal = 0.1
        config.method.alpha = 12.0
        config.train.steps = 1000
        config.sweep.rank = (12,)
        config.sweep.planted_rank = ((1, 5), (2, 4), (3, 3), (4, 2), (5, 1))
    elif arg is not None:
        raise ValueError(f"{arg!r} is no variant; there is noise, spectrum, adalora")
    return config
