import importlib.metadata
import json
import re

import numpy as np
import pytest
from support import require

from lorax import tasks
from lorax.tasks import instruct, rows, templates
from lorax.tasks.records import Record
from lorax.tasks.rows import END

PAIR = {"prompt": "2 + 2 =", "completion": " 4 "}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
BARE = {"instruction": "Say hi.", "input": "", "output": "Hi"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "7"},
    ]
}
USER, ANSWER = CHAT["messages"][1:3]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDED = (  # in the manner of Zephyr, with the vocabulary's own end
    "{% for m in messages %}\n<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
)


def pieces(record, vocabulary=None, template=None):
    if vocabulary is None:  # a form without a template asks nothing of it
        template, vocabulary = "plain", None
    (found,), _ = instruct.examples([instruct.read(Record("f:1", record))], vocabulary, template)
    return list(found)


def write(path, records):
    array = path.suffix == ".json"
    text = json.dumps(records) if array else "".join(json.dumps(x) + "\n" for x in records)
    path.write_text(text, encoding="utf-8")
    return path


def build(path, vocabulary, seq_len=400, **fields):
    return tasks.build({"name": "instruct", "path": str(path), **fields}, vocabulary, seq_len)


# ----------------------------------------------------------------------------------- the forms


def test_prompt_and_completion():
    assert pieces(PAIR) == [("2 + 2 =", False), (" 4", True), (END, True)]
    assert pieces({"prompt": "A:\n", "completion": "b"}) == [
        ("A:\n", False),
        ("b", True),
        (END, True),
    ]


def test_alpaca_in_its_own_words():
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert pieces(ALPACA) == [
        (
            "Below is an instruction that describes a task, paired with an input that provides "
            f"further context. {request}Add.\n\n### Input:\n2 and 2\n\n### Response:",
            False,
        ),
        (" 4", True),
        (END, True),
    ]
    bare = f"Below is an instruction that describes a task. {request}Say hi.\n\n### Response:"
    assert pieces(BARE) == [(bare, False), (" Hi", True), (END, True)]
    assert pieces({k: v for k, v in BARE.items() if k != "input"}) == pieces(BARE)
    braces = {**BARE, "instruction": "Print {input} {0}."}
    assert "Print {input} {0}." in pieces(braces)[0][0]


def test_every_assistant_turn_is_a_target():
    assert pieces(CHAT) == [
        ("System: Be brief.\nUser: 2 + 2?\nAssistant:", False),
        (" 4", True),
        (END, True),
        ("\nUser: And 3?\nAssistant:", False),
        (" 7", True),
        (END, True),
    ]


def test_what_follows_the_last_answer_or_is_empty_is_no_target():
    user, silent = CHAT["messages"][1], {"role": "assistant", "content": " "}
    messages = [user, silent, *CHAT["messages"][1:3], user]
    assert pieces({"messages": messages}) == [
        ("User: 2 + 2?\nAssistant: \nUser: 2 + 2?\nAssistant:", False),
        (" 4", True),
        (END, True),
    ]


@pytest.mark.parametrize("kind", ["vocabulary", "llama"])
def test_rows_of_a_conversation(kind, request):
    vocabulary = request.getfixturevalue(kind)
    built, _ = rows.encode([pieces(CHAT)], vocabulary, 400, "train")
    ids, mask = built["tokens"][0], built["mask"][0]
    n = len(vocabulary.start)
    targets = ids[mask == 1.0]
    ends = (targets == vocabulary.end).nonzero()[0]
    assert len(ends) == 2 and ends[1] == len(targets) - 1
    answers = [targets[: ends[0]], targets[ends[0] + 1 : -1]]
    assert [vocabulary.decode(x).strip() for x in answers] == ["4", "7"]
    length = int(mask.nonzero()[0][-1]) + 1
    assert vocabulary.decode(ids[n:length]) == (
        "System: Be brief.\nUser: 2 + 2?\nAssistant: 4\nUser: And 3?\nAssistant: 7"
    )


# ------------------------------------------------------------------------------- chat templates


