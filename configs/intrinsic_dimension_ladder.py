"""Does a larger model need fewer dimensions? d90 of language models of 0.26 to 135 million.

    python -m lorax.run --config=configs/intrinsic_dimension_ladder.py:stories
    python -m lorax.run --config=configs/intrinsic_dimension_ladder.py:smollm2

Aghajanyan et al. 2020 (arXiv:2012.13255, section 4.2): the more parameters, the smaller d90. Both
learn E2E: d90 is the smallest random subspace with 90% of what full fine-tuning takes off the
loss. Without an argument: gpt2-nano on its own task. The projection is sparse (Li et al. 2018).
experiments/dimension_over_size reads the runs.
"""

from lorax.scales import scale

#: dimensions, rates in the subspace, rates of full fine-tuning
GRIDS = {
    None: ((4_000, 16_000, 64_000, 256_000), (1e-2, 3e-2), (1e-3, 2e-3, 4e-3)),
    "stories": ((1_000, 4_000, 16_000, 64_000), (1e-2, 3e-2), (1e-3, 2e-3, 4e-3)),
    "smollm2": ((64, 512, 4_096, 32_768), (1e-2, 4e-2), (2e-5, 6e-5, 2e-4)),
}


def get_config(arg=None):
    config = scale(arg)
    config.operands = "float32"  # all weights are trained
    config.method.name = "subspace"
    config.method.projection = "sparse"
    config.train.schedule = "constant"
    config.eval.every = config.train.steps
    config.eval.test = 0
    config.sweep.dim, config.sweep.lr, config.search.baseline_lr = GRIDS[arg]
    config.search.threshold = 0.9
    config.search.metric = "loss"
    config.search.seeds = (0, 1, 2)
    config.search.points = 1
    return config
