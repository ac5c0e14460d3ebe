"""`recommend` on a toy teacher: the recipe it writes loads, plans, says why, and is the same after a kill."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdistill.pipeline.plan import make_plan
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.recipe import load_recipe
from lmdistill.recommend import run as recommending
from lmdistill.recommend.request import Request
from lmdistill.recommend.run import Laboratory, Recommendation, recommend
from lmdistill.recommend.samples import separator_of, source_keys

MakeRequest = Callable[..., Request]
COMMENT = re.compile(r"(^|\s)# \S")


def planned_and_commented(file: Path, tmp_path: Path) -> Any:
    """The recipe, proven to load and plan, with a comment at every line that has a key."""
    recipe = load_recipe(file)
    assert [step.state for step in make_plan(recipe, tmp_path / "planned").steps] == ["run"] * len(recipe.entries)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not COMMENT.search(line)] == []
    assert all(len(line) <= 160 for line in lines)
    return recipe


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the process die after so many trials."""
    attempts = Laboratory._attempt

    def stop(after: int) -> None:
        left = [after]

        def attempt(lab: Laboratory, *given: Any) -> Any:
            inner = attempts(lab, *given)

            def counted(params: Any) -> Any:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return inner(params)

            return counted

        monkeypatch.setattr(Laboratory, "_attempt", attempt)

    return stop


@pytest.mark.usefixtures("in_process")
def test_a_sweep_writes_a_recipe_with_its_evidence_and_a_killed_one_goes_on_to_the_same(
    request_for: MakeRequest, tmp_path: Path, stopped: Callable[[int], None]
) -> None:
    stopped(2)
    with pytest.raises(Killed):
        recommend(request_for(), SilentProgress())
    assert not (tmp_path / "notes.yaml").exists()
    stopped(2)  # one more trial, and the winner at twice its tokens: what was done is not done again
    found = recommend(request_for(), SilentProgress())

    recipe = planned_and_commented(tmp_path / "notes.yaml", tmp_path)
    distill = recipe.entry("distill").config
    assert (distill.loss, distill.tokens) == (found.proposal.loss, found.proposal.tokens)
    text = (tmp_path / "notes.yaml").read_text(encoding="utf-8")
    assert len(found.outcomes) == 3
    assert all(f"{one.nll:.4f}" in text for one in found.outcomes)
    assert "Sweep: 3 trainings" in text and "At twice the tokens" in text and "Nothing was trained" not in text
    assert [one.params["loss"] for one in found.outcomes[:2]] == ["decoupled_topk", "ce"]

    stopped(4)
    whole = recommend(request_for(work=tmp_path / "elsewhere", out=tmp_path / "new" / "notes.yaml"), SilentProgress())
    assert whole.text == found.text


@pytest.mark.usefixtures("in_process")
def test_without_a_sweep_the_recipe_says_that_nothing_was_trained(
    request_for: MakeRequest, tmp_path: Path, stopped: Callable[[int], None]
) -> None:
    stopped(0)
    found = recommend(request_for(sweep=False), SilentProgress())
    recipe = planned_and_commented(tmp_path / "notes.yaml", tmp_path)
    assert "Nothing was trained" in found.text and "measured: " not in found.text
    assert {entry.name for entry in recipe.entries} >= {"corpus", "teach", "student", "distill", "ce", "evaluate"}
    features = found.features
    assert (features.records, features.duplicates, features.empty) == (162, 1, 1)
    assert 80 <= features.length_p50 <= 90
    assert features.teacher_nll >= features.teacher_entropy > 0
    assert f"{features.teacher_nll:.3f}" in found.text and "1 repeated, 1 empty" in found.text.replace("\n# ", " ")


def test_conversations_are_read_where_records_have_no_text(request_for: MakeRequest, tmp_path: Path) -> None:
    def keys(record: str, **asked: str) -> dict[str, str]:
        (tmp_path / "data.jsonl").write_text(record + "\n")
        return source_keys(request_for(sources=(str(tmp_path / "data.jsonl"),), **asked))

    assert keys('{"messages": [{"role": "user", "content": "hello"}]}') == {"messages": "messages"}
    assert keys('{"messages": [], "text": "hello"}') == {}
    assert keys('{"0": "hello"}', field="0") == {"text": "0"}
    assert keys('{"turns": []}', messages="turns") == {"messages": "turns"}


def test_documents_are_parted_as_the_tokenizers_pre_training_did(
    smollm_tokenizer_folder: Path, toy_teacher: Path, tmp_path: Path
) -> None:
    """SmolLM2's EOS is the end of a chat's turn; the toy has no mark but its EOS; a bare tokenizer has neither."""
    assert separator_of(smollm_tokenizer_folder) == "<|endoftext|>"
    assert separator_of(toy_teacher) == "eos"
    (tmp_path / "tokenizer.json").write_text((toy_teacher / "tokenizer.json").read_text())
    assert separator_of(tmp_path) == "none"


def test_where_cross_entropy_wins_it_is_what_is_recommended(
    request_for: MakeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    from lmdistill.recommend.sweep import Outcome

    def attempt(lab: Laboratory, first: Any, times: int) -> Any:
        def pretend(params: Any) -> Outcome:
            nll = 2.0 if params["loss"] == "ce" else 3.0
            return Outcome(params, 4096 * times, 1000, [nll * 10] * 4, [10] * 4)

        return pretend

    monkeypatch.setattr(Laboratory, "_attempt", attempt)
    found: Recommendation = recommend(request_for(), SilentProgress())
    recipe = planned_and_commented(tmp_path / "notes.yaml", tmp_path)
    assert recipe.entry("distill").config.loss == "ce"
    assert "ce" not in [entry.name for entry in recipe.entries]
    assert "The teacher brought nothing here" in found.text


def test_what_cannot_be_is_said_before_anything_is_read(
    request_for: MakeRequest, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.errors import LmdistillError

    monkeypatch.setattr(recommending.Bench, "make", lambda *_: pytest.fail("something was made"))
    (tmp_path / "there.yaml").write_text("mine")
    cases = [
        ({"sources": ()}, "there is no data"),
        ({"sources": ("nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"sources": ("hf:only-a-name",)}, "names nothing that can be read"),
        ({"teacher": "no/such/folder"}, "no/such/folder"),
        ({"teacher": str(toy_data)}, "is not a model"),
        ({"out": tmp_path / "there.yaml"}, "is there already"),
        ({"field": "a", "messages": "b"}, "both name the field"),
        ({"depths": (9,)}, "--layers 9 cannot be grown from a teacher of 2 blocks"),
        ({"trials": 1}, "leaves nothing to compare"),
    ]
    for keys, message in cases:
        with pytest.raises(LmdistillError, match=re.escape(message)):
            recommend(request_for(**keys), SilentProgress())


@pytest.mark.usefixtures("in_process")
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_is_not(request_for: MakeRequest) -> None:
    from lmdistill.errors import LmdistillError
    from lmdistill.recommend.request import parse_budget

    with pytest.raises(LmdistillError, match="--budget 1ktok is too small for 3 trials") as told:
        recommend(request_for(budget=parse_budget("1ktok")), SilentProgress())
    least = re.search(r"at least (\d+ktok)", told.value.fix)
    assert least and parse_budget(least[1]).tokens == 21_000, "(3 trials + 2) · 4 steps of 1,024 tokens, rounded up"
    with pytest.raises(LmdistillError, match="--budget 2s is too small"):
        recommend(request_for(budget=parse_budget("2s")), SilentProgress())
