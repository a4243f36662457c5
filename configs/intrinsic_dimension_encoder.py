"""How many dimensions does a pretrained encoder need? d90 of MiniLM on SST-2 and CoLA.

    python -m lorax.run --config=configs/intrinsic_dimension_encoder.py
    python -m lorax.run --config=configs/intrinsic_dimension_encoder.py:cola

The setting of Aghajanyan et al. 2020 (arXiv:2012.13255, section 3) at a fifth of BERT base's size:
fine-tuning in a random subspace of all parameters (DID), and with a scale per layer (SAID), until
90% of full fine-tuning's score. Published for BERT base: 1,861 and 1,608 on MRPC, 9,295 and 8,030
on QQP. The control is the same architecture with random weights. The random projection is sparse
(Li et al. 2018): Fastfood of 22.7 million parameters costs more than the step itself.
experiments/encoder_dimension reads both runs.

    --config=configs/intrinsic_dimension_encoder.py:sst2 --config.sweep.base=DIR,random:DIR
"""

from lorax.errors import nearest
from lorax.scales import minilm

METRICS = {"sst2": "accuracy", "cola": "matthews"}


def get_config(arg=None):
    arg = arg or "sst2"
    if arg not in METRICS:
        near = nearest(arg, METRICS)
        raise ValueError(f"--config=FILE:{arg}: choose {' or '.join(METRICS)}{near}")
    config = minilm()
    config.task.subset = arg
    config.method.name = "subspace"
    config.method.projection = "sparse"
    config.train.steps = 300
    config.train.schedule = "constant"
    config.eval.every = 300
    config.eval.examples = 1_024
    config.eval.test = 0
    config.search.threshold = 0.9
    config.search.metric = METRICS[arg]
    config.search.baseline_lr = (3e-5, 1e-4, 3e-4)
    config.search.seeds = (0, 1, 2)
    config.search.points = 1
    config.search.lora_ranks = (1, 8)
    config.sweep.base = (config.base, f"random:{config.base}")
    config.sweep.method = ("subspace", "said")
    config.sweep.dim = (32, 128, 512, 2_048)
    config.sweep.lr = (1e-2, 4e-2)
    return config
