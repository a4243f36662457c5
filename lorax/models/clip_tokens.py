"""Texts as CLIP's tokens, as transformers' CLIPTokenizer makes them for a pipeline of diffusers.

A text is lower case, begins with <|startoftext|>, ends with <|endoftext|>, and is filled up to the
length of all texts with the pad token, <|endoftext|> again where the files name no other (those of
Stable Diffusion 2 name "!"). A longer text is cut, and its end token stays. As in transformers, a
pad token that occurs in a text is itself there too, and not the last letter of a word.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from lorax import chat_files, fields
from lorax.files import read_json, read_text

START, END = "<|startoftext|>", "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
#: Fields read from a tokenizer_config.json. A tokenizer without a limit has a huge length there.
_LENGTH = {"model_max_length": fields.Kind("a positive number", lambda x: _is_number(x) and x >= 1)}


def encode(texts: Sequence[str], directory: Path, longest: int) -> tuple[np.ndarray, int]:
    """(tokens (N, T) int32, how many of the texts were cut). T is the length that the directory's
    tokenizer_config.json names, at most `longest`, the text encoder's positions.

    Raises FileNotFoundError or ValueError that names the file at fault.
    """
    tokenizer, config = read(directory), directory / CONFIG
    given = fields.read(read_json(config), _LENGTH, config) if config.is_file() else {}
    t, pad = int(min(given.get("model_max_length", longest), longest)), _pad(directory)
    number = tokenizer.token_to_id(pad)
    if number is None:
        raise ValueError(f"{directory}: the pad token {pad!r} is not in the vocabulary")
    whole = tokenizer.encode_batch(list(texts))
    tokenizer.enable_truncation(t)
    tokenizer.enable_padding(length=t, pad_id=number, pad_token=pad)
    made = tokenizer.encode_batch(list(texts))
    cut = sum(len(encoding.ids) > t for encoding in whole)
    return np.array([encoding.ids for encoding in made], np.int32), cut


def read(directory: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt; it neither cuts nor pads.
    Raises FileNotFoundError or ValueError that names the file at fault."""
    whole, vocab, merges = (directory / name for name in FILES)
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        raise FileNotFoundError(f"{directory}: no tokenizer.json, nor vocab.json and merges.txt")
    file = whole if whole.is_file() else vocab
    read_text(file)  # names a file that is no text
    try:
        from_files = lambda: _built(vocab, merges, _pad(directory))
        tokenizer = Tokenizer.from_file(str(whole)) if file == whole else from_files()
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file}: not the file of a CLIP tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _built(vocab: Path, merges: Path, pad: str) -> Tokenizer:
    ids, pairs = models.BPE.read_file(str(vocab), str(merges))
    bpe = models.BPE(
        ids, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
        unk_token=END,
    )  # fmt: skip
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    parts = [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.add_special_tokens([x for x in (START, END, pad) if x in ids])
    ends = ((name, tokenizer.token_to_id(name)) for name in (END, START))
    tokenizer.post_processor = processors.RobertaProcessing(*ends, False, False)
    return tokenizer


def _pad(directory: Path) -> str:
    """The pad token's text. Files of transformers 4 may name two: that of the map holds."""
    config = directory / CONFIG
    older = not (config.is_file() and "added_tokens_decoder" in read_json(config))
    names = [MAP, CONFIG] if older else [CONFIG]
    for name in names:
        if (directory / name).is_file():
            given = chat_files.tokens_of(read_json(directory / name), directory / name)
            if given.get("pad_token"):
                return given["pad_token"]
    return END


def _is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
