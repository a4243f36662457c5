"""Texts from the command line, with several adapters in one batch."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

import lorax
from lorax import adapters, decode, generate
from lorax.adapters import peft_methods
from lorax.interop import peft

PROMPTS = ["Near the river", "name = The Red Fox ; food = Thai =>", "Once upon a time", "The"]


@pytest.fixture(scope="module")
def base():
    return lorax.load("gpt2-nano")


@pytest.fixture(scope="module")
def directories(base, tmp_path_factory):
    """Two adapters of unlike rank and targets, strong enough to change every text."""
    found = []
    for seed, (rank, targets) in enumerate(((4, ("q", "v", "o")), (2, ("up", "down")))):
        method = lorax.method("lora", rank=rank, targets=targets, alpha=8)
        state = method.init(jax.random.key(seed), base.params, base.sites)
        rng = np.random.default_rng(seed)
        trainable = jax.tree.map(
            lambda x, rng=rng: rng.normal(0, 0.15, x.shape).astype(np.float32), state.trainable
        )
        adapter = adapters.factored(base, method, state._replace(trainable=trainable))
        found.append(tmp_path_factory.mktemp("adapter") / str(seed))
        peft.save(found[-1], adapter, base.sources, "gpt2-nano")
    return found


def texts(base, prompts, params, options):
    return decode.complete(base, prompts, params, options, batch_size=3)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_with_adapters_of_their_own_are_what_separate_runs_write(base, directories, beams):
    options = decode.DecodingOptions(max_new_tokens=12, num_beams=beams)
    loaded = [None, *(peft.load(path, base.sources) for path in directories)]
    rows = [0, 1, 2, 1, 2, 0, 2]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(rows))]
    mixed = adapters.mixed(base, loaded, rows)
    together = decode.complete(base, prompts, mixed, options, rows=rows, batch_size=3)
    apart = {
        which: texts(base, prompts, adapters.bind(base, a) if a else base.params, options)
        for which, a in enumerate(loaded)
    }
    assert together == [apart[row][i] for i, row in enumerate(rows)]
    assert all(len({apart[which][i] for which in apart}) == 3 for i in range(len(rows)))


def test_the_command_line_writes_every_prompt_with_every_adapter(base, directories, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:2]))
    code = generate.main(
        ["--base", "gpt2-nano", "--adapter", "base", "--adapter", str(directories[0])]
        + ["--prompts", str(file), "--new-tokens", "8", "--out", str(out)]
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    wanted = [(p, a) for p in PROMPTS[:2] for a in ("base", str(directories[0]))]
    assert [(row["prompt"], row["adapter"]) for row in rows] == wanted
    options = decode.DecodingOptions(max_new_tokens=8)
    assert [r["text"] for r in rows[::2]] == texts(base, PROMPTS[:2], base.params, options)


@pytest.mark.parametrize("name", ["ia3", "prefix", "adalora"])
def test_adapters_of_other_methods_write_what_their_method_does(base, directories, tmp_path, name):
    hp = dict(rank=2) if name == "adalora" else dict(tokens=3) if name == "prefix" else {}
    method = lorax.method(name, **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    rng = np.random.default_rng(2)
    noise = lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32)
    state = state._replace(trainable=jax.tree.map(noise, state.trainable))
    own, out = str(tmp_path / "own"), tmp_path / "texts.jsonl"
    peft_methods.save(own, method, state, base, "gpt2-nano")
    asked = ["--base", "gpt2-nano", "--prompt", PROMPTS[0], "--new-tokens", "8", "--out", str(out)]
    assert generate.main([*asked, "--adapter", own]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    bound = method.bind(*state, base.params, sites=base.sites)
    options = decode.DecodingOptions(max_new_tokens=8)
    assert [row["text"]] == texts(base, PROMPTS[:1], bound, options)
    assert [row["text"]] != texts(base, PROMPTS[:1], base.params, options)
    beside = [*asked, "--adapter", own, "--adapter", str(directories[0])]
    assert generate.main(beside) == (0 if name == "adalora" else 2)


def test_one_adapter_is_printed_after_its_prompt(base, directories, capsys):
    assert generate.main(["--base", "gpt2-nano", "--prompt", "The fox", "--new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The fox")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: none given"),
        (["--prompts", "nowhere.txt"], "--prompts: no file nowhere.txt"),
        (["--prompt", "a", "--beams", "0"], "num_beams: 0 given, must be at least 1"),
        (["--prompt", "a", "--adapter", "nowhere"], "nowhere/adapter_config.json: no such file"),
        (["--prompt", "a", "--batch-size", "0"], "batch_size: 0 given, must be at least 1"),
        (["--prompt", "a", "--seed", str(10**20)], f"seed: {10**20} given, must be from 0 to 42"),
        (["--prompt", "a", "--length-penalty", "nan"], "length_penalty: nan given, must be"),
        (["--prompt", "a", "--temperature", "inf"], "temperature: inf given, must be 0"),
        (["--prompt", "caf\udce9"], r"--prompt: 'caf\udce9' is not UTF-8 at character 4; expected"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert generate.main(["--base", "gpt2-nano", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("lorax: ")


def test_a_line_that_is_no_prompt_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(
        ValueError, match=r"prompts.jsonl:2: field 'prompt' is missing; the record has text"
    ):
        generate.read_prompts([], str(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": 3}', "field 'prompt' is 3; expected text"),
        (b'{"prompt": ["a"]}', "field 'prompt' is ["),
        (b'{"prompt": "\\ud83d"}', "half of a character"),
        (b'"a"', "expected an object"),
        (b'{"prompt": "\xe9"}', "bad byte 0xe9; expected UTF-8"),
    ],
)
def test_a_prompt_that_is_no_text_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        generate.read_prompts([], str(file))
    assert str(error.value).startswith(f"{file}:2: ") and message in str(error.value)


ODD = "a\u2028b\x85c\x0bd\x0ce\x1cf"  # str.splitlines cuts at each of these


def test_only_line_feeds_part_prompts(tmp_path):
    for name, content in (
        ("p.txt", f"\ufeff{ODD}\r\n\ng\n"),
        (
            "p.jsonl",
            f'\ufeff{{"prompt": {json.dumps(ODD, ensure_ascii=False)}}}\n{{"prompt": "g"}}',
        ),
        ("p.json", json.dumps([{"prompt": ODD}, {"prompt": "g"}])),
    ):
        (tmp_path / name).write_bytes(content.encode())
        assert generate.read_prompts(["first"], str(tmp_path / name)) == ["first", ODD, "g"]
    (tmp_path / "p.txt").write_bytes(b"a\n\xe9")
    with pytest.raises(ValueError, match=r"p\.txt:2: bad byte 0xe9; expected UTF-8"):
        generate.read_prompts([], str(tmp_path / "p.txt"))


@pytest.fixture
def written(monkeypatch):
    """What a run writes, made at once."""
    rows = [{"prompt": ODD, "adapter": "base", "text": "\u2028 b"}]
    monkeypatch.setattr(generate, "run", lambda given, prompts: rows)
    return rows


def test_the_texts_written_can_be_read_as_prompts(written, tmp_path):
    out = str(tmp_path / "new" / "out.jsonl")
    assert generate.main(["--base", "x", "--prompt", ODD, "--out", out]) == 0
    assert generate.read_prompts([], out) == [ODD]


def test_a_place_that_can_not_be_written_is_found_before_the_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "run", lambda given, prompts: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "is not a regular file"),
        (tmp_path / "file" / "out.jsonl", "is not a folder"),
        ("/dev/null", "is not a regular file"),
        ("", "is not a regular file"),
    ):
        assert generate.main(["--base", "x", "--prompt", "a", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("lorax: --out: ") and message in error


def test_texts_are_printed_where_the_terminal_lacks_their_characters(written, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert generate.main(["--base", "x", "--prompt", "a"]) == 0
    shown.flush()
    assert shown.buffer.getvalue().endswith(b"\\u2028 b\n")


def test_texts_that_can_not_be_written_are_printed(written, monkeypatch, tmp_path, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(generate, "write_bytes", full)
    code = generate.main(["--base", "x", "--prompt", "a", "--out", str(tmp_path / "out.jsonl")])
    shown = capsys.readouterr()
    assert code == 1 and [json.loads(shown.out)] == written
    assert "No space left on device" in shown.err and "printed instead" in shown.err


# ------------------------------------------------------------------------------------------- chats

TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """gpt2-nano with a chat template and with generation settings."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(base.directory, folder)
    (folder / "chat_template.jinja").write_text(TURNS)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5, "min_p": 0.1}')
    return str(folder)


