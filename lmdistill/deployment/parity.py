"""Proof that a GGUF file computes what its checkpoint computes: divergence of the two next-token distributions.

The checkpoint runs once, in float32 in transformers; its log-probabilities wait on disk for every file.

Axes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
from lmdistill.errors import IntegrityError

TIE = 0.03  # nats: about three deviations of what f16 moves two logits apart; closer choices turn over now and then
_CHUNK = 128  # rows of logits llama.cpp gives at a time: 24 MiB at V = 49,152


@dataclass(frozen=True)
class Parity:
    """How far a file is from its checkpoint over `tokens` predictions."""

    mean_kl: float  # KL(checkpoint ‖ file), nats a token
    top1: float  # share of predictions with the same most likely token
    top1_decided: float  # the same, where a choice the checkpoint finds as good within TIE counts as the same
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """For deployment.json; figures to six digits, below which a sum's order shows."""
        figures = {"mean_kl": self.mean_kl, "top1": self.top1, "top1_decided": self.top1_decided}
        return {name: float(f"{value:.6g}") for name, value in figures.items()} | {"tokens": self.tokens}


def write_reference(folder: Path, sequences: Sequence[Sequence[int]], target: Path, threads: int | None) -> None:
    """Write the checkpoint's log-probabilities of every position of `sequences` to `target`."""
    import torch

    from lmdistill.checkpoints import load_model
    from lmdistill.evaluation.divergence import log_softmax_in_place
    from lmdistill.evaluation.references import ReferenceWriter

    if threads:
        torch.set_num_threads(threads)
    model = load_model(folder, "float32", "cpu")
    with ReferenceWriter(target) as reference, torch.inference_mode():
        for tokens_T in sequences:
            logits_TV = model(input_ids=torch.tensor([list(tokens_T)]), use_cache=False).logits[0]
            reference.append(log_softmax_in_place(logits_TV.float().contiguous()))


def measure_parity(
    gguf_path: Path, sequences: Sequence[Sequence[int]], reference_path: Path, threads: int | None
) -> Parity:
    """Run `sequences` through the file in llama.cpp and compare with the reference, some rows at a time.

    Raises IntegrityError where the file does not load, has another vocabulary or gives numbers that are not finite.
    """
    import torch

    from lmdistill.evaluation.divergence import kl, log_softmax_in_place
    from lmdistill.evaluation.references import Reference

    longest, total = max(map(len, sequences)), sum(map(len, sequences))
    kl_sum, same, decided = 0.0, 0, 0
    with LlamaCppRuntime(gguf_path, n_ctx=longest, n_batch=_CHUNK, n_threads=threads, exact=True) as runtime:
        reference, offset = Reference(reference_path, total, runtime.n_vocab), 0
        for tokens_T in sequences:
            for start, logits_CV in runtime.logit_chunks(tokens_T):
                log_x_CV = log_softmax_in_place(torch.from_numpy(logits_CV))
                log_p_CV = reference.read(offset + start, offset + start + len(log_x_CV))
                kl_sum += float(kl(log_p_CV, log_x_CV).sum())
                lost_C = log_p_CV.amax(-1) - log_p_CV.gather(-1, log_x_CV.argmax(-1, keepdim=True))[:, 0]
                same, decided = same + int((lost_C == 0).sum()), decided + int((lost_C <= TIE).sum())
            offset += len(tokens_T)
    if not kl_sum < float("inf"):
        raise IntegrityError(f"{gguf_path.name} gives logits that are not finite in llama.cpp")
    return Parity(kl_sum / total, same / total, decided / total, total)
