"""Proof that a file computes what its checkpoint computes: divergence of the two next-token distributions.

The checkpoint runs once, in float32 in transformers; its logits wait on disk for every file.

Axes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import IntegrityError

if TYPE_CHECKING:
    from lmdistill.deployment.logit_source import LogitSource

TIE = 0.03  # nats: about three deviations of what f16 moves two logits apart; closer choices turn over now and then


@dataclass(frozen=True)
class Parity:
    """How far a file is from its checkpoint over `tokens` predictions."""

    mean_kl: float  # KL(checkpoint ‖ file), nats a token
    top1: float  # share of predictions with the same most likely token
    top1_decided: float  # the same, where a choice the checkpoint finds as good within TIE counts as the same
    tokens: int
    max_abs: float = 0.0  # farthest that a logit is from the checkpoint's
    largest: float = 0.0  # magnitude of the checkpoint's logits

    def to_json(self) -> dict[str, Any]:
        """For deployment.json; figures to six digits, below which a sum's order shows."""
        figures = {"mean_kl": self.mean_kl, "top1": self.top1, "top1_decided": self.top1_decided}
        return {name: float(f"{value:.6g}") for name, value in figures.items()} | {"tokens": self.tokens}


def write_reference(
    folder: Path, sequences: Sequence[Sequence[int]], target: Path, threads: int | None, *, on_grid: bool = False
) -> None:
    """Write the checkpoint's logits of every position of `sequences` to `target`.

    With `on_grid` it computes as it was trained to on its grids: where a grid rounds activations too, so does this.
    """
    import torch

    from lmdistill.checkpoints import load_model
    from lmdistill.evaluation.references import ReferenceWriter

    if threads:
        torch.set_num_threads(threads)
    model = load_model(folder, "float32", "cpu")
    if on_grid:
        from lmdistill.quantization.on_grid import kept_on_its_grids

        kept_on_its_grids(model, folder)
    with ReferenceWriter(target) as reference, torch.inference_mode():
        for tokens_T in sequences:
            logits_TV = model(input_ids=torch.tensor([list(tokens_T)]), use_cache=False).logits[0]
            reference.append(logits_TV.float())


def measure_parity(source: LogitSource, name: str, sequences: Sequence[Sequence[int]], reference_path: Path) -> Parity:
    """Run `sequences` through an open file, called `name`, and compare with the reference, some rows at a time.

    Raises IntegrityError where it has another vocabulary or gives numbers that are not finite.
    """
    import torch

    from lmdistill.evaluation.divergence import kl, log_softmax_in_place
    from lmdistill.evaluation.references import Reference

    total = sum(map(len, sequences))
    kl_sum, same, decided, farthest, largest, offset = 0.0, 0, 0, 0.0, 0.0, 0
    reference = Reference(reference_path, total, source.n_vocab)
    for tokens_T in sequences:
        for start, array_CV in source.logit_chunks(tokens_T):
            log_x_CV = torch.from_numpy(array_CV)
            log_p_CV = reference.read(offset + start, offset + start + len(log_x_CV))
            farthest = max(farthest, float((log_x_CV - log_p_CV).abs().max()))
            largest = max(largest, float(log_p_CV.abs().max()))
            log_x_CV, log_p_CV = log_softmax_in_place(log_x_CV), log_softmax_in_place(log_p_CV)
            kl_sum += float(kl(log_p_CV, log_x_CV).sum())
            lost_C = log_p_CV.amax(-1) - log_p_CV.gather(-1, log_x_CV.argmax(-1, keepdim=True))[:, 0]
            same, decided = same + int((lost_C == 0).sum()), decided + int((lost_C <= TIE).sum())
        offset += len(tokens_T)
    if not kl_sum < float("inf"):
        raise IntegrityError(f"{name} gives logits that are not finite")
    return Parity(kl_sum / total, same / total, decided / total, total, farthest, largest)
