"""Which method does most with a budget? Each at about 8,000 trainable parameters of gpt2-nano.

    python -m lorax.run --config=configs/methods_compare.py

LoRA and its variants adapt q and v, at the rank nearest to the budget; IA3, BitFit and LN-tuning
have fewer parameters. Full fine-tuning is the reference. Every method has its own three learning
rates, a factor of four apart, and two seeds; the report compares each at its best. Each method is
a separate group with its own compilation.
"""

from lorax.config import default

#: method, rank, virtual tokens, middle learning rate; the comments give the trainable parameters
METHODS = (
    ("lora", 4, None, 2e-2),  # 8,192
    ("rslora", 4, None, 2e-2),  # 8,192
    ("dora", 4, None, 2e-2),  # 9,216
    ("lora-fa", 8, None, 8e-2),  # 8,192
    ("lora+", 4, None, 4e-3),  # 8,192
    ("adalora", 4, None, 8e-2),  # 8,224
    ("loha", 2, None, 4e-2),  # 8,192
    ("lokr", 32, None, 8e-2),  # 8,320: whole factors of 4 x 4 and 32 x 32
    ("vera", 896, None, 3e-1),  # 8,192
    ("ia3", 8, None, 3e-1),  # 3,072
    ("houlsby", 2, None, 2e-2),  # 7,440
    ("pfeiffer", 7, None, 2e-2),  # 7,708
    ("bitfit", 8, None, 4e-2),  # 5,760
    ("ln-tuning", 8, None, 4e-2),  # 2,304
    ("prefix", 8, 8, 3e-1),  # 8,192
    ("prompt", 8, 64, 2e-1),  # 8,192
    ("llama-adapter", 8, 16, 1.6e-1),  # 8,196
    ("full", 8, None, 4e-3),  # 957,184
)
FACTORS = (0.25, 1, 4)  # of the learning rate


def get_config(arg=None):
    config = default()
    config.method.alpha = 16.0
    config.method.factor = 4  # lokr
    config.train.batch_size = 8
    config.train.steps = 100
    config.eval.every = 50
    config.eval.examples = 128
    points = [(name, r, t, lr * f) for name, r, t, lr in METHODS for f in FACTORS]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.tokens, sweep.lr = zip(*points, strict=True)
    sweep.zip = (("method", "rank", "tokens", "lr"),)
    sweep.seed = (0, 1)
    return config
