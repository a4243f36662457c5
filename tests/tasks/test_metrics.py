"""Scores are those of the E2E challenge's scorer, of sacrebleu, of NLTK and of the formulas."""

import csv
import io
import math
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from support import data, require

from lorax.tasks import metrics

# ------------------------------------------------------------------------------ predictions


def test_classes_by_the_definitions():
    labels = np.random.default_rng(0).integers(0, 2, 60)
    predictions = np.where(np.arange(60) % 3 == 0, 1 - labels, labels)  # two thirds are right
    predictions[:9] = 1
    both, either = (predictions & labels).sum(), (predictions | labels).sum()
    right = both + len(labels) - either
    assert metrics.accuracy(predictions, labels) == pytest.approx(right / 60, abs=1e-12)
    assert metrics.f1(predictions, labels) == pytest.approx(2 * both / (both + either), abs=1e-12)
    phi = np.corrcoef(predictions, labels)[0, 1]  # what Matthews' is, for two classes
    assert metrics.matthews(predictions, labels) == pytest.approx(phi, abs=1e-12)
    assert 0.1 < phi < 0.9


def test_reals_by_the_definitions():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 40).astype(np.float32)  # with ties
    predictions = labels + rng.normal(0, 1, 40).astype(np.float32)
    rank = lambda x: (x[:, None] > x[None, :]).sum(1) + ((x[:, None] == x[None, :]).sum(1) - 1) / 2
    for metric, expected in (
        (metrics.pearson, np.corrcoef(predictions, labels)[0, 1]),
        (metrics.spearman, np.corrcoef(rank(predictions), rank(labels))[0, 1]),
    ):
        assert 0.5 < expected < 0.95
        assert metric(predictions, labels) == pytest.approx(expected, abs=1e-6)
    assert metrics.spearman(np.exp(predictions), labels) == metrics.spearman(predictions, labels)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_constants_do_not_correlate(name):
    labels = np.array([0, 1, 1, 0, 1])
    constants = [np.zeros(5, int), np.ones(5, int)]
    if name != "matthews":
        rounded = np.cumsum(np.full(5, 0.1)) / np.arange(1, 6)
        assert np.ptp(rounded) > 0
        constants += [np.full(5, -0.1, np.float32), rounded]
    for constant in constants:
        scores = metrics.METRICS[name](constant, labels), metrics.METRICS[name](labels, constant)
        assert scores == (0.0, 0.0) and type(scores[0]) is float


def test_glue_gives_each_task_its_own_metrics():
    predictions, labels = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    assert {name: metrics.glue(name, predictions, labels) for name in metrics.GLUE} == {
        **dict.fromkeys(("sst2", "mnli", "qnli", "rte"), {"accuracy": 0.75}),
        **dict.fromkeys(("mrpc", "qqp"), {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}),
        "cola": {"matthews": pytest.approx(1 / math.sqrt(3))},
        "stsb": dict.fromkeys(("pearson", "spearman"), pytest.approx(1 / math.sqrt(3))),
    }
    assert metrics.glue("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert metrics.glue("mrpc", [0, 0], [0, 1]) == {"accuracy": 0.5, "f1": 0.0}


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1], [1, 0]), ([[1]], [[1]])])
def test_predictions_must_match_labels(name, predictions, labels):
    with pytest.raises(ValueError, match=r"^predictions \(.*\) and labels \(.*\) were given; a "):
        metrics.METRICS[name](predictions, labels)


# ---------------------------------------------------------------------------- generated text


@pytest.fixture(scope="module")
def e2e() -> dict[str, list[str]]:
    """Meaning representation -> texts, of the E2E test set."""
    with zipfile.ZipFile(data("e2e/e2e-dataset.zip")) as archive:
        content = archive.read("e2e-dataset/testset_w_refs.csv").decode()
    groups = {}
    for row in csv.DictReader(io.StringIO(content, newline="")):
        groups.setdefault(row["mr"], []).append(row["ref"])
    assert len(groups) == 630
    return groups


