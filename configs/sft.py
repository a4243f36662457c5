"""Instruction tuning, with the settings of TRL's SFTTrainer example for LoRA and QLoRA.

    python -m lorax.run --config=configs/sft.py:BASE,DATA
    python -m lorax.run --config=configs/sft.py:HuggingFaceTB/SmolLM2-135M-Instruct,chats.jsonl
    python -m lorax.run --config=configs/sft.py:BASE,DATA --config.quant=nf4

BASE: a shipped name, a folder or a Hub id. DATA: a file with a conversation a line, the last 5% of
which are for evaluation, or a folder with train.jsonl and eval.jsonl (docs/data.md has more forms):

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

    SFTConfig, LoraConfig                          here
    target_modules="all-linear"                    method.targets
    r=16, lora_alpha=32, lora_dropout=0.05         method.rank, method.alpha, method.dropout
    learning_rate=2e-4                             train.lr
    lr_scheduler_type="cosine"                     train.schedule
    warmup_ratio=0.03 or warmup_steps              train.warmup_ratio or train.warmup
    num_train_epochs=2 or max_steps                train.epochs or train.steps
    per_device_train_batch_size=4                  train.batch_size, times train.accumulate
    gradient_accumulation_steps=4                  train.accumulate
    max_length=1024, packing=True                  train.seq_len, task.packing
    max_grad_norm=1.0, weight_decay=0.0            train.clip, train.weight_decay
    bf16=True, dtype="bfloat16"                    dtype, param_dtype
    gradient_checkpointing=True                    train.remat
    load_best_model_at_end=True, eval_steps=20     eval.keep, eval.every
    BitsAndBytesConfig(load_in_4bit=True)          quant

docs/trl.md has all keys, and what differs. A CPU computes in bfloat16 slowly: there, add
`--config.dtype=float32 --config.param_dtype=float32`. Any axis makes a sweep of it, such as
`--config.sweep.rank="(4, 16, 64)"`.
"""

from lorax.config import default


def get_config(arg=None):
    config = default()
    base, path = [*(arg or "").split(",", 1), ""][:2]
    config.base = base or config.base
    if path:
        config.task.name = "instruct"
        config.task.path = path
    config.task.packing = True
    config.dtype = "bfloat16"
    config.param_dtype = "bfloat16"  # the adapters are in float32
    config.method.targets = ("all-linear",)
    config.method.rank = 16
    config.method.alpha = 32.0
    config.method.dropout = 0.05
    config.train.lr = 2e-4
    config.train.schedule = "cosine"
    config.train.warmup_ratio = 0.03
    config.train.epochs = 2
    config.train.batch_size = 16
    config.train.accumulate = 4
    config.train.seq_len = 1024
    config.train.clip = 1.0
    config.train.weight_decay = 0.0
    config.train.remat = "full"
    config.eval.every = 20
    config.eval.keep = "best"
    return config
