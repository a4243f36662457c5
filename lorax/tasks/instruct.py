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

with the vocabulary's end token for <end>. The loss is on the assistant's words and ends, in every
turn. With `task.template`, a chat template in Jinja as Hugging Face models have, that renders all
three forms instead; instruction and input are then a user's turn, parted by an empty line.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorax.tasks import records
from lorax.tasks.records import Record
from lorax.tasks.rows import (
    END,
    Example,
    Task,
    check_path,
    count,
    encode_sets,
    group,
    pair,
)
from lorax.vocabulary import Vocabulary

EXPECTED = (
    "a file of JSON Lines or a JSON array, or a folder with train.jsonl and eval.jsonl (or "
    "test.jsonl) in it"
)
ALPACA = (  # github.com/tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT; with an input, without
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}

Messages = list[dict[str, Any]]
Render = Callable[[Messages], Example]  # raises ValueError for messages that it can't render


def load(config: Mapping[str, Any], vocabulary: Vocabulary, seq_len: int) -> Task:
    """Trains on train.jsonl of a folder (its first n_train records) and evaluates on eval.jsonl or
    test.jsonl beside it; of a single file the last 5% (at least one) are the evaluation set.
    Records whose answers are empty are left out. A prompt is an evaluation record up to its last
    answer."""
    path = check_path(config, EXPECTED)
    source = config.get("template")
    render = template(source, vocabulary) if source else None
    if path.is_dir():
        train, empty = _examples(_beside(path, "train.jsonl"), render)
        evaluation, empty_eval = _examples(_beside(path, "eval.jsonl", "test.jsonl"), render)
        empty += empty_eval
    else:
        found, empty = _examples(path, render)
        held_out = max(1, len(found) * 5 // 100)
        train, evaluation = found[:-held_out], found[-held_out:]
    if not train or not evaluation:
        raise ValueError(
            f"task.path: {str(path)!r} has {len(train)} train and {len(evaluation)} evaluation "
            "examples with an answer; at least one of each is needed"
        )
    prompts = group(_question(example, vocabulary) for example in evaluation)
    task = encode_sets(config, vocabulary, seq_len, train, evaluation, prompts)
    if empty:
        task = task._replace(note=f"{task.note}; {count(empty)} without an answer left out")
    return task


def example(record: Record, render: Render | None = None) -> Example:
    """Pieces of a record, () where its answers are empty. render: of a chat template.

    Raises ValueError naming the record's place and what is wrong.
    """
    fields = record.fields
    if "messages" in fields:
        messages = _messages(record)
    elif "instruction" in fields:
        slots = {"instruction": record.get("instruction"), "input": ""}
        if "input" in fields:
            slots["input"] = record.get("input")
        answer = record.get("output").strip()
        prompt = ALPACA[not slots["input"]].format_map(slots)
        messages = _turns("\n\n".join(filter(None, slots.values())), answer)
    elif "prompt" in fields:
        prompt, answer = record.get("prompt"), record.get("completion").strip()
        if not prompt:
            raise ValueError(f"{record.place}: field 'prompt' is empty; expected text")
        messages = _turns(prompt, answer)
    else:
        raise ValueError(
            f"{record.place}: the record has the fields {', '.join(fields) or '(none)'}; expected "
            "prompt and completion, instruction and output, or messages"
        )
    if not any(m["content"].strip() for m in messages if m["role"] == "assistant"):
        return ()
    if render is None and "messages" not in fields:
        return pair(prompt, answer)
    try:
        return (render or plain)(messages)
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None


def plain(messages: Messages) -> Example:
    """Pieces of a conversation without a template, in the form that this module begins with.

    Raises ValueError for a role that the form has no name for.
    """
    pieces, before = [], ""
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role not in ROLES:
            raise ValueError(
                f"role {role!r} has no place in a conversation without a template; expected "
                f"{', '.join(ROLES)}, or set task.template"
            )
        before += f"{ROLES[role]}:"
        if role == "assistant" and content:
            pieces += pair(before, content)
            before = "\n"
        else:
            before += f" {content}\n"
    return tuple(pieces)


def template(source: str, vocabulary: Vocabulary) -> Render:
    """Pieces of a conversation by a Jinja chat template: the template's text, or a file of it.

    As `transformers` renders it, with `bos_token` empty (rows have their start already). A turn
    is what rendering the conversation up to it adds to rendering what came before and the
    generation prompt. A turn that the template doesn't end gets the end token.

    Raises ValueError where Jinja is not installed, the template is wrong, or it renders what came
    before in another way once more follows.
    """
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(
            "task.template: a chat template needs Jinja; install it (pip install jinja2), or "
            "leave task.template out"
        ) from None
    if "{{" not in source and "{%" not in source:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(
                f"task.template: {source!r} is neither a Jinja template nor a file of one"
            )
        source = path.read_text(encoding="utf-8")

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    # A template comes with a model: it may not reach beyond what it is given.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent
    )
    ends = _spelled(vocabulary)
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"task.template: {error}") from None

    def text(messages: Messages, cue: bool) -> str:
        try:
            return compiled.render(
                messages=messages,
                add_generation_prompt=cue,
                bos_token="",
                eos_token=ends[0],
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"task.template: {error}") from None

    def render(messages: Messages) -> Example:
        whole, pieces, at = text(messages, cue=False), [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            before, after = text(messages[:i], cue=True), text(messages[: i + 1], cue=False)
            if not (len(before) >= at and after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"task.template: it does not render message {i} as the continuation of those "
                    "before it and the generation prompt, so its words can't be told apart"
                )
            turn = after[len(before) :]
            pieces += [(whole[at : len(before)], False), (turn, True)]
            if not any(end in turn for end in ends):
                pieces.append((END, True))
            at = len(after)
        return tuple(piece for piece in pieces if piece[0] != "")

    return render


def _examples(path: Path, render: Render | None) -> tuple[list[Example], int]:
    """The examples of a file, and how many records were left out as empty."""
    found = [example(record, render) for record in records.read(path)]
    kept = [pieces for pieces in found if pieces]
    return kept, len(found) - len(kept)


def _beside(folder: Path, *names: str) -> Path:
    for name in names:
        for path in (folder / name, folder / name.replace(".jsonl", ".json")):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"task.path: {str(folder)!r} has no {' or '.join(names)}; expected {EXPECTED}"
    )


def _messages(record: Record) -> Messages:
    messages = record.get("messages", list)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{record.place}: messages[{i}] is no object with role and content")
        turn = Record(f"{record.place}: messages[{i}]", message)
        turn.get("role"), turn.get("content")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{record.place}: no message of role 'assistant', so nothing to learn")
    return messages


def _turns(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _spelled(vocabulary: Vocabulary) -> list[str]:
    """The tokens that end a text, as they are written in one."""
    return [vocabulary.tokenizer.id_to_token(i) for i in vocabulary.ends]


def _question(example: Example, vocabulary: Vocabulary) -> tuple[str, str]:
    """An example's text up to its last answer, and that answer."""
    ends = _spelled(vocabulary)
    last = max(i for i, (text, target) in enumerate(example) if target and text is not END)
    before = "".join(ends[0] if text is END else text for text, _ in example[:last])
    answer = example[last][0]
    for end in ends:
        answer = answer.partition(end)[0]
    return before, answer.strip()
