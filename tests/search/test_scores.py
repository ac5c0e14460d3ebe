"""Losses of candidates are kept line by line, and survive being stopped in the middle of a line, again and again."""

from __future__ import annotations

import random
from pathlib import Path

from toys.search_shapes import toy_whole

from lmdistill.search.candidate import Candidate
from lmdistill.search.scored import Scores


class Free:
    """A device on which nothing costs anything."""

    def figures(self, candidate: Candidate) -> dict[str, float]:
        return {"decode_ms": 1.0}

    def excess(self, candidate: Candidate) -> dict[str, float]:
        return {}


def scores(file: Path) -> Scores:
    return Scores(lambda candidate: {"kd": candidate.parameters / 1e6, "ce": 1.0}, Free(), file)


def test_stopped_twice_in_the_middle_of_a_line_every_whole_score_is_kept(tmp_path: Path) -> None:
    file, rng = tmp_path / "scores.jsonl", random.Random(0)
    candidates = [toy_whole().sample(rng) for _ in range(4)]
    first = scores(file)
    known = [first.of(one) for one in candidates[:2]]
    for stopped, lost in ((30, 1), (1, 0)):  # bytes short of the last line's end: in its middle, before its newline
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) - stopped])
        again = scores(file)
        assert [again.of(one) for one in candidates[:2]] == known and again.new == lost
        again.of(candidates[2])
    last = scores(file)
    assert [last.of(one) for one in candidates[:2]] == known and last.new == 0
    assert len(file.read_text().splitlines()) == 3
