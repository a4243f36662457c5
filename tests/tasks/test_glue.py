"""GLUE's files give the rows that transformers' tokenizers give, and its scores."""

import math
import re

import numpy as np
import pytest
from support import data, require
from tokenizers import Tokenizer, processors

from lorax.tasks import glue, metrics, sentences
from lorax.vocabulary import Vocabulary


def load(config, vocabulary, seq_len):
    return glue.load(config).build(config, vocabulary, seq_len, None)


@pytest.fixture(scope="module")
def roberta() -> Vocabulary:
    """RoBERTa's tokenizer but for its ids: GPT-2's, with <s> a </s></s> b </s>."""
    file = data("models/gpt2-tokenizer/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    start, end, pad = (tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<pad>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", end), ("<s>", start), add_prefix_space=False
    )
    return Vocabulary(tokenizer, (start,), (end,), pad)


# -------------------------------------------------------------------------------------- files

TEXT = 'a "quoted\u2028 word \x85'  # an odd quote and line breaks that are none
TSV = {  # the published formats: (content, sentences, labels)
    "cola": (
        f"gj04\t1\t\t{TEXT}\r\ncj99\t0\t*\tAnd two.\r\n",
        [(TEXT,), ("And two.",)],
        [1, 0],
    ),
    "sst2": (
        f"sentence\tlabel\nit 's well-conceived \t1\n{TEXT}\t0\n",
        [("it 's well-conceived ",), (TEXT,)],
        [1, 0],
    ),
    "mrpc": (
        f"\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n0\t7\t8\tOne.\t{TEXT}\r\n"
        '1\t9\t4\t" Two .\tThree .\r\n',
        [("One.", TEXT), ('" Two .', "Three .")],
        [0, 1],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        f"8\t1\t2\tWho?\t{TEXT}\t0\n"
        # a question with a line break in it, and one that is missing
        '9\t3\t4\tWas he real?\t"\n\tWhat is the evidence?\t0\n'
        "3\t5\t6\t\tWhat?\t0\n"
        "4\t7\t8\tWhy?\tHow come?\t1\n",
        [("Who?", TEXT), ("Why?", "How come?")],
        [0, 1],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        f"0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\t{TEXT}\t4.75\n"
        "1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA man.\tA dog.\t0.000\n",
        [("A plane.", TEXT), ("A man.", "A dog.")],
        [4.75, 0],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        f"0\t3\t3n\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tA b.\t{TEXT}\tneutral\tneutral\n"
        "1\t4\t4c\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tC.\tD.\tneutral\tcontradiction\n"
        "2\t5\t5e\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tE.\tF.\tneutral\tentailment\n",
        [("A b.", TEXT), ("C.", "D."), ("E.", "F.")],
        [1, 2, 0],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n"
        f"0\tWhen?\t{TEXT}\tentailment\n1\tWho?\tIn May.\tnot_entailment\n",
        [("When?", TEXT), ("Who?", "In May.")],
        [0, 1],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n"
        f"0\tNo.\t{TEXT}\tnot_entailment\n1\tIt rained.\tIt was wet.\tentailment\n",
        [("No.", TEXT), ("It rained.", "It was wet.")],
        [1, 0],
    ),
}


