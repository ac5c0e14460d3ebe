"""The recommended recipe as text: the evidence at its top, and a comment at every key."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from lmdistill.recommend.request import Request
from lmdistill.recommend.rules import Proposal, student_keys

WIDTH, COMMENT_AT, ROW = 110, 34, "|"


def compose(name: str, request: Request, proposal: Proposal, source: dict[str, str], evidence: Sequence[str]) -> str:
    """The whole file; `source` names the field that holds the text."""
    name = re.sub(r"[^a-z0-9_-]+", "-", name.lower())
    text = [
        *_comments([f"A recipe that lmdistill recommends for {', '.join(request.sources)}, with what speaks for it."]),
        *_comments(evidence),
        _line(0, f"name: {name}", "names the run folder, runs/" + name),
        "",
        _line(0, f"teacher: {_plain(request.teacher)}", "the model to distil from; pin a commit to repeat it"),
        "",
        _line(0, "stages:", "in the order they run"),
        *_corpus(request, proposal, source),
        *_teach(proposal),
        *_student(proposal),
        *_distill(proposal),
        *_rest(proposal),
    ]
    return "\n".join(text) + "\n"


def _corpus(request: Request, proposal: Proposal, source: dict[str, str]) -> Iterable[str]:
    yield _line(2, "- stage: corpus", "text → rows of tokens")
    yield _line(4, "sources:", "data, in order")
    for one in request.sources:
        yield _line(6, f"- source: {_plain(one)}", "as given")
        for key, field in source.items():
            yield _line(8, f"{key}: {_plain(field)}", "the field to read")
    separator = "between documents, as the tokenizer's pre-training marked them or, without a mark, its EOS"
    yield _line(4, f"separator: {_plain(proposal.separator)}", separator)
    yield _line(4, f"sequence_length: {proposal.sequence_length}", proposal.reasons["sequence_length"])
    yield ""


def _teach(proposal: Proposal) -> Iterable[str]:
    yield _line(2, "- stage: teach", "teacher log-probs of every token")
    yield _line(4, f"k: {proposal.k}", proposal.reasons["k"])
    yield _line(4, f"precision: {proposal.precision}", "of the teacher's weights, as in what was measured")
    yield ""


def _student(proposal: Proposal) -> Iterable[str]:
    keys = student_keys(proposal.architecture, proposal.layers)
    kind = "short convolutions and some attention" if proposal.architecture == "lfm2" else "attention throughout"
    yield _line(2, "- stage: student", "grown from the teacher")
    yield _line(4, f"architecture: {proposal.architecture}", kind)
    yield _line(4, f"layers: {proposal.layers}", proposal.reasons["layers"])
    yield _line(4, f"attention_layers: {keys['attention_layers']}", "of them attend")
    yield ""


def _distill(proposal: Proposal) -> Iterable[str]:
    from lmdistill.losses.registry import entry

    same = [
        (f"tokens: {proposal.tokens}", proposal.reasons["tokens"]),
        (f"batch_rows: {proposal.batch_rows}", "rows in a step: about a thousand tokens"),
    ]
    yield _line(2, "- stage: distill", "the student learns from the cache")
    yield _line(4, f"loss: {proposal.loss}", proposal.reasons["loss"])
    if proposal.loss != "ce":
        yield _line(4, f"kd_weight: {proposal.kd_weight}", "λ: " + proposal.reasons["kd_weight"])
    if "temperature" in entry(proposal.loss).options:
        yield _line(4, f"temperature: {proposal.temperature}", "τ: " + proposal.reasons["temperature"])
    yield from (_line(4, text, comment) for text, comment in same)
    yield ""
    if proposal.loss == "ce":
        return
    yield _line(2, "- stage: distill", "the baseline: the same student, tokens and steps, without the teacher")
    yield _line(4, "name: ce", "a second stage of a kind has a name")
    yield _line(4, "from: [student, teach]", "not the model just trained")
    yield _line(4, "loss: ce", "next-token cross-entropy")
    yield from (_line(4, text, "as above") for text, _ in same)
    yield ""


def _rest(proposal: Proposal) -> Iterable[str]:
    yield _line(2, "- stage: export", "the student's files")
    yield _line(4, "name: files", "what the report calls them")
    yield _line(4, "from: [distill, corpus]", "the model, with held-out text for the proofs")
    yield ""
    yield _line(2, "- stage: evaluate", "all of it side by side")
    yield _line(4, "suite: default", "eval/suites/default.yaml")
    if proposal.loss != "ce":
        yield _line(4, "gates:", "promises that fail the run if they do not hold")
        yield _line(6, "- {metric: nll, of: distill, at_most: {of: ce}}", "distilling beats cross-entropy")


def _line(indent: int, text: str, comment: str) -> str:
    return f"{' ' * indent}{text}".ljust(COMMENT_AT - 1) + f" # {comment}"


def _comments(paragraphs: Iterable[str]) -> list[str]:
    """Paragraphs as comments; a table's row stays as it is."""
    lines = []
    for paragraph in paragraphs:
        lines += [paragraph] if paragraph.startswith(ROW) else textwrap.wrap(paragraph, WIDTH)
    return ["# " + line for line in lines]


def _plain(text: str) -> str:
    """A string as YAML: bare where it reads back as itself, else quoted."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        bare = YAML(typ="safe").load(f"key: {text} # comment")["key"] == text
    except YAMLError:
        bare = False
    return text if bare else json.dumps(text, ensure_ascii=False)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Aligned columns, a line each."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return [f"{ROW} {' | '.join(row)} |" for row in padded]
