"""A model folder's tokenizer: what it puts in front of a text, ids that the model lacks, damage."""

import json
import re
import shutil

import numpy as np
import pytest
from support import data, require
from tokenizers import Tokenizer, models, processors

import lorax
from lorax import decode, vocabulary
from lorax.tasks import rows, sentences


@pytest.fixture
def stories(tmp_path):
    """A copy of a real LLaMA's folder, to change."""
    return shutil.copytree(data("models/stories-llama-260k"), tmp_path / "stories")


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def add_pad(directory):
    """What `tokenizer.add_special_tokens({"pad_token": "[PAD]"})` does: id 512 of 512 rows."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.add_special_tokens(["[PAD]"]) == 1 and tokenizer.token_to_id("[PAD]") == 512
    tokenizer.save(str(directory / "tokenizer.json"))


# ------------------------------------------------------------------------------ ids of no embedding


@pytest.mark.parametrize(
    ("file", "field", "value", "use"),
    [
        ("config.json", "pad_token_id", 512, "is pad_token_id"),
        ("generation_config.json", "pad_token_id", 512, "is pad_token_id"),
        ("config.json", "eos_token_id", [2, 512], "is eos_token_id"),
    ],
)
def test_a_special_id_that_the_model_has_no_embedding_for(stories, file, field, value, use):
    add_pad(stories)
    (stories / "generation_config.json").unlink()
    (stories / file).exists() or (stories / file).write_text("{}")
    edit(stories / file, **{field: value})
    with pytest.raises(ValueError, match=rf"'\[PAD\]' has the id 512 and {use}.*vocab_size is 512"):
        lorax.load(str(stories))


def test_a_token_that_the_model_has_no_embedding_for_may_not_come_in_a_text(stories):
    plain = lorax.load(str(stories))
    add_pad(stories)
    base = lorax.load(str(stories))  # a token that no text has does no harm
    options = decode.DecodingOptions(max_new_tokens=4)
    assert decode.complete(base, ["Once"], options=options) == decode.complete(
        plain, ["Once"], options=options
    )
    match = r"'\[PAD\]' has the id 512 and occurs in a text, but vocab_size is 512"
    with pytest.raises(ValueError, match=match):
        decode.complete(base, ["Once", "upon [PAD]"], options=options)
    with pytest.raises(ValueError, match=match):
        rows.encode([rows.pair("Once", "a [PAD] b")], base.vocabulary, 32, "train")
    with pytest.raises(ValueError, match=match):
        sentences.encode([("a [PAD]",)], np.zeros(1, np.int32), base.vocabulary, 32)


def test_a_tokenizer_that_starts_with_a_token_of_no_embedding(stories):
    with pytest.raises(ValueError, match="'<s>' has the id 1 and begins every text"):
        vocabulary.read(stories, rows=1)


# ------------------------------------------------------------------------------------ what is ahead


@pytest.mark.parametrize(
    ("fields", "ahead"),
    [({}, 1), ({"bos_token_id": 0}, 1), ({"bos_token_id": None}, 1), ({"eos_token_id": 1}, 1)],
    ids=str,
)
def test_a_text_begins_with_what_the_tokenizer_puts_in_front(stories, fields, ahead):
    (stories / "generation_config.json").unlink()
    edit(stories / "config.json", **fields)
    words = vocabulary.read(stories)
    assert words.start == (ahead,)
    theirs = require("transformers").AutoTokenizer.from_pretrained(stories)
    assert [*words.start, *words.encode("Once")] == theirs("Once").input_ids
    built, _ = rows.encode([rows.pair("Once", "upon")], words, 16, "train")
    assert built["tokens"][0, 0] == ahead


@pytest.mark.parametrize(
    ("template", "start"),
    [("$A", ()), ("x $A", (2,)), ("$A x", ()), ("x y $A x", (2, 3)), ("y $A y", (3,))],
)
def test_the_start_is_the_whole_of_what_a_template_has_in_front(template, start):
    tokenizer = Tokenizer(models.WordLevel({"b": 0, "c": 1, "x": 2, "y": 3}))  # knows no "a"
    special = [("x", 2), ("y", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    assert vocabulary.from_tokenizer(tokenizer, {"eos_token_id": 3}).start == start


def gemma(directory, template, **config):
    """A folder with a tokenizer like Gemma's, and transformers' tokenizer of it."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "b": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    if template is not None:
        special = [("<bos>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return require("transformers").AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("add", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_a_template_with_bos_puts_it_in_front_once(tmp_path, add):
    theirs = gemma(tmp_path, "<bos> $A", **add)
    words = vocabulary.read(tmp_path)
    assert words.start == (2,) and [*words.start, *words.encode("a")] == theirs("a").input_ids


@pytest.mark.parametrize("template", [None, "$A"])
@pytest.mark.parametrize("token", ["<bos>", {"content": "<bos>", "lstrip": False}], ids=str)
def test_a_tokenizer_config_that_asks_for_bos_gets_it(tmp_path, template, token):
    gemma(tmp_path, template)
    assert vocabulary.read(tmp_path).start == ()
    edit(tmp_path / "tokenizer_config.json", add_bos_token=True, bos_token=token)
    words = vocabulary.read(tmp_path, rows=6)
    assert words.start == (2,) and words.encode("a") == [4]
    edit(tmp_path / "tokenizer_config.json", add_bos_token=False)
    assert vocabulary.read(tmp_path).start == ()


@pytest.mark.parametrize("token", [None, "<s>"], ids=str)
def test_a_bos_that_the_tokenizer_lacks_is_named(tmp_path, token):
    gemma(tmp_path, "$A")
    edit(tmp_path / "tokenizer_config.json", add_bos_token=True, bos_token=token)
    with pytest.raises(ValueError, match="tokenizer_config.json: add_bos_token is true, but bos_t"):
        vocabulary.read(tmp_path)
    edit(tmp_path / "tokenizer_config.json", bos_token={"lstrip": False})
    with pytest.raises(ValueError, match="tokenizer_config.json: bos_token: {.*} given, must be a"):
        vocabulary.read(tmp_path)


# ------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b'{"a": 0, "b": 1}', "not a tokenizer.json"),  # a vocab.json
        (b"[]", "not a tokenizer.json"),
        (b"", "not a tokenizer.json"),
        (b"[" * 200_000, "not a tokenizer.json"),
        (b'{"version": "1.0", "model": {"type": "Of tomorrow"}}', "not a tokenizer.json"),
        (b'{"version": "\xff"}', "bad byte 0xff"),
    ],
    ids=("pointer", "vocab.json", "list", "empty", "deep", "model", "bytes"),
)
def test_a_tokenizer_json_of_another_kind_is_one_clear_error(stories, content, message):
    file = stories / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}:.*{message}"):
        lorax.load(str(stories))


def test_a_byte_order_mark_changes_nothing(stories):
    plain = vocabulary.read(stories).encode("Once upon")
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        (stories / name).write_bytes(b"\xef\xbb\xbf" + (stories / name).read_bytes())
    assert lorax.load(str(stories)).vocabulary.encode("Once upon") == plain


@pytest.mark.parametrize("name", vocabulary.FILES)
@pytest.mark.parametrize("field", vocabulary.IDS)
@pytest.mark.parametrize(
    "value",
    ['"0"', "1.5", "true", "-2", "1e400", "NaN", "{}", '["2"]', "[[2]]", "[-1]", "9" * 5000],
    ids=lambda value: value[:9],
)
def test_ids_of_another_kind(stories, name, field, value):
    (stories / name).write_text(f'{{"{field}": {value}}}')
    wrong = "a number with too many digits" if len(value) == 5000 else f"{field}: .* given, must be"
    with pytest.raises(ValueError, match=f"^{re.escape(str(stories / name))}:(1:)? {wrong}"):
        vocabulary.read(stories)
