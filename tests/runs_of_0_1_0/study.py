"""A small study that lorax 0.1.0 ran: LoRA on images or texts, other methods, a search.

The zips beside it hold what it left, once finished and once stopped.
"""

from lorax.config import default


def get_config(arg="sweep"):
    c = default()
    c.base = "random:mlp-64-16-10"
    c.task.name = "digits"
    c.train.steps, c.train.batch_size, c.train.warmup = 6, 8, 1
    c.eval.every, c.eval.examples, c.eval.batch_size = 2, 40, 20
    c.method.targets = ("all-linear",)
    if arg == "sweep":
        c.sweep.rank, c.sweep.seed = (1, 2), (0, 1)
        c.analysis.trajectory = True
    elif arg == "text":
        c.base, c.task.name, c.train.seq_len = "gpt2-nano", "restaurants", 80
        c.method.targets, c.method.layers, c.method.dropout = ("q", "v"), (0,), 0.1
        c.eval.generate, c.eval.new_tokens = 2, 4
        c.sweep.rank = (1, 2)
    elif arg == "methods":
        c.sweep.method = ("loha", "full")
    elif arg == "search":
        c.search.threshold, c.search.points = 0.9, 1
        c.sweep.method, c.sweep.dim, c.sweep.lr = ("subspace",), (2, 8), (1e-2,)
    return c.lock()
