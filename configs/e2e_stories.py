"""How much rank does E2E take, from a real pretrained model that a laptop can train?

    python -m lorax.run --config=configs/e2e_stories.py:DIR --config.task.path=e2e-dataset.zip

DIR: karpathy/tinyllamas' stories260K in Hugging Face's layout, a LLaMA of 260,032 parameters that
was trained on children's stories. Rank 1 to 64 (its width) on all layers that are so wide, with
BLEU and NIST on the test set. LOG.md has the table.
"""

from lorax.config import default


def get_config(base=None):
    config = default()
    config.base = base or "stories-llama-260k"
    config.task.name = "e2e"
    config.task.path = "e2e-dataset.zip"
    config.task.packing = True
    config.method.targets = ("q", "o", "mlp")  # k and v are 64 x 32: no room for rank 64
    config.method.alpha = 16.0
    config.train.batch_size = 8
    config.train.seq_len = 256
    config.train.steps = 600
    config.train.lr = 1e-2  # the best of 3e-3, 1e-2 and 3e-2 at ranks 1 and 64
    config.train.warmup = 50
    config.eval.every = 200
    config.eval.examples = 256
    config.eval.generate = 630  # all meaning representations of the test set
    config.eval.new_tokens = 128
    config.eval.beams = 4
    config.eval.batch_size = 64
    config.sweep.rank = (1, 2, 4, 8, 16, 32, 64)
    return config