@pytest.mark.parametrize(
    ("system", "bleu", "nist"), [("human", 0.6046, 8.899), ("copy", 0.0694, 2.851)]
)
def test_scores_are_those_of_the_e2e_scorer(e2e, system, bleu, nist):
    require("sacrebleu")
    if system == "human":  # the first text against the others
        groups = [texts for texts in e2e.values() if len(texts) > 1]
        assert len(groups) == 616
        hypotheses, references = [g[0] for g in groups], [g[1:] for g in groups]
    else:
        hypotheses, references = list(e2e), list(e2e.values())
    assert metrics.bleu(hypotheses, references) == pytest.approx(bleu, abs=5e-5)
    assert metrics.nist(hypotheses, references) == pytest.approx(nist, abs=5e-4)


STRANGE = [
    'Don\'t! 1,000.5 e.g. a-b 5-star £20... "q" &amp; x&lt;y <b> ~{}|^_`@:;/[]\\ 3.,4 ,a .5 5. É—ß',
    "a\nb-\nc",
    "a....b, 1.,2 1,.2 .",
    "1-2-3 - -- \ttab\u00a0b\u2028c",
]


def test_words_are_those_of_mteval(e2e):
    require("sacrebleu")
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    theirs = Tokenizer13a()
    for text in [*e2e, *(texts[-1] for texts in e2e.values()), *STRANGE]:
        assert metrics._words(text) == theirs(text.lower()).split()


