"""The LoRA paper's E2E study: GPT-2 medium, rank 1 to 64 on q and v, three seeds, BLEU and NIST.

    python -m lorax.run --config=configs/e2e_gpt2.py --config.task.path=e2e-dataset.zip

Hyperparameters of Hu et al. 2021 (arXiv:2106.09685), table 11, with their code's length penalty
(0.8; the table has 0.9). Published for r = 4: BLEU 70.4 +- 0.1, NIST 8.85 (table 3); validation
loss 1.23, 1.21, 1.18, 1.17, 1.16, 1.16 at r = 1, 2, 4, 8, 16, 64 (table 18, with smoothed labels).
A GPU's work: 18 members of 26,290 steps. The data is at https://github.com/tuetschek/e2e-dataset.

    --config=configs/e2e_gpt2.py:DIR_OR_HUB_ID    another GPT-2, "random:DIR" for its shape alone
"""

from lorax.scales import gpt2_medium


def get_config(base=None):
    config = gpt2_medium()
    config.base = base or config.base
    config.method.targets = ("q", "v")
    config.eval.generate = 630  # all meaning representations of the test set
    config.eval.beams = 10
    config.eval.length_penalty = 0.8
    config.eval.no_repeat_ngram = 4
    config.sweep.rank = (1, 2, 4, 8, 16, 64)
    config.sweep.seed = (0, 1, 2)
    return config
