"""Instructions and conversations: JSON Lines, or a JSON array, in three common forms.

    {"prompt": "2 + 2 =", "completion": "4"}
    {"instruction": "Add.", "input": "2 and 2", "output": "4"}        Stanford Alpaca's
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

A prompt is taken as it is, an Alpaca record in Alpaca's wording, and a conversation reads

    System: Be brief.
    User: 2 + 2?
    Assistant: 4<end>
    User: And 3 more?
    Assistant: 7<end>

with the vocabulary's end token for <end>. The loss is on the assistant's words and end tokens, in
every turn. With `task.template`, a Jinja chat template as Hugging Face models have, the template
renders all three forms instead; instruction and input are then a user's turn, separated by an empty
line.

Further fields of a record:
- `weight` of an assistant's message: 0: it is context, not a target; 1: the default.
- `system` of a conversation or an Alpaca record: the first message, or a replacement for Alpaca's
  opening sentence. `history` of an Alpaca record: [[question, answer], ...], the previous turns,
  whose answers are targets too (LLaMA-Factory's format).
- `tools` and `documents` of a conversation, and `name`, `tool_calls`, `tool_call_id`,
  `function_call` and the reasoning (`reasoning_content`, `thinking`, `reasoning`) of a message:
  for a template. Refused without a template, or if the template renders the same text without them
  (except `tool_call_id`, and the `name` of a tool's answer, which only repeat the call).
- `prompt` of a conversation, equal to the first user's words, as in UltraChat: ignored.

The fields in `MEANT` and `MEANT_OF_MESSAGES` ask for something that lorax doesn't do, and are
refused unless they are empty, as is a field that belongs to another form. All others (ids, sources,
categories...) are not used in training; the task's note names them.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax.tasks import data, records, templates
from lorax.tasks.data import Data
from lorax.tasks.records import Record
from lorax.tasks.rows import (
    END,
    Example,
    check_path,
    count,
    pair,
)
from lorax.tasks.templates import Chat
from lorax.vocabulary import Vocabulary

EXPECTED = (
    "a file of JSON Lines or a JSON array, or a folder with train.jsonl and eval.jsonl (or "
    "test.jsonl, or both) in it"
)
OPENINGS = (  # github.com/tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT; without an input, with
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.",
)
ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}

# the field that identifies a form -> all fields that it may have
FORMS = {
    "messages": ("messages", "system", "tools", "documents"),
    "instruction": ("instruction", "input", "output", "system", "history"),
    "prompt": ("prompt", "completion"),
}
IMAGES = ("image", "images", "video", "videos", "audio", "audios")
REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("train", "training", "trainable", "mask", "loss", "loss_mask")
MEANT = {
    *(name for names in FORMS.values() for name in names),
    *("conversations", "conversation", "functions", "context", "suffix", "chosen", "rejected"),
    *("kto_tag", "weight", "labels", "input_ids", "chat_template_kwargs"),
    *(*IMAGES, *REASONING, *WEIGHTS),
}
EXTRA = ("tools", "documents")  # by a template, of a conversation
KEPT = ("role", "content", "weight")
CARRIED = ("name", "tool_calls", "tool_call_id", "function_call", *REASONING)  # by a template
CALLED = ("tool_call_id", "name")  # of a tool's answer: the call already says the same
MEANT_OF_MESSAGES = {"prefix", "refusal", "tools", "documents", *IMAGES, *WEIGHTS}


class Read(NamedTuple):
    """A parsed record. plain: its pieces without a template, None for those of the function
    `plain`. unused: its fields that are not used in training."""

    chat: Chat
    plain: Example | None
    unused: set[str]


def load(config: Mapping[str, Any], vocabulary: Vocabulary) -> Data:
    """Trains on train.jsonl of a folder (its first n_train records), validates on eval.jsonl, tests
    on test.jsonl. If one of the two is missing, the other is the evaluation set, half of which is
    for test; from a single file the last 5% are (at least one record, or two with test rows).
    Records with empty answers are left out. The prompts are the test records up to their last
    answers, those for validation without test rows."""
    path = check_path(config, EXPECTED)
    read = functools.partial(_examples, vocabulary=vocabulary, template=config.get("template"))
    if not path.is_dir():
        return _of_one_file(config, path, *read(path), vocabulary)
    files = {"train": _file_in(path, "train.jsonl")}
    files["eval"] = _file_in(path, "eval.jsonl", "test.jsonl")
    test = next((x for x in _files_in(path, "test.jsonl") if x != files["eval"]), None)
    files |= {"test": test} if test else {}
    sets, empty, unused = {}, 0, set()
    for name, file in files.items():
        sets[name], left_out, others = read(file)
        empty, unused = empty + left_out, unused | others
    return _data(path, sets["train"], sets["eval"], sets.get("test"), empty, unused, vocabulary)


def _of_one_file(config, path: Path, pieces, empty: int, unused: set[str], vocabulary) -> Data:
    """The data of a single file, whose last 5% are for evaluation."""
    held_out = max(1, len(pieces) * 5 // 100)
    of = lambda n: _data(path, pieces[:-n], pieces[-n:], None, empty, unused, vocabulary)

    def build(*arguments, apart=False):
        return of(max(2, held_out) if apart else held_out).build(*arguments, apart=apart)

    return of(held_out)._replace(build=build)


def _data(path: Path, train, evaluation, test, empty: int, unused: set[str], vocabulary) -> Data:
    """`data.examples` of the sets. Raises ValueError if one has no example."""
    sizes = {"train": train, "evaluation": evaluation} | ({} if test is None else {"test": test})
    if not all(sizes.values()):
        sizes = " and ".join(f"{len(part)} {name}" for name, part in sizes.items())
        raise ValueError(
            f"task.path: {str(path)!r} has {sizes} examples with an answer; at least one of each "
            "is needed"
        )
    question = functools.partial(_question, vocabulary=vocabulary)
    note = f"; {count(empty)} without an answer left out" * bool(empty)
    note += f"; fields without a part in training: {', '.join(sorted(unused))}" * bool(unused)
    return data.examples(train, evaluation, question, note=note, test=test)


def examples(
    parsed: Iterable[Read], vocabulary: Vocabulary, template: str | None = None
) -> list[Example]:
    """Pieces of every record, () for one without targets. template: as `task.template`.

    Raises ValueError naming the record's place and what is wrong.
    """
    parsed = list(parsed)
    if template is None:
        return [_worded(read) if read.chat.learnt else () for read in parsed]
    chats = [read.chat for read in parsed if read.chat.learnt]
    rendered = iter(templates.render(templates.source(template), _spelled(vocabulary), chats))
    return [next(rendered) if read.chat.learnt else () for read in parsed]


def read(record: Record) -> Read:
    """Raises ValueError naming the record's place and the field that is wrong."""
    fields = record.fields
    form = next((form for form in FORMS if form in fields), None)
    if form is None:
        raise ValueError(
            f"{record.place}: the record has the fields {', '.join(fields) or '(none)'}; expected "
            "prompt and completion, instruction and output, or messages"
        )
    present = {name for name, value in fields.items() if value not in (None, "", [], {})}
    present -= set(FORMS[form])
    if form == "messages" and "prompt" in present and fields["prompt"] == _first_words(fields):
        present.remove("prompt")
    if fields.get("weight") == 1:
        present.remove("weight")
    for name in fields:
        if name in present & MEANT:
            raise ValueError(
                f"{record.place}: field {name!r} has no part in a record with {form!r}; such a "
                f"record has {', '.join(FORMS[form])}. Leave it out, or rename it if it is a remark"
            )
    unused = present - MEANT
    if form == "messages":
        return _conversation(record, unused)
    if form == "instruction":
        return _alpaca(record, unused)
    prompt, answer = record.get("prompt"), record.get("completion").strip()
    if not prompt:
        raise ValueError(f"{record.place}: field 'prompt' is empty; expected text")
    return Read(_told(record, [(prompt, answer)]), pair(prompt, answer), unused)


