import collections
import json
import re
import types

import numpy as np
import pytest
from support import data
from tokenizers import Tokenizer, pre_tokenizers

from lorax import vocabulary as vocabularies
from lorax.tasks import restaurants, rows
from lorax.tasks.rows import END

PAIRS = restaurants.examples(300, 0)


def read(kind: str) -> vocabularies.Vocabulary:
    """gpt2 and llama: real ones. metaspace: llama's pieces with the dummy prefix as newer files
    have it, in a pre-tokenizer that adds a space only where the text has none."""
    if kind == "gpt2":
        return vocabularies.read(data("models/gpt2-tokenizer"))
    llama = vocabularies.read(data("models/stories-llama-260k"))
    if kind == "llama":
        return llama
    tokenizer = Tokenizer.from_str(
        json.dumps(json.loads(llama.tokenizer.to_str()) | {"normalizer": None})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return llama._replace(tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["gpt2", "llama", "metaspace"])
def real(request) -> vocabularies.Vocabulary:
    return read(request.param)


def examples_of(packed: dict) -> list[tuple]:
    """(ids, mask) of the examples in packed rows."""
    found = []
    for tokens, mask, segments in zip(
        packed["tokens"], packed["mask"], packed["segments"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            found.append((tokens[at].tolist(), mask[at].tolist()))
    return found


# ------------------------------------------------------------------------------ real tokenizers


ODD = [
    ("name = Café Zoë =>", "Zoë, a café:  £5 – “fine”."),
    ("two  spaces\n\nand lines\n", "\nindented\n    code"),
    (" led by a space", "日本 ✓"),
    ("ends in a space ", "x"),
    ("a", ""),
]


def test_apart_and_put_together_are_the_text(real):
    pairs = PAIRS[:40] + ODD
    if real.decode(real.encode(" x")) == "x":  # Metaspace can't tell a space from its own
        pairs.remove(ODD[2])
    built, _ = rows.encode([rows.pair(*x) for x in pairs], real, 300, "train")
    n = len(real.start)
    assert real.start == ((1,) if real.end == 2 else ()) and real.end in (2, 50_256)
    for (prompt, completion), ids, mask in zip(pairs, built["tokens"], built["mask"], strict=True):
        space = "" if prompt[-1].isspace() or completion[:1].isspace() else " "
        length = int(mask.nonzero()[0][-1]) + 1
        first = int(mask.argmax())
        assert tuple(ids[:n]) == real.start and ids[length - 1] == real.end
        assert mask.tolist() == [float(first <= i < length) for i in range(301)]
        assert (ids[length:] == real.pad).all()
        assert real.decode(ids[n:first]) == prompt
        assert real.decode(ids[n:length]) == prompt + space + completion


def test_ids_are_those_of_the_whole_text(real):
    # Both kinds split before a space, so nothing is lost by tokenising apart.
    built, _ = rows.encode([rows.pair(*x) for x in PAIRS], real, 400, "train")
    for (prompt, completion), ids in zip(PAIRS, built["tokens"], strict=True):
        whole = [*real.start, *real.encode(f"{prompt} {completion}"), real.end]
        assert ids[: len(whole)].tolist() == whole


def test_pieces_inside_a_row(real):
    pieces = [("User:", False), (" hi", True), (END, True), ("\nUser:", False), ("\n", True)]
    pieces += [("x", False), ("  y", True), (END, True), ("x", False)]
    built, _ = rows.encode([pieces], real, 40, "train")
    ids, mask = built["tokens"][0], built["mask"][0]
    n = len(real.start)
    targets, rest = ids[mask == 1.0], ids[n:][mask[n:] == 0.0]
    assert real.decode(ids[n:]).rstrip() == "User: hi\nUser:\nx  yx"
    assert (targets == real.end).sum() == 2 and targets[-1] == real.end
    assert real.decode([*real.encode("a"), *targets]) == "a hi\n  y"
    assert real.decode(rest).rstrip() == "User:\nUser:xx"


def test_tokenizer_that_can_not_be_cut(llama):
    def merged(text: str, **_) -> object:  # one token for a whole text, a space in front
        return types.SimpleNamespace(ids=[len(text)])

    class Strange:
        encode = staticmethod(merged)

        def encode_batch_fast(self, texts, **_):
            return [merged(text) for text in texts]

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    with pytest.raises(ValueError, match=r"^tokenizer: .* so that ' b' can't be tokenised as a"):
        rows.encode([rows.pair("a", "b")], llama._replace(tokenizer=Strange()), 8, "train")


# ---------------------------------------------------------------------------- rows and their masks


def test_masked_targets_are_the_completion(vocabulary):
    built, note = rows.encode([rows.pair(*x) for x in PAIRS], vocabulary, 256, "train")
    tokens, mask = built["tokens"], built["mask"]
    assert note == "300 train examples" and list(built) == ["tokens", "mask"]
    assert tokens.dtype == np.int32 and mask.dtype == np.float32
    assert tokens.shape == mask.shape == (300, 257)
    assert not mask[:, 0].any()
    for (prompt, completion), row, weight in zip(PAIRS, tokens, mask, strict=True):
        ids = [vocabulary.encode(prompt), [*vocabulary.encode(f" {completion}"), vocabulary.end]]
        stop = len(ids[0]) + len(ids[1])
        assert row[:stop].tolist() == ids[0] + ids[1] and (row[stop:] == vocabulary.pad).all()
        assert weight.nonzero()[0].tolist() == list(range(len(ids[0]), stop))
        assert set(weight.tolist()) == {0.0, 1.0}


def test_padding_is_the_vocabularys(vocabulary):
    built, _ = rows.encode([rows.pair("a", "b")], vocabulary._replace(pad=7), 9, "train")
    assert built["tokens"][0].tolist()[-3:] == [7, 7, 7] and vocabulary.end in built["tokens"]


def test_long_examples_are_dropped_and_counted(vocabulary):
    examples = [rows.pair(*x) for x in PAIRS]
    whole, _ = rows.encode(examples, vocabulary, 256, "train")
    lengths = (whole["tokens"] != vocabulary.end).sum(1) + 1
    seq_len = int(np.median(lengths)) - 1
    kept = lengths <= seq_len + 1
    part, note = rows.encode(examples, vocabulary, seq_len, "train")
    assert 0 < kept.sum() < 300
    np.testing.assert_array_equal(part["tokens"], whole["tokens"][kept][:, : seq_len + 1])
    dropped = f"{300 - kept.sum()} of 300 dropped, longer than {seq_len + 1} tokens"
    assert note == f"{kept.sum()} train examples ({dropped})"


def test_long_examples_are_cut_where_a_target_is_left(vocabulary):
    examples = [rows.pair(*x) for x in PAIRS]
    whole, _ = rows.encode(examples, vocabulary, 256, "train")
    first = np.argmax(whole["mask"], axis=1)  # target
    seq_len = int(np.median(first))
    kept, long = first <= seq_len, (whole["tokens"] != vocabulary.end).sum(1) > seq_len
    part, note = rows.encode(examples, vocabulary, seq_len, "train", truncate=True)
    for name, x in part.items():
        np.testing.assert_array_equal(x, whole[name][kept][:, : seq_len + 1])
    said = f"{300 - kept.sum()} of 300 dropped, {(kept & long).sum()} of 300 cut, longer than"
    assert (
        0 < kept.sum() < 300
        and note == f"{kept.sum()} train examples ({said} {seq_len + 1} tokens)"
    )


@pytest.mark.parametrize("packing", [False, True])
def test_training_is_on_all_tokens_if_asked_and_evaluation_on_completions(vocabulary, packing):
    examples = [rows.pair(*x) for x in PAIRS[:9]]
    packed, _ = rows.encode(examples, vocabulary, 300, "train", packing=True)
    built = {}
    for loss_on in ("completions", "all"):
        settings = {"name": "x", "packing": packing, "loss_on": loss_on}
        built[loss_on] = rows.encode_sets(settings, vocabulary, 300, *[examples] * 2, None, ())
    usual, task = built.values()
    # but the first of each example, which nothing predicts
    assert task.train["mask"].sum() == (packed["segments"] > 0).sum() - len(examples)
    np.testing.assert_array_equal(task.train["tokens"], usual.train["tokens"])
    np.testing.assert_array_equal(task.eval["mask"], usual.eval["mask"])


def test_no_example_fits(vocabulary):
    examples = [rows.pair(*x) for x in PAIRS]
    whole, _ = rows.encode(examples, vocabulary, 256, "train")
    needed = (whole["tokens"] != vocabulary.end).sum(1)  # read all but the last, the end
    message = (
        r"^train\.seq_len: none of the 300 train examples fits 8; "
        f"the shortest needs {needed.min()}, all of them {needed.max()}$"
    )
    with pytest.raises(ValueError, match=message):
        rows.encode(examples, vocabulary, 8, "train")
    fitting, _ = rows.encode(examples, vocabulary, int(needed.max()), "train")
    assert len(fitting["tokens"]) == 300


# --------------------------------------------------------------------------------------- packing


def test_first_fit_decreasing_by_hand():
    #                                     order: 1 (7), 4 (5), 0 (4), 2 (3), 5 (3), 3 (1)
    assert rows.first_fit([4, 7, 3, 1, 5, 3], 10).tolist() == [1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_first_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    width = 64
    lengths = rng.integers(1, width + 1, 500)
    row_of = rows.first_fit(lengths, width)
    room = []  # the definition, slowly
    for i in sorted(range(500), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(room))
        room += [width] * (row == len(room))
        room[row] -= lengths[i]
        assert row_of[i] == row
    assert row_of.max() + 1 == len(room) >= lengths.sum() / width


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_rows_hold_every_example_once(kind):
    vocabulary = read(kind)
    examples = [rows.pair(*x) for x in PAIRS]
    plain, _ = rows.encode(examples, vocabulary, 300, "train")
    packed, note = rows.encode(examples, vocabulary, 300, "train", packing=True)
    n = len(packed["tokens"])
    assert note == f"300 train examples packed into {n} rows"
    assert {k: (v.dtype, v.shape) for k, v in packed.items()} == {
        "tokens": (np.int32, (n, 301)),
        "mask": (np.float32, (n, 301)),
        "segments": (np.int32, (n, 301)),
    }
    lengths = [int(mask.nonzero()[0][-1]) + 1 for mask in plain["mask"]]
    alone = [
        (tokens[:length].tolist(), mask[:length].tolist())
        for tokens, mask, length in zip(plain["tokens"], plain["mask"], lengths, strict=True)
    ]
    assert sorted(examples_of(packed)) == sorted(alone)

    inside = packed["segments"] > 0
    assert (packed["tokens"][~inside] == vocabulary.pad).all()
    assert not packed["mask"][~inside].any()
    step = np.diff(packed["segments"], axis=1)  # 1, 2, 3, ..., then 0 to the end of the row
    assert (packed["segments"][:, 0] == 1).all() and (packed["segments"].max(1) > 1).any()
    assert ((step == 0) | (step == 1) | ~inside[:, 1:]).all()
    assert (inside[:, 1:] <= inside[:, :-1]).all()
    assert not packed["mask"][:, 1:][step != 0].any()  # no example predicts another's first token

    def bigrams(built):  # what any model with a context of one token is trained on
        weighted = built["mask"][:, 1:] > 0
        left, right = built["tokens"][:, :-1][weighted], built["tokens"][:, 1:][weighted]
        return collections.Counter(zip(left.tolist(), right.tolist(), strict=True))

    assert bigrams(packed) == bigrams(plain)


def test_a_first_token_is_no_target_even_of_a_target(vocabulary):
    built, _ = rows.encode([[("one", True)], [("two", True)]], vocabulary, 20, "train", True)
    assert built["segments"].max() == 2
    starts = np.diff(built["segments"][0], prepend=0) > 0
    assert not built["mask"][0][starts].any() and built["mask"].sum() > 0


def test_packing_drops_what_is_too_long(vocabulary):
    examples = [rows.pair("a", "b"), rows.pair("a", "b" * 50), rows.pair("c", "d")]
    built, note = rows.encode(examples, vocabulary, 12, "train", packing=True)
    dropped = re.escape(
        "2 train examples packed into 1 rows (1 of 3 dropped, longer than 13 tokens)"
    )
    assert re.fullmatch(dropped, note) and built["segments"].max() == 2
