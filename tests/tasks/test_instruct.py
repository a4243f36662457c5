import json
import re
import sys

import numpy as np
import pytest
from support import require

from lorax import tasks
from lorax.tasks import instruct, rows
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
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDED = (  # in the manner of Zephyr, with the vocabulary's own end
    "{% for m in messages %}\n<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
)


def pieces(record, render=None):
    return list(instruct.example(Record("f:1", record), render))


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
    render = instruct.template(ENDED, vocabulary)
    assert pieces(CHAT, render) == [
        (
            "<|system|>\nBe brief.<|endoftext|>\n<|user|>\n2 + 2?<|endoftext|>\n<|assistant|>\n",
            False,
        ),
        ("4<|endoftext|>\n", True),
        ("<|user|>\nAnd 3?<|endoftext|>\n<|assistant|>\n", False),
        ("7<|endoftext|>\n", True),
    ]
    assert pieces(ALPACA, render) == [
        ("<|user|>\nAdd.\n\n2 and 2<|endoftext|>\n<|assistant|>\n", False),
        ("4<|endoftext|>\n", True),
    ]
    assert pieces(PAIR, render)[0][0].startswith("<|user|>\n2 + 2 =<|")
    # ChatML's end is no end of this vocabulary's
    assert pieces(CHAT, instruct.template(CHATML, vocabulary))[1:3] == [
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
    found = [x for x in pieces(CHAT, instruct.template(source, vocabulary)) if x[0] is not END]
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
        # the last turn only, as templates do that drop a model's earlier thoughts
        ("{{ messages[-1].content }}", "f:1: task.template: it does not render message 2 as"),
    ],
)
def test_template_errors(vocabulary, source, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pieces(CHAT, instruct.template(source, vocabulary))


def test_template_whose_turns_overlap(vocabulary):
    source = (  # the line break after a turn is left out before the generation prompt
        "{% for m in messages %}{{ m.content }}"
        "{% if not (loop.last and add_generation_prompt) %}{{ '\\n' }}{% endif %}{% endfor %}"
    )
    messages = [*CHAT["messages"][1:3], {"role": "assistant", "content": "5"}]
    with pytest.raises(ValueError, match="it does not render message 2 as the continuation"):
        pieces({"messages": messages}, instruct.template(source, vocabulary))


def test_template_without_jinja(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"^task\.template: a chat template needs Jinja; install"):
        instruct.template(CHATML, vocabulary)


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


USER, ANSWER = CHAT["messages"][1:3]


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
            "role 'tool' has no place in a conversation without a template; expected system, user,",
        ),
    ],
)
def test_malformed_records_name_the_line(tmp_path, vocabulary, record, message):
    for name, place in (("x.jsonl", ":2"), ("x.json", "[1]")):
        path = write(tmp_path / name, [PAIR, record])
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}{place}: {message}")):
            build(path, vocabulary)