def _worded(read: Read) -> Example:
    return plain(read.chat) if read.plain is None else read.plain


def plain(chat: Chat) -> Example:
    """Pieces of a conversation without a template, in the form shown at the top of this module.

    Raises ValueError for a role or a field that the form can't express.
    """
    if chat.carried or chat.extra:
        raise ValueError(
            f"{chat.place}: {', '.join((*chat.extra, *chat.carried))} has no place in a "
            "conversation without a template; leave it out, or set task.template"
        )
    pieces, before, last = [], "", 0
    for i, message in enumerate(chat.messages):
        role, content = message["role"], message["content"].strip()
        if role not in ROLES:
            raise ValueError(
                f"{chat.place}: role {role!r} has no place in a conversation without a template; "
                f"expected {', '.join(ROLES)}, or set task.template"
            )
        before += f"{ROLES[role]}:"
        if role == "assistant" and content:
            learnt = i in chat.learnt
            pieces += [(text, target and learnt) for text, target in pair(before, content)]
            last = len(pieces) if learnt else last
            before = "\n"
        else:
            before += f" {content}\n"
    return tuple(pieces[:last])


def _examples(
    path: Path, vocabulary: Vocabulary, template: str | None
) -> tuple[list[Example], int, set[str]]:
    """The examples of a file, how many records were left out as empty, and the fields that are not
    used in training."""
    parsed = [read(record) for record in records.read(path)]
    pieces = examples(parsed, vocabulary, template or None)
    trainable = [example for example in pieces if example]
    return trainable, len(pieces) - len(trainable), set().union(*(read.unused for read in parsed))


def _files_in(folder: Path, *names: str) -> list[Path]:
    """The files of these names that there are, each as JSON Lines or JSON."""
    both = (folder / x for name in names for x in (name, name.replace(".jsonl", ".json")))
    return [path for path in both if path.is_file()]


def _file_in(folder: Path, *names: str) -> Path:
    for path in _files_in(folder, *names):
        return path
    raise FileNotFoundError(
        f"task.path: {str(folder)!r} has no {' or '.join(names)}; expected {EXPECTED}"
    )


