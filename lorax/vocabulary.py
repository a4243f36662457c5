"""A tokenizer with a model's special ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tokenizers import Tokenizer

from lorax import chat_files, fields
from lorax.files import pointer_hint, read_json, read_text

END_OF_TEXT = "<|endoftext|>"
FILES = ("config.json", "generation_config.json")  # the later one takes precedence
#: The fields with ids. A pad_token_id of -1 is an older way to say that there is none.
IDS = {
    "eos_token_id": fields.either(fields.optional(fields.ID), fields.each(fields.ID)),
    "pad_token_id": fields.optional(fields.whole(-1)),
}
CONFIG = "tokenizer_config.json"
#: Fields read from it, beside its tokens and templates (`chat_files`).
START = {"add_bos_token": fields.optional(fields.FLAG)}


class Vocabulary(NamedTuple):
    """Converts text to a model's tokens and back.

    tokenizer: the `tokenizers.Tokenizer`, which neither truncates nor pads.
    start: ids that the tokenizer puts in front of a text (BOS, BERT's [CLS]), () for none. A
        language model reads every text after them.
    ends: ids that end a text, () for none; `end`, the first, ends training examples.
    pad: id that fills up rows; it is never attended to, so any valid id will do.
    rows: the model has embeddings for ids 0 to rows - 1; None if that isn't known.
    templates: {name: Jinja text} of the model's chat templates, "default" for the usual one.
    special: {"bos_token": "<s>", ...}, the special tokens by the names that templates use.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    ends: tuple[int, ...]
    pad: int
    rows: int | None = None
    templates: Mapping[str, str] = MappingProxyType({})
    special: Mapping[str, str] = MappingProxyType({})

    @property
    def end(self) -> int:
        """The id that ends a training example. Raises ValueError if the model has none."""
        if not self.ends:
            raise ValueError(
                f"tokenizer: no token ends a text: config.json names no eos_token_id, and there is "
                f"no {END_OF_TEXT!r}; add it with tokenizer.add_special_tokens([{END_OF_TEXT!r}])"
            )
        return self.ends[0]

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens. Raises ValueError as `check` does."""
        return self.check(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def check(self, ids: Sequence[int], use: str = "occurs in a text") -> Sequence[int]:
        """The same ids. Raises ValueError for one that the model has no embedding for, such as a
        token that was added only to the tokenizer."""
        if self.rows is not None and max(ids, default=0) >= self.rows:
            wrong = next(i for i in ids if i >= self.rows)
            raise ValueError(
                f"tokenizer: {self.tokenizer.id_to_token(wrong)!r} has the id {wrong} and {use}, "
                f"but vocab_size is {self.rows}: the model has no embedding for it; use a token "
                f"with an id below {self.rows}, or a model whose embeddings were resized"
            )
        return ids

    def decode(self, ids) -> str:
        """The text of ids without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def from_tokenizer(
    tokenizer: Tokenizer, ids: dict | None = None, rows: int | None = None
) -> Vocabulary:
    """The vocabulary of a tokenizer.

    ids: `eos_token_id` (int or list), `pad_token_id` as in a config.json. rows: of the model's
    embedding, None if unknown. Without an `eos_token_id` texts end at "<|endoftext|>". As in
    transformers, the start is what the tokenizer itself puts in front of a text, whatever
    `bos_token_id` says. Raises ValueError for an id that the tokenizer or the model lacks.
    """
    ids = ids or {}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ends = ids.get("eos_token_id")
    ends = tokenizer.token_to_id(END_OF_TEXT) if ends is None else ends
    ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,) if ends is not None else ()
    pad = ids.get("pad_token_id")
    pad = (*ends, 0)[0] if pad is None or pad < 0 else pad
    wrong = [i for i in (*ends, pad) if tokenizer.id_to_token(i) is None]
    if wrong:
        raise ValueError(
            f"tokenizer: it has {tokenizer.get_vocab_size()} tokens; config.json names the ids "
            f"{wrong}"
        )
    vocabulary = Vocabulary(tokenizer, _in_front(tokenizer), ends, pad, rows)
    vocabulary.check(vocabulary.start, "begins every text")
    vocabulary.check(ends, "is eos_token_id")
    vocabulary.check((pad,), "is pad_token_id")
    return vocabulary


def _in_front(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that the tokenizer's template puts in front of a text."""
    # Tries texts of one known token: an unknown token may be dropped or be an error.
    for text in filter(None, map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))):
        encoding = tokenizer.encode(text)
        first = next(
            (i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None), None
        )
        if first is not None:
            return tuple(encoding.ids[:first])
    return ()


def read(directory: Path, rows: int | None = None) -> Vocabulary | None:
    """The vocabulary of a model directory, None if it has no tokenizer.json. rows: as for
    `from_tokenizer`. If the tokenizer puts nothing in front of a text but tokenizer_config.json has
    `add_bos_token`, texts start with its `bos_token`, as in transformers 4 (transformers 5 ignores
    the field where there is a tokenizer.json).

    Raises ValueError that names the unreadable file or the wrong field, and as `from_tokenizer`.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    ids = {}
    for name in FILES:
        if (directory / name).exists():
            stored = fields.read(read_json(directory / name), IDS, directory / name)
            ids |= {k: v for k, v in stored.items() if v is not None}
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except ValueError:  # `read_text` has named the file
        raise
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"{file}: not a tokenizer.json of the tokenizers library ({error}){pointer_hint(file)}"
        ) from None
    vocabulary = from_tokenizer(tokenizer, ids, rows)._replace(
        templates=chat_files.templates(directory), special=chat_files.special_tokens(directory)
    )
    return vocabulary if vocabulary.start else _with_bos(vocabulary, directory / CONFIG)


def _with_bos(vocabulary: Vocabulary, file: Path) -> Vocabulary:
    """The vocabulary with the start that a tokenizer_config.json asks for, if any."""
    stored = fields.read(read_json(file), START, file) if file.exists() else {}
    if not stored.get("add_bos_token"):
        return vocabulary
    token = vocabulary.special.get("bos_token")
    start = vocabulary.tokenizer.token_to_id(token) if token else None
    if start is None:
        raise ValueError(
            f"{file}: add_bos_token is true, but bos_token {fields.shown(token)} is no token of "
            "tokenizer.json"
        )
    vocabulary.check((start,), "begins every text")
    return vocabulary._replace(start=(start,))