def test_template_by_hand(vocabulary):
    assert pieces(CHAT, vocabulary, ENDED) == [
        (
            "<|system|>\nBe brief.<|endoftext|>\n<|user|>\n2 + 2?<|endoftext|>\n<|assistant|>\n",
            False,
        ),
        ("4<|endoftext|>\n", True),
        ("<|user|>\nAnd 3?<|endoftext|>\n<|assistant|>\n", False),
        ("7<|endoftext|>\n", True),
    ]
    assert pieces(ALPACA, vocabulary, ENDED) == [
        ("<|user|>\nAdd.\n\n2 and 2<|endoftext|>\n<|assistant|>\n", False),
        ("4<|endoftext|>\n", True),
    ]
    assert pieces(PAIR, vocabulary, ENDED)[0][0].startswith("<|user|>\n2 + 2 =<|")
    # ChatML's end is no end of this vocabulary's
    assert pieces(CHAT, vocabulary, CHATML)[1:3] == [
        ("4<|im_end|>\n", True),
        (END, True),
    ]


@pytest.mark.parametrize("source", [CHATML, ENDED])
def test_template_against_transformers(source, vocabulary):
    utils = require("transformers.utils.chat_template_utils")
    answer = re.compile(r"\{\{ m\S*content\S*( \+ eos_token)? \}\}(<\|im_end\|>)?\n")
    tracked = answer.sub(
        lambda x: (
            "{% if m.role == 'assistant' %}{% generation %}" + x[0] + "{% endgeneration %}"
            "{% else %}" + x[0] + "{% endif %}"
        ),
        source,
    )
    (text,), (spans,) = utils.render_jinja_template(
        [CHAT["messages"]],
        chat_template=tracked,
        return_assistant_tokens_mask=True,
        bos_token="",
        eos_token="<|endoftext|>",
    )
    found = [x for x in pieces(CHAT, vocabulary, source) if x[0] is not END]
    assert "".join(x for x, _ in found) == text
    assert len(spans) == 2
    assert [x for x, target in found if target] == [text[a:b] for a, b in spans]


def test_template_from_a_file(tmp_path, vocabulary):
    (tmp_path / "chat.jinja").write_text(CHATML)
    path = write(tmp_path / "train.jsonl", [CHAT] * 3)
    one = build(path, vocabulary, template=str(tmp_path / "chat.jinja"))
    two = build(path, vocabulary, template=CHATML)
    np.testing.assert_array_equal(one.train["tokens"], two.train["tokens"])
    assert one.prompts == (
        tasks.Prompt(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
            "<|im_start|>assistant\n4<|im_end|>\n<|endoftext|><|im_start|>user\nAnd 3?<|im_end|>\n"
            "<|im_start|>assistant\n",
            ("7<|im_end|>",),
        ),
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no such file", "task.template: 'no such file' is neither a Jinja template nor a file"),
        ("{% for m in messages %}", "task.template: Unexpected end of template"),
        ("{{ raise_exception('roles must alternate') }}", "f:1: task.template: roles must alter"),
        ("{{ messages.__class__.__mro__ }}", "f:1: task.template: access to attribute '__class__'"),
        ("{{ messages + 1 }}", "f:1: task.template: "),
        # a prompt is never what its answer follows
        ("{{ messages[-1].content }}", "f:1: task.template: it does not render message 4 as"),
    ],
)
def test_template_errors(vocabulary, source, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pieces(CHAT, vocabulary, source)


def test_template_whose_turns_overlap(vocabulary):
    source = (  # the line break after a turn is left out before the generation prompt
        "{% for m in messages %}{{ m.content }}"
        "{% if not (loop.last and add_generation_prompt) %}{{ '\\n' }}{% endif %}{% endfor %}"
    )
    messages = [*CHAT["messages"][1:3], {"role": "assistant", "content": "5"}]
    with pytest.raises(ValueError, match="it does not render message 2 as the continuation"):
        pieces({"messages": messages}, vocabulary, source)


def test_template_without_jinja(vocabulary, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"^task\.template: a chat template needs Jinja 3\.1\.6"):
        pieces(CHAT, vocabulary, CHATML)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(ValueError, match=r" 3\.1\.6 or later, not 3\.1\.5; install it"):
        pieces(CHAT, vocabulary, CHATML)


# ----------------------------------------------------------------- templates that others render

NAMED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"b": 2, "a": "\u00e9 <"}}}],
}
TOOLS = [{"function": {"name": "add"}, "type": "function"}]
USES = {
    "generation": CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{%- endgeneration -%}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n",
    ),
    "of the day": "{{ strftime_now('%Y-%m') }}" + CHATML,
    "json": "{% for m in messages %}{{ m.content }}{{ m | tojson(sort_keys=true) }}"
    "{{ m | tojson(ensure_ascii=true, separators=(',', ':')) }}{{ [1] | tojson(indent=2) }}"
    "{% endfor %}",
    "names": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{{ n.k }}"
    "{{ dict(a=n.k) }}{{ m.content }}{% if n.k > 4 %}{% break %}{% endif %}{% endfor %}",
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ documents }}"
    "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}",
    "reasoning": "{% for m in messages %}<{{ m.reasoning_content }}|{{ m.thinking }}>"
    "{{ m.content }}{% endfor %}",
}
USED = {
    "tools": {"messages": [*CHAT["messages"][:2], NAMED], "tools": TOOLS},
    "reasoning": {
        "messages": [
            CHAT["messages"][1],
            {**CHAT["messages"][2], "reasoning": "2 and 2", "name": None},
        ]
    },
}


