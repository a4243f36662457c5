"""Jinja chat templates: reads them, and renders conversations with them."""

import collections
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax import chat_files
from lorax.files import check_unicode, parse_json, read_text
from lorax.tasks.rows import Example
from lorax.vocabulary import Vocabulary

RENDERING = Path(__file__).with_name("rendering.py")
JINJA = (3, 1, 6)  # older sandboxes are known to leak
SECONDS = 10.0  # of CPU time, for one conversation
MEMORY = 2**30  # bytes that the process of a template may address
LONGEST = 10_000_000  # characters of a conversation
MANY = 4096  # conversations that one process renders, so that memory holds no more of them twice
PLAIN = "plain"  # as `task.template`: no template
DEVELOPER = "developer"  # OpenAI's newer name for the role "system"
#: What the task's line says about conversations, by the names that `rendering` gives.
REMARKS = {
    "ended": "answers are followed by {end}, since the template writes no token that ends a text",
    "marked": "the template changes earlier answers when more messages follow, and has them "
    "trained on as they are then",
    "start": "the tokenizer puts {start} in front, which the template leaves out",
    "unstable": "the template changes earlier answers when more messages follow, so these answers "
    "are not trained on (the last is)",
}


class Chat(NamedTuple):
    """A record as a conversation.

    place: of the record. messages: each with role, content and other meaningful fields. learnt:
    indices of the messages that are targets; none for a prompt, which is rendered with the
    generation prompt. extra: further variables for a template (tools,
    documents). carried: the fields of messages, besides role and content, that a template must
    use.
    """

    place: str
    messages: list[dict[str, Any]]
    learnt: list[int]
    extra: dict[str, Any]
    carried: list[str]


class Spelling(NamedTuple):
    """Special tokens as text.

    start: what the tokenizer puts in front of a text. ends: the tokens that end a text. special:
    {"bos_token": "<s>", ...} for templates.
    """

    start: str
    ends: Sequence[str]
    special: Mapping[str, str]


def spelling(vocabulary: Vocabulary) -> Spelling:
    """The special tokens of a vocabulary. Raises ValueError if no token ends a text."""
    spell = vocabulary.tokenizer.id_to_token
    start = "".join(map(spell, vocabulary.start))
    ends = [spell(i) for i in (vocabulary.end, *vocabulary.ends[1:])]
    return Spelling(start, ends, {"bos_token": start, "eos_token": ends[0]} | vocabulary.special)


def chosen(setting: str | None, vocabulary: Vocabulary) -> dict[str, str]:
    """{name: text} of the templates that `task.template` means: None for those of the model (none
    without a default), "plain" for none, else `source`. Raises ValueError as `source` does."""
    if setting == PLAIN:
        return {}
    if setting:
        return {chat_files.DEFAULT: source(setting)}
    return dict(vocabulary.templates) if chat_files.DEFAULT in vocabulary.templates else {}


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
            f"task.template: {setting!r} is neither a Jinja template nor a file of one; expected "
            f"one of them, {PLAIN!r} for none, or None for the model's own"
        )
    text = read_text(path)
    if path.suffix != ".json":
        return text
    value = parse_json(text, path)
    named = chat_files.of_config(value, path) if isinstance(value, dict) else {}
    if chat_files.DEFAULT not in named:
        raise ValueError(
            f"task.template: {setting!r} has no text as its chat_template; expected a file of a "
            "Jinja template, or a tokenizer_config.json with one"
        )
    return named[chat_files.DEFAULT]


class Rendered(NamedTuple):
    """examples: the pieces of every conversation. remarks: {name in `REMARKS`: conversations}."""

    examples: list[Example]
    remarks: collections.Counter


def said(remarks: Mapping[str, int], spelling: Spelling) -> str:
    """Remarks in words, each with the number of conversations that it is about."""
    spelled = {"start": spelling.start, "end": spelling.ends[0]}
    return "".join(
        f"; in {n:,} of them {REMARKS[name].format(**spelled)}"
        for name, n in sorted(remarks.items())
    )


def render(texts: Mapping[str, str], spelling: Spelling, chats: Sequence[Chat]) -> Rendered:
    """Conversations, rendered with the templates of a model.

    texts: {name: template}; as in transformers, conversations with tools take the one called
    "tool_use", if there is one, all others "default". Extensions, filters, globals and special
    tokens are those of transformers, except that the start that a tokenizer adds to every text is
    taken off again: rows have it already. `strftime_now` uses the time of the call. A template that
    doesn't know the role "developer" is given "system" instead.

    In a template with {% generation %}, exactly the marked text is the target. Otherwise the target
    of a turn is what it adds to the rendering of the previous turns with the generation prompt, and
    a turn that the template doesn't end gets the end token. A turn that later turns change is no
    target, unless it is the last.

    Templates come with models, from untrusted sources. They run in a separate process, in Jinja's
    sandbox, limited to `SECONDS` per conversation, `MEMORY` and `LONGEST`; the operating system
    enforces the first two, also within one long operation.

    Raises ValueError naming `task.template` and the record: if Jinja is missing or old, if the
    template is invalid or exceeds a limit, if it ignores a message or a field that the conversation
    has, and if it does not render the last target as the continuation of its prompt.
    """
    named = lambda chat: "tool_use" if "tool_use" in texts and "tools" in chat.extra else "default"
    examples, remarks = [()] * len(chats), collections.Counter()
    for name, text in texts.items():
        which = [i for i, chat in enumerate(chats) if named(chat) == name]
        for part in (which[at : at + MANY] for at in range(0, len(which), MANY)):
            answers = _answers(text, spelling, [_known(chats[i], text) for i in part])
            for i, answer in zip(part, answers, strict=True):
                examples[i] = tuple((piece, target) for piece, target in answer["pieces"])
                remarks.update(answer["remarks"])
    return Rendered(examples, remarks)


def prompts(
    texts: Mapping[str, str], spelling: Spelling, conversations: Sequence[list[dict[str, Any]]]
) -> list[str]:
    """Conversations with the generation prompt, for the model to answer. Arguments and errors as
    for `render`; conversations: the messages of each."""
    chats = [Chat(f"prompt {i}", each, [], {}, []) for i, each in enumerate(conversations)]
    examples = render(texts, spelling, chats).examples
    return ["".join(text for text, _ in example) for example in examples]


def _known(chat: Chat, text: str) -> Chat:
    """The conversation with roles that the template knows."""
    if DEVELOPER in text:
        return chat
    as_system = lambda m: m | {"role": "system"} if m["role"] == DEVELOPER else m
    return chat._replace(messages=[as_system(message) for message in chat.messages])


def _answers(text: str, spelling: Spelling, chats: Sequence[Chat]) -> list[dict]:
    """The answers of `rendering` to conversations."""
    _check_jinja()
    settings = {"source": text, **spelling._asdict(), "seconds": SECONDS, "memory": MEMORY}
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
    return answers[1:]


def _check_jinja() -> None:
    needs = f"a chat template needs Jinja {'.'.join(map(str, JINJA))} or later"
    mend = f"install it (pip install lorax-research[data]), or set task.template to {PLAIN!r}"
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"task.template: {needs}; {mend}") from None
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < JINJA:
        raise ValueError(f"task.template: {needs}, not {version}; {mend}")
