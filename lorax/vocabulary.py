"""A tokenizer with the ids that a model gives a meaning to."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from lorax import fields
from lorax.files import pointer_hint, read_json, read_text

END_OF_TEXT = "<|endoftext|>"
FILES = ("config.json", "generation_config.json")  # the later one knows better
#: What the two say of ids. pad_token_id -1 is an older way to say that there is none.
IDS = {
    "eos_token_id": fields.either(fields.optional(fields.ID), fields.each(fields.ID)),
    "pad_token_id": fields.optional(fields.whole(-1)),
}


class Vocabulary(NamedTuple):
    """What turns text into a model's tokens and back.

    tokenizer: the `tokenizers.Tokenizer`, which neither truncates nor pads.
    start: ids that the tokenizer puts in front of a text (BOS, BERT's [CLS]), () where it puts
        none. A language model reads every text behind them.
    ends: ids that end a text, () where there are none; `end` is the first, and the one that
        training examples end with.
    pad: id that fills rows up; never attended to, so any id that the model has will do.
    rows: ids that the model has an embedding for, 0 to rows - 1; None where that isn't known.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    ends: tuple[int, ...]
    pad: int
    rows: int | None = None

    @property
    def end(self) -> int:
        """The id that ends a training example. Raises ValueError where the model has none."""
        if not self.ends:
            raise ValueError(
                f"tokenizer: no token ends a text: config.json names no eos_token_id, and there is "
                f"no {END_OF_TEXT!r}; add it with tokenizer.add_special_tokens([{END_OF_TEXT!r}])"
            )
        return self.ends[0]

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, nothing added. Raises ValueError as `check` does."""
        return self.check(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def check(self, ids: Sequence[int], use: str = "comes in a text") -> Sequence[int]:
        """The same ids. Raises ValueError for one that the model has no embedding for: a token that
        was added to the tokenizer alone."""
        if self.rows is not None and max(ids, default=0) >= self.rows:
            wrong = next(i for i in ids if i >= self.rows)
            raise ValueError(
                f"tokenizer: {self.tokenizer.id_to_token(wrong)!r} has the id {wrong} and {use}, "
                f"but vocab_size is {self.rows}: the model has no embedding for it; use a token "
                f"with an id below {self.rows}, or a model whose embeddings were resized"
            )
        return ids

    def decode(self, ids) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def from_tokenizer(
    tokenizer: Tokenizer, ids: dict | None = None, rows: int | None = None
) -> Vocabulary:
    """ids: `eos_token_id` (int or list), `pad_token_id` as in a config.json. rows: of the model's
    embedding, None where that isn't known.

    A model without an end of its own ends at "<|endoftext|>". The start is what the tokenizer
    itself puts in front of a text, as it is to transformers, whatever `bos_token_id` says. Raises
    ValueError for an id that the tokenizer lacks, or the model.
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
    found = Vocabulary(tokenizer, _in_front(tokenizer), ends, pad, rows)
    found.check(found.start, "begins every text")
    found.check(ends, "is eos_token_id")
    found.check((pad,), "is pad_token_id")
    return found


def _in_front(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that the tokenizer's template puts in front of a text."""
    # A text of one known token: an unknown one may be dropped, or be an error.
    for text in filter(None, map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))):
        encoding = tokenizer.encode(text)
        own = next((i for i, of in enumerate(encoding.sequence_ids) if of is not None), None)
        if own is not None:
            return tuple(encoding.ids[:own])
    return ()


def read(directory: Path, rows: int | None = None) -> Vocabulary | None:
    """The vocabulary of a model directory, None where it has no tokenizer.json. rows: as for
    `from_tokenizer`.

    Raises ValueError that names the file which can't be read, the field which is wrong, and as
    `from_tokenizer` does.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    ids = {}
    for name in FILES:
        if (directory / name).exists():
            given = fields.read(read_json(directory / name), IDS, directory / name)
            ids |= {k: v for k, v in given.items() if v is not None}
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except ValueError:  # `read_text` has named the file
        raise
    except Exception as error:  # the library has no narrower one
        raise ValueError(
            f"{file}: not a tokenizer.json of the tokenizers library ({error}){pointer_hint(file)}"
        ) from None
    return from_tokenizer(tokenizer, ids, rows)
