"""Which rank, rate, targets and scale does your task need on your model?

    python -m lorax.run --config=configs/which_rank.py:BASE,TASK,PATH
    python -m lorax.run --config=configs/which_rank.py:Qwen/Qwen2.5-0.5B,instruct,chats.jsonl
    python -m lorax.run --config=configs/which_rank.py:stories-llama-260k,e2e,e2e-dataset.zip

BASE: a shipped name, a folder or a Hub id. TASK and PATH: `task.name` and `task.path`
(docs/data.md); left out, they are the defaults. Around the usual recipes: rank 1 to 32, attention's
q and v or every linear layer, s = 1 or 2 at every rank, three seeds. Each of these 16 settings gets
its own learning rate out of five by halving, for about a third of what the full grid costs.
`python -m lorax.plan` with the same argument says beforehand what it takes.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    base, name, path = [*(arg or "").split(",", 2), "", ""][:3]
    config.base = base or config.base
    config.task.name = name or config.task.name
    config.task.path = path or None
    config.method.scaling = "fixed"  # s = alpha at every rank, so that a rank is not also a rate
    config.train.steps = 200
    config.train.batch_size = 8
    config.train.seq_len = 256
    config.train.warmup = 10
    config.eval.every = 50
    config.eval.examples = 128
    config.eval.test = 1024  # all rows of a large set would cost more than the training
    config.sweep.targets = (("q", "v"), ("all-linear",))
    config.sweep.alpha = (1.0, 2.0)
    config.sweep.rank = (1, 4, 16, 32)
    config.sweep.lr = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    config.sweep.tune = "lr"
    config.sweep.seed = (0, 1, 2)
    config.sweep.full_lr = (1e-4, 3e-4, 1e-3, 3e-3)  # its best is often a tenth of LoRA's
    return config
