"""The scores of a task: of a model's outputs, and of the texts that it generates."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorax import outside
from lorax.tasks import metrics
from lorax.tasks.rows import Task

RESERVED = ("loss", "member", "step", "split", "grad_norm")  # other fields of metrics.jsonl


class Metric(NamedTuple):
    """A metric of a task function. names: of its scores, in order.

    Called with (outputs, labels) or (texts, references) it returns {name: float}, all nan if an
    output is not finite: a model that has diverged predicts nothing.
    """

    function: Callable
    names: tuple[str, ...]

    def __call__(self, predicted, right) -> dict[str, float]:
        if isinstance(predicted, np.ndarray) and not np.isfinite(predicted).all():
            return dict.fromkeys(self.names, math.nan)
        values = _values(self.function, predicted, right)
        if tuple(values) != self.names:
            raise ValueError(
                f"{_place(self.function)}: gives {', '.join(values)} now and "
                f"{', '.join(self.names)} before; expected the same names every time"
            )
        return values


def rehearsed(function: Callable, predicted, right) -> Metric:
    """A `Metric`, after a trial. Raises ValueError, with the line of its file, if it fails or
    returns anything except a number or {name: number}."""
    if not callable(function):
        raise ValueError(f"metric: {function!r} was given; expected a function of two arguments")
    return Metric(function, tuple(_values(function, predicted, right)))


def _values(function: Callable, predicted, right) -> dict[str, float]:
    value = outside.call(function, predicted, right, field=_place(function))
    name = getattr(function, "__name__", "metric")
    by_name = value if isinstance(value, Mapping) else {name.strip("<>"): value}
    for key, number in by_name.items():
        if not isinstance(key, str) or not key or key in RESERVED:
            raise ValueError(f"{_place(function)}: {key!r} can't be the name of a score")
        if not isinstance(number, numbers.Real) and np.ndim(number) != 0:
            raise ValueError(
                f"{_place(function)}: returns {value!r}; expected a number or {{name: number}}"
            )
    try:
        return {key: float(number) for key, number in by_name.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"{_place(function)}: returns {value!r}; expected a number or {{name: number}}"
        ) from None


def _place(function: Callable) -> str:
    return f"metric {getattr(function, '__name__', function)!s}"


def of_members(task: Task, outputs, m: int) -> dict[str, np.ndarray]:
    """{metric: (m,) float32} of the first m members. outputs: of an evaluation, (M, N, B, k), or
    None, which gives no scores."""
    if outputs is None:
        return {}
    labels = task.eval["label"]
    rows = np.asarray(outputs)[:m].reshape(m, -1, outputs.shape[-1])[:, : len(labels)]
    each = [task.scores(row, labels) for row in rows]
    return {name: np.array([scores[name] for scores in each], np.float32) for name in each[0]}


def of_texts(
    task: Task,
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """{metric: value} of texts that complete the task's prompts: by its own metric, or else by
    `metrics.text_scores`, which reports those that it can't compute."""
    if task.text_scores is not None:
        return task.text_scores(texts, references)
    return metrics.text_scores(texts, references, say)


def names(task: Task, generates: bool) -> list[str]:
    """The names of the scores that a run reports. generates: whether it generates texts."""
    result = []
    if task.scores is not None:
        rows = np.zeros((1, 1, len(task.eval["label"]), task.outputs), np.float32)
        result += of_members(task, rows, 1)
    if generates:
        prompt = task.prompts[0]
        result += of_texts(task, [prompt.references[0]], [prompt.references])
    return result
