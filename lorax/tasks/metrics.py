"""Scores of predictions (GLUE's) and of generated text (the E2E challenge's).

Pure functions of Python and NumPy values. Sources: GLUE, Wang et al. 2018 (arXiv:1804.07461),
table 1; BLEU, Papineni et al. 2002; NIST, Doddington 2002; ROUGE, Lin 2004; METEOR, Lavie and
Agarwal 2007; the E2E challenge, Dusek et al. 2019 (arXiv:1901.07931). Libraries are imported
where they are used: that takes seconds, and most programs compute no scores.
"""

import functools
import importlib
import itertools
import math
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

# ------------------------------------------------------------------------------ predictions


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions (N,) that equal the labels (N,)."""
    predictions, labels = _aligned(predictions, labels)
    return float(np.mean(predictions == labels))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1, both (N,) of 0 and 1. 0.0 if there are no predicted or no actual positives."""
    from sklearn.metrics import f1_score

    predictions, labels = _aligned(predictions, labels)
    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of two (N,) of classes. 0.0 if one of the two is constant."""
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _aligned(predictions, labels)
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson correlation of two (N,) of reals. 0.0 if one is constant (to rounding)."""
    from scipy.stats import pearsonr

    predictions, labels = _aligned(predictions, labels)
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman rank correlation of two (N,) of reals. 0.0 if one is constant (to rounding)."""
    from scipy.stats import spearmanr

    predictions, labels = _aligned(predictions, labels)
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(spearmanr(predictions, labels).statistic)


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}

# task -> the metrics that the benchmark reports
GLUE = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
}


def glue(subset: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """{name: value} of the metrics of one of GLUE's tasks, a key of `GLUE`; none in percent.

    predictions, labels: (N,) classes, or (N,) reals for "stsb". Raises ValueError for arrays that
    are empty or of other shapes.
    """
    return {name: METRICS[name](predictions, labels) for name in GLUE[subset]}


def _aligned(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"predictions {predictions.shape} and labels {labels.shape} were given; a score needs "
            "two arrays (N,) of the same N, at least 1"
        )
    return predictions, labels


def _constant(x: np.ndarray) -> bool:
    # up to rounding errors, which have no meaningful correlation
    x = x.astype(np.float64)
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max())


# ---------------------------------------------------------------------------- generated text
#
# hypotheses: N texts, "" allowed. references: N lists of one or more texts, none of them blank.

Texts = Sequence[str]


def perplexity(nats: float) -> float:
    """exp of a mean cross-entropy in nats per token; inf on overflow."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def bleu(hypotheses: Texts, references: Sequence[Texts]) -> float:
    """Corpus BLEU-4 in [0, 1], like the scorer of the E2E challenge (mteval-v13a).

    Case-insensitive, mteval-v13a tokens, the length of the closest reference (the shorter one of
    two equally close), no smoothing: 0.0 if no 4-gram matches. Computed by sacrebleu, which is
    case-sensitive by default. Raises ValueError for invalid texts, ImportError without sacrebleu.
    """
    _check(hypotheses, references)
    sacrebleu = _library("sacrebleu", "bleu")
    scorer = sacrebleu.BLEU(tokenize="13a", lowercase=True, smooth_method="none", force=True)
    streams = [
        list(stream) for stream in itertools.zip_longest(*references)
    ]  # None pads shorter lists
    return scorer.corpus_score(list(hypotheses), streams).score / 100


def nist(hypotheses: Texts, references: Sequence[Texts], n: int = 5) -> float:
    """Corpus NIST (Doddington 2002), like the E2E challenge's scorer; >= 0.

        info(w_1 .. w_k) = log2(count(w_1 .. w_k-1) / count(w_1 .. w_k)), over all references
        NIST = sum_k (info of the matched k-grams / number of k-grams in the hypotheses)
               * exp(beta ln^2 min(1, L_hyp / L_ref)), k = 1 .. n, beta such that the factor is 1/2
               at L_hyp / L_ref = 2/3

    An n-gram matches at most as often as it occurs in any one reference; L_ref sums the mean
    lengths of each hypothesis' references. Tokens and case as in `bleu`. Raises ValueError for
    bad texts.
    """
    _check(hypotheses, references)
    hypothesis_ngrams = [_ngrams(text, n) for text in hypotheses]
    wanted = [[_ngrams(text, n) for text in texts] for texts in references]
    counts: Counter = Counter()
    for reference in itertools.chain.from_iterable(wanted):
        counts.update(reference)
    info, total = np.zeros(n + 1), np.zeros(n + 1)  # by order, 0 to n
    for grams, texts in zip(hypothesis_ngrams, wanted, strict=True):
        for gram, matches in (grams & functools.reduce(operator.or_, texts)).items():
            info[len(gram)] += matches * math.log2(counts[gram[:-1]] / counts[gram])
        for gram, times in grams.items():
            total[len(gram)] += times
    if total[0] == 0:
        return 0.0
    length = sum(sum(text[()] for text in texts) / len(texts) for texts in wanted)
    beta = math.log(1 / 2) / math.log(2 / 3) ** 2
    penalty = math.exp(beta * math.log(min(1.0, total[0] / length)) ** 2)
    return penalty * float(np.sum(info[1:] / np.maximum(total[1:], 1)))


