from pathlib import Path

import pytest
from support import data
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lorax import vocabulary as vocabularies
from lorax.tasks import restaurants
from lorax.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens, trained on the task's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = restaurants.examples(500, seed=0)
    tokenizer.train_from_iterator((f"{prompt} {text}" for prompt, text in pairs), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def vocabulary(tokenizer) -> Vocabulary:
    """GPT-2's kind: no start, "<|endoftext|>" ends and pads."""
    return vocabularies.from_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def llama() -> Vocabulary:
    """LLaMA's kind, real: SentencePiece, <s> starts, </s> ends, no "<|endoftext|>"."""
    return vocabularies.read(data("models/stories-llama-260k"))


@pytest.fixture(scope="session")
def e2e_zip() -> Path:
    return data("e2e/e2e-dataset.zip")


@pytest.fixture(scope="session")
def stories() -> Path:
    return data("tinystories/tinystories_sample.txt")


@pytest.fixture(scope="session")
def bert() -> Vocabulary:
    """BERT's kind: 400 lower-case word pieces, [CLS] a [SEP] b [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    texts = (text for _, text in restaurants.examples(200, seed=0))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return Vocabulary(tokenizer, (), (3,), 0)
