"""Which method does most with a budget? Each at about 8,000 trainable parameters of gpt2-nano.

    python -m lorax.run --config=configs/methods_compare.py

LoRA's kin adapt q and v, at the rank nearest the budget; IA3, BitFit and LN-tuning have less to
train and are taken as they are. Full fine-tuning is the line to reach. Every method at three
learning rates and two seeds; the report compares each at its best. A method is a group of its own,
with a compilation of its own.
"""

from lorax.config import default

#: method, rank, virtual tokens; the comments give the trainable parameters
METHODS = (
    ("lora", 4, None),  # 8,192
    ("rslora", 4, None),  # 8,192
    ("dora", 4, None),  # 9,216
    ("lora-fa", 8, None),  # 8,192
    ("lora+", 4, None),  # 8,192
    ("adalora", 4, None),  # 8,224
    ("loha", 2, None),  # 8,192
    ("lokr", 32, None),
    ("vera", 896, None),  # 8,192
    ("ia3", 8, None),  # 3,072
    ("houlsby", 2, None),  # 7,440
    ("pfeiffer", 7, None),  # 7,708
    ("bitfit", 8, None),  # 5,760
    ("ln-tuning", 8, None),  # 2,304
    ("prefix", 8, 8),  # 8,192
    ("prompt", 8, 64),  # 8,192
    ("llama-adapter", 8, 16),  # 8,196
    ("full", 8, None),  # 957,184
)


def get_config(arg=None):
    config = default()
    config.method.alpha = 16.0
    config.train.batch_size = 8
    config.train.steps = 100
    config.eval.every = 50
    config.eval.examples = 128
    names, ranks, tokens = zip(*METHODS, strict=True)
    config.sweep.method, config.sweep.rank, config.sweep.tokens = names, ranks, tokens
    config.sweep.zip = (("method", "rank", "tokens"),)
    config.sweep.lr = (1e-3, 5e-3, 2e-2)
    config.sweep.seed = (0, 1)
    return config
