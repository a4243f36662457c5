"""A small made-up run directory with planted structure, as training would leave it."""

import itertools
import json
import pathlib
from collections.abc import Callable
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


def measurements(member: int, final: float, broken: bool) -> list[dict[str, Any]]:
    """Losses from the base's to `final`, in a straight line; none after step 0 if it is broken."""
    metrics = []
    for step in STEPS:
        loss = BASE_LOSS + (final - BASE_LOSS) * step / STEPS[-1]
        loss = None if broken and step else loss
        point = {"member": member, "step": step}
        metrics.append({**point, "split": "eval", "loss": loss})
        if step:
            metrics.append({**point, "split": "train", "loss": loss, "grad_norm": 0.3})
    return metrics


def make_run(
    directory: pathlib.Path,
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16),
    seeds: tuple[int, ...] = (0, 1),
    alphas: tuple[float, ...] = (16.0,),
    lrs: tuple[float, ...] = (2e-3,),
    scaling: str = "lora",
    diverged: tuple[int, ...] = (),
    stopped: tuple[int, ...] = (),
    adapters: bool = True,
) -> pathlib.Path:
    members: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    status: dict[str, Any] = {}
    axes = itertools.product(ranks, alphas, lrs, seeds)
    for member, (rank, alpha, lr, seed) in enumerate(axes):
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
        broken, out = member in diverged, member in stopped
        final = planted_loss(rank, seed) + 0.1 * lrs.index(lr) + 0.2 * alphas.index(alpha)
        measured = measurements(member, final, broken)
        metrics += [x for x in measured if not out or x["step"] <= 50]
        status[str(member)] = {
            "status": "diverged" if broken else "stopped" if out else "finished",
            "diverged_at": 50 if broken else None,
            "seconds": 12.5,
        } | ({"stopped_at": 50} if out else {})
        if adapters and not out:
            factors = planted_factors(rank, seed, scale)
            peft.save(directory / "adapters" / str(member), factors, SOURCES, "gpt2-nano")
    sweep = {"rank": ranks, "alpha": alphas, "lr": lrs, "seed": seeds}
    sweep |= {"tune": "lr"} if stopped else {}
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


