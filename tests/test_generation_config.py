"""What a model's generation_config.json decides, and what the user does."""

import json
import re

import pytest
from support import require

from lorax import decode, generation_config
from lorax.decode import DecodingOptions

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [3, 4]}


def merged(stored, **given):
    return generation_config.merged(dict.fromkeys(generation_config.OPTIONS) | given, stored)


@pytest.mark.parametrize(
    ("stored", "given", "options"),
    [
        ({}, {}, {}),
        (QWEN, {}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        (QWEN, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 20, "top_p": 0.95}),
        (QWEN, {"temperature": 0.0}, {}),
        (QWEN, {"top_k": 0, "top_p": 1.0}, {"temperature": 0.6}),
        (QWEN, {"num_beams": 4}, {"num_beams": 4}),
        ({**QWEN, "do_sample": False}, {}, {}),
        ({**QWEN, "do_sample": False}, {"temperature": 0.5},
         {"temperature": 0.5, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}),
        ({"num_beams": 4, "length_penalty": 0.8}, {}, {"num_beams": 4, "length_penalty": 0.8}),
        ({"num_beams": 4}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({"length_penalty": 0.8}, {}, {}),
        ({"max_new_tokens": 5, "no_repeat_ngram_size": 3}, {"max_new_tokens": 7},
         {"max_new_tokens": 7, "no_repeat_ngram_size": 3}),
    ],
)  # fmt: skip
def test_the_file_decides_what_the_user_left_out(stored, given, options):
    found, _ = merged({k: v for k, v in stored.items() if k != "eos_token_id"}, **given)
    assert found == DecodingOptions(**options)
    decode.check(found)


def test_what_is_used_and_what_is_not_is_said():
    stored = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "min_length": 0}
    _, said = merged(stored)
    assert said == (
        "generation_config.json: temperature 0.6, top_k 50; not used: repetition_penalty 1.1"
    )
    assert merged({"do_sample": True, "num_beams": 4})[1].endswith("; not used: num_beams 4")
    assert merged({"do_sample": False, "temperature": 0.6})[1] == ""


def test_a_sampling_default_is_that_of_transformers(tmp_path):
    theirs = require("transformers").GenerationConfig
    assert theirs._get_default_generation_params()["top_k"] == generation_config.TOP_K
    fields = theirs._get_default_generation_params()
    for name, neutral in generation_config.OTHERS.items():
        if fields.get(name) is not None and name != "max_length":
            assert fields[name] == neutral, name
    theirs(**QWEN, max_new_tokens=9).save_pretrained(tmp_path)
    options, _ = merged(generation_config.read(tmp_path))
    assert options == DecodingOptions(9, temperature=0.6, top_k=20, top_p=0.95)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": "yes"}, 'do_sample: "yes" given, must be true or false, or null'),
        ({"top_k": 1.5}, "top_k: 1.5 given, must be a whole number"),
        ({"temperature": "hot"}, 'temperature: "hot" given, must be a number, or null'),
    ],
)
def test_a_wrong_field_is_named(tmp_path, fields, message):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {message}")):
        generation_config.read(tmp_path)
    assert generation_config.read(None) == generation_config.read(tmp_path / "other") == {}
