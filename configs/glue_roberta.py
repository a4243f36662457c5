"""RoBERTa on GLUE with LoRA (r = 8 on q and v), as published: one task an argument, five seeds.

    python -m lorax.run --config=configs/glue_roberta.py:cola --config.task.path=GLUE/CoLA

Tasks: mnli sst2 mrpc cola qnli qqp rte stsb. Hyperparameters of the released scripts of Hu et al.
2021 (arXiv:2106.09685, appendix D; alpha is 16 there, the paper's table 9 prints 8). Published for
RoBERTa base (table 2): MNLI 87.5, SST-2 95.1, MRPC 89.7, CoLA 63.4, QNLI 93.3, QQP 90.8, RTE 86.6,
STS-B 91.5; their MRPC, RTE and STS-B start from the MNLI adapter, here all start afresh.
"""

from lorax.config import default

# task -> (training examples, batch over all devices, learning rate, epochs)
TASKS = {
    "mnli": (392_702, 128, 5e-4, 30),
    "sst2": (67_349, 128, 5e-4, 60),
    "mrpc": (3_668, 128, 4e-4, 30),
    "cola": (8_551, 64, 4e-4, 80),
    "qnli": (104_743, 256, 4e-4, 25),
    "qqp": (363_846, 128, 5e-4, 25),
    "rte": (2_490, 256, 5e-4, 80),
    "stsb": (5_749, 128, 4e-4, 40),
}


def get_config(task=None):
    task = task or "cola"
    if task not in TASKS:
        raise ValueError(f"configs/glue_roberta.py:{task}: one of {', '.join(TASKS)} is expected")
    examples, batch, lr, epochs = TASKS[task]
    config = default()
    config.base = "FacebookAI/roberta-base"
    config.task.name = "glue"
    config.task.subset = task
    config.task.path = "glue"  # the folder with CoLA, SST-2 ... in it, or one of these
    config.method.rank = 8
    config.method.alpha = 16.0
    config.method.targets = ("q", "v")
    config.train.batch_size = batch
    config.train.accumulate = batch // 16
    config.train.seq_len = 512
    config.train.steps = epochs * -(-examples // batch)
    config.train.lr = lr
    config.train.warmup = round(0.06 * config.train.steps)
    config.train.weight_decay = 0.1
    config.train.eps = 1e-6
    config.eval.every = -(-examples // batch)  # once an epoch
    config.eval.batch_size = 64
    config.eval.examples = 10_000  # all
    config.eval.test = 0  # like the paper: all of the development set
    config.sweep.seed = (0, 1, 2, 3, 4)
    return config
