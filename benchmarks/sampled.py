"""Sampled distillation in figures: is its gradient that of the full KL, how far is one draw off, what the cache takes.

    python benchmarks/sampled.py [--json] [--tokens 512] [--seeds 12] [--draws 24] [--cache-tokens 32768]

The embedded teacher reads real text (OpenWebText passages); the student is the teacher without its last block. The
gradient of KD in the head (V·D numbers) is computed with the teacher's whole distribution, and then from what caches
hold: ids drawn anew for each seed, by strata as lmdistill draws and independently as the paper does, and the teacher's
top 32. Distances are relative to the full gradient's norm. An unbiased way's mean over S seeds lies about
1/√S of one seed's distance away from the full gradient; a biased one stays where it is.
The result is also written to benchmarks/results/sampled.json. About three minutes on two cores.

Axes: N tokens, n draws, D hidden width, V vocabulary, K cached entries.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import hardware
from teacher_cache.reading import random_passes
from teacher_cache.text import ROW_TOKENS, TEACHER, build_corpus

from lmdistill import assets
from lmdistill.corpus.format import CorpusReader
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, Targets
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.signals.capture import Capture
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.sampling import Sampling
from lmdistill.teachers.draws import CPU_TOKENS, draw
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.reduction import reduce_logits
from lmdistill.teachers.registry import create_engine

RESULT = Path(__file__).parent / "results" / "sampled.json"
CHUNK, TOP_K, READ_PASSES = 256, 32, 5


@dataclass(frozen=True)
class Case:
    """A teacher's and a student's word on the same tokens."""

    teacher_NV: torch.Tensor  # logits, bfloat16
    hidden_ND: torch.Tensor
    head_VD: torch.Tensor
    next_N: torch.Tensor


def case_of(engine: Any, corpus: CorpusReader, tokens: int) -> Case:
    """Teacher's logits, and hidden states of the student: the same model without its last block."""
    tokens_BT = corpus.split("train").tokens_RT[: tokens // ROW_TOKENS].astype(np.int64)
    with torch.inference_mode():
        chunks = engine.logit_chunks(tokens_BT, np.zeros(tokens_BT.shape, bool))
        teacher_NV = torch.cat([logits_CV.bfloat16() for _, logits_CV in chunks])
        body, blocks = engine._model.base_model, engine._model.base_model.layers
        body.layers = blocks[:-1]
        hidden_ND = body(torch.from_numpy(tokens_BT), use_cache=False).last_hidden_state.flatten(0, 1).float()
        body.layers = blocks
        head_VD = engine._model.get_output_embeddings().weight[: corpus.meta.vocab_size].float()
    next_N = torch.from_numpy(np.roll(tokens_BT, -1, axis=1).reshape(-1).copy())
    return Case(teacher_NV, hidden_ND.clone(), head_VD.clone(), next_N)


def full_gradient(case: Case) -> tuple[torch.Tensor, float]:
    """Of the mean KL(p‖q) in the head, from the whole distributions; and that KL."""
    gradient_VD, kl = torch.zeros_like(case.head_VD), 0.0
    for start in range(0, len(case.hidden_ND), CHUNK):
        hidden_CD = case.hidden_ND[start : start + CHUNK]
        log_p_CV = case.teacher_NV[start : start + CHUNK].float().log_softmax(-1)
        log_q_CV = (hidden_CD @ case.head_VD.T).log_softmax(-1)
        p_CV = log_p_CV.exp()
        kl += float((p_CV * (log_p_CV - log_q_CV)).sum(dtype=torch.float64))
        gradient_VD += (log_q_CV.exp() - p_CV).T @ hidden_CD
    return gradient_VD / len(case.hidden_ND), kl / len(case.hidden_ND)


def gradient_of(name: str, case: Case, targets: Targets) -> tuple[torch.Tensor, float]:
    """A registered loss' mean gradient in the head, and its mean value."""
    head_VD = case.head_VD.detach().requires_grad_()
    sums = fused_head_loss(case.hidden_ND, head_VD, targets, Mix(registry.get(name), LossOptions(), 1.0, 0.0), CHUNK)
    (sums.total / len(case.hidden_ND)).backward()
    assert head_VD.grad is not None
    return head_VD.grad, float(sums.kd) / len(case.hidden_ND)


def top_k_targets(case: Case) -> Targets:
    """What a top-K cache holds, exact."""
    with torch.inference_mode():
        ids, logp, tail, _ = reduce_logits(case.teacher_NV, case.next_N, TOP_K)
    return Targets(case.next_N, ids.long().clone(), logp.clone(), tail.clone())


def drawn_targets(case: Case, sampling: Sampling, independent: bool) -> Targets:
    """What a sampled cache holds, exact; `independent` draws are not one from each n-th of the distribution."""
    tokens = len(case.next_N)
    uniforms_Nn = torch.from_numpy(sampling.uniforms("train", 0, 1, tokens)[0])
    if independent:
        generator = torch.Generator().manual_seed(sampling.seed)
        uniforms_Nn = torch.rand(uniforms_Nn.shape, generator=generator, dtype=torch.float64).sort(1).values
    parts = []
    for start in range(0, tokens, CPU_TOKENS):
        rows = slice(start, start + CPU_TOKENS)
        parts.append(draw(case.teacher_NV[rows], uniforms_Nn[rows], case.next_N[rows], sampling.temperature))
    ids, logp, counts, log_z, outside, _ = (torch.cat(column) for column in zip(*parts, strict=True))
    ratio = ((1 - sampling.temperature) * logp + log_z[:, None]).exp()
    weight = (counts / sampling.draws * ratio).masked_fill(counts == 0, 0.0)
    return Targets(case.next_N, ids.long(), logp, outside, weight)


def far(gradient: torch.Tensor, full: torch.Tensor) -> float:
    """Relative distance."""
    return round(float((gradient - full).norm() / full.norm()), 5)


def measure_draws(case: Case, full: torch.Tensor, samplings: Iterator[Sampling], independent: bool) -> dict[str, Any]:
    """One seed's distance from the full gradient, and that of the mean over all seeds."""
    mean, distances, values, distinct = torch.zeros_like(full), [], [], []
    for sampling in samplings:
        targets = drawn_targets(case, sampling, independent)
        gradient, value = gradient_of("sampled_kd", case, targets)
        mean += gradient
        distances.append(far(gradient, full))
        values.append(value)
        distinct.append(float((~targets.absent_NK).sum(1).float().mean()))
    seeds = len(distances)
    return {
        "seeds": seeds,
        "distinct_ids": round(statistics.fmean(distinct), 2),
        "one_seed": round(statistics.fmean(distances), 5),
        "mean_of_seeds": far(mean / seeds, full),
        "mean_if_unbiased": round(statistics.fmean(d * d for d in distances) ** 0.5 / seeds**0.5, 5),
        "kl": round(statistics.fmean(values), 5),
        "kl_standard_error": round(statistics.stdev(values) / seeds**0.5, 5),
    }


def measure_top_k(name: str, case: Case, full: torch.Tensor) -> dict[str, Any]:
    """A top-K loss' distance: it is what it is, whatever is averaged."""
    gradient, value = gradient_of(name, case, top_k_targets(case))
    return {"k": TOP_K, "distance": far(gradient, full), "kl": round(value, 5)}


def measure_cache(engine: Any, teacher: ModelRef, corpus: CorpusReader, sampling: Sampling) -> dict[str, Any]:
    """A sampled cache of the corpus: bytes a token, and read speed of one core in random order."""
    layout = Layout(ROW_TOKENS, sampling.draws, corpus.meta.vocab_size, "sampled", sampling=sampling)
    info = TeacherInfo(teacher.source, teacher.digest, "bfloat16", "transformers", engine.version())
    with tempfile.TemporaryDirectory() as folder:
        manifest = Capture(
            Path(folder), corpus, ("train",), layout, info, lambda: engine, 10_000, 8, progress=SilentProgress()
        ).run()
        speeds = random_passes(Path(folder), "train", READ_PASSES)
        reader = SignalsReader(Path(folder), verify=False)
        batch = reader.read(slice(None))
    figures = manifest.splits["train"].statistics
    return {
        "tokens": reader.rows * ROW_TOKENS,
        "bytes_per_token": round(float(figures["bytes_per_token"] or 0), 2),
        "distinct_ids": round(float(np.isfinite(batch.logp_RTK).sum(-1).mean()), 2),
        "mass_drawn": round(float(figures["head_mass"] or 0), 4),
        "next_among_drawn": round(float(figures["observed_in_top_k"] or 0), 4),
        "read_tps": round(statistics.median(speeds)),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    teacher = assets.model_folder(TEACHER, SilentProgress())
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_corpus(Path(folder) / "corpus", teacher, max(args.tokens, args.cache_tokens))
        engine: Any = create_engine("transformers")
        engine.open(teacher, EngineOptions(TOP_K, corpus.meta.vocab_size, "bfloat16"))
        case = case_of(engine, corpus, args.tokens)
        full, kl = full_gradient(case)
        ways = {
            name: measure_draws(case, full, (Sampling(args.draws, t, s) for s in range(args.seeds)), independent)
            for name, t, independent in (
                ("strata", 1.0, False),
                ("independent", 1.0, True),
                ("strata_t_0.8", 0.8, False),
            )
        }
        top_k = {name: measure_top_k(name, case, full) for name in ("topk_renormalised", "decoupled_topk")}
        cache = measure_cache(engine, teacher, corpus, Sampling(args.draws))
    return {
        "full": {"tokens": args.tokens, "kl": round(kl, 5)},
        "draws": args.draws,
        "sampled": ways,
        "top_k": top_k,
        "cache": cache,
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/sampled.py " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the gradients")
    parser.add_argument("--seeds", type=int, default=12, help="draws of each token's ids")
    parser.add_argument("--draws", type=int, default=24, help="ids drawn of a token")
    parser.add_argument("--cache-tokens", type=int, default=32_768, help="tokens of the cache")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    args = parser.parse_args()
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
