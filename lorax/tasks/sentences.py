"""Rows of a text classifier: one sentence or two, joined by its tokenizer."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from lorax.tasks.rows import Rows
from lorax.vocabulary import Vocabulary

Texts = tuple[str, ...]  # an example's sentence, or its two


def encode(
    texts: Sequence[Texts], labels: np.ndarray, vocabulary: Vocabulary, seq_len: int
) -> tuple[Rows, int]:
    """Rows that a classifier reads, and how many examples were truncated.

    The tokenizer's own template joins the sentences ("<s> a </s></s> b </s>", "[CLS] a [SEP] b
    [SEP]"). What is longer than seq_len loses tokens at the end of its sentences, the longer
    first, as in Hugging Face's `truncation="longest_first"`.

    Returns {"tokens": (N, seq_len) int32, padded with `vocabulary.pad`; "segments": (N, seq_len)
    int32, 1 on tokens and 0 on padding; "types": (N, seq_len) int32, the tokenizer's type ids (0
    and 1 for the two sentences of BERT, 0 for RoBERTa) and 0 on padding; "label": labels}.
    Raises ValueError for a tokenizer without a template, if seq_len is too short, and for a token
    without an embedding in the model.
    """
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer.to_str())  # a copy, to set it up
    sentences = len(texts[0])
    if tokenizer.encode(*["a"] * sentences).special_tokens_mask[:1] != [1]:
        raise ValueError(
            "tokenizer: it puts no special token in front of a text, and a classifier reads the "
            "first token; set tokenizer.post_processor, as in BERT's or RoBERTa's tokenizer.json"
        )
    special = tokenizer.num_special_tokens_to_add(sentences == 2)
    if seq_len < special + sentences:
        raise ValueError(
            f"train.seq_len: {seq_len} was given; it must be at least {special + sentences}: "
            f"{special} special tokens and one for each sentence"
        )
    tokenizer.enable_truncation(seq_len, strategy="longest_first")
    shape = (len(texts), seq_len)
    tokens = np.full(shape, vocabulary.pad, np.int32)
    segments, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    cut = 0
    for start in range(0, len(texts), 10_000):  # encodings take far more memory than rows
        batch = [pair if sentences == 2 else pair[0] for pair in texts[start : start + 10_000]]
        for row, encoding in enumerate(tokenizer.encode_batch_fast(batch), start):
            length = len(encoding.ids)
            tokens[row, :length] = vocabulary.check(encoding.ids)
            segments[row, :length] = 1
            types[row, :length] = encoding.type_ids
            cut += bool(encoding.overflowing)
    return {"tokens": tokens, "segments": segments, "types": types, "label": labels}, cut
