"""Random teachers and students, and every loss on cells from its definition, for autograd in float64.

Axes: N positions, V vocabulary, K cached entries, C cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from lmdistill.losses import registry
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets

N = 3
CASES = st.tuples(st.integers(0, 10_000), st.integers(4, 40), st.floats(0.1, 6.0))
OPTIONS = st.builds(
    LossOptions,
    temperature=st.floats(0.5, 4.0),
    hinton_scaled=st.booleans(),
    js_beta=st.floats(0.05, 0.95),
    skew_alpha=st.floats(0.05, 0.95),
    bd_weight=st.floats(0.5, 1.0),
)


def teacher_and_student(seed: int, vocab: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random teacher log-probs and student logits `[N, V]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV = torch.randn(N, vocab, generator=generator, dtype=torch.float64).mul(spread).log_softmax(-1)
    return teacher_NV, torch.randn(N, vocab, generator=generator, dtype=torch.float64).mul(spread)


def cached(teacher_NV: torch.Tensor, k: int, seed: int = 0) -> Targets:
    """The teacher's top K with its tail, and random next tokens."""
    logp_NK, ids_NK = teacher_NV.topk(k)
    tail_N = teacher_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    next_N = torch.randint(teacher_NV.shape[1], (N,), generator=torch.Generator().manual_seed(seed))
    return Targets(next_N, ids_NK, logp_NK, tail_N)


def case(seed: int, vocab: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Teacher, student and what a cache of some K below V holds."""
    teacher_NV, student_NV = teacher_and_student(seed, vocab, spread)
    return teacher_NV, student_NV, cached(teacher_NV, 1 + seed % (vocab - 1), seed)


def softmax_of(logits_NV: torch.Tensor, targets: Targets) -> StudentSoftmax:
    """What the fused head says of the student's logits."""
    rest_NV = logits_NV.scatter(1, targets.ids_NK, -torch.inf)
    return StudentSoftmax(
        logits_NV.gather(1, targets.ids_NK).masked_fill(targets.absent_NK, -torch.inf),
        logits_NV.gather(1, targets.next_N[:, None])[:, 0],
        logits_NV.logsumexp(-1),
        rest_NV.logsumexp(-1),
        logits_NV.shape[1],
    )


def terms(name: str, logits_NV: torch.Tensor, targets: Targets, options: LossOptions) -> LossTerms:
    """The loss called `name` as the product computes it."""
    return registry.get(name)(softmax_of(logits_NV, targets), targets, options)


def gradient(said: LossTerms, logits_NV: torch.Tensor) -> torch.Tensor:
    """The gradient in the logits `[N, V]` that closed-form terms stand for."""
    return (said.outside_N[:, None] * logits_NV.softmax(-1)).scatter(1, said.ids_NS, said.inside_NS)


Definition = Callable[[torch.Tensor, torch.Tensor, LossOptions], torch.Tensor]  # log p, log q [N, C] → loss [N]


def kl(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor) -> torch.Tensor:
    """Σ p·log(p/q)."""
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(-1)


def _mix(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor, share: float) -> torch.Tensor:
    return (share * log_p_NC.exp() + (1 - share) * log_q_NC.exp()).log()


def _js(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor, options: LossOptions) -> torch.Tensor:
    beta = options.js_beta
    log_m_NC = _mix(log_p_NC, log_q_NC, beta)
    return beta * kl(log_p_NC, log_m_NC) + (1 - beta) * kl(log_q_NC, log_m_NC)


def bd_kd(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor, options: LossOptions, rest_ids: int = 1) -> torch.Tensor:
    """BD-KD where the last cell stands for `rest_ids` ids that share its mass evenly."""
    ids_C = torch.ones_like(log_p_NC[0])
    ids_C[-1] = rest_ids
    entropy_p_N, entropy_q_N = ((log.exp() * (ids_C.log() - log)).sum(-1).detach() for log in (log_p_NC, log_q_NC))
    ahead_N, back_N = kl(log_p_NC, log_q_NC), kl(log_q_NC, log_p_NC)
    larger, smaller = options.bd_weight, 1 - options.bd_weight
    student_sharper = larger * ahead_N + smaller * back_N
    return torch.where(entropy_q_N < entropy_p_N, student_sharper, smaller * ahead_N + larger * back_N)


DIVERGENCES: dict[str, Definition] = {  # those that coarsening can only make smaller
    "forward_kl": lambda log_p, log_q, options: kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, options: kl(log_q, log_p),
    "js": _js,
    "skew_kl": lambda log_p, log_q, options: kl(log_p, _mix(log_p, log_q, options.skew_alpha)),
    "skew_reverse_kl": lambda log_p, log_q, options: kl(log_q, _mix(log_p, log_q, 1 - options.skew_alpha)),
    "total_variation": lambda log_p, log_q, options: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
}


def _tempered(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor, options: LossOptions) -> torch.Tensor:
    tau = options.temperature
    scale = tau**2 if options.hinton_scaled else 1.0
    return scale * kl((log_p_NC / tau).log_softmax(-1), (log_q_NC / tau).log_softmax(-1))


DEFINITIONS: dict[str, Definition] = {**DIVERGENCES, "bd_kd": bd_kd, "topk_rest_bucket": _tempered}
DEFINITIONS["topk_renormalised"] = lambda log_p, log_q, options: _tempered(log_p[:, :-1], log_q[:, :-1], options)


def cells_of(logits_NV: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and log q `[N, K+1]` of the K entries and the rest; differentiable in the logits. K below V."""
    log_q_NV = logits_NV.log_softmax(-1)
    rest_N = log_q_NV.scatter(1, targets.ids_NK, -torch.inf).logsumexp(-1)
    log_p_NC = torch.cat([targets.logp_NK, targets.tail_N[:, None]], 1)
    return log_p_NC, torch.cat([log_q_NV.gather(1, targets.ids_NK), rest_N[:, None]], 1)


def defined(name: str, logits_NV: torch.Tensor, targets: Targets, options: LossOptions) -> torch.Tensor:
    """The loss `[N]` from its definition on the cells."""
    cells = cells_of(logits_NV, targets)
    if name == "bd_kd":
        return bd_kd(*cells, options, logits_NV.shape[1] - targets.ids_NK.shape[1])
    return DEFINITIONS[name](*cells, options)