def test_messages_are_completed_in_the_chat_template(base, tuned, tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    asked = ["--base", tuned, "--chat", "--prompt", "Who is it?", "--out", str(out)]
    assert generate.main([*asked, "--system", "Be brief."]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    rendered = "system: Be brief.\nuser: Who is it?\nassistant:"
    options = decode.DecodingOptions(max_new_tokens=5)
    assert row["prompt"] == "Who is it?"
    assert [row["text"]] == texts(base, [rendered], base.params, options)
    assert (
        "generation_config.json: max_new_tokens 5; not used: min_p 0.1" in capsys.readouterr().err
    )


def test_a_text_ends_at_each_eos_of_the_file(base, tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "model")
    (whole,) = texts(base, ["The"], base.params, decode.DecodingOptions(max_new_tokens=5))
    ids = base.vocabulary.encode(whole)
    stored = {"max_new_tokens": 5, "eos_token_id": [base.vocabulary.end, ids[3]]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(stored))
    assert generate.main(["--base", str(tmp_path / "model"), "--prompt", "The"]) == 0
    cut = base.vocabulary.decode(ids[: ids.index(ids[3])])
    assert capsys.readouterr().out == f"The{cut}\n" != f"The{whole}\n"


def test_a_conversation_goes_on_line_by_line(base, tuned, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is it?\n\nAnd where?\n"))
    assert generate.main(["--base", tuned, "--chat"]) == 0
    options = decode.DecodingOptions(max_new_tokens=5)
    first = "user: Who is it?\nassistant:"
    (answer,) = texts(base, [first], base.params, options)
    second = f"{first} {answer.strip()}\nuser: And where?\nassistant:"
    (another,) = texts(base, [second], base.params, options)
    assert capsys.readouterr().out == f"{answer}\n{another}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--prompt", "a"], "--chat: gpt2-nano has no chat template; give one with --te"),
        (["--chat"], "--chat: gpt2-nano has no chat template"),
        (["--system", "a", "--prompt", "b"], "--system: given without --chat"),
        (
            ["--chat", "--out", "x.jsonl"],
            "--out: given without a prompt; a conversation is printed",
        ),
        (
            ["--chat", "--adapter", "base", "--adapter", "base"],
            "--adapter: 2 given; a conversati",
        ),
        (
            ["--chat", "--prompt", "a", "--template", "x"],
            "task.template: 'x' is neither a Jinja t",
        ),
    ],
)
def test_a_chat_that_can_not_be_is_one_line(arguments, message, capsys):
    assert generate.main(["--base", "gpt2-nano", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lorax: {message}")
