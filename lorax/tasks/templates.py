"""Chat templates in Jinja: where one is read from, and conversations rendered with it."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax.files import check_unicode, parse_json, read_text
from lorax.tasks.rows import Example

RENDERING = Path(__file__).with_name("rendering.py")
JINJA = (3, 1, 6)  # older sandboxes are known to leak
SECONDS = 10.0  # of a processor, for one conversation
MEMORY = 2**30  # bytes that the process of a template may address
LONGEST = 10_000_000  # characters of a conversation


class Chat(NamedTuple):
    """A record as a conversation.

    place: of the record. messages: each with role and content, and what else it has that means
    something. learnt: which messages are targets. extra: what else a template is given (tools,
    documents). carried: the fields of messages besides role and content that a template must have
    a use for.
    """

    place: str
    messages: list[dict[str, Any]]
    learnt: list[int]
    extra: dict[str, Any]
    carried: list[str]


def source(given: str) -> str:
    """The text of `task.template`: the template itself, a file of it, or a JSON file that has it
    as `chat_template`, as a tokenizer_config.json does (of several the one called "default").

    Raises ValueError naming `task.template`.
    """
    if "{{" in given or "{%" in given:
        check_unicode(given, "task.template")
        return given
    path = Path(given).expanduser()
    if not os.path.isfile(path):  # Path.is_file raises for names too long to be one
        raise ValueError(f"task.template: {given!r} is neither a Jinja template nor a file of one")
    text = read_text(path)
    if path.suffix != ".json":
        return text
    value = parse_json(text, path)
    found = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(found, list):
        named = [x for x in found if isinstance(x, dict) and x.get("name") == "default"]
        found = named[0].get("template") if named else None
    if not isinstance(found, str):
        raise ValueError(
            f"task.template: {given!r} has no text as its chat_template; expected a file of a "
            "Jinja template, or a tokenizer_config.json with one"
        )
    return found


def render(text: str, ends: Sequence[str], chats: Sequence[Chat]) -> list[Example]:
    """Pieces of every conversation by a template's text.

    ends: the tokens that end a text, as they are written; the first is `eos_token`. `bos_token` is
    empty: rows have their start already. Extensions, filters and globals are those of
    transformers; `strftime_now` gives the day of the call.

    A template with {% generation %} is taken at its word: what it marks is the target, no more.
    Otherwise a turn is what rendering the conversation up to it adds to rendering what came before
    and the generation prompt, and a turn that the template doesn't end gets the end token.

    A template comes with a model, from anyone. It runs in a process of its own, in Jinja's sandbox,
    with `SECONDS` for a conversation, `MEMORY` and `LONGEST`: the system's limits, so that they
    hold within one long operation too.

    Raises ValueError naming `task.template` and the record: where Jinja is missing or old, where
    the template is wrong or passes a limit, where it has no use for a field that the conversation
    has, and where it renders what came before in another way once more follows.
    """
    _check_jinja()
    settings = {"source": text, "ends": ends, "seconds": SECONDS, "memory": MEMORY}
    lines = [settings | {"longest": LONGEST}, *(chat._asdict() for chat in chats)]
    ran = subprocess.run(
        [sys.executable, "-P", RENDERING],
        input="".join(json.dumps(line) + "\n" for line in lines).encode(),
        capture_output=True,
        check=False,
    )
    answers = [json.loads(line) for line in ran.stdout.split(b"\n")[:-1]]
    places = ["task.template", *(f"{chat.place}: task.template" for chat in chats)]
    for place, answer in zip(places, answers, strict=False):
        if "error" in answer:
            raise ValueError(f"{place}: {answer['error']}")
    if len(answers) < len(places):
        why = f"Jinja's process ended with code {ran.returncode}: {ran.stderr.decode()[-200:]}"
        if ran.returncode == -signal.SIGPROF:
            why = f"rendering takes more than {SECONDS:g} s; does a loop or a macro have no end?"
        raise ValueError(f"{places[len(answers)]}: {why}")
    return [tuple((text, target) for text, target in x["pieces"]) for x in answers[1:]]


def _check_jinja() -> None:
    needs = f"a chat template needs Jinja {'.'.join(map(str, JINJA))} or later"
    mend = "install it (pip install -U jinja2), or leave task.template out"
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"task.template: {needs}; {mend}") from None
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < JINJA:
        raise ValueError(f"task.template: {needs}, not {version}; {mend}")
