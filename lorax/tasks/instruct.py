"""Instructions and conversations, in the forms that people have them in.

    {"prompt": "2 + 2 =", "completion": "4"}
    {"instruction": "Add.", "input": "2 and 2", "output": "4"}        Stanford Alpaca's
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "completion": [{"role": "assistant", "content": "4"}]}           TRL's

The last three are conversations: OpenAI's, ShareGPT's, and one whose prompt is not trained on.
`lorax.tasks.sources` says which files and data sets hold records.

A prompt is taken as it is, an Alpaca record in Alpaca's wording. A conversation is rendered with
the chat template of the base (a Jinja template, as Hugging Face models have), if it has one;
otherwise it reads

    System: Be brief.
    User: 2 + 2?
    Assistant: 4<end>
    User: And 3 more?
    Assistant: 7<end>

with the vocabulary's end token for <end>. The loss is on the assistant's words and end tokens, in
every turn. `task.template` "plain" switches the base's template off. A template that it names
renders all forms; instruction and input are then a user's turn, separated by an empty line.

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

Content may be a list of parts of type text, which are joined. Lists (messages, tools, ...) may be
given as JSON text, as in CSV files; so may the arguments of a tool call, which templates get as an
object. The role `developer` is a system's for a template that doesn't know it.

The fields in `MEANT` and `MEANT_OF_MESSAGES` ask for something that lorax doesn't do, and are
refused unless they are empty, as is a field that belongs to another form. All others (ids, sources,
categories...) are not used in training; the task's note names them.
"""

import collections
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lorax.errors import nearest
from lorax.files import parse_json
from lorax.tasks import data, records, sources, templates
from lorax.tasks.data import Data
from lorax.tasks.records import Record
from lorax.tasks.rows import END, Example, count, pair
from lorax.tasks.templates import Chat
from lorax.vocabulary import Vocabulary

OPENINGS = (  # github.com/tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT; without an input, with
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.",
)
ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
SYSTEM = ("system", templates.DEVELOPER)
CALLER = "function_call"  # the speaker of a ShareGPT turn that is a tool call
#: The role of a speaker in ShareGPT's form, with LLaMA-Factory's and axolotl's names.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{"system": "system", "developer": "developer", CALLER: "assistant"},
}

# the field that identifies a form -> all fields that it may have
FORMS = {
    "messages": ("messages", "system", "tools", "documents"),
    "conversations": ("conversations", "system", "tools", "documents"),
    "instruction": ("instruction", "input", "output", "system", "history"),
    "prompt": ("prompt", "completion"),
    "prompt of messages": ("prompt", "completion", "tools", "documents"),
}
CONVERSATIONS = ("messages", "conversations", "prompt of messages")
LISTS = ("messages", "conversations", "prompt", "completion", "history", "tools", "documents")
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
    """Trains on the train set (its first n_train records), validates on the eval set, tests on the
    test set (`sources.read`). If one of the two is missing, the other is the evaluation set, half
    of which is for test; without both, the last 5% of the train set are (at least one record, or
    two with test rows). Records with empty answers are left out. The prompts are the test records
    up to their last answers, those for validation without test rows."""
    whose = "task.template" if config.get("template") else "the base's chat template"
    sets, notes = {}, Notes(whose, [], 0, set())
    for name, found in sources.read(config).items():
        pieces, notes = _examples(found, vocabulary, config.get("template"), notes)
        sets[name] = pieces
    place, train = config["path"], sets.pop("train")
    if not sets:
        return _of_one_set(place, train, notes, vocabulary)
    evaluation = sets.pop("eval" if "eval" in sets else "test")
    return _data(place, train, evaluation, sets.get("test"), notes, vocabulary)


class Notes(NamedTuple):
    """What the task's line says. template: what a template is called there. rendered: of every set.
    empty: number of records without an answer. unused: fields that are not used in training."""

    template: str
    rendered: list[templates.Rendered]
    empty: int
    unused: set[str]