@pytest.mark.parametrize("name", USES)
def test_whatever_transformers_renders_is_rendered_alike(name, vocabulary):
    utils = require("transformers.utils.chat_template_utils")
    record = USED.get(name, CHAT)
    normal = [utils._normalize_chat_messages(record["messages"])]
    (text,), *spans = utils.render_jinja_template(
        [utils._alias_reasoning_fields(normal[0])],
        tools=record.get("tools"),
        chat_template=USES[name],
        return_assistant_tokens_mask=name == "generation",
        bos_token="",
        eos_token="<|endoftext|>",
    )
    found = [x for x in pieces(record, vocabulary, USES[name]) if x[0] is not END]
    ours = "".join(x for x, _ in found)
    assert text.startswith(ours) and found[-1][1]
    if name == "generation":
        (spans,) = spans[0]
        assert [x for x, target in found if target] == [text[a:b] for a, b in spans]
        assert [x for x, target in found if target] == ["4<|im_end|>", "7<|im_end|>"]
    else:
        assert ours == text


def test_a_template_that_marks_the_words_may_drop_what_came_before(vocabulary):
    last = (
        "{{ messages[-2].content }}={% generation %}{{ messages[-1].content }}{% endgeneration %}"
    )
    weighted = [*CHAT["messages"][:2], {**ANSWER, "weight": 0}, *CHAT["messages"][3:]]
    assert pieces(CHAT, vocabulary, last) == [("And 3?=", False), ("7", True)]
    with pytest.raises(ValueError, match="it marks 1 parts with generation, and the record has 2"):
        pieces({"messages": weighted}, vocabulary, last)
    found = pieces({"messages": weighted}, vocabulary, USES["generation"])
    assert [text for text, target in found if target] == ["7<|im_end|>"]
    with pytest.raises(ValueError, match="f:1: task.template: it renders no word of message 2, 4 "):
        pieces(CHAT, vocabulary, "{% if 0 %}{% generation %}{% endgeneration %}{% endif %}x")
    with pytest.raises(ValueError, match="its generation blocks are inside a macro"):
        pieces(
            CHAT,
            vocabulary,
            "{% set x %}a{% generation %}b{% endgeneration %}{% endset %}{{ x * 2 }}",
        )


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "{{ 1/0 }}": "ZeroDivisionError: division by zero",
    "{{ {}['a'].b.c }}": "'dict object' has no attribute 'a'",
    "{{ 'a'.index('b') }}": "ValueError: substring not found",
    "{{ '%d' % 'a' }}": "TypeError: ",
    "{{ range(10**9) }}": "OverflowError: Range too big",
    "{% include '/etc/passwd' %}": "TypeError: no loader for this environment specified",
    "{{ '\\ud83d' }}": "it renders half of a character",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "it is nested too deep, or a macro calls",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}": "it is nested too deep, or a macro calls",
    ENDLESS: "rendering takes more than 0.5 s; does a loop or a macro have no end?",
    "{{ 9**(9**9) }}": "rendering takes more than 0.5 s",
    "{% set x = 'x' * 10**9 %}{{ (x ~ x) | length }}": "it needs more than 256 MiB",
    "{{ 'x' * 10**8 }}": "it needs more than 256 MiB",
    "{% set n = 10**7 + 1 %}{{ messages and 'x' * n }}": "it renders more than 10,000,000 chara",
    "{{ lipsum(n=10**7) }}": "rendering takes more than 0.5 s",
    "{% for i in range(9999) %}{{ 'y' * 9999 }}{% endfor %}": "it renders more than 10,000,000 ch",
    "{% set n = namespace(__class__=1) %}": "a namespace may not hold '__class__'",
    "{{ dict.mro() }}": "has no attribute 'mro'",
    "no word": "it renders no word of message 2 as what is to be learnt",
    # a model of images expects parts where a text stands
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}"
    "<end>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}": "it renders no word",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_template_without_end_or_bounds_is_one_line(source, vocabulary, monkeypatch):
    # Time is short only where it is what runs out: elsewhere a busy machine must not be first.
    monkeypatch.setattr(templates, "SECONDS", 0.5 if "0.5 s" in HOSTILE[source] else 60)
    monkeypatch.setattr(templates, "MEMORY", 2**28)
    with pytest.raises(ValueError) as error:
        pieces(CHAT, vocabulary, source if "{" in source else "{% raw %}" + source + "{% endraw %}")
    text = str(error.value)
    assert "task.template: " in text and "\n" not in text and len(text) < 400
    assert HOSTILE[source] in text


