"""The sizes of the studies in configs/: base, task, batch, steps and learning rate.

A config file starts from `scale(argument)` and changes the keys that its study is about. The ladder
of pretrained bases is gpt2-nano (1 million parameters), stories (0.26), minilm (23) and smollm2
(135); "-random" after a name is the same architecture with random weights, the control.

Data and models lie where the environment variables LORAX_DATA and LORAX_MODELS say, if they are
set; --config.base=DIR and --config.task.path=PATH name them one by one.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from lorax.config import default
from lorax.errors import nearest


def data(path: str) -> str:
    """Where data lie: PATH in the folder LORAX_DATA, or its last part where that is unset."""
    folder = os.environ.get("LORAX_DATA")
    return str(Path(folder) / path) if folder else Path(path).name


def model(name: str, hub: str) -> str:
    """Where a model lies: NAME in the folder LORAX_MODELS, or its Hub id where that is unset."""
    folder = os.environ.get("LORAX_MODELS")
    return str(Path(folder) / name) if folder else hub


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
    config.base = data("models/stories-llama-260k")
    config.task.name = "e2e"
    config.task.path = data("e2e/e2e-dataset.zip")
    config.train.batch_size = 8
    config.train.seq_len = 128
    config.train.steps = 200
    config.train.lr = 1e-2
    config.train.warmup = 20
    config.eval.every = 100
    config.eval.examples = 256
    config.eval.test = 512
    return config


def minilm() -> ConfigDict:
    """SST-2 with all-MiniLM-L6-v2, an encoder of 22.7 million parameters (BERT, 6 layers of 384).

    Half of the development set chooses, the other half tests. Products with frozen weights multiply
    in bfloat16.
    """
    config = default()
    config.base = model("minilm", "sentence-transformers/all-MiniLM-L6-v2")
    config.operands = "bfloat16"
    config.task.name = "glue"
    config.task.subset = "sst2"
    config.task.path = data("glue")
    config.task.group_by_length = True
    config.train.seq_len = 64
    config.train.steps = 300
    config.train.lr = 2e-3
    config.train.warmup = 30
    config.eval.every = 150
    config.eval.batch_size = 64
    config.eval.examples = 512
    config.eval.test = 1024
    return config


def minilm_cola() -> ConfigDict:
    """CoLA with all-MiniLM-L6-v2: is a sentence grammatical?"""
    config = minilm()
    config.task.subset = "cola"
    return config


def smollm2() -> ConfigDict:
    """E2E with SmolLM2-135M-Instruct, a LLaMA of 30 layers of 576 (134.5 million parameters).

    Two examples share a row of 128 tokens. Products with frozen weights multiply in bfloat16.
    """
    config = default()
    config.base = model("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")
    config.task.name = "e2e"
    config.task.path = data("e2e/e2e-dataset.zip")
    config.task.packing = True
    config.operands = "bfloat16"
    config.train.batch_size = 4
    config.train.steps = 60
    config.train.lr = 4e-3
    config.train.warmup = 6
    config.eval.every = 30
    config.eval.batch_size = 8
    config.eval.examples = 48
    config.eval.test = 128
    return config


def smollm2_text() -> ConfigDict:
    """Shakespeare with SmolLM2-135M-Instruct: the next token of a text (tinyshakespeare)."""
    config = smollm2()
    config.task.name = "text"
    config.task.path = data("tinyshakespeare/input.txt")
    config.task.packing = False
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


SCALES = {
    None: nano,
    "stories": stories,
    "minilm": minilm,
    "minilm-cola": minilm_cola,
    "smollm2": smollm2,
    "smollm2-text": smollm2_text,
    "gpt2-medium": gpt2_medium,
}


def size_of(name: str | None) -> str | None:
    """The size that an argument names, pretrained or random: "stories" of "stories-random"."""
    if name is None or not name.endswith("random"):
        return name
    return name.removesuffix("random").rstrip("-") or None


def largest_rank(name: str | None) -> int:
    """The studies' large rank at a size: 64, or 32 for stories, whose k and v are 64 x 32."""
    return 32 if size_of(name) == "stories" else 64


def two_digits(rate: float) -> float:
    """A learning rate rounded to two digits: 0.0035 for 0.0035355."""
    return float(f"{rate:.2g}")


def scale(name: str | None) -> ConfigDict:
    """The config of a size, named by the argument of --config=FILE:ARGUMENT; None is `nano`, and
    "random" is `nano` from random weights.

    Raises ValueError for an unknown name.
    """
    size = size_of(name)
    if size not in SCALES:
        names = [known for known in SCALES if known]
        hint = nearest(name, names)
        raise ValueError(f"--config=FILE:{name}: no such size; choose {', '.join(names)}{hint}")
    config = SCALES[size]()
    if name != size:  # "-random"
        config.base = f"random:{config.base}"
    return config


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
