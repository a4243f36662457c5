import pkgutil
import types

import ml_collections
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from lorax import tasks
from lorax.tasks import rows

CONFIG = types.MappingProxyType({"name": "restaurants", "path": None, "n_train": 300, "seed": 0})


# ------------------------------------------------------------------------------ the batch order


def flat(n: int, batch_size: int, seed: int, steps: int) -> np.ndarray:
    return tasks.orders(n, batch_size, seed, range(steps)).reshape(-1)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 25])
def test_every_epoch_is_a_permutation_and_batches_span_epochs(batch_size):
    n, epochs = 10, 14  # 140 is a multiple of every batch size but 25
    visited = flat(n, batch_size, seed=3, steps=-(-n * epochs // batch_size))[: n * epochs]
    for epoch in visited.reshape(epochs, n):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))


def test_batch_size_does_not_change_the_order():
    np.testing.assert_array_equal(flat(10, 4, 3, 15), flat(10, 6, 3, 10))


def test_epochs_and_seeds_differ():
    first, second = flat(50, 10, 0, 10).reshape(2, 50)
    assert (first != second).any()
    other = flat(50, 10, 1, 5)
    assert (first != other).any()
    assert (second != other).any()  # seed 1 is not seed 0 one epoch late


def test_order_is_a_pure_function():
    batch = tasks.order(1000, 16, 5, 123_456_789)
    tasks._order.cache_clear()
    tasks._batches.cache_clear()
    np.testing.assert_array_equal(tasks.order(1000, 16, 5, 123_456_789), batch)
    np.testing.assert_array_equal(tasks.order(np.int64(1000), 16, np.int32(5), 123_456_789), batch)
    assert batch.dtype == np.int64 and batch.shape == (16,)
    with pytest.raises(ValueError, match="read-only"):
        batch[0] = 0


def test_orders_stacks_order():
    steps = [7, 2, 2, 900]
    batches = tasks.orders(100, 8, 1, steps)
    assert batches.shape == (4, 8) and batches.dtype == np.int64
    for batch, step in zip(batches, steps, strict=True):
        np.testing.assert_array_equal(batch, tasks.order(100, 8, 1, step))
    assert tasks.orders(100, 8, 1, []).shape == (0, 8)


def test_one_row():
    np.testing.assert_array_equal(tasks.order(1, 3, 0, 5), [0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0), "n is 0; it must be at least 1"),
        ((10, 0, 0, 0), "batch_size is 0; it must be at least 1"),
        ((10, 4, -1, 0), "seed is -1; it must be at least 0"),
        ((10, 4, 0, -1), "step is -1; it must be at least 0"),
    ],
)
def test_order_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks.order(*arguments)


def test_order_takes_whole_numbers_only():
    with pytest.raises(TypeError, match="float"):
        tasks.order(10, 4, 0, 1.5)


# -------------------------------------------------------------------------- rows and their masks


def test_masked_targets_are_the_completion(tokenizer):
    task = tasks.build(CONFIG, tokenizer, 256, eval_examples=64)
    end = tokenizer.token_to_id("<|endoftext|>")
    for split, pairs in (
        (task.train, tasks.restaurants.examples(300, 0, "train")),
        (task.eval, tasks.restaurants.examples(512, 0, "eval")[::8]),
    ):
        tokens, mask = split["tokens"], split["mask"]
        assert tokens.dtype == np.int32 and mask.dtype == np.float32
        assert tokens.shape == mask.shape == (len(pairs), 257)
        assert not mask[:, 0].any()
        for (prompt, completion), row, weight in zip(pairs, tokens, mask, strict=True):
            targets = row[1:][weight[1:] == 1.0]
            assert targets[-1] == end
            assert tokenizer.decode(targets[:-1].tolist()) == " " + completion
            start = int(weight.argmax())
            assert tokenizer.decode(row[:start].tolist()) == prompt
            after = row[start + len(targets) :]
            assert (after == end).all() and not weight[start + len(targets) :].any()


def test_build_takes_a_config_dict_and_is_deterministic(tokenizer):
    config = ml_collections.ConfigDict(dict(CONFIG)).lock()
    one = tasks.build(config, tokenizer, 256, 64)
    two = tasks.build(CONFIG, tokenizer, 256, 64)
    assert one.name == "restaurants" and one.note == two.note
    for split in ("train", "eval"):
        for key in ("tokens", "mask"):
            np.testing.assert_array_equal(getattr(one, split)[key], getattr(two, split)[key])