def make_adapter(
    directory: pathlib.Path, seed: int, rank: int = 4, base: str = "gpt2-nano", width: int = 128
) -> dict[str, peft.Factors]:
    """A PEFT adapter of two layers' q and v, with Gaussian factors; as wide as gpt2-nano."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    factors = {
        f"h/{layer}/attn/{target}": peft.Factors(draw(width, rank), draw(rank, width), 0.5)
        for layer in range(2)
        for target in TARGETS
    }
    peft.save(directory, factors, gpt2.hf_tensors(gpt2.Config(n_embd=width)), base)
    return factors


SEARCH = {"threshold": 0.9, "metric": "accuracy", "seeds": (0, 1, 2), "points": 4, "rounds": 1}
FULL = 1000  # parameters of the base


def planted_accuracy(dim: float, lr: float, shift: float = 0.0) -> float:
    """0.1 at d = 1, 0.3 more for every factor of 10, up to 1; at the right learning rate."""
    return min(1.0, 0.1 + 0.3 * (np.log10(dim) + shift)) - 0.05 * (lr != 0.1)


def make_search(
    directory: pathlib.Path,
    dims: tuple[int, ...] = (10, 100, 1000),
    seeds: tuple[int, ...] = (0, 1, 2),
    conditions: tuple[bool, ...] = (False,),
    lora_ranks: tuple[int, ...] = (),
    diverged: tuple[int, ...] = (),
    full: float = 1.0,
) -> pathlib.Path:
    """A run that looked for d90 with learning rates 0.1 and 0.2: 10^(7/3), about 464, where full
    fine-tuning reaches 1 and the seed is 0; a tenth of a decade less for every seed after it, and a
    decade more where pixels are shuffled. LoRA needs twice as many parameters."""
    members: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    status: dict[str, Any] = {}

    def member(method, lr, seed, shuffle, params, accuracy, **more):
        index, swept = len(members), {"shuffle": shuffle} if len(conditions) > 1 else {}
        kept = {k: v for k, v in more.items() if v is not None}
        point = swept | kept | {"lr": lr, "seed": seed}
        name = ",".join(f"{k}={v}" for k, v in point.items())
        own = {"method": method, "rank": more.get("rank"), "scale": None, "lr": lr, "seed": seed}
        members.append(
            {"member": index, "group": 0, "name": name} | own | swept | kept
            | {"trainable_params": params, "n_train": None}
        )  # fmt: skip
        broken = index in diverged
        for step in STEPS:
            value = 0.1 + (accuracy - 0.1) * step / STEPS[-1]
            point = {"member": index, "step": step, "split": "eval"}
            lost = broken and step > 0
            metrics.append(
                {**point, "loss": None if lost else 2 - value, "accuracy": None if lost else value}
            )
        status[str(index)] = {
            "status": "diverged" if broken else "finished",
            "diverged_at": 50 if broken else None,
            "eval_loss": None if broken else 2 - accuracy,
            "seconds": 1.0,
            "scores": {} if broken else {"accuracy": accuracy},
        }

    for shuffle in conditions:
        for dim in dims:
            for lr in (0.1, 0.2):
                for seed in seeds:
                    value = planted_accuracy(dim, lr, 0.1 * seed - shuffle)
                    member("subspace", lr, seed, shuffle, dim, value, dim=dim)
    for shuffle in conditions:
        for lr, lost in ((0.01, 0.0), (0.02, 0.2)):
            for seed in seeds:
                member("full", lr, seed, shuffle, FULL, full - lost)
        for rank in lora_ranks:
            for lr in (0.1, 0.2):
                for seed in seeds:
                    value = planted_accuracy(10 * rank, lr, 0.1 * seed - shuffle)
                    member("lora", lr, seed, shuffle, 20 * rank, value, rank=rank)
    sweep = {"dim": dims, "lr": (0.1, 0.2), "seed": seeds}
    sweep |= {"shuffle": conditions if len(conditions) > 1 else ()}
    config = {"base": "random:mlp", "sweep": sweep, "task": {"name": "digits"}, "search": SEARCH}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"config": config, "versions": {}}))
    state = {"state": "finished", "members": status, "wall_seconds": 12.5}
    (directory / "status.json").write_text(json.dumps(state))
    (directory / "members.jsonl").write_text("".join(json.dumps(m) + "\n" for m in members))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return directory


ROWS = 40  # test rows of a study


def make_study(
    directory: pathlib.Path,
    axes: dict[str, tuple],
    loss: Callable[[dict], float],
    seeds: tuple[int, ...] = (0, 1, 2),
    diverged: tuple[int, ...] = (),
    stopped: tuple[int, ...] = (),
    rows: bool = True,
    metric: str = "loss",
    config: dict[str, Any] | None = None,
    noise: float = 0.001,
) -> pathlib.Path:
    """A run whose members have the test loss that `loss` gives their setting, give or take `noise`
    of seeds; or, with another `metric`, that score. Test rows are alike in all members except for
    that; the base has loss 3 and score 0.1. rows: whether the losses of single rows are kept.
    `config` adds sections."""
    members, metrics, status = [], [], {}
    start = {"loss": 3.0}.get(metric, 0.1)
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    for member, (point, seed) in enumerate(itertools.product(points, seeds)):
        rank = point.get("rank", 4)
        usual = {"method": "lora", "rank": rank, "alpha": 8.0, "scale": 2.0, "lr": 1e-2}
        row = usual | {"n_train": None, "quant": None, "targets": ["q", "v"]} | point
        size = 100_000 if row["method"] == "full" else 100 * rank
        name = ",".join(f"{axis}={value}" for axis, value in (point | {"seed": seed}).items())
        row |= {"member": member, "group": 0, "name": name, "trainable_params": size, "seed": seed}
        members.append(row)
        rng = np.random.default_rng([member, 7])
        value = loss(row) + noise * rng.standard_normal()
        state = "diverged" if member in diverged else "stopped" if member in stopped else "finished"
        done = state == "finished"
        status[str(member)] = {"status": state, "seconds": 1.0} | (
            {"diverged_at": 50} if state == "diverged" else {}
        )
        losses = {"loss": value if metric == "loss" else 1.0, "start": 3.0}
        for split in ("eval", "test") if rows else ("eval",):
            for step, key in ((0, "start"), (100, "loss")):
                if step and not done:
                    continue
                point_ = {"member": member, "step": step, "split": split, "loss": losses[key]}
                if metric != "loss":
                    point_[metric] = start if step == 0 else value
                metrics.append(point_)
        if metric != "loss" and done:
            status[str(member)] |= {"scores": {metric: value}}
            status[str(member)] |= {"test_scores": {metric: value}} if rows else {}
        if rows and done:
            _write_rows(directory / "rows" / f"{member}.npz", value, start, metric, rng)
    given = {"base": "gpt2-nano", "task": {"name": "restaurants"}, **(config or {})}
    given["sweep"] = {**axes, "seed": seeds} | (config or {}).get("sweep", {})
    command = "python -m lorax.run --config=configs/gpt2_rank_sweep.py"
    about = {"config": given, "versions": {}, "command": command}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about))
    (directory / "status.json").write_text(json.dumps({"state": "finished", "members": status}))
    (directory / "members.jsonl").write_text("".join(json.dumps(m) + "\n" for m in members))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return directory


def _write_rows(file: pathlib.Path, value: float, start: float, metric: str, rng) -> None:
    """Test rows of 10 tokens each, whose mean is exactly `value` (before training: `start`)."""
    own = np.random.default_rng(0).standard_normal(ROWS) * 0.2
    own, extra = own - own.mean(), 0.002 * rng.standard_normal(ROWS)
    arrays = {name: np.full(ROWS, x) for name, x in (("weight", 10), ("loss", 10), ("start", 30))}
    names = ("loss", "start") if metric == "loss" else ("score", "start_score")
    after = 10 * (value + 0.1 * own + extra - extra.mean())
    arrays |= {names[0]: after, names[1]: 10 * (start + 0.1 * own)}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{name: array.astype(np.float32) for name, array in arrays.items()})
