"""The three sizes of the studies in configs/: base, task, batch, steps and learning rate.

A config file starts from `scale(argument)` and changes the keys that its study is about.
"""

from ml_collections import ConfigDict

from lorax.config import default
from lorax.errors import nearest


def nano() -> ConfigDict:
    """gpt2-nano on the shipped data-to-text task: minutes on two CPU cores, no download."""
    config = default()
    config.train.batch_size = 8
    config.train.steps = 150
    config.train.lr = 1e-2
    config.eval.every = 50
    config.eval.examples = 128
    return config


def stories() -> ConfigDict:
    """E2E with a real pretrained model of 260,032 parameters, karpathy/tinyllamas' stories260K.

    Its vocabulary of 512 makes texts long; examples of up to 128 tokens are kept, a third of all.
    """
    config = default()
    config.base = "stories-llama-260k"
    config.task.name = "e2e"
    config.task.path = "e2e-dataset.zip"
    config.train.batch_size = 8
    config.train.seq_len = 128
    config.train.steps = 200
    config.train.lr = 1e-2
    config.train.warmup = 20
    config.eval.every = 100
    config.eval.examples = 256
    config.eval.test = 512
    return config


def gpt2_medium() -> ConfigDict:
    """E2E with GPT-2 medium and the LoRA paper's hyperparameters (arXiv:2106.09685, table 11)."""
    config = default()
    config.base = "openai-community/gpt2-medium"
    config.task.name = "e2e"
    config.task.path = "e2e-dataset.zip"
    config.method.alpha = 32.0
    config.method.dropout = 0.1
    config.train.batch_size = 8
    config.train.seq_len = 512
    config.train.steps = 26_290  # 5 epochs of 42,061 examples
    config.train.lr = 2e-4
    config.train.warmup = 500
    config.train.eps = 1e-6
    config.train.weight_decay = 0.01
    config.train.label_smoothing = 0.1
    config.train.clip = 0.0
    config.eval.every = 1000
    config.eval.batch_size = 16
    config.eval.examples = 1024
    config.eval.test = 1024
    return config


SCALES = {None: nano, "stories": stories, "gpt2-medium": gpt2_medium}
#: The studies' large rank; k and v of stories are 64 x 32.
LARGEST_RANK = {None: 64, "stories": 32, "gpt2-medium": 64}


def two_digits(rate: float) -> float:
    """A learning rate rounded to two digits: 0.0035 for 0.0035355."""
    return float(f"{rate:.2g}")


def tune(config: ConfigDict, rate: float | None = None) -> None:
    """Gives each setting of the sweep its own best of five learning rates, a factor of two apart.

    rate: the middle one (default: train.lr). The rates race with the first seed alone, to a quarter
    and to half of the steps; the best is then trained with the other seeds. Of three seeds that
    costs 1.4 times what one rate does.
    """
    rate = config.train.lr if rate is None else rate
    config.sweep.lr = tuple(two_digits(rate * factor) for factor in (0.25, 0.5, 1, 2, 4))
    config.sweep.tune = "lr"
    config.halving.rungs = (0.25, 0.5)
    config.halving.keep = 0.5
    config.halving.seeds = 1


def scale(name: str | None) -> ConfigDict:
    """The config of a size, named by the argument of --config=FILE:ARGUMENT; None is `nano`.

    Raises ValueError for an unknown name.
    """
    if name not in SCALES:
        names = [known for known in SCALES if known]
        hint = nearest(name, names)
        raise ValueError(f"--config=FILE:{name}: no such size; choose {', '.join(names)}{hint}")
    return SCALES[name]()