def _of_one_set(place: str, pieces: list[Example], notes: Notes, vocabulary) -> Data:
    """The data of a single set, whose last 5% are for evaluation."""
    held_out = max(1, len(pieces) * 5 // 100)
    of = lambda n: _data(place, pieces[:-n], pieces[-n:], None, notes, vocabulary)

    def build(*arguments, apart=False):
        return of(max(2, held_out) if apart else held_out).build(*arguments, apart=apart)

    return of(held_out)._replace(build=build)


def _data(place: str, train, evaluation, test, notes: Notes, vocabulary) -> Data:
    """`data.examples` of the sets. Raises ValueError if one has no example."""
    sizes = {"train": train, "evaluation": evaluation} | ({} if test is None else {"test": test})
    if not all(sizes.values()):
        sizes = " and ".join(f"{len(part)} {name}" for name, part in sizes.items())
        raise ValueError(
            f"task.path: {place!r} has {sizes} examples with an answer; at least one of each is "
            "needed"
        )
    question = functools.partial(_question, vocabulary=vocabulary)
    note = _note(notes, vocabulary) + _repeated(train, [*evaluation, *(test or ())])
    return data.examples(train, evaluation, question, note=note, test=test)


def _note(notes: Notes, vocabulary: Vocabulary) -> str:
    n = sum(len(part.examples) for part in notes.rendered)
    remarks = sum((part.remarks for part in notes.rendered), collections.Counter())
    note = f"; {count(notes.empty)} without an answer left out" * bool(notes.empty)
    if n:
        note += f"; {count(n)} rendered with {notes.template}"
        note += templates.said(remarks, templates.spelling(vocabulary))
    unused = ", ".join(sorted(notes.unused))
    return note + f"; fields without a part in training: {unused}" * bool(unused)


def _repeated(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """A warning of examples that are both trained on and held out; "" for none."""
    trained = set(map(tuple, train))
    n = sum(tuple(example) in trained for example in held_out)
    if not n:
        return ""
    return f"; warning: {count(n)} of {count(len(held_out))} held-out examples are trained on, too"


def examples(
    parsed: Iterable[Read], vocabulary: Vocabulary, template: str | None = None
) -> tuple[list[Example], templates.Rendered]:
    """(pieces of every record, () for one without targets; what templates rendered of them).
    template: `task.template`, None for that of the model, for conversations.

    Raises ValueError naming the record's place and what is wrong.
    """
    parsed = list(parsed)
    texts = templates.chosen(template, vocabulary)
    is_rendered = lambda read: bool(texts and read.chat.learnt and (template or read.plain is None))
    chats = [read.chat for read in parsed if is_rendered(read)]
    rendered = templates.Rendered([], collections.Counter())
    if chats:
        rendered = _rendered(texts, vocabulary, chats, not template)
    pieces = iter(rendered.examples)
    worded = lambda read: _worded(read) if read.chat.learnt else ()
    return [next(pieces) if is_rendered(read) else worded(read) for read in parsed], rendered


def _rendered(texts, vocabulary, chats: list[Chat], of_base: bool) -> templates.Rendered:
    """`templates.render`; an error says what to do about a template that the user didn't choose."""
    try:
        return templates.render(texts, templates.spelling(vocabulary), chats)
    except ValueError as error:
        hint = " (the template is the base's; task.template=plain does without it)" * of_base
        raise ValueError(f"{error}{hint}") from None


def read(record: Record) -> Read:
    """Raises ValueError naming the record's place and the field that is wrong."""
    form = next((form for form in FORMS if form in record.fields), None)
    if form is None:
        raise ValueError(
            f"{record.place}: the record has the fields {', '.join(record.fields) or '(none)'}; "
            "expected prompt and completion, instruction and output, messages, or conversations "
            "(task.columns renames fields)"
        )
    record = Record(
        record.place,
        {k: _listed(record, k) if k in FORMS[form] else x for k, x in record.fields.items()},
    )
    if form == "prompt" and isinstance(record.fields["prompt"], list):
        form = "prompt of messages"
    unused = _unused(record, form)
    if form in CONVERSATIONS:
        return _conversation(record, form, unused)
    if form == "instruction":
        return _alpaca(record, unused)
    prompt, answer = record.get("prompt"), record.get("completion").strip()
    if not prompt:
        raise ValueError(f"{record.place}: field 'prompt' is empty; expected text")
    return Read(_told(record, [(prompt, answer)]), pair(prompt, answer), unused)


def _listed(record: Record, name: str) -> Any:
    """A field's value; a list given as JSON text as a list."""
    value = record.fields[name]
    if name not in LISTS or not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        listed = parse_json(value, f"{record.place}: field {name!r}")
    except ValueError:
        if name in ("prompt", "completion"):  # a text that begins with a bracket
            return value
        raise
    is_messages = all(isinstance(x, dict) and {"role", "from"} & x.keys() for x in listed)
    return value if name in ("prompt", "completion") and not is_messages else listed


def _unused(record: Record, form: str) -> set[str]:
    """The fields that a form does not use. Raises ValueError for one that means something."""
    fields = record.fields
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
    return present - MEANT


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
    found: Iterable[Record], vocabulary: Vocabulary, template: str | None, notes: Notes
) -> tuple[list[Example], Notes]:
    """The examples of a set, and the notes with what is to be said about it."""
    parsed = [read(record) for record in found]
    pieces, rendered = examples(parsed, vocabulary, template)
    trainable = [example for example in pieces if example]
    empty = notes.empty + len(pieces) - len(trainable)
    unused = notes.unused.union(*(read.unused for read in parsed))
    return trainable, Notes(notes.template, [*notes.rendered, rendered], empty, unused)


def _conversation(record: Record, form: str, unused: set[str]) -> Read:
    messages, learnt, carried = [], [], []
    for i, (turn, is_context) in enumerate(_turns(record, form)):
        role, content = turn.get("role"), turn.get("content")
        for name, value in turn.fields.items():
            if name in MEANT_OF_MESSAGES and value not in ("", [], {}):
                mend = (
                    "what is not to be learnt has weight 0" if name in WEIGHTS else "leave it out"
                )
                raise ValueError(f"{turn.place}: field {name!r} is not read; {mend}")
        is_target = _weight(turn, role) and not is_context
        calls = turn.fields.get("tool_calls") or turn.fields.get("function_call")
        if is_target and (content.strip() or calls):
            learnt.append(i)
        extra = {k: v for k, v in turn.fields.items() if k in CARRIED and v not in ("", [], {})}
        carried += [k for k in extra if k not in (CALLED if role == "tool" else CALLED[:1])]
        unused = unused | {f"messages.{k}" for k in turn.fields if k not in (*KEPT, *CARRIED)}
        messages.append({"role": role, "content": content} | extra)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{record.place}: no message of role 'assistant', so nothing to learn")
    if record.fields.get("system"):
        if messages[0]["role"] in SYSTEM:
            raise ValueError(f"{record.place}: field 'system' and messages[0] are both the system")
        messages.insert(0, {"role": "system", "content": record.get("system")})
        learnt = [i + 1 for i in learnt]
    extra = {name: record.get(name, list) for name in EXTRA if record.fields.get(name)}
    chat = Chat(record.place, messages, learnt, extra, list(dict.fromkeys(carried)))
    return Read(chat, None, unused)


def _turns(record: Record, form: str) -> Iterator[tuple[Record, bool]]:
    """Every message with role and content as texts, and whether it is of TRL's prompt, which is not
    trained on."""
    lists = ("prompt", "completion") if form == "prompt of messages" else (form,)
    for name in lists:
        for i, message in enumerate(record.get(name, list)):
            place = f"{record.place}: {name}[{i}]"
            if not isinstance(message, dict):
                raise ValueError(f"{place} is no object with role and content")
            message = {field: value for field, value in message.items() if value is not None}
            if "from" in message and "role" not in message:
                message = _spoken(place, message)
            if message.get("tool_calls") or message.get("function_call"):
                message.setdefault("content", "")
            message = {field: _plain_value(place, field, x) for field, x in message.items()}
            yield Record(place, message), name == "prompt"


def _spoken(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A turn in ShareGPT's form as a message. Raises ValueError for an unknown speaker."""
    turn = Record(place, message)
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS:
        raise ValueError(
            f"{place}: field 'from' is {records.shown(speaker)}; expected one of "
            f"{', '.join(SPEAKERS)}{nearest(speaker, SPEAKERS)}"
        )
    rest = {name: x for name, x in message.items() if name not in ("from", "value")}
    if speaker != CALLER:
        return {"role": SPEAKERS[speaker], "content": value} | rest
    calls = parse_json(value, f"{place}: field 'value'")
    calls = calls if isinstance(calls, list) else [calls]
    calls = [{"type": "function", "function": call} for call in calls]
    return {"role": SPEAKERS[speaker], "content": "", "tool_calls": calls} | rest


def _plain_value(place: str, name: str, value: Any) -> Any:
    """A message's field as templates read it: content as one text, arguments of calls as objects.
    Raises ValueError for content that is no text, and for calls that are malformed."""
    if name == "content" and isinstance(value, list):
        return "".join(_part(f"{place}: content[{i}]", part) for i, part in enumerate(value))
    if name == "function_call":
        return _call(f"{place}: {name}", value)
    if name != "tool_calls" or not value:
        return value
    if not isinstance(value, list):
        raise ValueError(f"{place}: field {name!r} is {records.shown(value)}; expected an array")
    calls = []
    for i, call in enumerate(value):
        at, inside = f"{place}: {name}[{i}]", isinstance(call, dict) and "function" in call
        calls.append(
            call | {"function": _call(at, call["function"])} if inside else _call(at, call)
        )
    return calls


def _part(place: str, part: Any) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise ValueError(f"{place} is {records.shown(part)}; expected a part of type text")
    return part["text"]


def _call(place: str, call: Any) -> dict[str, Any]:
    """The name and the arguments of a tool call, arguments in JSON text as an object."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"{place} is {records.shown(call)}; expected an object with a name")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{place}: arguments")
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{place}: arguments {records.shown(arguments)} given; expected an object, or its JSON"
        )
    return call | {"arguments": arguments}


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


def _question(example: Example, vocabulary: Vocabulary) -> tuple[str, str]:
    """An example's text up to its last answer, and that answer."""
    ends = templates.spelling(vocabulary).ends
    last = max(i for i, (text, target) in enumerate(example) if target and text is not END)
    before = "".join(ends[0] if text is END else text for text, _ in example[:last])
    answer = example[last][0]
    for end in ends:
        answer = answer.partition(end)[0]
    return before, answer.strip()
