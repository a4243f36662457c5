"""The LoRA paper's E2E study: GPT-2 medium, rank 1 to 64 on q and v, three seeds, BLEU and NIST.

    python -m lorax.run --config=configs/e2e_gpt2.py --config.task.path=e2e-dataset.zip

Hyperparameters of Hu et al. 2021 (arXiv:2106.09685), table 11, with their code's length penalty
(0.8; the table has 0.9). Published for r = 4: BLEU 70.4 +- 0.1, NIST 8.85 (table 3); validation
loss 1.23, 1.21, 1.18, 1.17, 1.16, 1.16 at r = 1, 2, 4, 8, 16, 64 (table 18, with smoothed labels).
A GPU's work: 18 members of 26,290 steps. The data is at https://github.com/tuetschek/e2e-dataset.

    --config=configs/e2e_gpt2.py:DIR_OR_HUB_ID    another GPT-2, "random:DIR" for its shape alone
"""

from lorax.config import default


def get_config(base=None):
    config = default()
    config.base = base or "openai-community/gpt2-medium"
    config.task.name = "e2e"
    config.task.path = "e2e-dataset.zip"
    config.method.alpha = 32.0
    config.method.scaling = "lora"
    config.method.dropout = 0.1
    config.method.targets = ("q", "v")
    config.train.batch_size = 8
    config.train.seq_len = 512
    config.train.steps = 26_290  # 5 epochs of 42,061 examples
    config.train.lr = 2e-4
    config.train.warmup = 500
    config.train.eps = 1e-6
    config.train.weight_decay = 0.01
    config.train.label_smoothing = 0.1
    config.train.clip = 0.0
    config.eval.every = 1000
    config.eval.batch_size = 16
    config.eval.examples = 1024
    config.eval.generate = 630  # all meaning representations of the test set
    config.eval.beams = 10
    config.eval.length_penalty = 0.8
    config.eval.no_repeat_ngram = 4
    config.sweep.rank = (1, 2, 4, 8, 16, 64)
    config.sweep.seed = (0, 1, 2)
    return config