def write(folder, subset, train=None, evaluation=None, files=None):
    """A task's folder; both sets are the table's unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    names = files or glue.SUBSETS[subset].files[0]
    for name, content in zip(names, (train, evaluation), strict=True):
        content = TSV[subset][0] if content is None else content
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("subset", glue.SUBSETS)
def test_published_format(subset, tmp_path):
    content, texts, labels = TSV[subset]
    left_out = 3 if subset == "qqp" else 0
    for whole in (content, content.removesuffix("\n")):
        (tmp_path / "train.tsv").write_bytes(whole.encode())
        found, classes, n = glue.examples(tmp_path / "train.tsv", subset)
        assert (found, classes.tolist(), n) == (texts, labels, left_out)
        assert classes.dtype == (np.float32 if subset == "stsb" else np.int32)


def test_every_task_has_metrics_and_a_format():
    assert set(glue.SUBSETS) == set(metrics.GLUE) == set(TSV)


@pytest.mark.parametrize(
    ("subset", "folder", "sizes", "ones", "first"),
    [
        ("cola", "CoLA", (7250, 1043), (5088, 721), "Our friends won't buy this analysis, let "),
        ("sst2", "SST-2", (60_614, 6735), (33_828, 3741), "when are bears bears and "),
    ],
)
def test_real_files(subset, folder, sizes, ones, first):
    path = data(f"glue/{folder}")
    for name, size, positive in zip(("train.tsv", "dev.tsv"), sizes, ones, strict=True):
        texts, labels, left_out = glue.examples(path / name, subset)
        assert (len(texts), int(labels.sum()), left_out) == (size, positive, 0)
        assert name != "train.tsv" or texts[0][0].startswith(first)
    assert glue._files(path, subset) == glue._files(path.parent, subset)


@pytest.mark.parametrize(
    ("subset", "content", "line", "message"),
    [
        ("cola", "", 1, "the line has 1 fields; expected 4, source, label, mark, sentence"),
        ("cola", "a\t1\t\tb\na\t1\tb\n", 2, "the line has 3 fields; expected 4, source, label"),
        ("cola", "a\t1\t\tb\na\t1\t\t\tb\n", 2, "the line has 5 fields; expected 4, source"),
        ("cola", "a\t1\t\tb\na\t1\t\t \n", 2, "field 'sentence' is empty; expected text"),
        ("cola", "a\t2\t\tb\n", 1, "field 'label' is '2'; expected one of 0, 1"),
        ("cola", b"a\t1\t\tb\na\t1\t\t\xe9\n", 2, "bad byte 0xe9; expected UTF-8"),
        ("sst2", "", 1, "the header is ''; expected the columns sentence, label"),
        ("sst2", "a\t1\n", 1, r"the header is 'a\t1'; expected the columns sentence, label"),
        ("sst2", "sentence\tlabel\n", 1, "no examples; expected one per line"),
        ("sst2", "sentence\tlabel\na\t1\n\nb\t0\n", 3, "the line has 1 fields; expected 2, sent"),
        ("mrpc", "Quality\t#1 String\n", 1, r"the header is 'Quality\t#1 String'; expected the"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tneutral\n", 2, "field 'label' is 'neutral'; "),
        (
            "mnli",
            "sentence1\tsentence2\tgold_label\na\tb\t-\n",
            2,
            "field 'gold_label' is '-'; exp",
        ),
        ("qqp", "question1\tquestion2\tis_duplicate\na\tb\tx\n", 2, "field 'is_duplicate' is 'x'"),
        ("qqp", "question1\tquestion2\tis_duplicate\na\tb\n", 2, "no examples; expected one per"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", 2, "field 'score' is '5.1'; expected"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", 2, "field 'score' is 'nan'; expected"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t\n", 2, "field 'score' is ''; expected a num"),
    ],
)
def test_bad_file_names_file_and_line(subset, content, line, message, tmp_path, bert):
    write(tmp_path, subset, evaluation=content)
    file = tmp_path / glue.SUBSETS[subset].files[0][1]
    with pytest.raises(ValueError, match="^" + re.escape(f"{file}:{line}: {message}")):
        load({"name": "glue", "path": str(tmp_path), "subset": subset}, bert, 16)


# --------------------------------------------------------------------------------------- rows


def texts_for(sentences):
    words = "The Mill is a cheap pub by the river with French food and a garden .".split()
    pick = np.random.default_rng(0).integers(1, len(words) + 1, (40, sentences))
    return [tuple(" ".join(words[:n]) for n in row) for row in pick]


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seq_len", [9, 64])
def test_rows_are_those_of_transformers(kind, n, seq_len, request):
    transformers, vocabulary = require("transformers"), request.getfixturevalue(kind)
    texts, labels = texts_for(n), np.arange(40, dtype=np.int32)
    rows, cut = sentences.encode(texts, labels, vocabulary, seq_len)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary.tokenizer.to_str()),
        pad_token=vocabulary.tokenizer.id_to_token(vocabulary.pad),
    )
    columns = [list(column) for column in zip(*texts, strict=True)]
    options = {"padding": "max_length", "max_length": seq_len, "return_token_type_ids": True}
    expected = theirs(*columns, truncation="longest_first", **options)
    keys = {"tokens": "input_ids", "segments": "attention_mask", "types": "token_type_ids"}
    for key, name in keys.items():
        assert rows[key].dtype == np.int32 and rows[key].shape == (40, seq_len)
        np.testing.assert_array_equal(rows[key], expected[name])
    assert rows["label"] is labels and set(rows) == {*keys, "label"}
    lengths = [len(ids) for ids in theirs(*columns)["input_ids"]]
    assert cut == sum(length > seq_len for length in lengths)
    assert (cut > 0) == (seq_len < 64)
    assert rows["types"].any() == (kind == "bert" and n == 2)
    assert vocabulary.tokenizer.truncation is None  # still as it was


def test_templates_are_those_of_the_models(roberta, bert):
    for vocabulary, expected, types in (
        (roberta, "<s> The Mill </s> </s> a garden </s> <pad> <pad>", "0000000000"),
        (bert, "[CLS] the mi ##ll [SEP] a garden [SEP] [PAD] [PAD]", "0000011100"),
    ):
        rows, _ = sentences.encode(
            [("The Mill", "a garden")], np.zeros(1, np.int32), vocabulary, 10
        )
        tokens = [vocabulary.tokenizer.id_to_token(i) for i in rows["tokens"][0]]
        assert " ".join(tokens).replace("Ġ", "") == expected
        assert "".join(map(str, rows["types"][0])) == types
        assert rows["segments"][0].tolist() == [1] * 8 + [0] * 2


def test_many_rows_are_encoded_in_parts(bert):
    texts = [("pub " * (i % 7 + 1),) for i in range(10_003)]
    rows, _ = sentences.encode(texts, np.zeros(10_003, np.int32), bert, 16)
    expected, _ = sentences.encode(texts[:7], np.zeros(7, np.int32), bert, 16)
    for key in ("tokens", "segments", "types"):
        np.testing.assert_array_equal(rows[key], expected[key][np.arange(10_003) % 7])


@pytest.mark.parametrize("template", [None, "$A </s>"])
def test_tokenizer_without_a_first_token(template, tokenizer, vocabulary):
    copy = Tokenizer.from_str(tokenizer.to_str())
    if template:  # T5's
        copy.add_special_tokens(["</s>"])
        copy.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("</s>", copy.token_to_id("</s>"))]
        )
    with pytest.raises(ValueError, match=r"^tokenizer: it puts no special token in front of a te"):
        sentences.encode([("a b",)], np.zeros(1), vocabulary._replace(tokenizer=copy), 16)


def test_too_short_for_a_token_of_each_sentence(roberta):
    labels = np.zeros(1, np.int32)
    for texts, least, special in (([("a b",)], 3, 2), ([("a b", "c d e")], 6, 4)):
        rows, cut = sentences.encode(texts, labels, roberta, least)
        assert rows["segments"].all() and cut == 1
        message = (
            rf"^train\.seq_len: {least - 1} was given; it must be at least {least}: {special} spec"
        )
        with pytest.raises(ValueError, match=message):
            sentences.encode(texts, labels, roberta, least - 1)


# ------------------------------------------------------------------------------------ the task


@pytest.mark.parametrize("subset", glue.SUBSETS)
def test_load(subset, bert, tmp_path):
    spec, (_, texts, labels) = glue.SUBSETS[subset], TSV[subset]
    write(tmp_path / "GLUE" / spec.folder, subset)
    (tmp_path / "GLUE" / "other").mkdir()
    config = {"name": "glue", "path": str(tmp_path / "GLUE"), "n_train": 1, "seed": 0}
    task = load(config | {"subset": spec.folder}, bert, 64)
    inner = config | {"path": str(tmp_path / "GLUE" / spec.folder), "subset": subset}
    again = load(inner, bert, 64)
    expected, _ = sentences.encode(texts, np.array(labels), bert, 64)
    for key, value in expected.items():
        np.testing.assert_array_equal(task.eval[key], value)
        np.testing.assert_array_equal(task.train[key], value[:1])
        np.testing.assert_array_equal(again.eval[key], value)
    broken = " (3 broken lines left out)" if subset == "qqp" else ""
    assert task.name == "glue" and task.note == again.note == (
        f"{spec.folder}, 1 train examples of train.tsv{broken}, {len(texts)} eval examples of "
        f"{spec.files[0][1]}{broken}"
    )
    assert task.outputs == {"mnli": 3, "stsb": 1}.get(subset, 2) and task.prompts == ()
    right = np.eye(3)[labels][:, : task.outputs] if spec.labels else np.array(labels)[:, None]
    assert task.scores(right, task.eval["label"]) == pytest.approx(
        dict.fromkeys(metrics.GLUE[subset], 1.0)
    )
    note = load(inner, bert, 6).note
    assert re.search(r"1 train examples of train\.tsv \(.*1 cut at 6 tokens\), ", note)


def test_mrpc_as_microsoft_publishes_it(bert, tmp_path):
    config = {"name": "glue", "path": str(tmp_path), "subset": "mrpc"}
    one_more = TSV["mrpc"][0] + "1\t9\t4\tFour.\tFive.\r\n"
    write(tmp_path, "mrpc", one_more, files=glue.MRPC[1])
    note = load(config, bert, 64).note
    assert note == (
        "MRPC, 3 train examples of msr_paraphrase_train.txt, 2 eval examples of "
        "msr_paraphrase_test.txt"
    )
    write(tmp_path, "mrpc")  # GLUE's own split counts, where it is
    assert "2 train examples of train.tsv" in load(config, bert, 64).note


def test_real_cola(roberta):
    config = {"name": "glue", "path": str(data("glue")), "subset": "CoLA", "n_train": 500}
    task = load(config, roberta, 24)
    assert task.train["tokens"].shape == (500, 24) and task.eval["tokens"].shape == (1043, 24)
    assert re.fullmatch(
        r"CoLA, 500 train examples of train\.tsv \(\d+ cut at 24 tokens\), 1,043 eval examples of "
        r"dev\.tsv \(\d+ cut at 24 tokens\)",
        task.note,
    )
    ids = task.eval["tokens"][0][task.eval["segments"][0] == 1]
    assert roberta.decode(ids) == "The sailors rode the breeze clear of the rocks."
    majority = np.tile([0.0, 1.0], (1043, 1))
    assert task.scores(majority, task.eval["label"]) == {"matthews": 0.0}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"subset": None},
            ValueError,
            r"task\.subset: task 'glue' needs one of cola, sst2, .*none",
        ),
        ({"subset": "sts"}, ValueError, r"task\.subset: 'sts' was given; .* did you mean 'stsb'\?"),
        ({"path": None}, ValueError, r"task\.path: task 'glue' needs GLUE's folder 'CoLA' with tr"),
        (
            {"path": "/none"},
            FileNotFoundError,
            r"task\.path: '/none' does not exist; expected GLUE",
        ),
        (
            {"subset": "mnli"},
            FileNotFoundError,
            r"task\.path: .* has no train\.tsv and dev_matched",
        ),
        (
            {"n_train": 3},
            ValueError,
            r"task\.n_train: 3 was given; the train set ha",
        ),
    ],
)
def test_bad_settings(fields, error, message, bert, tmp_path):
    write(tmp_path, "cola")
    config = {"name": "glue", "path": str(tmp_path), "subset": "cola"} | fields
    with pytest.raises(error, match="^" + message):
        load(config, bert, 16)
    with pytest.raises(FileNotFoundError, match=r"train\.tsv' has no train\.tsv and dev\.tsv; exp"):
        load(config | {"path": str(tmp_path / "train.tsv"), "subset": "cola"}, bert, 16)


# ------------------------------------------------------------------------------------- scores


def test_report_takes_the_largest_score():
    labels = np.array([0, 1, 1, 0])
    logits = np.array([[0.2, 0.1], [-3.0, -2.0], [1.0, 0.0], [5.0, -5.0]], np.float32)
    assert glue.report("MRPC", logits, labels) == metrics.glue("mrpc", [0, 1, 0, 0], labels)
    three = np.array([[0.0, 1, 2], [2, 1, 0], [0, 2, 1], [9, 0, 0]])
    assert glue.report("mnli", three, np.array([2, 0, 1, 1])) == {"accuracy": 0.75}
    scores = np.array([[1.0], [4.0], [3.0], [2.0]])
    truth = np.array([0.0, 5, 2, 3], np.float32)
    assert glue.report("sts-b", scores, truth) == metrics.glue("stsb", scores[:, 0], truth)


@pytest.mark.parametrize("subset", glue.SUBSETS)
def test_report_of_a_diverged_or_misshapen_model(subset):
    k = glue.outputs(subset)
    for wrong in (np.nan, np.inf):
        scores = np.zeros((3, k), np.float32)
        scores[1, 0] = wrong
        values = glue.report(subset, scores, np.array([0, 1, 1]))
        assert list(values) == list(metrics.GLUE[subset])
        assert all(math.isnan(value) for value in values.values())
    for shape in ((3,), (3, k + 1)):
        with pytest.raises(ValueError, match=rf"^scores: shape .* needs \(N, {k}\)$"):
            glue.report(subset, np.zeros(shape), np.zeros(3, int))
