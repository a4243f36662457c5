"""Rows of a comparison: both sides timed in turn, and their ratio."""

import os
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class Row(NamedTuple):
    """One measurement: value and baseline in `unit`; ratio = baseline / value, with its range."""

    name: str
    value: float
    unit: str
    baseline: float
    ratio: float
    low: float
    high: float
    against: str
    machine: str


def measure(sides: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """What each side returns, seconds, in each round, after a warm-up round."""
    times = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            seconds = run()
            if i:
                times[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in times.items()}


def row(name, seconds, baseline, against) -> Row:
    """A row of what each side took in each round, in seconds (`measure`)."""
    ratios = baseline / seconds
    middle = float(np.median(ratios))
    times = float(np.median(seconds)) * 1e3, float(np.median(baseline)) * 1e3
    return Row(
        name, times[0], "ms", times[1], middle, float(ratios.min()), float(ratios.max()),
        against, machine(),
    )  # fmt: skip


def once(run: Callable) -> Callable[[], float]:
    """Seconds of one call."""

    def seconds():
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    return seconds


def timed(run: Callable) -> Callable[[], float]:
    """Seconds of one call, the fastest of three."""

    seconds = once(run)
    return lambda: min(seconds() for _ in range(3))


def machine() -> str:
    """The name of the accelerator, or of the processor with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"
