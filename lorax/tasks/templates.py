"""Jinja chat templates: reads them, and renders conversations with them."""

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
SECONDS = 10.0  # of CPU time, for one conversation
MEMORY = 2**30  # bytes that the process of a template may address
LONGEST = 10_000_000  # characters of a conversation


class Chat(NamedTuple):
    """A record as a conversation.

    place: of the record. messages: each with role, content and other meaningful fields. learnt:
    indices of the messages that are targets. extra: further variables for a template (tools,
    documents). carried: the fields of messages, besides role and content, that a template must
    use.
    """

    place: str
    messages: list[dict[str, Any]]
    learnt: list[int]
    extra: dict[str, Any]
    carried: list[str]


def source(setting: str) -> str:
    """The text of `task.template`: the template itself, a file with it, or a JSON file that has it
    as `chat_template`, like tokenizer_config.json (among several, the one called "default").

    Raises ValueError naming `task.template`.
    """
    if "{{" in setting or "{%" in setting:
        check_unicode(setting, "task.template")
        return setting
    path = Path(setting).expanduser()
    if not os.path.isfile(path):  # Path.is_file raises for names too long to be one
        raise ValueError(
            f"task.template: {setting!r} is neither a Jinja template nor a file of one"
        )
    text = read_text(path)
    if path.suffix != ".json":
        return text
    value = parse_json(text, path)
    template = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(template, list):
        named = [x for x in template if isinstance(x, dict) and x.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise ValueError(
            f"task.template: {setting!r} has no text as its chat_template; expected a file of a "
            "Jinja template, or a tokenizer_config.json with one"
        )
    return template


def render(text: str, ends: Sequence[str], chats: Sequence[Chat]) -> list[Example]:
    """Pieces of every conversation, rendered with the text of a template.

    ends: the tokens that end a text, as strings; the first is `eos_token`. `bos_token` is
    empty: rows have their start already. Extensions, filters and globals are those of
    transformers; `strftime_now` uses the time of the call.

    In a template with {% generation %}, exactly the marked text is the target. Otherwise the target
    of a turn is what it adds to the rendering of the previous turns with the generation prompt, and
    a turn that the template doesn't end gets the end token.

    Templates come with models, from untrusted sources. They run in a separate process, in Jinja's
    sandbox, limited to `SECONDS` per conversation, `MEMORY` and `LONGEST`; the operating system
    enforces the first two, also within one long operation.

    Raises ValueError naming `task.template` and the record: if Jinja is missing or old, if the
    template is invalid or exceeds a limit, if it ignores a field that the conversation has, and if
    later turns change how it renders earlier ones.
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
