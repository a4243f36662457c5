"""The scores of a task: of a model's outputs, and of the texts that it generates."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorax import outside
from lorax.tasks import metrics
from lorax.tasks.rows import Task
from lorax.tasks.subsets import size

# Share of the target tokens whose logit is the largest, given the tokens before them
TOKEN_ACCURACY = "token_accuracy"
# Other fields of metrics.jsonl
RESERVED = ("loss", "member", "step", "split", "grad_norm", TOKEN_ACCURACY)


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


def tried(function: Callable, trials: Sequence[tuple]) -> Metric:
    """A `Metric`, after a call with each of the trials (predicted, right). Raises ValueError, with
    the line of its file, if it fails or returns anything except a number or {name: number}."""
    if not callable(function):
        raise ValueError(f"metric: {function!r} was given; expected a function of two arguments")
    metric = Metric(function, tuple(_values(function, *trials[0])))
    for predicted, right in trials[1:]:
        metric(predicted, right)
    return metric


def trials(task: Task) -> list[tuple]:
    """Arguments to try a metric with: random outputs and the labels; or of a language model's task
    the references, then the prompts, as if they were generated: a model may write anything."""
    if not task.kind.causal:
        labels = task.eval["label"]
        shape = len(labels), task.outputs
        return [(np.random.default_rng(0).standard_normal(shape).astype(np.float32), labels)]
    few = task.prompts[:8]
    references = [prompt.references for prompt in few]
    right, wrong = [texts[0] for texts in references], [prompt.text for prompt in few]
    return [(right, references), (wrong, references)]


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


def with_own(task: Task, name: str, generates: bool) -> Task:
    """The task with the score "FILE.py:function" of the user's (`eval.score`), after a trial.

    It is called with (outputs (N, k) float, labels (N,)), or for a language model with (generated
    texts, references) if generates, i.e. if the run generates texts. Raises FileNotFoundError or
    ValueError, which begin with eval.score, for one that fails, that returns anything except a
    number or {name: number}, that has the name of a score of the task, or that nothing is given to.
    """
    function = outside.resolve(name, "eval.score")
    if task.kind.reads == "noisy arrays":
        raise ValueError(
            f"eval.score: {name} given, but task {task.name} has no outputs to score; leave it out"
        )
    if task.kind.causal and not (generates and task.prompts):
        why = "set eval.generate to how many prompts to complete" if task.prompts else "it has none"
        raise ValueError(
            f"eval.score: {name} given, which scores completions of the prompts of task "
            f"{task.name}; {why}"
        )
    try:
        own = tried(function, trials(task))
    except ValueError as error:
        raise ValueError(f"eval.score: {error}") from None
    taken = [score for score in names(task, generates) if score in own.names]
    if taken:
        raise ValueError(
            f"eval.score: {name} gives {taken[0]}, which task {task.name} measures itself; give "
            "it another name"
        )
    return task._replace(own_score=own, kind=task.kind._replace(scored=not task.kind.causal))


def of_members(task: Task, outputs, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """{metric: (M,) float32} of members. outputs: of an evaluation, (M, N, k). labels: (N, ...), or
    None for rows without."""
    rows = np.asarray(outputs)
    measured = [metric for metric in (task.own_score, task.scores) if metric is not None]
    each = [{k: v for metric in measured for k, v in metric(row, labels).items()} for row in rows]
    return {name: np.array([scores[name] for scores in each], np.float32) for name in each[0]}


def per_parameter(name: str) -> str:
    """The name of a score divided by the trainable parameters (`Task.per_parameter`)."""
    return f"{name}_per_parameter"


def of_texts(
    task: Task,
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """{metric: value} of texts that complete the task's prompts: by its own metric, or else by
    `metrics.text_scores`, which reports those that it can't compute; and the user's score."""
    if task.text_scores is None:
        values = metrics.text_scores(texts, references, say)
    else:
        values = task.text_scores(texts, references)
    return (task.own_score(texts, references) if task.own_score else {}) | values


def has_token_accuracy(task: Task) -> bool:
    """Whether a run reports `TOKEN_ACCURACY`: of a language model, if rows are looked at one by
    one, as they are with test rows."""
    return task.kind.causal and task.test is not None


def names(task: Task, generates: bool) -> list[str]:
    """The names of the scores that a run reports. generates: whether it generates texts."""
    result = []
    if task.kind.scored:
        outputs = np.zeros((1, size(task.eval), task.outputs), np.float32)
        result += of_members(task, outputs, task.eval.get("label"))
        result += [per_parameter(name) for name in task.per_parameter]
    if has_token_accuracy(task):
        result.append(TOKEN_ACCURACY)
    if generates:
        prompt = task.prompts[0]
        result += of_texts(task, [prompt.references[0]], [prompt.references])
    return result
