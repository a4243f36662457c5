"""A small made-up run directory with planted structure, as training would leave it."""

import json
import pathlib
from typing import Any

import numpy as np

from lorax.interop import peft
from lorax.models import gpt2

WIDTH = 24
LAYERS = 3
TARGETS = ("q", "v")
BASE_LOSS = 3.456
STEPS = (0, 50, 100)
SOURCES = gpt2.hf_tensors(gpt2.Config(n_embd=WIDTH))


def planted_loss(rank: int, seed: int) -> float:
    """Falls until rank 4 and is flat from there; seeds differ by +-0.01."""
    return 1.2 + 0.4 * max(0.0, 1 - np.log2(rank) / 2) + (0.01 if seed % 2 else -0.01)


def planted_factors(rank: int, seed: int, scale: float) -> dict[str, peft.Factors]:
    """Every dW has the input direction e_0 (q) or e_1 (v) in common, by far the strongest, and
    directions of its own beside it."""
    rng = np.random.default_rng([rank, seed])
    factors = {}
    for layer in range(LAYERS):
        for n, target in enumerate(TARGETS):
            a = rng.standard_normal((WIDTH, rank)) * 0.05
            a[:, 0] = 3.0 * np.eye(WIDTH)[n]
            b = rng.standard_normal((rank, WIDTH)) * 0.05
            b[0] = np.eye(WIDTH)[2 + n]
            factor = peft.Factors(a.astype(np.float32), b.astype(np.float32), scale)
            factors[f"h/{layer}/attn/{target}"] = factor
    return factors


def kernels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shape = (WIDTH, WIDTH)
    return {
        f"h/{layer}/attn/{target}": rng.standard_normal(shape).astype(np.float32)
        for layer in range(LAYERS)
        for target in TARGETS
    }


def make_run(
    directory: pathlib.Path,
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16),
    seeds: tuple[int, ...] = (0, 1),
    alphas: tuple[float, ...] = (16.0,),
    lrs: tuple[float, ...] = (2e-3,),
    scaling: str = "lora",
    diverged: tuple[int, ...] = (),
    adapters: bool = True,
) -> pathlib.Path:
    members: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    status: dict[str, Any] = {}
    for rank in ranks:
        for alpha in alphas:
            for lr in lrs:
                for seed in seeds:
                    member = len(members)
                    scale = alpha / rank if scaling == "lora" else alpha
                    members.append(
                        {
                            "member": member,
                            "group": 0,
                            "name": f"rank={rank},alpha={alpha:g},lr={lr:g},seed={seed}",
                            "method": "lora",
                            "rank": rank,
                            "alpha": alpha,
                            "scaling": scaling,
                            "scale": scale,
                            "init": "kaiming",
                            "targets": list(TARGETS),
                            "layers": None,
                            "dropout": 0.0,
                            "lr": lr,
                            "weight_decay": 0.0,
                            "seed": seed,
                            "n_train": None,
                            "trainable_params": 2 * WIDTH * rank * LAYERS * len(TARGETS),
                        }
                    )
                    broken = member in diverged
                    final = (
                        planted_loss(rank, seed) + 0.1 * lrs.index(lr) + 0.2 * alphas.index(alpha)
                    )
                    for step in STEPS:
                        loss = BASE_LOSS + (final - BASE_LOSS) * step / STEPS[-1]
                        loss = None if broken and step else loss
                        point = {"member": member, "step": step}
                        metrics.append({**point, "split": "eval", "loss": loss})
                        if step:
                            train = {"split": "train", "loss": loss, "grad_norm": 0.3}
                            metrics.append({**point, **train})
                    status[str(member)] = {
                        "status": "diverged" if broken else "finished",
                        "diverged_at": 50 if broken else None,
                        "seconds": 12.5,
                    }
                    if adapters:
                        factors = planted_factors(rank, seed, scale)
                        peft.save(
                            directory / "adapters" / str(member), factors, SOURCES, "gpt2-nano"
                        )
    sweep = {"rank": ranks, "alpha": alphas, "lr": lrs, "seed": seeds}
    config = {"base": "gpt2-nano", "sweep": sweep, "task": {"name": "restaurants"}}
    about = {
        "config": config,
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
        "git": "0123abc",
        "base_sha256": "f" * 64,
    }
    state = {
        "state": "finished",
        "step": STEPS[-1],
        "steps": STEPS[-1],
        "members": status,
        "wall_seconds": 125.0,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about))
    (directory / "status.json").write_text(json.dumps(state))
    (directory / "members.jsonl").write_text("".join(json.dumps(m) + "\n" for m in members))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return directory
