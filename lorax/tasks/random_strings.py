"""Random strings: texts of uniformly drawn tokens, which can only be memorised, not understood.

A string of L tokens that are drawn from an alphabet of V holds L log2 V bits. A model that predicts
its tokens x_t with probabilities p(x_t) still needs sum_t -log2 p(x_t) of them, so that it stores

    bits = sum over strings of max(0, L log2 V - sum_t -log2 p(x_t))

(Morris et al., arXiv:2505.24832, section 3; Tan, Du and Feng, arXiv:2607.21351, divide it by the
trainable parameters). p is the model's probability among all tokens, not among the V alone: what a
model has learned about the alphabet, log2 V bits a token at most are needed for then, counts for
nothing.

There is nothing to generalise to: validation and test rows are the strings that are trained on, and
all their losses and scores are of memory.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax.tasks import kinds
from lorax.tasks.data import Data, shapes_of_texts
from lorax.tasks.rows import Task, count
from lorax.tasks.scores import Metric
from lorax.tasks.subsets import check_memorised
from lorax.vocabulary import Vocabulary


def load(config: Mapping[str, Any]) -> Data:
    """The strings that `config` describes, a function of it and of the vocabulary alone.

    config: `examples` (their number), `alphabet` (V, the different tokens in them, drawn from the
        vocabulary; all of it where it has fewer), `seed` (of alphabet and strings, which have
        separate streams: more strings begin with the same ones).

    A row has the tokens that the vocabulary begins a text with (or its end token, if there are
    none) and then L = train.seq_len tokens of the alphabet, one fewer for every further token in
    front. Scores: "bits" and "recalled", the share of tokens with p > 1/2, of all strings together;
    "bits_per_parameter" is of the trainable parameters. `Task.facts` has "string_bits",
    L log2 V, and "alphabet", V as it is.

    Raises ValueError that names the config field.
    """
    for field, least in {"examples": 1, "alphabet": 2}.items():
        if config[field] < least:
            raise ValueError(f"task.{field}: {config[field]} given, must be at least {least}")

    def build(config, vocabulary, seq_len, base, apart=False):
        front = vocabulary.start or (vocabulary.end,)
        length = seq_len + 1 - len(front)
        if length < 1:
            raise ValueError(
                f"train.seq_len: {seq_len} given; task random_strings needs at least {len(front)}, "
                f"{len(front)} tokens begin every text of {base.name}"
            )
        alphabet = _alphabet(vocabulary, config["alphabet"], config["seed"])
        strings = np.random.default_rng((config["seed"], 1))
        drawn = strings.integers(len(alphabet), size=(config["examples"], length))
        tokens = np.empty((len(drawn), seq_len + 1), np.int32)
        tokens[:, : len(front)], tokens[:, len(front) :] = front, alphabet[drawn]
        mask = np.ones(tokens.shape, np.float32)
        mask[:, : len(front)] = 0.0
        rows = {"tokens": tokens, "mask": mask}
        held = length * math.log2(len(alphabet))
        task = Task(
            config["name"],
            rows,
            rows,
            _note(config, len(alphabet), length, held, apart),
            outputs=2,
            scores=Metric(lambda outputs, _: stored(outputs, length, held), ("bits", "recalled")),
            per_parameter=("bits",),
            facts={"string_bits": round(held, 3), "alphabet": len(alphabet)},
            kind=kinds.STRINGS,
            memorised=True,
        )
        check_memorised(task, config.get("n_train"))
        return task._replace(test=rows) if apart else task

    return Data(kinds.STRINGS, build, shapes_of_texts)


def stored(outputs: np.ndarray, length: int, held: float) -> dict[str, float]:
    """{"bits", "recalled"} of strings of `length` tokens and `held` bits each. outputs: (N, 2)
    float32, of `losses.string_rows`."""
    nats, recalled = outputs.astype(np.float64).T
    bits = np.maximum(0.0, held - nats / math.log(2)).sum()
    return {"bits": float(bits), "recalled": float(recalled.sum() / (len(outputs) * length))}


def _alphabet(vocabulary: Vocabulary, size: int, seed: int) -> np.ndarray:
    """(at most size,) int32, ascending: tokens of the vocabulary, without its special ones."""
    known = vocabulary.tokenizer.get_vocab_size()
    tokens = range(known if vocabulary.rows is None else min(known, vocabulary.rows))
    special = {*vocabulary.start, *vocabulary.ends, vocabulary.pad}
    special |= set(vocabulary.tokenizer.get_added_tokens_decoder())
    usable = np.array([i for i in tokens if i not in special], np.int32)
    chosen = np.random.default_rng((seed, 0)).permutation(len(usable))[:size]
    return np.sort(usable[chosen])


def _note(config, alphabet: int, length: int, held: float, apart: bool) -> str:
    few = f" (all that there are; task.alphabet {count(config['alphabet'])})"
    sets = "validation and test rows are" if apart else "validation rows are"
    return (
        f"{count(config['examples'])} strings of {length} tokens, drawn from {count(alphabet)}"
        f"{few * (alphabet < config['alphabet'])}: {held:,.1f} bits each, "
        f"{held * config['examples'] / 1e6:.3g} million in all; {sets} these strings themselves, "
        f"all of them, whatever eval.examples says; seed {config['seed']}"
    )
