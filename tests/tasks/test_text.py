import numpy as np
import pytest

from lorax import tasks
from lorax.tasks import restaurants


@pytest.fixture
def file(tmp_path):
    stories = [text for _, text in restaurants.examples(60, seed=0)]
    path = tmp_path / "stories.txt"
    path.write_bytes("\r\n<|endoftext|>\n".join([*stories, "Zoë’s café"]).encode())
    return path


def build(path, vocabulary, seq_len=16, **fields):
    return tasks.build({"name": "text", "path": str(path), **fields}, vocabulary, seq_len, None)


def test_every_token_is_predicted_once(file, tokenizer, vocabulary):
    content = file.read_bytes().decode()
    ids = tokenizer.encode(content).ids
    assert tokenizer.token_to_id("<|endoftext|>") in ids
    task = build(file, vocabulary)
    tokens = np.concatenate([task.train["tokens"], task.eval["tokens"]])
    mask = np.concatenate([task.train["mask"], task.eval["mask"]])
    assert tokens.dtype == np.int32 and mask.dtype == np.float32
    assert not mask[:, 0].any() and (mask[:, 1:] == 1.0).all()
    np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])  # the overlap
    targets = tokens[:, 1:].reshape(-1)
    np.testing.assert_array_equal(targets, ids[1 : len(targets) + 1])
    left_over = len(ids) - 1 - len(targets)
    assert 0 <= left_over < 16
    assert f"{left_over} left over at the end dropped" in task.note
    read = [ids[0], *targets.tolist()]
    assert content.startswith(tokenizer.decode(read, skip_special_tokens=False).rstrip("\ufffd"))
    assert len(task.eval["tokens"]) == len(tokens) * 5 // 100 > 1


def test_round_trip_without_remainder(file, tokenizer, vocabulary):
    content = file.read_bytes().decode()
    n = len(tokenizer.encode(content).ids)
    seq_len = next(k for k in range(2, n) if (n - 1) % k == 0 and (n - 1) // k >= 2)
    task = build(file, vocabulary, seq_len)
    tokens = np.concatenate([task.train["tokens"], task.eval["tokens"]])
    ids = [tokens[0, 0].item(), *tokens[:, 1:].reshape(-1).tolist()]
    assert tokenizer.decode(ids, skip_special_tokens=False) == content


def test_marker_is_the_end_of_whatever_vocabulary(file, llama):
    stories = file.read_bytes().decode().split("<|endoftext|>")
    expected = [[1, *llama.tokenizer.encode(x, add_special_tokens=False).ids] for x in stories]
    ids = np.concatenate([[*x, 2] for x in expected])[:-1]
    task = build(file, llama)
    tokens = np.concatenate([task.train["tokens"], task.eval["tokens"]])
    mask = np.concatenate([task.train["mask"], task.eval["mask"]])
    read = np.append(tokens[0, 0], tokens[:, 1:])
    np.testing.assert_array_equal(read, ids[: len(read)])
    np.testing.assert_array_equal(mask[:, 1:], tokens[:, 1:] != 1)  # a start is given
    assert (read == 1).sum() > 40 and (read == 2).sum() > 40
    first = read[1 : list(read).index(2)]
    assert llama.decode(first) == stories[0]


def test_at_least_one_evaluation_row(tmp_path, tokenizer, vocabulary):
    path = tmp_path / "short.txt"
    path.write_text("cheap")
    n = len(tokenizer.encode("cheap and high or low " * 3).ids)
    path.write_text("cheap and high or low " * 3)
    task = build(path, vocabulary, (n - 1) // 2)
    assert len(task.train["tokens"]) == len(task.eval["tokens"]) == 1
    with pytest.raises(ValueError) as error:
        build(path, vocabulary, n)
    assert str(error.value) == (
        f"task.path: {str(path)!r} is too short: it has {n} tokens, and a train and an eval "
        f"row of {n} need {2 * n + 1}"
    )


def test_n_train_takes_the_first_rows(file, vocabulary):
    whole, part = build(file, vocabulary), build(file, vocabulary, n_train=3)
    np.testing.assert_array_equal(part.train["tokens"], whole.train["tokens"][:3])
    np.testing.assert_array_equal(part.eval["tokens"], whole.eval["tokens"])
    available = len(whole.train["tokens"])
    with pytest.raises(ValueError, match=rf"^task\.n_train: 9999 was given; .* has {available} "):
        build(file, vocabulary, n_train=9999)


def test_empty_file(tmp_path, vocabulary):
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="is too short: it has 0 tokens"):
        build(tmp_path / "empty", vocabulary)


def test_path_errors(tmp_path, vocabulary):
    with pytest.raises(ValueError, match=r"^task\.path: task 'text' needs a UTF-8 text file; none"):
        tasks.build({"name": "text", "path": None}, vocabulary, 16, None)
    with pytest.raises(
        FileNotFoundError, match=r"^task\.path: '.*none' does not exist; expected a"
    ):
        build(tmp_path / "none", vocabulary)
    with pytest.raises(ValueError, match=r"^task\.path: .* is no file; expected a UTF-8 text file"):
        build(tmp_path, vocabulary)


def test_not_utf8(tmp_path, vocabulary):
    path = tmp_path / "latin1.txt"
    path.write_bytes("Zoë ".encode() + "café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt:1: bad byte 0xe9; expected UTF-8$"):
        build(path, vocabulary)


def test_a_byte_order_mark_is_no_text(tmp_path, vocabulary):
    (tmp_path / "plain.txt").write_text("One day. " * 60)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + b"One day. " * 60)
    plain, marked = (build(tmp_path / f"{name}.txt", vocabulary) for name in ("plain", "marked"))
    np.testing.assert_array_equal(plain.train["tokens"], marked.train["tokens"])
