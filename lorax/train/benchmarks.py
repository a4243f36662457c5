"""Tasks of lm-evaluation-harness for trained members, one after another on the frozen base.

`lorax.tasks.harness` imports lm-eval, so it is imported only where tasks are asked for.
"""

from lorax.errors import optional
from lorax.models import Base


def check(base: Base, tasks: tuple[str, ...]) -> None:
    """Raises ValueError or FileNotFoundError, before anything is trained, if lm-eval is missing, a
    task can't be loaded, or the base can't do it."""
    harness = _harness()
    harness.check(base)
    harness.load(tasks)


def scores(base: Base, params, c) -> dict[str, float]:
    """{"TASK_METRIC": value} of a member. params: bound to the base. c: its `eval` section."""
    values = _harness().evaluate(base, params, c.harness, c.batch_size)
    return {name: round(value, 5) for name, value in values.items()}


def _harness():
    missing = "eval.harness: tasks need lm-eval: pip install lorax-research[harness]"
    return optional("lorax.tasks.harness", "lm_eval", missing)
