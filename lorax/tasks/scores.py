"""The scores of a task: of a model's outputs, and of the texts that it writes."""

from collections.abc import Callable, Sequence

import numpy as np

from lorax.tasks import metrics
from lorax.tasks.rows import Task


def of_members(task: Task, outputs, m: int) -> dict[str, np.ndarray]:
    """{metric: (m,) float32} of the first m members. outputs: of an evaluation, (M, N, B, k), or
    None, for which there are no scores."""
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
    """{metric: value} of texts that complete the task's prompts; see `metrics.text_scores`."""
    return metrics.text_scores(texts, references, say)


def names(task: Task, generates: bool) -> list[str]:
    """The names of the scores that a run reports. generates: whether it writes texts."""
    found = []
    if task.scores is not None:
        rows = np.zeros((1, 1, len(task.eval["label"]), task.outputs), np.float32)
        found += of_members(task, rows, 1)
    if generates:
        found += of_texts(task, ["a"], [("a",)])
    return found
