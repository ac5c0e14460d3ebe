"""The report of a model trained on its grid has its parent's quantisations beside it, or the recipe is refused."""

from __future__ import annotations

import pytest

from lmdistill.evaluation.ptq_rows import missing_ptq
from lmdistill.pipeline.stage import Planned
from lmdistill.stages.export import ExportConfig
from lmdistill.stages.student import StudentConfig
from lmdistill.training.config import DistillConfig

PARENT = Planned("distill", "distill", "model", "p" * 64, DistillConfig())


def _trained(grid: str) -> Planned:
    keys = DistillConfig.model_validate({"quantize": {"grid": grid}})
    return Planned("qad", "distill", "model", "q" * 64, keys, {"student": [PARENT]})


def _export(name: str, of: Planned, *formats: str, imatrix: int | None = None) -> Planned:
    config = ExportConfig(formats=formats, imatrix_tokens=imatrix)
    return Planned(name, "export", "deployment", name[0] * 64, config, {"model": [of]})


PLAIN, WEIGHED = _export("files", PARENT, "f16", "q4_0"), _export("weighed", PARENT, "q4_0", imatrix=64)


@pytest.mark.parametrize(
    ("beside", "lacking"),
    [
        ((), ["q4_0 is not", "q4_0 with an importance matrix is not"]),
        ((PLAIN,), ["q4_0 with an importance matrix is not"]),
        ((WEIGHED,), ["q4_0 is not"]),
        ((PLAIN, WEIGHED), []),
        ((_export("files", PARENT, "q8_0"), WEIGHED), ["q4_0 is not"]),
    ],
)
def test_the_parents_quantisations_of_the_same_type_must_be_evaluated(
    beside: tuple[Planned, ...], lacking: list[str]
) -> None:
    found = [str(one) for one in missing_ptq("evaluate", [_export("qad_files", _trained("q4_0"), "q4_0"), *beside])]
    assert len(found) == len(lacking) and all(text in one for text, one in zip(lacking, found, strict=True))


def test_programs_need_the_same_of_their_own_format() -> None:
    keys = DistillConfig.model_validate({"quantize": {"grid": "8da4w", "embeddings": "8da4w"}})
    trained = Planned("qad", "distill", "model", "q" * 64, keys, {"student": [PARENT]})
    export, plain = _export("qad_files", trained, "pte_8da4w_all"), _export("files", PARENT, "pte_8da4w_all")
    weighed = _export("weighed", PARENT, "pte_8da4w_all", imatrix=64)
    assert list(missing_ptq("evaluate", [export, plain, weighed])) == []
    [problem] = map(str, missing_ptq("evaluate", [export, plain]))
    assert "quantised to pte_8da4w_all with an importance matrix is not" in problem
    other = _export("files", PARENT, "pte_8da4w")
    assert len(list(missing_ptq("evaluate", [export, other, weighed]))) == 1


def test_a_checkpoint_that_is_yet_to_be_fetched_may_lie_on_a_grid_itself() -> None:
    """Then it is no parent in full precision: nothing is asked for before it is here."""
    begun = StudentConfig(init="checkpoint", source=f"hf:org/never-fetched@{'c' * 40}")  # type: ignore[arg-type]
    student = Planned("student", "student", "student", "s" * 64, begun)
    keys = DistillConfig.model_validate({"quantize": {"grid": "q4_0"}})
    trained = Planned("qad", "distill", "model", "q" * 64, keys, {"student": [student]})
    assert list(missing_ptq("evaluate", [_export("qad_files", trained, "q4_0")])) == []


def test_files_that_are_not_trained_on_their_grid_need_nothing_beside_them() -> None:
    assert list(missing_ptq("evaluate", [PLAIN])) == []
    assert list(missing_ptq("evaluate", [_export("qad_files", _trained("q4_0"), "f16")])) == []
    assert list(missing_ptq("evaluate", [_export("qad_files", _trained("8da4w"), "f16")])) == []


def test_a_model_trained_on_after_it_was_put_on_its_grid_has_the_same_parent() -> None:
    later = Planned("sft", "distill", "model", "s" * 64, DistillConfig(loss="ce"), {"student": [_trained("q4_0")]})
    again = Planned("again", "distill", "model", "a" * 64, _trained("q4_0").config, {"student": [later]})
    for model in (later, again):
        trained = _export("later_files", model, "q4_0")
        assert list(missing_ptq("evaluate", [trained, PLAIN, WEIGHED])) == []
        [first, second] = [str(one) for one in missing_ptq("evaluate", [trained])]
        assert "'distill' quantised to q4_0 is not" in first and "importance matrix is not" in second
