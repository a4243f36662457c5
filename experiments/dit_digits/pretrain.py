"""Pretrain `dit-digits`, the diffusion transformer that ships with lorax, on scikit-learn's digits.

    python -m experiments.dit_digits.pretrain [--output=lorax/assets/dit-digits]

It learns digits 0 to 8 of the training images of task `digits`, of which it sees no 9. About ten
minutes on one CPU core. Writes the model with its scheduler_config.json, and `curve.csv` and
`samples.png` beside this file; prints the share of samples that a classifier takes for the digit
that was asked for, and the same of real test images.
"""

import csv
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from matplotlib.figure import Figure

from lorax import denoising, diffusion
from lorax.files import write_json
from lorax.models import Base, dit, save
from lorax.tasks import noisy_images, vision

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "lorax/assets/dit-digits", "where the model goes")
flags.DEFINE_string("workdir", str(Path(__file__).parent), "where curve.csv and samples.png go")
flags.DEFINE_integer("steps", 6000, "optimiser steps")

CONFIG = dit.Config(
    num_attention_heads=3, attention_head_dim=16, num_layers=4, in_channels=1, sample_size=8,
    num_embeds_ada_norm=10,
)  # fmt: skip
HELD_OUT = 9
SETTINGS = denoising.Settings(diffusion.Schedule(), dropout=0.1)
BATCH, LEARNING_RATE, WARMUP, CLIP, AVERAGE, SEED = 64, 2e-3, 200, 1.0, 0.998, 0
SAMPLES, SAMPLE_STEPS = 100, 50  # of each digit; of DDIM


def main(_):
    # --------------------------------------------------------------------------------------- images
    train, test = vision.digit_sets()
    score = noisy_images.accuracy_of(*train)
    rows, held_out = (_rows(part) for part in (train, test))
    held_out |= denoising.fixed(SETTINGS, len(held_out["weight"]), SEED)
    print(
        f"{len(rows['weight']):,} training images, {len(held_out['weight'])} held out", flush=True
    )

    # -------------------------------------------------------------------------- model and optimiser
    module = dit.DiT(CONFIG)
    one = jnp.zeros((1, *CONFIG.image_shape)), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    params = jax.jit(module.init)(jax.random.key(SEED), *one)["params"]
    average = params
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, WARMUP, FLAGS.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(schedule, b2=0.99))
    opt_state = jax.jit(optimizer.init)(params)

    def mean(params, batch):
        total, weight, _ = denoising.loss(SETTINGS, module, params, batch)
        return total / weight

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def steps(params, average, opt_state, batches):  # leaves (K, BATCH, ...)
        def step(carry, batch):
            params, average, opt_state = carry
            loss, grads = jax.value_and_grad(mean)(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            average = optax.incremental_update(params, average, 1 - AVERAGE)
            return (params, average, opt_state), loss

        carry, losses = jax.lax.scan(step, (params, average, opt_state), batches)
        return *carry, losses.mean()

    evaluate = jax.jit(mean)

    # --------------------------------------------------------------------------------------- train
    rng, began, k = np.random.default_rng(SEED), time.time(), 50
    average = jax.tree.map(jnp.copy, params)
    curve = [(0, float("nan"), float(evaluate(average, held_out)))]
    for step in range(k, FLAGS.steps + 1, k):
        at = rng.integers(0, len(rows["weight"]), (k, BATCH))
        batches = {name: x[at] for name, x in rows.items()}
        batches |= denoising.drawn(SETTINGS, np.int32(CONFIG.no_class), batches, rng)
        params, average, opt_state, loss = steps(params, average, opt_state, batches)
        if step % 250 == 0:
            curve.append((step, float(loss), float(evaluate(average, held_out))))
            left = (time.time() - began) / step * (FLAGS.steps - step)
            print(
                f"step {step:5d}  train {loss:.4f}  held out {curve[-1][2]:.4f}  {left:.0f} s left",
                flush=True,
            )

    # --------------------------------------------------------------------------- sample and write
    average = jax.tree.map(lambda x: x.astype(jnp.float16), average)  # as it ships
    output = Path(FLAGS.output)
    save(output, Base(module, average, CONFIG, None, {}, "DiTTransformer2DModel", "dit-digits"))
    write_json(output / diffusion.FILE, diffusion.to_diffusers(SETTINGS.schedule))
    classes = np.repeat([c for c in range(10) if c != HELD_OUT], SAMPLES).astype(np.int32)
    noise = jax.random.normal(jax.random.key(SEED), (len(classes), *CONFIG.image_shape))
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), average)
    predict = lambda x, t: module.apply({"params": whole}, x, t, classes)
    make = jax.jit(lambda noise: diffusion.ddim(predict, noise, SETTINGS.schedule, SAMPLE_STEPS))
    images = denoising.pixels(make(noise))
    draw(images.reshape(-1, SAMPLES, 8, 8)[:, :20], Path(FLAGS.workdir) / "samples.png")
    with open(Path(FLAGS.workdir) / "curve.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_squared_error", "held_out_squared_error"])
        writer.writerows(curve)
    print(f"samples {score(images, classes)}  test images {score(*test)}")
    for c in np.unique(classes):
        print(c, score(images[classes == c], classes[classes == c]))


def _rows(part) -> dict[str, np.ndarray]:
    """The images of the digits to learn, as rows of `lorax.denoising`."""
    x, y = part
    x, y = x[y != HELD_OUT][..., None], y[y != HELD_OUT].astype(np.int32)
    return {"inputs": x, "condition": y, "weight": np.ones(len(y), np.float32)}


def draw(images, file):
    """Images (rows, columns, 8, 8) as one picture."""
    rows, columns = images.shape[:2]
    whole = images.transpose(0, 2, 1, 3).reshape(rows * 8, columns * 8)
    figure = Figure(figsize=(columns / 3, rows / 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(255 - whole, cmap="gray")
    axes.axis("off")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    app.run(main)
