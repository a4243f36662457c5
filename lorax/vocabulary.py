"""A tokenizer with the ids that a model gives a meaning to."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from lorax.files import read_json

END_OF_TEXT = "<|endoftext|>"


class Vocabulary(NamedTuple):
    """What turns text into a model's tokens and back.

    tokenizer: the `tokenizers.Tokenizer`, which neither truncates nor pads.
    start: ids in front of every text of a language model (BOS), () for models without.
    ends: ids that end a text, () where there are none; `end` is the first, and the one that
        training examples end with.
    pad: id that fills rows up; never attended to, so any id will do where a model has none.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    ends: tuple[int, ...]
    pad: int

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
        """Ids of a text alone, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def from_tokenizer(tokenizer: Tokenizer, ids: dict | None = None) -> Vocabulary:
    """ids: `bos_token_id`, `eos_token_id` (int or list), `pad_token_id` as in a config.json.

    A model without an end of its own ends at "<|endoftext|>". The start is what the tokenizer
    itself puts in front of a text. Raises ValueError for an id that the tokenizer lacks.
    """
    ids = ids or {}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ends = ids.get("eos_token_id")
    ends = tokenizer.token_to_id(END_OF_TEXT) if ends is None else ends
    ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,) if ends is not None else ()
    pad = ids.get("pad_token_id")
    pad = (*ends, 0)[0] if pad is None or pad < 0 else pad
    size = tokenizer.get_vocab_size()
    wrong = [i for i in (*ends, pad) if not 0 <= i < size]
    if wrong:
        raise ValueError(f"tokenizer: it has {size} tokens; config.json names the ids {wrong}")
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    start = tuple(i for i in first if i == ids.get("bos_token_id", i) and i not in ends)
    return Vocabulary(tokenizer, start, ends, pad)


def read(directory: Path) -> Vocabulary | None:
    """The vocabulary of a model directory, None where it has no tokenizer.json."""
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    ids = {}
    for name in ("config.json", "generation_config.json"):  # the later one knows better
        if (directory / name).exists():
            ids |= {k: v for k, v in read_json(directory / name).items() if v is not None}
    return from_tokenizer(Tokenizer.from_file(str(file)), ids)
