"""What the documents show is true: recipes load, the example loss has autograd's gradient, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lmdistill.losses import registry
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets
from lmdistill.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
)
DOCUMENTS = [path for path in DOCUMENTS if not path.relative_to(ROOT).parts[0].startswith(".")]


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(document: Path) -> None:
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text())]
    missing = [link for link in targets if link and "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_recipes_in_the_readme_load(tmp_path: Path) -> None:
    recipes = _blocks(ROOT / "README.md", "yaml")
    assert recipes
    for text in recipes:
        (tmp_path / "shown.yaml").write_text(text)
        assert load_recipe(tmp_path / "shown.yaml").entries


def test_the_example_loss_has_autograds_gradient() -> None:
    (source,) = (block for block in _blocks(ROOT / "README.md", "python") if "@loss" in block)
    names = {name: getattr(registry, name) for name in ("StudentSoftmax", "Targets", "LossOptions", "LossTerms")}
    scope = names | {"loss": lambda name: lambda function: function}  # shown, not registered
    exec(source, scope)
    generator = torch.Generator().manual_seed(0)
    teacher_NV = torch.randn(5, 40, generator=generator, dtype=torch.float64).log_softmax(-1)
    logits_NV = torch.randn(5, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    logp_NK, ids_NK = teacher_NV.topk(6)
    tail_N = teacher_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    rest_N = logits_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    student = StudentSoftmax(logits_NV.gather(1, ids_NK), logits_NV[:, 0], logits_NV.logsumexp(-1), rest_N)
    targets = Targets(torch.zeros(5, dtype=torch.long), ids_NK, logp_NK, tail_N)
    terms: LossTerms = scope["total_mass"](student, targets, LossOptions())
    (wanted_NV,) = torch.autograd.grad(terms.loss_N.sum(), logits_NV)
    dense_NV = terms.outside_N[:, None] * logits_NV.softmax(-1)
    torch.testing.assert_close(dense_NV.scatter(1, terms.ids_NS, terms.inside_NS), wanted_NV)
