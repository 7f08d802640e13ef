"""GLUE's own metrics, those of the E2E challenge that kept libraries give, accuracy and loss; shares times 100."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Metric = Literal["accuracy", "accuracy_f1", "matthews", "pearson_spearman", "bleu", "loss"]
#: What a metric is called in a table, and whether more of it is better.
TITLES: dict[Metric, str] = {
    "accuracy": "accuracy",
    "accuracy_f1": "mean of accuracy and F1",
    "matthews": "Matthews correlation",
    "pearson_spearman": "mean of Pearson and Spearman",
    "bleu": "BLEU",
    "loss": "loss per token, nats",
}
Scores = dict[str, float]


def lower_is_better(metric: str) -> bool:
    """Whether it is a loss."""
    return metric == "loss"


def score_labels(metric: Metric, found: Sequence[str | float], expected: Sequence[str | float]) -> Scores:
    """A metric, under its own name, and what it is the mean of."""
    scores = _LABEL_SCORES[metric](found, expected)
    return {metric: sum(scores.values()) / len(scores)} | scores


def _accuracy(found: Sequence[str | float], expected: Sequence[str | float]) -> Scores:
    from sklearn.metrics import accuracy_score

    return {"accuracy": 100 * float(accuracy_score(expected, found))}


def _accuracy_f1(found: Sequence[str | float], expected: Sequence[str | float]) -> Scores:
    from sklearn.metrics import f1_score

    f1 = f1_score(expected, found, pos_label="1", zero_division=0.0)
    return _accuracy(found, expected) | {"f1": 100 * float(f1)}


def _matthews(found: Sequence[str | float], expected: Sequence[str | float]) -> Scores:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": 100 * float(matthews_corrcoef(expected, found))}


def _pearson_spearman(found: Sequence[str | float], expected: Sequence[str | float]) -> Scores:
    from scipy.stats import pearsonr, spearmanr

    if len(set(found)) < 2:  # a constant correlates with nothing
        return {"pearson": 0.0, "spearman": 0.0}
    pearson, spearman = pearsonr(found, expected).statistic, spearmanr(found, expected).statistic
    return {"pearson": 100 * float(pearson), "spearman": 100 * float(spearman)}


_LABEL_SCORES: Mapping[str, Callable[[Sequence[str | float], Sequence[str | float]], Scores]] = {
    "accuracy": _accuracy,
    "accuracy_f1": _accuracy_f1,
    "matthews": _matthews,
    "pearson_spearman": _pearson_spearman,
}


def score_texts(found: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """BLEU (sacrebleu), ROUGE-L (rouge-score, best reference) and NIST (nltk), each text against all of its references.

    NIST is no share; its words are those of sacrebleu's tokenizer.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    # sacrebleu wants as many references of each; None is none.
    columns: Any = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    rouge = RougeScorer(["rougeL"])
    best = [
        max(rouge.score(reference, text)["rougeL"].fmeasure for reference in each)
        for text, each in zip(found, references, strict=True)
    ]
    return {
        "bleu": BLEU().corpus_score(found, columns).score,
        "rouge_l": 100 * math.fsum(best) / len(best),
        "nist": _nist(found, references),
    }


def _nist(found: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words: Any = Tokenizer13a()  # has no types
    try:
        return float(
            corpus_nist(
                [[words(one).split() for one in each] for each in references], [words(t).split() for t in found]
            )
        )
    except ZeroDivisionError:  # no text is as long as the longest phrases that it counts
        return 0.0
