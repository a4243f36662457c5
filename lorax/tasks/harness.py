"""Tasks of EleutherAI's lm-evaluation-harness for a base with an adapter, without merging them.

    from lorax.tasks import harness
    harness.evaluate(base, params, ("arc_easy", "mine.yaml"))   # {"arc_easy_acc": 0.43, ...}

A task is a name that lm-eval knows, or a YAML file in its format. `Model` is what lm-eval calls:
texts begin with the model's start token, if it has one, and are cut at their left end where they
are longer than the model reads, as in lm-eval's own `hf` model.
"""

import contextlib
import functools
import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from lorax import decode, divided, gather, hosts, losses
from lorax.errors import reason
from lorax.methods import prefix
from lorax.models import Base

LENGTH = 2048  # tokens that a model reads whose positions have no end
NEW_TOKENS = 256  # lm-eval's default
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SEED = 1234  # of lm-eval's examples in front of a question
ROUND = 32  # rows are padded to multiples of this, so that few programs are compiled

_rows = jax.jit(losses.lm_rows, static_argnums=0)


def _samples(settings: dict) -> bool:
    """Whether a task's settings of generation ask for sampled texts."""
    return bool(settings.get("do_sample")) and settings.get("temperature", 1.0) > 0


def _asked(context: str, settings: dict) -> tuple[str, int, tuple[str, ...]]:
    """(context, most new tokens, texts that end it) of a request to generate."""
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else until
    given = [settings[name] for name in LIMITS if settings.get(name) is not None]
    return context, (*given, NEW_TOKENS)[0], tuple(word for word in until if word)


def check(base: Base) -> None:
    """Raises ValueError for a base that is no causal language model, or has no tokenizer."""
    if not base.causal or base.vocabulary is None:
        lacks = "a tokenizer.json" if base.causal else "a causal language model"
        raise ValueError(f"eval.harness: tasks of lm-eval need {lacks}, and {base.name} has none")


class Model(TemplateLM):
    """A causal base as lm-eval's model. params: for `lorax.apply` (default: the base's)."""

    def __init__(self, base: Base, params=None, batch_size: int = 32):
        super().__init__()
        check(base)
        self.base, self.batch_size = base, batch_size
        self.params = base.params if params is None else params

    @property
    def max_length(self) -> int:
        """Tokens that the model reads, besides virtual ones."""
        return (self.base.positions or LENGTH) - prefix.ahead(self.params).tokens

    @property
    def eot_token_id(self) -> int:
        return self.base.vocabulary.end

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without a context."""
        return (*self.base.vocabulary.start, *self.base.vocabulary.ends)[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """The ids of a text, after the start tokens unless `add_special_tokens` is False or the
        text has them."""
        ids, start = self.base.vocabulary.encode(string), [*self.base.vocabulary.start]
        given = add_special_tokens is None and ids[: len(start)] == start
        return ids if add_special_tokens is False or given else start + ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each request, (_, ids of
        the context, ids of what follows)."""
        most, cut = self.max_length + 1, []  # the last token is only predicted
        for _, context, following in requests:
            ids = [*context, *following][-most:]
            cut.append((ids, min(len(following), len(ids) - 1)))
        order = sorted(range(len(cut)), key=lambda i: -len(cut[i][0]))
        answers = {}
        for first in range(0, len(order), self.batch_size):
            part = order[first : first + self.batch_size]
            width = min(-(-len(cut[part[0]][0]) // ROUND) * ROUND, most)
            tokens = np.full((self.batch_size, width), self.base.vocabulary.pad, np.int32)
            mask = np.zeros((self.batch_size, width), np.float32)
            for row, i in enumerate(part):
                ids, count = cut[i]
                tokens[row, : len(ids)] = ids
                mask[row, len(ids) - count : len(ids)] = 1
            batch = {"tokens": tokens, "mask": mask}
            mesh = gather.mesh_of(self.params)
            with divided.on(mesh):
                batch = gather.side_by_side(batch, mesh, axis=0)
                rows = _rows(self.base.module, self.params, batch)
            loss, right = hosts.whole((rows.loss, rows.right))
            for row, i in enumerate(part):
                answers[i] = float(-loss[row]), bool(right[row] == cut[i][1])
        return [answers[i] for i in range(len(cut))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text in nats, in windows that don't overlap."""
        windows, of = [], []
        for n, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows, of = windows + parts, of + [n] * len(parts)
        totals = np.zeros(len(requests))
        for n, (value, _) in zip(of, self._loglikelihood_tokens(windows), strict=True):
            totals[n] += value
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Each context's greedy continuation, up to the first of its texts `until`."""
        asked = [_asked(*request.args) for request in requests]
        texts = {}
        for limit in {limit for _, limit, _ in asked}:
            group = [n for n, (_, of, _) in enumerate(asked) if of == limit]
            contexts = [self._cut(asked[n][0], limit) for n in group]
            options = decode.DecodingOptions(max_new_tokens=limit)
            written = decode.complete(
                self.base, contexts, self.params, options, batch_size=self.batch_size
            )
            for n, text in zip(group, written, strict=True):
                ends = [text.find(word) for word in asked[n][2] if word in text]
                texts[n] = text[: min(ends, default=len(text))]
        return [texts[n] for n in range(len(requests))]

    def _cut(self, context: str, new_tokens: int) -> str:
        """The end of a context that leaves room for new tokens."""
        ids, start = self.base.vocabulary.encode(context), self.base.vocabulary.start
        room = self.max_length - new_tokens - len(start)
        return context if len(ids) <= room else self.base.vocabulary.decode(ids[-room:])


@functools.cache
def load(names: tuple[str, ...]) -> Mapping:
    """lm-eval's tasks and groups, of names and of YAML files.

    Raises ValueError for one that lm-eval can't load or that samples, FileNotFoundError for a file
    that does not exist.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise FileNotFoundError(f"eval.harness: {name}: no such file")
    try:
        with _quiet():
            manager = TaskManager(include_defaults=len(files) < len(names))  # it reads all of them
            loaded = manager.load([*names])
    except Exception as error:  # of a task's file, its data set or the network
        raise ValueError(f"eval.harness: {', '.join(names)}: {reason(error)}") from None
    for name, task in loaded["tasks"].items():
        task.set_fewshot_seed(SEED)  # as lm-eval's command does, with the next line
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        if _samples(task.config.generation_kwargs or {}):
            raise ValueError(f"eval.harness: {name} samples its texts; they can only be greedy")
    return loaded


def evaluate(
    base: Base, params=None, tasks: Iterable[str] = (), batch_size: int = 32
) -> dict[str, float]:
    """{"TASK_METRIC": value} of tasks, names or YAML files.

    params: for `lorax.apply` (default: the base's). A metric with a filter other than "none" has
    its name behind it. Raises ValueError and FileNotFoundError as `load` does, and ValueError for a
    base that is no causal language model.
    """
    loaded, model = load(tuple(tasks)), Model(base, params, batch_size)
    with _quiet():
        found = evaluator.evaluate(model, loaded, bootstrap_iters=0, log_samples=False)
    values = {}
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, int | float) and chosen and not metric.endswith("_stderr"):
                words = (task, metric, *([chosen] if chosen != "none" else []))
                values[re.sub(r"\W+", "_", "_".join(words))] = float(value)
    return values


@contextlib.contextmanager
def _quiet():
    """Context without lm-eval's lines and bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
