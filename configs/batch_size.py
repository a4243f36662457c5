"""Does LoRA suffer from large batches? Ranks and full fine-tuning at three batch sizes.

    python -m lorax.run --config=configs/batch_size.py

"LoRA Without Regret" (Thinking Machines 2025): on a given number of examples the loss of LoRA falls
behind that of full fine-tuning as the batch grows, whatever the rank. Every batch size sees the
same number of examples, each method at the best of three learning rates. Here:
experiments/batch_size, 14 minutes on two busy cores (stories 8).

    --config=configs/batch_size.py:stories
    --config=configs/batch_size.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale, two_digits

BATCHES = (2, 8, 32)


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("all-linear",)
    config.train.schedule = "constant"
    config.train.warmup = 0
    examples = 8 * min(config.train.steps, 100)
    config.eval.every = examples // 2  # only at the end
    lr = config.train.lr / 2
    points = [
        # Adam's best rate grows with about the square root of the batch.
        (method, rank, two_digits(rate * factor * (batch / 8) ** 0.5), batch, examples // batch)
        for batch in BATCHES
        for method, rank, rate in (("lora", 4, lr), ("lora", 32, lr), ("full", 8, lr / 5))
        for factor in (0.3, 1, 3)
    ]
    sweep = config.sweep
    sweep.method, sweep.rank, sweep.lr, sweep.batch_size, sweep.steps = zip(*points, strict=True)
    sweep.zip = (("method", "rank", "lr", "batch_size", "steps"),)
    sweep.seed = (0, 1, 2)
    return config