def test_long_examples_are_dropped_and_counted(tokenizer):
    whole = tasks.build(CONFIG, tokenizer, 256, None)
    end = tokenizer.token_to_id("<|endoftext|>")
    lengths = (whole.train["tokens"] != end).sum(1) + 1
    seq_len = int(np.median(lengths)) - 1
    kept = lengths <= seq_len + 1
    part = tasks.build(CONFIG, tokenizer, seq_len, None)
    assert 0 < kept.sum() < 300
    np.testing.assert_array_equal(
        part.train["tokens"], whole.train["tokens"][kept][:, : seq_len + 1]
    )
    dropped = f"{300 - kept.sum()} of 300 dropped, longer than {seq_len + 1} tokens"
    assert f"{kept.sum()} train examples ({dropped})" in part.note
    assert whole.note == "restaurants: 300 train examples, 512 eval examples"


def test_no_example_fits(tokenizer):
    whole = tasks.build(CONFIG, tokenizer, 256, None)
    end = tokenizer.token_to_id("<|endoftext|>")
    needed = (whole.train["tokens"] != end).sum(1)  # read all but the last, end-of-text
    message = (
        r"^train\.seq_len: none of the 300 train examples fits 8; "
        f"the shortest needs {needed.min()}, all of them {needed.max()}$"
    )
    with pytest.raises(ValueError, match=message):
        tasks.build(CONFIG, tokenizer, 8, None)
    fitting = tasks.build(CONFIG, tokenizer, int(needed.max()), None)
    assert len(fitting.train["tokens"]) == 300


def test_evaluation_rows_are_evenly_spaced(tokenizer):
    whole = tasks.build(CONFIG, tokenizer, 256, None)
    part = tasks.build(CONFIG, tokenizer, 256, 5)
    index = [0, 102, 204, 307, 409]
    np.testing.assert_array_equal(part.eval["tokens"], whole.eval["tokens"][index])
    np.testing.assert_array_equal(part.eval["mask"], whole.eval["mask"][index])
    assert part.note.endswith("; evaluates on 5 of these, evenly spaced")
    assert len(tasks.build(CONFIG, tokenizer, 256, 10_000).eval["tokens"]) == 512


# -------------------------------------------------------------------------------------- errors


def test_registry_is_complete():
    modules = [
        pkgutil.resolve_name(f"lorax.tasks.{x.name}") for x in pkgutil.iter_modules(tasks.__path__)
    ]
    assert {x.load for x in modules if hasattr(x, "load")} == set(tasks.TASKS.values())


def test_unknown_task(tokenizer):
    with pytest.raises(ValueError) as error:
        tasks.build({**CONFIG, "name": "restaurant"}, tokenizer, 64, 8)
    assert str(error.value) == (
        "task.name: 'restaurant' is no task; there is e2e, restaurants, text (nearest: restaurants)"
    )


@pytest.mark.parametrize(
    ("seq_len", "eval_examples", "message"),
    [
        (0, 8, r"^train\.seq_len: 0 was given; it must be at least 1"),
        (64, 0, r"^eval\.examples: 0 was given; it must be at least 1"),
    ],
)
def test_sizes_must_be_positive(tokenizer, seq_len, eval_examples, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(CONFIG, tokenizer, seq_len, eval_examples)


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_tokenizer_without_end_of_text(name, tmp_path):
    path = tmp_path / "file"
    path.write_text("once upon a time")
    config = {"name": name, "path": str(path) if name == "text" else None}
    if name == "e2e":
        for file in ("trainset.csv", "devset.csv"):
            (tmp_path / file).write_text("mr,ref\nname[A],B\n")
        config["path"] = str(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer: it has no '<\|endoftext\|>' token"):
        tasks.build(config, Tokenizer(models.BPE()), 64, 8)


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_tokenizer_that_cuts_or_pads(tokenizer, setting):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(8) if setting == "truncation" else copy.enable_padding()
    with pytest.raises(ValueError, match="^tokenizer: it truncates or pads"):
        rows.end_of_text(copy)
