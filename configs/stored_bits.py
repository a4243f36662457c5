"""How many bits does a trainable parameter store? Random strings, learned by heart.

    python -m lorax.run --config=configs/stored_bits.py:stories
    python -m lorax.run --config=configs/stored_bits.py:stories-random

Tan, Du and Feng (arXiv:2607.21351): full fine-tuning stores more bits a trainable parameter than
LoRA, LoRA in the feed-forward layers more than in attention, and a random base far less. About
4,000 parameters each: one o matrix in full, LoRA on all o, on attention and on the feed-forward
layers; 40 strings of 63 tokens, several times what they can store. Each at its best of six rates.
experiments/bits_per_parameter reads it.
"""

from lorax.scales import scale, size_of, two_digits

#: size: strings; ranks of LoRA on o, on attention, on the feed-forward layers; the layer whose o is
#: trained in full
SIZES = {"stories": (40, 6, 2, 1, 2), None: (112, 16, 4, 3, 2)}
FACTORS = tuple(2.0**k for k in range(-4, 2))  # of the rate


def get_config(arg=None):
    size = size_of(arg)
    if size not in SIZES:
        raise ValueError(f"{arg!r} is no size of this study; there is none, random, stories")
    strings, of_o, of_attention, of_mlp, layer = SIZES[size]
    config = scale(arg)
    config.task.name, config.task.path = "random_strings", None
    config.task.examples = strings
    config.method.parameters = ("o",)
    config.train.seq_len = 64
    config.train.batch_size = strings // 2
    config.train.steps = 600
    config.train.schedule = "cosine"
    config.train.warmup = 20
    config.eval.every = 60
    config.eval.test = 0
    cells = [
        ("full", ("o",), 8, (layer,)),
        ("lora", ("o",), of_o, None),
        ("lora", ("attention",), of_attention, None),
        ("lora", ("mlp",), of_mlp, None),
    ]
    sweep = config.sweep
    sweep.method, sweep.targets, sweep.rank, sweep.layers = zip(*cells, strict=True)
    sweep.zip = (("method", "targets", "rank", "layers"),)
    sweep.lr = tuple(two_digits(config.train.lr * factor) for factor in FACTORS)
    sweep.tune = "lr"
    sweep.seed = (0, 1, 2)
    return config