def rouge(hypotheses: Texts, references: Sequence[Texts]) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: mean F1 in [0, 1] of each hypothesis with its best reference.

    The rouge-score package, no stemming; its words are runs of a-z and 0-9. (The E2E challenge's
    own ROUGE-L differs: F with beta = 1.2, of the best precision and the best recall, which may
    come from different references, and other tokens.) Raises ValueError for bad texts,
    ImportError where rouge-score is missing.
    """
    _check(hypotheses, references)
    names = ("rouge1", "rouge2", "rougeL")
    scorer = _library("rouge_score.rouge_scorer", "rouge").RougeScorer(names)
    scores = [
        scorer.score_multi(list(texts), text)
        for text, texts in zip(hypotheses, references, strict=True)
    ]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def meteor(hypotheses: Texts, references: Sequence[Texts]) -> float:
    """Mean METEOR in [0, 1] of each hypothesis' best reference: exact, stem and WordNet matches.

    NLTK's version, the METEOR of 2007, on the tokens of `bleu`; the scorer of the E2E challenge
    uses METEOR 1.5 with paraphrases, so the two are not comparable. Raises ValueError for bad
    texts, ImportError where NLTK or its WordNet is missing.
    """
    _check(hypotheses, references)
    score = _library("nltk.translate.meteor_score", "meteor").meteor_score
    wordnet = _library("nltk.corpus", "meteor").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise ImportError(
            "meteor: NLTK's WordNet data is not installed; python -m nltk.downloader wordnet"
        ) from None
    scores = [
        score([_words(reference) for reference in texts], _words(text), wordnet=wordnet)
        for text, texts in zip(hypotheses, references, strict=True)
    ]
    return float(np.mean(scores))


def text_scores(
    hypotheses: Texts, references: Sequence[Texts], say: Callable[[str], object] = lambda line: None
) -> dict[str, float]:
    """{"bleu", "nist", "rouge1", "rouge2", "rougeL", "meteor"} from the functions above.

    Those whose library is not installed are left out, with a message through say(line); "nist"
    needs none.
    Raises ValueError for bad texts.
    """
    scores = {}
    for metric in (bleu, nist, rouge, meteor):
        try:
            score = metric(hypotheses, references)
        except ImportError as error:
            say(f"without {error}")
            continue
        scores |= score if isinstance(score, dict) else {metric.__name__: score}
    return scores


SYMBOLS = re.compile(
    "([" + re.escape("".join(sorted(set(string.punctuation) - set("',-.")))) + "])"
)
REPLACED = {"-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


def _words(text: str) -> list[str]:
    """Lower-case tokens of a text as mteval-v13a's `NormalizeText` splits them."""
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    text = SYMBOLS.sub(r" \1 ", f" {text.lower()} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a full stop, but not a decimal point
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def _ngrams(text: str, n: int) -> Counter:
    """Counts of a text's n-grams of order 0 to n; the empty one occurs once per word."""
    words = _words(text)
    return Counter(
        tuple(words[i : i + k])
        for i in range(len(words))
        for k in range(n + 1)
        if i + k <= len(words)
    )


def _check(hypotheses, references) -> None:
    for name, value in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(value, str):
            raise ValueError(f"{name}: one text was given; expected a list of them")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"references: {len(references)} lists were given for {len(hypotheses)} hypotheses; "
            "expected one list for each"
        )
    if not len(hypotheses):
        raise ValueError("hypotheses: none was given; a score needs at least one")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts) or not all(text.strip() for text in texts):
            raise ValueError(
                f"references[{i}]: {texts!r} was given; expected a list of one or more texts, "
                "none of them blank"
            )


def _library(module: str, metric: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{metric}: needs {module.partition(".")[0]} ({error}); pip install -e ".[eval]"'
        ) from None
