"""The chat templates that models have, against transformers and TRL."""

import copy
import json

import numpy as np
import pytest
from support import data, require
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lorax import chat_files, resume, tasks, vocabulary
from lorax.tasks import instruct, rows, templates
from lorax.tasks.records import Record
from lorax.tasks.rows import END

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
#: Thoughts stay in the turns after the last question only, which have a block for them in any case.
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.open and m.role == 'user' %}
        {%- set ns.open = false %}{% set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- set content = m.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n' + call.function.name + call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role in ('user', 'system', 'tool') %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
MARKED = SMOLLM2.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' +"
    " message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}",
)
FAMILIES = {  # template, tokens, what starts a text, what ends one
    "smollm2": (SMOLLM2, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "qwen3": (QWEN3, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "marked": (MARKED, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ("<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|bos|>",
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>"),
}
USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4, of course."}
AGAIN = {"role": "user", "content": "And 3 more?"}
LAST = {"role": "assistant", "content": "7"}
CHAT = {"messages": [USER, ANSWER, AGAIN, LAST]}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "2 + 2 =", "completion": "4"}
CALL = {"function": {"name": "add", "arguments": {"a": 2}}, "type": "function"}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Directories of tokenizers with the special tokens and the template of a family."""

    def make(name):
        template, special, start, end = FAMILIES[name]
        folder = tmp_path_factory.mktemp(name)
        alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(alphabet, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(special))
        if start:
            ids = [(start, tokenizer.token_to_id(start))]
            tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A", None, ids)
        tokenizer.save(str(folder / "tokenizer.json"))
        ids = {"eos_token_id": tokenizer.token_to_id(end)}
        (folder / "config.json").write_text(json.dumps(ids))
        stored = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        stored |= {"bos_token": start} if start else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(stored))
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def tokens(record, words, template=None):
    """(ids, mask) of a record, without padding."""
    (example,), _ = instruct.examples([instruct.read(Record("f:1", record))], words, template)
    built, _ = rows.encode([example], words, 600, "train")
    n = int((built["tokens"][0] != words.pad).nonzero()[0][-1]) + 1
    n = max(n, int(built["mask"][0].nonzero()[0][-1]) + 1)
    return built["tokens"][0, :n].tolist(), built["mask"][0, :n].astype(int).tolist()


def said(records, words, template=None):
    parsed = [instruct.read(Record("f:1", record)) for record in records]
    _, rendered = instruct.examples(parsed, words, template)
    return templates.said(rendered.remarks, templates.spelling(words))


# ---------------------------------------------------------------------- against transformers, TRL


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name, family):
    theirs = require("transformers").AutoTokenizer.from_pretrained(family(name))
    words = vocabulary.read(family(name))
    ids, mask = tokens(CHAT, words)
    whole = theirs.apply_chat_template(CHAT["messages"], return_dict=False)
    assert whole[: len(ids)] == ids and theirs.decode(whole[len(ids) :]).strip() == ""
    # what is trained on is what the model writes behind each prompt that it is given
    prompt = theirs.apply_chat_template(CHAT["messages"][:3], add_generation_prompt=True)
    prompt = prompt["input_ids"]
    assert ids[: len(prompt)] == prompt and all(mask[len(prompt) :])
    answers = "".join(theirs.decode(i) for i, m in zip(ids, mask, strict=True) if m)
    assert answers.count("7") == 1 and ("of course" in answers) == (name != "qwen3")
    texts = templates.prompts(words.templates, templates.spelling(words), [CHAT["messages"][:3]])
    assert [*words.start, *words.encode(*texts)] == prompt


def test_marks_are_the_mask_of_transformers(family):
    theirs = require("transformers").AutoTokenizer.from_pretrained(family("marked"))
    ids, mask = tokens(CHAT, vocabulary.read(family("marked")))
    given = theirs.apply_chat_template(
        CHAT["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert given["input_ids"][: len(ids)] == ids
    assert given["assistant_masks"][: len(ids)] == mask and sum(given["assistant_masks"]) == sum(
        mask
    )


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER, ANSWER, AGAIN], "completion": [LAST]},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {
            "prompt": [USER],
            "completion": [{"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}],
        },
    ],
    ids=["turns", "system", "thought"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_messages_is_masked_as_in_trl(name, record, family):
    """`trl.SFTTrainer`: the completion is what the whole adds to the prompt with its cue."""
    theirs = require("transformers").AutoTokenizer.from_pretrained(family(name))
    words = vocabulary.read(family(name))
    if name == "gemma" and record["prompt"][0] == SYSTEM:
        with pytest.raises(ValueError, match="f:1: task.template: System role not supported"):
            tokens(record, words)
        return
    ids, mask = tokens(record, words)
    ask = lambda messages, **more: theirs.apply_chat_template(messages, **more)["input_ids"]
    prompt = ask(record["prompt"], add_generation_prompt=True)
    whole = ask(record["prompt"] + record["completion"])
    assert whole[: len(prompt)] == prompt and ids == whole[: len(ids)]
    if name == "marked":  # what it marks ends with the token, without the line break behind it
        assert theirs.decode(whole[len(ids) :]) == "\n"
    else:
        assert ids == whole
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


@pytest.mark.filterwarnings("ignore")  # what the trainer tells its own users
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "gemma", "marked"])
def test_labels_are_those_of_trls_trainer(name, family, tmp_path):
    trl, transformers, datasets = map(require, ("trl", "transformers", "datasets"))
    folder, is_marked = family(name), name == "marked"
    theirs, words = transformers.AutoTokenizer.from_pretrained(folder), vocabulary.read(folder)
    theirs.pad_token = theirs.eos_token
    sizes = dict(
        vocab_size=len(theirs),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    record = CHAT if is_marked else {"prompt": [USER, ANSWER, AGAIN], "completion": [LAST]}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], assistant_only_loss=is_marked
        ),
        train_dataset=datasets.Dataset.from_list([record, {**record, "id": "0"}]),
        processing_class=theirs,
    )
    ids, mask = tokens(record, words)
    given = trainer.train_dataset[0]
    assert given["input_ids"][: len(ids)] == ids
    assert [int(label != -100) for label in given["labels"]][: len(ids)] == mask
    assert all(label == -100 for label in given["labels"][len(ids) :])


def test_smollm2_itself(tmp_path):
    folder = data("models/smollm2")
    words = vocabulary.read(folder)
    ids, mask = tokens(CHAT, words)
    theirs = require("transformers").AutoTokenizer.from_pretrained(folder)
    assert ids == theirs.apply_chat_template(CHAT["messages"])["input_ids"]
    assert theirs.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        "4, of course.<|im_end|>\n7<|im_end|>\n"
    )


# -------------------------------------------------------------------- templates that change turns


def test_a_template_that_changes_earlier_turns_trains_the_last(family):
    words = vocabulary.read(family("qwen3"))
    (example,), rendered = instruct.examples([instruct.read(Record("f:1", CHAT))], words)
    assert example == (
        (
            "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4, of course."
            "<|im_end|>\n<|im_start|>user\nAnd 3 more?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("<think>\n\n</think>\n\n7<|im_end|>\n", True),
    )
    assert "in 1 of them the template changes earlier answers" in said([CHAT, PAIR], words)
    assert said([{"messages": [USER, ANSWER]}, PAIR], words) == ""
    # without the last one it is the conversation up to the one that counts
    cut = {"messages": [USER, ANSWER, AGAIN, {**LAST, "weight": 0}]}
    assert tokens(cut, words) == tokens({"messages": [USER, ANSWER]}, words)


def test_marks_that_change_earlier_turns_are_said(family):
    words = vocabulary.read(family("smollm2"))
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<think></think>' if loop.last }}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (example,), _ = instruct.examples([instruct.read(Record("f:1", CHAT))], words, marked)
    assert [text.count("<think>") for text, target in example if target] == [0, 1]
    assert "in 1 of them the template changes earlier answers" in said([CHAT], words, marked)
    assert said([{"messages": [USER, ANSWER]}], words, marked) == ""
    assert said([CHAT], vocabulary.read(family("marked"))) == ""


def test_answers_between_tool_calls_stay_as_they_were_written(family):
    words = vocabulary.read(family("qwen3"))
    called = {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALL]}
    told = {"role": "tool", "content": "4"}
    record = {"messages": [USER, called, told, ANSWER]}
    (example,), rendered = instruct.examples([instruct.read(Record("f:1", record))], words)
    assert [text for text, target in example if target] == [
        '<think>\nadd\n</think>\n\n<tool_call>\nadd{"a": 2}<|im_end|>\n',
        "<think>\n\n</think>\n\n4, of course.<|im_end|>\n",
    ]
    assert not rendered.remarks


def test_a_template_may_want_arguments_as_text(family):
    words = vocabulary.read(family("qwen3"))
    source = QWEN3.replace("call.function.arguments | tojson", "call.function.arguments")
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    want = tokens({"messages": [USER, called]}, words)
    assert source != QWEN3 and tokens({"messages": [USER, called]}, words, source) == want


def test_a_last_turn_that_does_not_continue_its_prompt_is_refused(family):
    cue = "<|im_start|>assistant\n<think>\n"  # as in templates of models that always think
    source = SMOLLM2.replace("<|im_start|>assistant\n", cue)
    with pytest.raises(ValueError, match="it does not render message 3 as the continuation of"):
        tokens(CHAT, vocabulary.read(family("smollm2")), source)


def test_a_message_that_the_template_leaves_out_is_refused(family):
    words = vocabulary.read(family("qwen3"))
    record = {"messages": [{"role": "narrator", "content": "Once upon"}, USER, ANSWER]}
    error = "^f:1: task.template: it leaves out message 0, of role 'narrator'"
    with pytest.raises(
        ValueError, match=error + r" \(the template is the base's; task.template=pl"
    ):
        tokens(record, words)
    with pytest.raises(ValueError, match=error + "$"):
        tokens(record, words, QWEN3)


# --------------------------------------------------------------------- which template, what starts


def test_the_bases_template_is_for_conversations(family, tmp_path):
    words = vocabulary.read(family("smollm2"))
    file = tmp_path / "x.jsonl"
    records = [CHAT, PAIR, {"messages": [USER, ANSWER]}, CHAT]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    build = lambda **more: tasks.build({"name": "instruct", "path": str(file), **more}, words, 300)
    task = build()
    assert "; 3 rendered with the base's chat template" in task.note
    starts = [words.decode(row[:9]) for row in task.train["tokens"]]
    assert starts[1].startswith("2 + 2 =") and starts[0] == starts[2] != starts[1]
    bare = words._replace(templates={})
    plain, without = (
        build(template="plain"),
        tasks.build({"name": "instruct", "path": str(file)}, bare, 300),
    )
    np.testing.assert_array_equal(plain.train["tokens"], without.train["tokens"])
    assert (
        "chat template" not in plain.note and words.decode(plain.train["tokens"][0][:5]) == "User:"
    )
    other = build(template=SMOLLM2)  # is for all forms
    assert "; 4 rendered with task.template" in other.note


def test_records_with_tools_take_the_template_for_them(family):
    words = vocabulary.read(family("smollm2"))
    tools = "{{ tools | tojson }}" + SMOLLM2
    words = words._replace(templates={"default": SMOLLM2, "tool_use": tools})
    ids, _ = tokens({**CHAT, "tools": [CALL]}, words)
    assert words.decode(ids).startswith('[{"function"') and tokens(CHAT, words)[0][0] != ids[0]
    only = words._replace(templates={"tool_use": tools})  # no default: as if it had none
    assert words.decode(tokens(CHAT, only)[0]).startswith("User:")


def test_a_text_starts_once(family):
    words = vocabulary.read(family("llama3"))
    start = words.start[0]
    assert tokens(CHAT, words)[0].count(start) == 1 and said([CHAT], words) == ""
    # a template that leaves it out, of a tokenizer that adds it
    bare = LLAMA3.replace("bos_token + content", "content")
    assert tokens(CHAT, words, bare) == tokens(CHAT, words)
    assert "in 1 of them the tokenizer puts <|bos|> in front" in said([CHAT], words, bare)
    # a tokenizer that doesn't add it, of a template that writes it
    assert tokens(CHAT, words._replace(start=())) == tokens(CHAT, words)


def test_an_end_that_the_template_does_not_write_is_said(family):
    words = vocabulary.read(family("smollm2"))
    other = words._replace(ends=(words.tokenizer.token_to_id("<|im_start|>"),))
    assert said([CHAT], words) == ""
    assert "in 1 of them answers are followed by <|im_start|>" in said([CHAT], other)


def test_a_developer_is_a_system_for_a_template_that_knows_none(family):
    words = vocabulary.read(family("smollm2"))
    developer = {"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]}
    system = {"messages": [SYSTEM, USER, ANSWER]}
    assert tokens(developer, words) == tokens(system, words)
    assert tokens(developer, words, "plain") == tokens(system, words, "plain")
    knows = "{# developer #}" + SMOLLM2
    assert "developer" in words.decode(tokens(developer, words, knows)[0])


def test_a_run_from_before_templates_were_used_is_continued_without():
    stored = {"task": {"name": "instruct", "template": None}}
    assert resume.worded_plainly(stored) == {"task.template": "plain"}
    assert stored["task"]["template"] == "plain"
    for task in (
        {"name": "instruct", "template": "x"},
        {"name": "e2e", "template": None},
        {"name": "instruct", "template": None, "columns": None},
    ):
        stored = {"task": copy.copy(task)}
        assert resume.worded_plainly(stored) == {} and stored["task"] == task


# ------------------------------------------------------------------------------------------- files


def test_named_templates_are_those_of_transformers(tmp_path, family):
    transformers, folder = require("transformers"), family("llama3")
    chat_files.write(folder, {"tool_use": "{{ tools }}"}, {})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    words = vocabulary.read(folder)
    assert words.templates == theirs.chat_template == {"default": LLAMA3, "tool_use": "{{ tools }}"}
    assert words.special == {k: str(v) for k, v in theirs.special_tokens_map.items()}
    theirs.save_pretrained(tmp_path)
    assert chat_files.templates(tmp_path) == words.templates
    assert chat_files.special_tokens(tmp_path) == words.special


def test_templates_and_special_tokens_of_older_files(tmp_path):
    stored = {"chat_template": "{{ 1 }}", "eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stored))
    assert chat_files.templates(tmp_path) == {"default": "{{ 1 }}"}
    assert chat_files.special_tokens(tmp_path) == {"eos_token": "</s>"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    stored = {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stored))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert chat_files.templates(tmp_path) == {"default": "a", "tool_use": "b"}
    assert chat_files.special_tokens(tmp_path) == {"bos_token": "<s>"}
    texts = {"default": "c", "rag": "d\n"}
    chat_files.write(tmp_path, texts, {})
    assert chat_files.templates(tmp_path) == {"tool_use": "b", **texts}
    chat_files.write(tmp_path / "new", texts, {"bos_token": "<s>"})
    assert chat_files.templates(tmp_path / "new") == texts
    assert chat_files.special_tokens(tmp_path / "new") == {"bos_token": "<s>"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chat_template": 3}', "tokenizer_config.json: chat_template: 3 given, must be a string"),
        ('{"chat_template": [{"name": "x"}]}', "chat_template: \\[{.*must be a string, or a list"),
        ('{"eos_token": ["</s>"]}', "tokenizer_config.json: eos_token: .* given, must be a string"),
        ("[]", "tokenizer_config.json: a JSON object is expected"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        chat_files.templates(tmp_path)
        chat_files.special_tokens(tmp_path)


def test_an_example_of_the_plain_form_is_as_it_was(family):
    words = vocabulary.read(family("smollm2"))
    (example,), _ = instruct.examples([instruct.read(Record("f:1", PAIR))], words)
    assert example == (("2 + 2 =", False), (" 4", True), (END, True))
