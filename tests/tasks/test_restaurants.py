import collections
import re
import zlib

import pytest
from tokenizers import Tokenizer, trainers

from lorax import tasks
from lorax.tasks import restaurants
from lorax.tasks.restaurants import FORMS, FUSIBLE, OPEN, VALUES


@pytest.fixture(scope="module")
def train():
    return restaurants.examples(restaurants.N_TRAIN, seed=0)


@pytest.fixture(scope="module")
def evaluation():
    return restaurants.examples(restaurants.N_EVAL, seed=0, split="eval")


def meaning(prompt: str) -> dict[str, str]:
    return dict(pair.split(" = ") for pair in prompt.removesuffix(" =>").split(" ; "))


def holds(key: str, slots: dict[str, str]) -> bool:
    """Whether the key of a phrase ("near", "price=cheap rating=low") fits a meaning."""
    parts = (part.partition("=") for part in key.split())
    return all(slot in slots and value in ("", slots[slot]) for slot, _, value in parts)


def pattern(phrase: str) -> re.Pattern:
    """A phrase with its {braces} open, at the start of a sentence or within it."""
    parts = [re.escape(part) for part in re.split(r"\{\w+\}", phrase)]
    return re.compile(r"\b" + "[A-Za-z' ]+?".join(parts) + r"(?!\w)", re.IGNORECASE)


PATTERNS = {
    key: [pattern(phrase) for phrase in forms.adj + forms.post + forms.verb + forms.say]
    for key, forms in FORMS.items()
}


# ------------------------------------------------------------------------------------ the split


def test_meanings_are_distinct_and_many(train, evaluation):
    texts = collections.defaultdict(set)
    for prompt, completion in train:
        texts[prompt].add(completion)
    assert len(train) == 12_000 and len(texts) == 4_000
    assert {len(x) for x in texts.values()} == {3}  # three texts each, no two alike
    assert len({prompt for prompt, _ in train[:4_000]}) == 4_000  # so n_train = 100 is diverse
    assert len(evaluation) == len({prompt for prompt, _ in evaluation}) == 512


def test_splits_share_no_meaning_whatever_the_seeds(train, evaluation):
    held_out = {prompt for prompt, _ in evaluation}
    assert held_out.isdisjoint(prompt for prompt, _ in train)
    assert held_out.isdisjoint(prompt for prompt, _ in restaurants.examples(4_000, seed=1))


def test_examples_are_deterministic_and_nested(train):
    assert restaurants.examples(300, seed=0) == train[:300]
    assert restaurants.examples(300, seed=1) != train[:300]


def test_more_than_the_default_brings_new_meanings(train):
    more = restaurants.examples(12_100, seed=0)
    assert more[:12_000] == train
    assert {p for p, _ in more[12_000:]}.isdisjoint(p for p, _ in train)


def test_shipped_data_has_not_changed(train):
    # Results quoted for this task hold for exactly these texts.
    assert zlib.crc32(repr(train).encode()) == 363_002_652


# ---------------------------------------------------------------------------------- the grammar


def test_every_value_has_words():
    for slot, values in VALUES.items():
        if slot != "kind":
            for key in [slot] if slot in OPEN else [f"{slot}={value}" for value in values]:
                assert FORMS[key].verb and FORMS[key].say, key
    pairs = {tuple(part.partition("=")[0] for part in key.split()) for key in FORMS if " " in key}
    assert pairs == set(FUSIBLE)
    for forms in FORMS.values():
        assert forms.sign in (-1, 0, 1) and (forms.verb or forms.say)


def test_every_phrase_is_used(train):
    texts = "\n".join(completion for _, completion in train)
    for key, phrases in PATTERNS.items():
        for phrase in phrases:
            assert phrase.search(texts), (key, phrase.pattern)


def test_all_is_said_and_nothing_else(train):
    for prompt, text in train[::7]:
        slots = meaning(prompt)
        assert slots["name"] in text
        assert slots.get("kind", "") in text
        for slot, value in slots.items():
            if slot in OPEN:
                assert value in text, (prompt, text)
            elif slot not in ("name", "kind"):
                keys = [k for k in FORMS if f"{slot}={value}" in k.split() and holds(k, slots)]
                assert any(p.search(text) for k in keys for p in PATTERNS[k]), (prompt, text, slot)
        for key, forms in FORMS.items():
            if not holds(key, slots):
                for phrase in forms.verb + forms.say:
                    told = "{" not in phrase and len(phrase.split()) > 2 and phrase in text.lower()
                    assert not told, (prompt, text, phrase)


def test_sentences_are_well_formed(train):
    for _, text in train:
        sentences = re.split(r"(?<=\.) ", text)
        assert 1 <= len(sentences) <= 3
        for sentence in sentences:
            assert re.fullmatch(r"[A-Z][A-Za-z', -]*[a-z]\.", sentence), text
        assert not re.search(r"  | ,|,,|\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text), text


def test_number_agrees(train):
    for dish in restaurants.DISHES:
        wrong = "is" if dish.endswith("s") else "are"
        assert not any(f"{dish} {wrong} " in text for _, text in train)
    texts = " ".join(text for _, text in train)
    assert "noodles are served" in texts and "cheese is served" in texts


def test_contrast_takes_but(train):
    assert restaurants._contrast(1, -1) == restaurants._contrast(-1, 1) == "but"
    assert restaurants._contrast(1, 1) == restaurants._contrast(0, -1) == "and"
    texts = "\n".join(text for _, text in train)
    assert "cheap but badly rated" in texts and "much loved and cheap" in texts
    assert "cheap and badly rated" not in texts and "much loved but cheap" not in texts
    assert re.search(r"^Although |\. Although ", texts)


# -------------------------------------------------------------------------------------- the task


def test_examples_fit_128_tokens_of_a_story_vocabulary(tokenizer, stories, train):
    story = Tokenizer.from_str(tokenizer.to_str())  # same pre-tokenizer, trained anew on stories
    text = stories.read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=story.pre_tokenizer.alphabet(),
        show_progress=False,
    )
    story.train_from_iterator(text.splitlines(), trainer)
    texts = [f"{prompt} {completion}<|endoftext|>" for prompt, completion in train]
    lengths = sorted(len(encoding.ids) for encoding in story.encode_batch_fast(texts))
    assert 80 <= lengths[len(lengths) // 2] <= 100
    assert lengths[int(0.97 * len(lengths))] <= 128


def test_build(vocabulary, evaluation):
    task = tasks.build(
        {"name": "restaurants"}, vocabulary, 256, 128
    )  # all fields at their defaults
    assert len(task.train["tokens"]) == 12_000 and len(task.eval["tokens"]) == 128
    assert task.note == (
        "restaurants: 12,000 train examples, 512 eval examples; evaluates on 128 of these, "
        "evenly spaced"
    )
    assert task.prompts == tuple(tasks.Prompt(prompt, (text,)) for prompt, text in evaluation)
    assert (task.outputs, task.scores) == (0, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "a.csv"}, r"^task\.path: 'a.csv' was given; task 'restaurants' reads no file"),
        ({"n_train": 0}, r"^task\.n_train: 0 was given; it must be at least 1"),
        ({"seed": -1}, r"^task\.seed: -1 was given; it must be at least 0"),
    ],
)
def test_errors(vocabulary, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.build({"name": "restaurants", **fields}, vocabulary, 128, 8)


def test_unknown_split():
    with pytest.raises(ValueError, match="^split: 'test' was given; expected 'train' or 'eval'"):
        restaurants.examples(1, 0, "test")
