"""Pretrain `gpt2-nano`, the GPT-2 that ships with lorax, from two public texts.

    python -m experiments.gpt2_nano.pretrain --data=DIR [--output=lorax/assets/gpt2-nano]

DIR holds tinystories/tinystories_sample.txt (CDLA-Sharing-1.0) and
tinyshakespeare/input.txt (1,115,394 bytes, MIT). Everything else is below: about 20 minutes on two
CPU cores. Writes the model, its tokenizer, and `curve.csv` beside this file; five checkpoints on
the way go to --checkpoints, where given.
"""

import csv
import functools
import math
import os
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lorax import vocabulary
from lorax.models import Base, gpt2, save

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "data", os.environ.get("LORAX_DATA"), "folder with tinystories/ and tinyshakespeare/"
)
flags.DEFINE_string("output", "lorax/assets/gpt2-nano", "where the model goes")
flags.DEFINE_string("checkpoints", None, "folder for checkpoints on the way")
flags.DEFINE_string("workdir", None, "folder for the model, the checkpoints and the curve")
flags.mark_flag_as_required("data")

CONFIG = gpt2.Config(
    vocab_size=1024, n_positions=256, n_embd=128, n_layer=4, n_head=4, unroll=4
)  # fmt: skip
STEPS, BATCH, SEQ = 4000, 16, 256
LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP, SEED = 3e-3, 100, 0.1, 1.0, 0
HELD_OUT = 0.05  # the last twentieth of each text
END = "<|endoftext|>"


def main(_):
    # ------------------------------------------------------------ text:
    data, folder = Path(FLAGS.data), Path(FLAGS.workdir or Path(__file__).parent)
    output, checkpoints = FLAGS.output, FLAGS.checkpoints
    if FLAGS.workdir:
        output, checkpoints = folder / "final", folder
    stories = (data / "tinystories/tinystories_sample.txt").read_text(encoding="utf-8")
    plays = (data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    documents = [[d.strip() for d in stories.split(END)], [d.strip() for d in plays.split("\n\n")]]
    train, held_out = [], []
    for parts in documents:
        parts = [part for part in parts if part]
        cut = round(len(parts) * (1 - HELD_OUT))
        train.append(parts[:cut])
        held_out.append(parts[cut:])
    # Speeches are short: a scene of them is one document.
    scenes = lambda speeches: [
        "\n\n".join(speeches[i : i + 20]) for i in range(0, len(speeches), 20)
    ]
    train, held_out = (part[0] + scenes(part[1]) for part in (train, held_out))
    np.random.default_rng(SEED).shuffle(train)

    # ------------------------------------------------------------ tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)
    end = tokenizer.token_to_id(END)
    encode = lambda texts: np.concatenate(
        [np.array([*e.ids, end], np.int32) for e in tokenizer.encode_batch(texts)]
    )
    train, held_out = encode(train), encode(held_out)
    rows = lambda ids: ids[: (len(ids) - 1) // SEQ * SEQ + 1]
    held_out = rows(held_out)
    held_out = np.stack([held_out[i : i + SEQ + 1] for i in range(0, len(held_out) - SEQ, SEQ)])
    print(f"{len(train):,} training tokens, {held_out[:, 1:].size:,} held out", flush=True)

    # -------------------------------------------------------------------------- model and optimiser
    module = gpt2.GPT2(CONFIG)
    params = jax.jit(module.init)(jax.random.key(SEED), jnp.zeros((1, 1), jnp.int32))["params"]
    n_params = sum(x.size for x in jax.tree.leaves(params))
    schedule = optax.warmup_cosine_decay_schedule(
        0, LEARNING_RATE, WARMUP, STEPS, 0.05 * LEARNING_RATE
    )
    decay = jax.tree.map(lambda x: x.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decay),
    )
    opt_state = jax.jit(optimizer.init)(params)

    def loss_fn(params, tokens):
        logits = module.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def steps(params, opt_state, batches):  # (K, BATCH, SEQ + 1)
        def step(carry, tokens):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), batches)
        return params, opt_state, losses.mean()

    evaluate = jax.jit(
        lambda params, rows: jax.lax.map(lambda r: loss_fn(params, r[None]), rows).mean()
    )

    # ------------------------------------------------------------ baselines
    counts = Counter(train.tolist())
    total = len(train) + CONFIG.vocab_size  # add-one smoothing
    unigram = -np.mean(
        [math.log((counts[t] + 1) / total) for t in held_out[:, 1:].ravel().tolist()]
    )
    at_random = float(evaluate(params, held_out))
    print(f"{n_params:,} parameters; held out: unigram {unigram:.4f}, random {at_random:.4f}")

    # ------------------------------------------------------------ train
    rng = np.random.default_rng(SEED)
    begin, curve, k = time.time(), [(0, float("nan"), at_random)], 20
    for step in range(k, STEPS + 1, k):
        starts = rng.integers(0, len(train) - SEQ - 1, (k, BATCH))
        batches = train[starts[..., None] + np.arange(SEQ + 1)]
        params, opt_state, loss = steps(params, opt_state, batches)
        if step % 200 == 0:
            curve.append((step, float(loss), float(evaluate(params, held_out))))
            left = (time.time() - begin) / step * (STEPS - step)
            print(
                f"step {step:5d}  train {loss:.4f}  held out {curve[-1][2]:.4f}  {left:.0f} s left",
                flush=True,
            )
        if checkpoints and step in (200, 600, 1200, 2400, STEPS):
            _save(Path(checkpoints) / f"step{step}", params, tokenizer)

    # ------------------------------------------------------------ write
    _save(Path(output), params, tokenizer)
    with open(folder / "curve.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_nats_per_token", "held_out_nats_per_token"])
        writer.writerows(curve)
    draw(curve, unigram, folder)
    print(f"unigram {unigram:.4f}  random weights {at_random:.4f}  gpt2-nano {curve[-1][2]:.4f}")


def draw(curve, unigram, folder):
    """The training curve as curve.png in a folder; unigram in nats a token."""
    steps, train, held_out = zip(*curve, strict=True)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(unigram, color="0.5", ls="--", label=f"unigram, {unigram:.2f}")
    axes.plot(
        steps, train, color="#E69F00", ls=":", marker="s", ms=3, label="train, last 20 batches"
    )
    axes.plot(steps, held_out, color="#0072B2", marker="o", ms=3, label="held out")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=150)


def _save(directory, params, tokenizer):
    words = vocabulary.from_tokenizer(tokenizer)
    save(directory, Base(None, params, CONFIG, words, {}, "gpt2", "gpt2-nano"))


if __name__ == "__main__":
    app.run(main)
