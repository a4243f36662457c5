"""A model's chat templates, and the special tokens that they write, as transformers stores them."""

from collections.abc import Mapping
from pathlib import Path

from lorax import fields
from lorax.files import read_json, read_text, write_bytes, write_json

DEFAULT = "default"
FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
#: Files that may hold templates as `chat_template`; the later one takes precedence.
CONFIGS = ("chat_template.json", "tokenizer_config.json")
#: Files with special tokens; the later one takes precedence.
TOKENS = ("special_tokens_map.json", "tokenizer_config.json")
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_NAMED = fields.Kind(
    "a list of objects with name and template, both strings",
    lambda x: isinstance(x, list) and all(map(_is_named, x)),
    lambda x: {one["name"]: one["template"] for one in x},
)
_TEMPLATE = {"chat_template": fields.optional(fields.either(fields.TEXT, _NAMED))}
_CONTENT = fields.Kind(
    "an object with the token's text as content",
    lambda x: isinstance(x, dict) and isinstance(x.get("content"), str),
    lambda x: x["content"],
)
_TOKEN = {
    f"{name}_token": fields.optional(fields.either(fields.TEXT, _CONTENT)) for name in SPECIAL
}


def _is_named(x) -> bool:
    return isinstance(x, dict) and all(isinstance(x.get(k), str) for k in ("name", "template"))


def of_config(config: Mapping, place: str | Path) -> dict[str, str]:
    """{name: template} in the fields of a tokenizer_config.json, the only one as "default".

    place: for messages. Raises ValueError naming the field if it holds no templates."""
    value = fields.read(config, _TEMPLATE, place).get("chat_template") or {}
    return {DEFAULT: value} if isinstance(value, str) else value


def templates(directory: Path) -> dict[str, str]:
    """{name: text} of the chat templates of a model directory, {} for none.

    The files chat_template.jinja and additional_chat_templates/NAME.jinja take precedence over
    `chat_template` in tokenizer_config.json. Raises ValueError naming the file if it is damaged."""
    found = {}
    for name in CONFIGS:
        if (directory / name).is_file():
            found |= of_config(read_json(directory / name), directory / name)
    others = {file.stem: file for file in sorted((directory / FOLDER).glob("*.jinja"))}
    files = others | ({DEFAULT: directory / FILE} if (directory / FILE).is_file() else {})
    return found | {name: read_text(file) for name, file in files.items()}


def special_tokens(directory: Path) -> dict[str, str]:
    """{"bos_token": "<s>", ...} of a model directory, without those that the model lacks.

    Raises ValueError naming the file and the field if one is no token."""
    found = {}
    for name in TOKENS:
        if (directory / name).is_file():
            found |= tokens_of(read_json(directory / name), directory / name)
    return {name: text for name, text in found.items() if text is not None}


def tokens_of(config: Mapping, place: str | Path) -> dict[str, str | None]:
    """The special tokens among the fields of one such file; None where it says that there is none.
    place: for messages. Raises ValueError naming the field if one is no token."""
    return fields.read(config, _TOKEN, place)


def write(directory: Path, texts: Mapping[str, str], special: Mapping[str, str]) -> None:
    """Write templates as transformers does, and the special tokens unless the folder has a
    tokenizer_config.json; inverse of `templates` and `special_tokens`."""
    for name, text in texts.items():
        file = FILE if name == DEFAULT else f"{FOLDER}/{name}.jinja"
        write_bytes(directory / file, text.encode())
    if special and not (directory / TOKENS[-1]).exists():
        write_json(directory / TOKENS[-1], dict(special))