def test_a_record_that_takes_too_long_is_named(vocabulary, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    source = "{% if messages[0].content == 'slow' %}" + ENDLESS + "{% endif %}" + CHATML
    turns = [{"role": "user", "content": "fast"}, ANSWER]
    slow = [{"role": "user", "content": "slow"}, ANSWER]
    found = [
        instruct.read(Record(f"f:{i}", {"messages": slow if i == 3 else turns})) for i in range(5)
    ]
    with pytest.raises(ValueError, match=r"^f:3: task\.template: rendering takes more than 0\.5 s"):
        instruct.examples(found, vocabulary, source)


def test_a_template_stands_in_several_kinds_of_files(tmp_path, vocabulary):
    want = pieces(CHAT, vocabulary, CHATML)
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]
    for name, content in (
        ("chat.jinja", "\ufeff" + CHATML),
        ("tokenizer_config.json", json.dumps({"chat_template": CHATML, "eos_token": "</s>"})),
        ("several.json", "\ufeff" + json.dumps({"chat_template": several})),
    ):
        (tmp_path / name).write_bytes(content.encode())
        assert pieces(CHAT, vocabulary, str(tmp_path / name)) == want
    for name, content, message in (
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "has no text as its chat_template"),
        ("list.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}', "has no text as"),
        ("array.json", b"[]", "has no text as its chat_template"),
        ("chat.jinja", b"{{ a }}\n\xe9", "chat.jinja:2: bad byte 0xe9; expected UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pieces(CHAT, vocabulary, str(tmp_path / name))
    for given in (str(tmp_path), "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="^task.template: .* is neither a Jinja template nor"):
            pieces(CHAT, vocabulary, given)


# ----------------------------------------------------------------------- what else a record may say

WEIGHTED = {
    "messages": [*CHAT["messages"][:2], {**ANSWER, "weight": 0}, *CHAT["messages"][3:]],
    "id": 7,
    "source": "by hand",
}


def test_an_answer_of_weight_0_is_read_and_not_learnt(vocabulary):
    learnt = [(text, target) for text, target in pieces(CHAT) if target][2:]
    assert pieces(WEIGHTED) == [
        ("System: Be brief.\nUser: 2 + 2?\nAssistant:", False),
        (" 4", False),
        (END, False),
        ("\nUser: And 3?\nAssistant:", False),
        *learnt,
    ]
    built, _ = rows.encode([pieces(WEIGHTED)], vocabulary, 400, "train")
    targets = built["tokens"][0][built["mask"][0] == 1.0]
    assert vocabulary.decode(targets[:-1]) == " 7" and targets[-1] == vocabulary.end
    found = pieces(WEIGHTED, vocabulary, CHATML)
    assert [text for text, target in found if target] == ["7<|im_end|>\n", END]
    assert found[0][0].endswith(
        "4<|im_end|>\n<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    # what follows the last words to learn is left out, and a conversation without any
    last = {"messages": [*CHAT["messages"][:4], {**ANSWER, "weight": 0}]}
    assert pieces(last) == pieces(CHAT)[:3]
    assert pieces({"messages": [*CHAT["messages"][:2], {**ANSWER, "weight": 0}]}) == []
    assert pieces(
        {"messages": [*CHAT["messages"][:4], {**ANSWER, "weight": 1, "content": "7"}]}
    ) == pieces(CHAT)


def test_system_and_history_of_an_alpaca_record(vocabulary):
    record = {**ALPACA, "system": "Be brief.", "history": [["1 + 1?", "2"], ["And 1?", " 3 "]]}
    assert pieces(record) == [
        ("Be brief.\n\n### Instruction:\n1 + 1?\n\n### Response:", False),
        (" 2", True),
        (END, True),
        ("\n\n### Instruction:\nAnd 1?\n\n### Response:", False),
        (" 3", True),
        (END, True),
        ("\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:", False),
        (" 4", True),
        (END, True),
    ]
    turns = [("1 + 1?", "2"), ("And 1?", "3"), ("Add.\n\n2 and 2", "4")]
    messages = [CHAT["messages"][0]]
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    assert pieces(record, vocabulary, CHATML) == pieces({"messages": messages}, vocabulary, CHATML)
    assert pieces({**ALPACA, "system": "", "history": []}) == pieces(ALPACA)
    assert pieces({**record, "output": " "}) == []


def test_system_and_a_repeated_prompt_of_a_conversation():
    rest = CHAT["messages"][1:]
    assert pieces({"messages": rest, "system": "Be brief."}) == pieces(CHAT)
    assert pieces({**CHAT, "prompt": "2 + 2?", "prompt_id": "x"}) == pieces(CHAT)


def test_fields_without_a_part_in_training_are_named(tmp_path, vocabulary):
    dated = {"messages": [{**x, "timestamp": 5} for x in CHAT["messages"]], "category": "sums"}
    path = write(tmp_path / "x.jsonl", [WEIGHTED, dated, PAIR])
    assert build(path, vocabulary).note.endswith(
        "; fields without a part in training: category, id, messages.timestamp, source"
    )


SAID = {"from": "human", "value": "2 + 2?"}


def _called(arguments):
    """A tool call whose arguments are JSON text."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def _with(fields, i=2):
    messages = [dict(x) for x in CHAT["messages"]]
    messages[i] |= fields
    return {"messages": messages}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            _with({"weight": 0.5}),
            "messages[2]: field 'weight' is 0.5; expected 0 (not to be learnt), ",
        ),
        (_with({"weight": "0"}), "messages[2]: field 'weight' is \"0\"; expected 0 "),
        (
            _with({"weight": 1}, 1),
            "messages[1]: field 'weight' is 1; expected 0 (not to be learnt)",
        ),
        (
            _with({"train": False}),
            "messages[2]: field 'train' is not read; what is not to be learnt",
        ),
        (_with({"loss": 0}), "messages[2]: field 'loss' is not read; what is not to be learnt has"),
        (_with({"images": ["a.png"]}), "messages[2]: field 'images' is not read; leave it out"),
        (_with({"content": [{"type": "image"}]}), 'messages[2]: content[0] is {"type": "image"}'),
        (_with({"content": None}), "messages[2]: field 'content' is missing"),
        (_with({"name": "Ann"}, 1), "name has no place in a conversation without a template"),
        (_with({"reasoning_content": "hm"}), "reasoning_content has no place in a conversation "),
        ({"messages": [USER, NAMED]}, "tool_calls has no place in a conversation without a templ"),
        ({**CHAT, "tools": TOOLS}, "tools has no place in a conversation without a template"),
        ({**CHAT, "tools": "x"}, "field 'tools' is \"x\"; expected an array"),
        ({**CHAT, "system": "x"}, "field 'system' and messages[0] are both the system"),
        ({**CHAT, "prompt": "other"}, "field 'prompt' has no part in a record with 'messages'; "),
        ({**CHAT, "images": ["a.png"]}, "field 'images' has no part in a record with 'messages'"),
        ({**CHAT, "history": [["a", "b"]]}, "field 'history' has no part in a record with 'messag"),
        ({**ALPACA, "history": ["a"]}, 'history[0] is "a"; expected [question, answer], two text'),
        ({**ALPACA, "history": [["a", ""]]}, 'history[0] is ["a", ""]; expected [question, an'),
        ({**ALPACA, "history": "a"}, "field 'history' is \"a\"; expected an array"),
        ({**ALPACA, "system": 3}, "field 'system' is 3; expected text"),
        ({**ALPACA, "context": "x"}, "field 'context' has no part in a record with 'instruction'"),
        ({**ALPACA, "tools": "[x]"}, "field 'tools' has no part in a record with 'instruction'"),
        ({**PAIR, "system": "x"}, "field 'system' has no part in a record with 'prompt'; such a "),
        ({**PAIR, "weight": 0}, "field 'weight' has no part in a record with 'prompt'; such a rec"),
        ({**PAIR, "mask": False}, "field 'mask' has no part in a record with 'prompt'"),
        ({**PAIR, "thinking": "x"}, "field 'thinking' has no part in a record with 'prompt'"),
        ({"prompt": [USER], "completion": "4"}, "field 'completion' is \"4\"; expected an array"),
        ({"prompt": [USER, "x"], "completion": []}, "prompt[1] is no object with role and conten"),
        (
            {"conversations": [SAID, {"from": "Bob", "value": "x"}]},
            "conversations[1]: field 'from' ",
        ),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: field 'value' is missing"),
        ({"conversations": [SAID]}, "no message of role 'assistant', so nothing to learn"),
        (
            {"conversations": [SAID, {"from": "function_call", "value": "{"}]},
            "conversations[1]: fi",
        ),
        ({"messages": [USER, _called("{")]}, "messages[1]: tool_calls[0]: arguments:1: not JSON ("),
        ({"messages": [USER, _called("[]")]}, "messages[1]: tool_calls[0]: arguments [] given; ex"),
        ({"messages": [USER, {**NAMED, "tool_calls": [3]}]}, "messages[1]: tool_calls[0] is 3; ex"),
        ({"messages": [USER, {**NAMED, "tool_calls": "x"}]}, "messages[1]: field 'tool_calls' is "),
        ({"messages": "[{"}, "field 'messages':1: not JSON ("),
    ],
)
def test_a_field_that_means_something_is_done_or_refused(record, message):
    with pytest.raises(ValueError, match="^" + re.escape("f:1: " + message)):
        pieces(record)


def test_a_template_must_have_a_use_for_what_a_record_has(vocabulary):
    calls = {"messages": [USER, NAMED], "tools": TOOLS}
    assert pieces(calls, vocabulary, USES["tools"])[-2][1]
    answers = {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"}
    said = {"messages": [USER, ANSWER, answers, ANSWER]}
    assert [text for text, target in pieces(said, vocabulary, CHATML) if target][
        0
    ] == "4<|im_end|>\n"
    for record, name in ((calls, "tool_calls"), ({**CHAT, "tools": TOOLS}, "tools")):
        with pytest.raises(
            ValueError, match=f"it has no use for the field '{name}', which the rec"
        ):
            pieces(record, vocabulary, CHATML)


def test_a_vocabulary_without_an_end_is_refused(vocabulary):
    for template in (None, CHATML):
        with pytest.raises(ValueError, match="tokenizer: no token ends a text"):
            instruct._question(pieces(CHAT, vocabulary, template), vocabulary._replace(ends=()))


# ------------------------------------------------------------------------------------- the sets


def test_the_end_of_a_single_file_is_for_evaluation(tmp_path, vocabulary):
    records = [{"prompt": f"{i} =", "completion": f"{i}"} for i in range(40)]
    for name in ("x.jsonl", "x.json"):
        path = write(tmp_path / name, records)
        task = build(path, vocabulary, packing=True)
        assert task.note.startswith("instruct: 38 train examples packed into ")
        assert task.note.endswith(" rows, 2 eval examples")
        assert task.prompts == (tasks.Prompt("38 =", ("38",)), tasks.Prompt("39 =", ("39",)))
        assert vocabulary.decode(task.eval["tokens"][1]) == "39 = 39"
        assert len(build(path, vocabulary, n_train=5).train["tokens"]) == 5
    write(path, records[:2])
    assert [len(x["tokens"]) for x in build(path, vocabulary)[1:3]] == [1, 1]


def test_a_folder_has_a_second_file(tmp_path, vocabulary):
    write(tmp_path / "train.jsonl", [ALPACA, BARE, {**BARE, "output": " "}])
    with pytest.raises(
        FileNotFoundError, match=r"^task\.path: .* has no eval\.jsonl or test\.json"
    ):
        build(tmp_path, vocabulary)
    write(tmp_path / "test.json", [CHAT])
    task = build(tmp_path, vocabulary)
    assert task.note == "instruct: 2 train examples, 1 eval examples; 1 without an answer left out"
    (prompt,) = task.prompts
    assert prompt.references == ("7",)
    assert prompt.text == (
        "System: Be brief.\nUser: 2 + 2?\nAssistant: 4<|endoftext|>\nUser: And 3?\nAssistant:"
    )
    ids = vocabulary.encode(prompt.text)  # what generation reads is what training read
    assert task.eval["tokens"][0][: len(ids)].tolist() == ids
    write(tmp_path / "eval.jsonl", [PAIR])
    assert build(tmp_path, vocabulary).prompts == (tasks.Prompt("2 + 2 =", ("4",)),)


def test_nothing_left_for_evaluation(tmp_path, vocabulary):
    path = write(tmp_path / "x.jsonl", [PAIR])
    with pytest.raises(ValueError, match=r"^task\.path: .* has 0 train and 1 evaluation examples"):
        build(path, vocabulary)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "the record has the fields text; expected prompt and completion, instruc"),
        ({"prompt": "x"}, "field 'completion' is missing; the record has prompt"),
        ({"prompt": "", "completion": "x"}, "field 'prompt' is empty; expected text"),
        ({"instruction": "x", "output": 4}, "field 'output' is 4; expected text"),
        ({"instruction": "x", "input": None, "output": "y"}, "field 'input' is null; expected"),
        ({"messages": "x"}, "field 'messages' is \"x\"; expected an array"),
        ({"messages": ["x"]}, "messages[0] is no object with role and content"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1]: field 'content' is missing"),
        ({"messages": [USER]}, "no message of role 'assistant', so nothing to learn"),
        (
            {"messages": [{"role": "tool", "content": "x"}, ANSWER]},
            "role 'tool' has no place in a conversation without a template; expected system, devel",
        ),
    ],
)
def test_malformed_records_name_the_line(tmp_path, vocabulary, record, message):
    for name, place in (("x.jsonl", ":2"), ("x.json", "[1]")):
        path = write(tmp_path / name, [PAIR, record])
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}{place}: {message}")):
            build(path, vocabulary)
