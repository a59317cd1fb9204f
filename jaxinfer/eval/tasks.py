"""Tasks with a right answer: HellaSwag (1905.07830) and LAMBADA (1606.06031), scored as lm-evaluation-harness does."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from jaxinfer.errors import InputError
from jaxinfer.eval.data import field
from jaxinfer.eval.journal import Journal
from jaxinfer.eval.scoring import Pair, Score, score_items
from jaxinfer.generation import tokenizer_of
from jaxinfer.program import Program
from jaxinfer.text.tokenizer import Tokenizer

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task measured over `n` items; `stderr` has the standard error of every metric."""

    task: str
    n: int
    metrics: dict[str, float]
    stderr: dict[str, float]
    tokens_computed: int  # that went through the model now; the rest was in the journal


def hellaswag(
    program: Program,
    rows: Sequence[Row],
    limit: int | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
    journal: Journal | None = None,
) -> Result:
    """Choose the ending of a scene: `acc` by log-likelihood, `acc_norm` by log-likelihood a byte of the ending."""
    questions = [_of_row(i, hellaswag_question, row) for i, row in enumerate(rows[:limit])]
    tokenizer = tokenizer_of(program)

    def judge(i: int, scores: list[Score]) -> Row:
        _, endings, label = questions[i]
        logprobs = [score.logprob for score in scores]
        a_byte = [p / len(ending.encode()) for p, ending in zip(logprobs, endings, strict=True)]
        right = {key: values.index(max(values)) == label for key, values in (("acc", logprobs), ("acc_norm", a_byte))}
        return {**right, "label": label, "logprobs": logprobs}

    items = [[encode_pair(tokenizer, ctx, " " + ending) for ending in endings] for ctx, endings, _ in questions]
    records, computed = score_items(program, items, judge, batch_size=batch_size, progress=progress, journal=journal)
    means = {key: _mean([float(record[key]) for record in records]) for key in ("acc", "acc_norm")}
    metrics, stderr = ({key: pair[k] for key, pair in means.items()} for k in (0, 1))
    return Result("hellaswag", len(records), metrics, stderr, computed)


def lambada(
    program: Program,
    rows: Sequence[Row],
    limit: int | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
    journal: Journal | None = None,
) -> Result:
    """Tell the last word of a passage: `acc` is how often greedy decoding says it, `perplexity` is the word's."""
    questions = [_of_row(i, lambada_question, row) for i, row in enumerate(rows[:limit])]
    tokenizer = tokenizer_of(program)
    records, computed = score_items(
        program,
        [[encode_pair(tokenizer, context, " " + word)] for context, word in questions],
        lambda _, scores: {"acc": scores[0].greedy, "logprob": scores[0].logprob},
        batch_size=batch_size,
        progress=progress,
        journal=journal,
    )
    acc, acc_error = _mean([float(record["acc"]) for record in records])
    nats, nats_error = _mean([-record["logprob"] for record in records])
    value = math.exp(nats) if nats < 700 else math.inf
    return Result(
        "lambada",
        len(records),
        {"acc": acc, "perplexity": value},
        {"acc": acc_error, "perplexity": value * nats_error},  # to first order
        computed,
    )


def hellaswag_question(row: Row) -> tuple[str, list[str], int]:
    """Return the context, the endings and the index of the right one.

    A row is the published one (`activity_label`, `ctx_a`, `ctx_b`) or has its context already written in `ctx`.
    """
    if "ctx_a" in row:
        label, a, b = (field(row, key, str, "a string") for key in ("activity_label", "ctx_a", "ctx_b"))
        context = f"{label}: {a} {b.capitalize()}"
    else:
        context = field(row, "ctx", str, "a string")
    endings = field(row, "endings", list, "a list of strings")
    if not endings or not all(isinstance(ending, str) and _clean(ending) for ending in endings):
        raise InputError(f"'endings' is {str(endings)[:40]!r}: must be a list of strings that are not empty")
    right = field(row, "label", (int, str), f"a number in 0..{len(endings) - 1}")
    if not str(right).isdecimal() or int(right) >= len(endings):
        raise InputError(f"'label' is {right!r}: must be a number in 0..{len(endings) - 1}")
    if not _clean(context):
        raise InputError("the context is empty: must have text")
    return _clean(context), [_clean(ending) for ending in endings], int(right)


def lambada_question(row: Row) -> tuple[str, str]:
    """Return a passage without its last word, and the word: of `context` and `continuation`, or of the whole `text`."""
    if "text" in row:
        context, _, word = field(row, "text", str, "a string").strip().rpartition(" ")
    else:
        context = field(row, "context", str, "a string").rstrip()
        word = field(row, "continuation", str, "a string").strip()
    if not context or not word:
        raise InputError(f"the {'last word' if context else 'context'} is empty: must have text")
    return context, word


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Return the tokens of `context` and of `continuation`, which are those of the whole text, cut in two.

    Spaces at the end of the context go to the continuation, where tokenizers put them.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    begin = tokenizer.encode("")[:1]
    begin = begin if begin == [tokenizer.bos_id] else []
    whole = begin + tokenizer.encode(kept + continuation, add_special=False)
    n = len(begin) + len(tokenizer.encode(kept, add_special=False))
    n = min(n, len(whole) - 1)  # a merge over the cut may leave fewer tokens: at least the last one is scored
    return whole[:n], whole[n:]


def _clean(text: str) -> str:
    """Remove the marks that WikiHow's pages left in HellaSwag: [header], [title], [step], [substeps]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _of_row(index: int, parse, row: Row):
    try:
        return parse(row)
    except InputError as e:
        raise InputError(f"row {index}: {e}") from None


def _mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    n = len(values)
    if not n:
        raise InputError("no rows to score; give a file with some, or a larger --limit")
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n)
