"""Is alpha anything but a learning rate? LoRA (arXiv:2106.09685, section 4.1) tunes one of the two.

    python -m lorax.run --config=configs/alpha_sweep.py

alpha 2 to 128 at r = 8, each at three learning rates a factor of four apart. The first, small steps
depend only on alpha times the rate of b. Here, 4 minutes on two busy cores: at the same product,
0.08, alpha = 2, 8, 32 end at 2.561, 2.824, 3.127 (stories, 4 minutes: 1.968, 2.101, 2.337), so a
larger rate helps more than a larger alpha (at 0.32 less so); the best losses per alpha are 2.56,
2.37, 2.47 and 2.33.

    --config=configs/alpha_sweep.py:stories
    --config=configs/alpha_sweep.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import scale


def get_config(arg=None):
    config = scale(arg)
    config.train.steps = min(config.train.steps, 2_000)
    config.sweep.alpha = (2.0, 8.0, 32.0, 128.0)
    config.sweep.lr = tuple(config.train.lr * factor for factor in (0.25, 1, 4))
    config.sweep.seed = (0, 1, 2)
    return config