def test_nist_of_one_reference_is_that_of_nltk(e2e):
    theirs = require("nltk.translate.nist_score").corpus_nist
    texts = [texts[0] for texts in e2e.values()][:100]
    references = [[text] for text in texts[1:] + texts[:1]]
    split = [[metrics._words(text) for text in refs] for refs in references]
    for keep in (1000, 60):  # the second is too short
        hypotheses = [text[:keep] for text in texts]
        expected = theirs(split, [metrics._words(text) for text in hypotheses], 5)
        assert expected > 1
        assert metrics.nist(hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_nist_by_hand():
    hypotheses, references = ["a c", "A B"], [["a b", "a c"], ["a b"]]
    # of the 6 words in the references 3 are a, 2 are b, 1 is c; a is followed twice by b, once by c
    one = 2 * math.log2(6 / 3) + math.log2(6 / 1) + math.log2(6 / 2)
    two = math.log2(3 / 1) + math.log2(3 / 2)
    assert metrics.nist(hypotheses, references, n=1) == pytest.approx(one / 4, abs=1e-12)
    assert metrics.nist(hypotheses, references) == pytest.approx(one / 4 + two / 2, abs=1e-12)
    # a word that comes once in the reference matches once
    assert metrics.nist(["a a"], [["a b"]], n=1) == pytest.approx(1 / 2, abs=1e-12)
    # 2/3 of the length halves the score; the length is the mean of the references'
    assert metrics.nist(["a b"], [["a b c"]], n=1) == pytest.approx(math.log2(3) / 2, abs=1e-12)
    assert metrics.nist(["a b"], [["a b c", "d"]], n=1) == pytest.approx(2, abs=1e-12)


def test_text_against_itself_and_against_nothing():
    require("sacrebleu"), require("rouge_score")
    texts = ["The Mill is a cheap pub.", "It serves French food by the river, at £20."]
    other = ["zzz"]
    same = metrics.text_scores([text.upper() for text in texts], [[*other, text] for text in texts])
    assert {k: v for k, v in same.items() if k in ("bleu", "rouge1", "rouge2", "rougeL")} == (
        pytest.approx(dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL"), 1.0), abs=1e-12)
    )
    for hypotheses in (["", ""], ["qqq", ""]):
        scores = metrics.text_scores(hypotheses, [[text] for text in texts])
        assert set(scores) == set(same) and not any(scores.values())
    half = metrics.text_scores([texts[0], ""], [[texts[0]], [texts[1]]])
    assert half["rougeL"] == 0.5 and 0 < half["bleu"] < 1  # the empty one costs brevity


def test_bleu_takes_the_closest_length_and_does_not_smooth():
    require("sacrebleu")
    words = "a b c d e f".split()
    text = " ".join(words)
    longer = [" ".join([*words, "g"]), " ".join([*words, *"ghijk"])]
    assert metrics.bleu([text], [longer]) == pytest.approx(math.exp(1 - 7 / 6), abs=1e-12)
    assert metrics.bleu([text], [[*longer, " ".join(words[:5])]]) == pytest.approx(1, abs=1e-12)
    assert metrics.bleu(["a b c x d e f"], [[text]]) == 0.0  # no 4-gram


def test_rouge_by_hand():
    require("rouge_score")
    scores = metrics.rouge(
        ["The cat sat.", "one"], [["a cat sat there", "sat the cat"], ["two", "three"]]
    )
    # all words of the second reference, one of its two pairs ("the cat"), two of three in order
    expected = {"rouge1": 1.0, "rouge2": 0.5, "rougeL": 2 / 3}
    assert scores == pytest.approx({k: v / 2 for k, v in expected.items()}, abs=1e-12)


def test_meteor_by_hand(monkeypatch):
    corpus = require("nltk").corpus
    require("nltk.translate.meteor_score")
    wordnet = SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: [])
    monkeypatch.setattr(corpus, "wordnet", wordnet)  # without synonyms
    references = [["Two dogs lay.", "The cats sat down"], ["nothing at all"]]
    # four matches in one chunk, one of them of stems
    expected = 1 - 0.5 * (1 / 4) ** 3
    assert metrics.meteor(["the cat sat down", ""], references) == pytest.approx(
        expected / 2, abs=1e-12
    )
    assert metrics.text_scores(["x", "y"], references)["meteor"] == 0.0


@pytest.mark.parametrize(
    ("name", "module", "keys"),
    [
        ("bleu", "sacrebleu", {"bleu"}),
        ("rouge", "rouge_score.rouge_scorer", {"rouge1", "rouge2", "rougeL"}),
        ("meteor", "nltk.translate.meteor_score", {"meteor"}),
    ],
)
def test_missing_library_is_named_and_its_scores_left_out(name, module, keys, monkeypatch):
    there = set(metrics.text_scores(["a b"], [["a b"]]))
    assert "nist" in there  # needs no library
    monkeypatch.setitem(sys.modules, module, None)
    library = module.partition(".")[0]
    message = rf'^{name}: needs {library} \(.*\); pip install -e "\.\[eval\]"$'
    with pytest.raises(ImportError, match=message):
        getattr(metrics, name)(["a b"], [["a b"]])
    assert set(metrics.text_scores(["a b"], [["a b"]])) == there - keys


def test_missing_wordnet_is_named(monkeypatch):
    corpus = require("nltk").corpus
    require("nltk.translate.meteor_score")

    def missing():
        raise LookupError("Resource wordnet not found")

    monkeypatch.setattr(corpus, "wordnet", SimpleNamespace(ensure_loaded=missing))
    message = "^meteor: NLTK's WordNet data is not installed; python -m nltk.downloader wordnet$"
    with pytest.raises(ImportError, match=message):
        metrics.meteor(["a"], [["a"]])
    assert "meteor" not in metrics.text_scores(["a"], [["a"]])


@pytest.mark.parametrize("name", ["bleu", "nist", "rouge", "meteor", "text_scores"])
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "hypotheses: none was given"),
        (["a"], [], "references: 0 lists were given for 1 hypotheses"),
        (["a"], [["a"], ["b"]], "references: 2 lists were given for 1 hypotheses"),
        ("a", [["a"]], "hypotheses: one text was given; expected a list"),
        (["a"], "a", "references: one text was given; expected a list"),
        (["a", "b"], [["a"], "b"], r"references\[1\]: 'b' was given; expected a list of one or"),
        (["a", "b"], [["a"], []], r"references\[1\]: \[\] was given"),
        (["a"], [["a", " \n"]], r"references\[0\]: \['a', ' \\n'\] was given"),
    ],
)
def test_bad_texts(name, hypotheses, references, message):
    with pytest.raises(ValueError, match="^" + message):
        getattr(metrics, name)(hypotheses, references)


def test_perplexity():
    assert metrics.perplexity(math.log(50)) == pytest.approx(50, rel=1e-12)
    assert metrics.perplexity(np.float32(0)) == 1.0
    assert metrics.perplexity(1e4) == math.inf and math.isnan(metrics.perplexity(math.nan))
