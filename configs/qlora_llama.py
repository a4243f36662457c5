"""QLoRA: a LLaMA held in NF4 with double quantisation, LoRA on all its linear layers.

    python -m lorax.run --config=configs/qlora_llama.py --config.base=DIR

DIR: karpathy/tinyllamas' stories260K in Hugging Face's layout, if "stories-llama-260k" is not in
the working directory; the task ships with lorax. The recipe at a laptop's size, compared with a
base in bfloat16: the paper finds no difference (table 4). LOG.md has the result.

    python -m lorax.run --config=configs/qlora_llama.py:7b --config.task.path=oasst1
    python -m lorax.plan --config=configs/qlora_llama.py:65b --config.base=random:llama-65b

Sizes: 7b 13b 33b 65b. Hyperparameters of Dettmers et al. 2023 (arXiv:2305.14314, section 5 and
appendix B), as Guanaco was trained on OASST1: 1,875 steps of 16 conversations of up to 512 tokens.
oasst1: a folder with train.jsonl and eval.jsonl, {"messages": [...]} per line. The loss is only on
the assistant's words, while theirs is on the whole conversation; adapters are in float32.
"""

from lorax.config import default

# size -> (Hub id, learning rate, dropout)
SIZES = {
    "7b": ("huggyllama/llama-7b", 2e-4, 0.1),
    "13b": ("huggyllama/llama-13b", 2e-4, 0.1),
    "33b": ("huggyllama/llama-30b", 1e-4, 0.05),
    "65b": ("huggyllama/llama-65b", 1e-4, 0.05),
}


def get_config(size=None):
    if size is not None and size not in SIZES:
        raise ValueError(f"configs/qlora_llama.py:{size}: one of {', '.join(SIZES)} is expected")
    config = default()
    config.quant = "nf4"
    config.double_quant = True
    config.dtype = "bfloat16"
    config.param_dtype = "bfloat16"  # of what is not quantised
    config.task.group_by_length = True
    config.method.targets = ("all-linear",)
    config.method.alpha = 16.0
    config.method.dropout = 0.1
    config.train.batch_size = 16
    config.train.schedule = "constant"
    config.train.warmup = 0
    config.train.b2 = 0.999
    config.train.clip = 0.3
    config.train.remat = "full"
    config.train.offload = "optimizer"
    if size is None:
        config.base = "stories-llama-260k"
        config.method.rank = 16  # k and v are 64 x 32: no room for rank 64
        config.train.seq_len = 256
        config.train.steps = 200
        config.train.lr = 1e-2
        config.eval.every = 50
        config.eval.examples = 128
        config.sweep.quant = (None, "nf4")
        return config
    config.base, config.train.lr, config.method.dropout = SIZES[size]
    config.task.name = "instruct"
    config.task.path = "oasst1"
    config.method.rank = 64
    config.train.accumulate = 16  # one conversation at a time
    config.train.seq_len = 512
    config.train.steps = 1875
    config.eval.every = 125
    config.eval.batch_size = 1
    return config
