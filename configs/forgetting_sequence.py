"""Does LoRA forget more than full fine-tuning over five tasks in a row?

    python -m lorax.run --config=configs/forgetting_sequence.py

Shuttleworth et al. (arXiv:2410.21228): over tasks in a row intruder dimensions pile up in LoRA, and
it forgets more than full fine-tuning; less at a high rank. Every member goes on from its own merged
model, and every task is measured after each. alpha = 2 r and alpha times the rate is the same for
all ranks, as in the paper. experiments/sequence_forgetting reads it.

The tasks are two of data to text, two of sentences (GLUE's, as plain text) and Shakespeare's plays;
the stories are text that the base was pretrained on. $LORAX_DATA has the files (docs/data.md).

    --config=configs/forgetting_sequence.py:stories
"""

from lorax.scales import data, largest_rank, scale, two_digits

TEXTS = {
    "reviews": "glue/SST-2/dev.tsv",
    "sentences": "glue/CoLA/train.tsv",
    "plays": "tinyshakespeare/input.txt",
    "stories": "tinystories/tinystories_sample.txt",
}


def get_config(arg=None):
    config = scale(arg)
    text = {name: (name, {"name": "text", "path": data(path)}) for name, path in TEXTS.items()}
    e2e = ("e2e", {"name": "e2e", "path": data("e2e/e2e-dataset.zip")})
    restaurants = ("restaurants", {"name": "restaurants"})
    config.sequence = (restaurants, text["reviews"], e2e, text["sentences"], text["plays"])
    config.eval.also = (text["stories"],)
    config.method.targets = ("all-linear",)
    config.train.steps = 60
    config.train.warmup = 6
    config.train.seq_len = 128
    config.eval.every = 60
    config.eval.examples = 64
    config.eval.test = 0  # tasks are compared by their validation rows
    config.analysis.report = False
    lr = config.train.lr
    points = [("lora", rank, 2.0 * rank, lr * 8 / rank) for rank in (8, largest_rank(arg))]
    points += [("full", 8, 16.0, 0.2 * lr)]
    points = [(*point[:3], two_digits(point[3])) for point in points]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.alpha, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "rank", "alpha", "lr"),)
    sweep.seed = (0, 1, 2, 3, 4, 5)
    return config