def _conversation(record: Record, unused: set[str]) -> Read:
    messages, learnt, carried = [], [], []
    for i, message in enumerate(record.get("messages", list)):
        if not isinstance(message, dict):
            raise ValueError(f"{record.place}: messages[{i}] is no object with role and content")
        message = {name: value for name, value in message.items() if value is not None}
        turn = Record(f"{record.place}: messages[{i}]", message)
        if message.get("tool_calls"):
            message.setdefault("content", "")
        role, content = turn.get("role"), turn.get("content")
        for name, value in message.items():
            if name in MEANT_OF_MESSAGES and value not in ("", [], {}):
                mend = (
                    "what is not to be learnt has weight 0" if name in WEIGHTS else "leave it out"
                )
                raise ValueError(f"{turn.place}: field {name!r} is not read; {mend}")
        if _weight(turn, role) and (content.strip() or message.get("tool_calls")):
            learnt.append(i)
        carried_fields = {
            k: v for k, v in message.items() if k in CARRIED and v not in ("", [], {})
        }
        carried += [
            k for k in carried_fields if k not in (CALLED if role == "tool" else CALLED[:1])
        ]
        unused = unused | {f"messages.{k}" for k in message if k not in (*KEPT, *CARRIED)}
        messages.append({"role": role, "content": content} | carried_fields)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{record.place}: no message of role 'assistant', so nothing to learn")
    if record.fields.get("system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"{record.place}: field 'system' and messages[0] are both the system")
        messages.insert(0, {"role": "system", "content": record.get("system")})
        learnt = [i + 1 for i in learnt]
    extra = {name: record.get(name, list) for name in EXTRA if record.fields.get(name)}
    chat = Chat(record.place, messages, learnt, extra, list(dict.fromkeys(carried)))
    return Read(chat, None, unused)


def _weight(turn: Record, role: str) -> bool:
    """Whether a message is a target. Raises ValueError for any other weight."""
    weight = turn.fields.get("weight", int(role == "assistant"))
    if weight not in ((0, 1) if role == "assistant" else (0,)):
        raise ValueError(
            f"{turn.place}: field 'weight' is {records.shown(weight)}; expected 0 (not to be "
            f"learnt){', or 1' * (role == 'assistant')}"
        )
    return bool(weight)


def _alpaca(record: Record, unused: set[str]) -> Read:
    instruction, answer = record.get("instruction"), record.get("output").strip()
    input_text = record.get("input") if "input" in record.fields else ""
    system = record.get("system") if record.fields.get("system") else ""
    history = record.get("history", list) if record.fields.get("history") else []
    for i, turn in enumerate(history):
        fine = isinstance(turn, list) and len(turn) == 2
        if not fine or not all(isinstance(text, str) and text.strip() for text in turn):
            raise ValueError(
                f"{record.place}: history[{i}] is {records.shown(turn)}; expected [question, "
                "answer], two texts"
            )
    turns = [(question, answer.strip()) for question, answer in history]
    pieces, before = (), f"{system.strip() or OPENINGS[bool(input_text)]}\n\n"
    asked = [f"### Instruction:\n{question}" for question, _ in turns]
    asked += [
        f"### Instruction:\n{instruction}" + f"\n\n### Input:\n{input_text}" * bool(input_text)
    ]
    turns += [("\n\n".join(filter(None, (instruction, input_text))), answer)]
    for question, (_, words) in zip(asked, turns, strict=True):
        pieces += pair(f"{before}{question}\n\n### Response:", words)
        before = "\n\n"
    return Read(_told(record, turns, system), pieces, unused)


def _told(record: Record, turns: Sequence[tuple[str, str]], system: str = "") -> Chat:
    """Questions and answers as a conversation; without targets if the last answer is empty."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    learnt = [i for i, m in enumerate(messages) if m["role"] == "assistant"] if answer else []
    return Chat(record.place, messages, learnt, {}, [])


def _first_words(fields: Mapping[str, Any]) -> Any:
    """The first user message, of messages that are not validated yet."""
    messages = fields["messages"] if isinstance(fields["messages"], list) else []
    turns = (m for m in messages if isinstance(m, dict) and m.get("role") == "user")
    return next(turns, {}).get("content")


def _spelled(vocabulary: Vocabulary) -> list[str]:
    """The tokens that end a text, as strings; `end` first, which must exist."""
    return [vocabulary.tokenizer.id_to_token(i) for i in (vocabulary.end, *vocabulary.ends[1:])]


def _question(example: Example, vocabulary: Vocabulary) -> tuple[str, str]:
    """An example's text up to its last answer, and that answer."""
    ends = _spelled(vocabulary)
    last = max(i for i, (text, target) in enumerate(example) if target and text is not END)
    before = "".join(ends[0] if text is END else text for text, _ in example[:last])
    answer = example[last][0]
    for end in ends:
        answer = answer.partition(end)[0]
    return before, answer.strip()
