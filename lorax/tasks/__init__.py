"""Tasks: rows to train and evaluate on.

A task is two sets of rows, built once and held in memory: texts for a language model or texts with
labels, both encoded with a base's vocabulary, or arrays that fit a base (`lorax.tasks.kinds`).
A task of your own is a function that returns what `pairs`, `texts`, `labelled` or `arrays` returns.
"""

from lorax.tasks.batch_order import order, orders, steps_of
from lorax.tasks.data import Data, arrays, labelled, pairs, texts
from lorax.tasks.rows import Prompt, Task
from lorax.tasks.subsets import prompts, size, spread, train_examples, train_size, widths
from lorax.tasks.table import TASKS, batch_shapes, build, check_base, kind_of, measured, outputs

__all__ = ["arrays", "labelled", "pairs", "texts", "Data", "Prompt", "TASKS", "Task"]
__all__ += ["batch_shapes", "build", "check_base", "kind_of", "measured", "order", "orders"]
__all__ += ["outputs", "prompts", "size", "spread", "steps_of"]
__all__ += ["train_examples", "train_size", "widths"]
