"""The distillation loss in figures: time against the best cross-entropy, peak memory against autograd, exactness.

    python benchmarks/loss.py [--json] [--vocab 49152] [--tokens 2048] [--k 32] [--rounds 4]

- time: head, loss and all gradients of one batch, for KD (0.9 KD + 0.1 CE, as recipes train) and for each way to do
  cross-entropy alone; all in turns within a round, so that they meet the same machine; and the same two inside a whole
  forward and backward of a student of recipes/lfm_small's shape (random weights). The rival is the fastest
  cross-entropy whose peak memory does not grow with tokens × vocabulary. Beside seconds of the clock, seconds of all
  cores together, which other work on the machine disturbs less;
- memory: VmHWM of a fresh process after one step, less its VmRSS before;
- gradient error: against float64 autograd, relative to the gradient's norm.

The result is also written to benchmarks/results/loss.json. Under three minutes on two free cores.

Axes: N tokens, C tokens of a chunk, D hidden width, V vocabulary, K cached entries.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import hardware
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, Targets

RESULT = Path(__file__).parent / "results" / "loss.json"
KD_WEIGHT, CE_WEIGHT = 0.9, 0.1
ROW_TOKENS = 256
CHECKED_TOKENS = 32  # of the comparison with float64

LossFunction = Callable[[torch.Tensor, torch.Tensor, Targets], torch.Tensor]  # hidden_ND, head_VD → mean loss


def targets_of(tokens: int, vocab: int, k: int) -> Targets:
    """A made-up teacher: K distinct ids a token, a falling distribution with a tail, next tokens often among the K."""
    generator = torch.Generator().manual_seed(1)
    first_N1 = torch.randint(vocab, (tokens, 1), generator=generator)
    ids_NK = (first_N1 + torch.arange(k) * (vocab // k)) % vocab
    spread_NK1 = torch.randn(tokens, k + 1, generator=generator).mul(2).sort(-1, descending=True).values
    logp_NK1 = spread_NK1.log_softmax(-1)
    inside_N = ids_NK.gather(1, torch.randint(k, (tokens, 1), generator=generator))[:, 0]
    anywhere_N = torch.randint(vocab, (tokens,), generator=generator)
    next_N = torch.where(torch.rand(tokens, generator=generator) < 0.8, inside_N, anywhere_N)
    return Targets(next_N, ids_NK, logp_NK1[:, :-1].contiguous(), logp_NK1[:, -1].contiguous())


def inputs_of(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states as a final norm leaves them, in `dtype`, and a head in float32: logits with a deviation of 2."""
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(tokens, width, generator=generator).to(dtype)
    head_VD = torch.randn(vocab, width, generator=generator) * (2 / width**0.5)
    return hidden_ND.requires_grad_(), head_VD.requires_grad_()


def fused(name: str, chunk: int) -> LossFunction:
    """The product's loss: the fused head with the KD mix, or with cross-entropy alone."""
    weights = (0.0, 1.0) if name == "ce" else (KD_WEIGHT, CE_WEIGHT)
    mix = Mix(registry.get(name), LossOptions(), *weights)
    return lambda hidden_ND, head_VD, targets: (
        fused_head_loss(hidden_ND, head_VD, targets, mix, chunk).total / hidden_ND.shape[0]
    )


def _ce_sum(hidden_CD: torch.Tensor, head_VD: torch.Tensor, next_C: torch.Tensor) -> torch.Tensor:
    logits_CV = (hidden_CD @ head_VD.to(hidden_CD.dtype).T).float()
    return functional.cross_entropy(logits_CV, next_C, reduction="sum")


def ce_recomputed(chunk: int) -> LossFunction:
    """Chunks of torch's cross-entropy whose logits are computed again in the backward pass."""

    def loss(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets) -> torch.Tensor:
        weight_VD = head_VD.to(hidden_ND.dtype)
        parts = zip(hidden_ND.split(chunk), targets.next_N.split(chunk), strict=True)
        sums = [checkpoint(_ce_sum, hidden, weight_VD, following, use_reentrant=False) for hidden, following in parts]
        return torch.stack(sums).sum() / hidden_ND.shape[0]

    return loss


class _CeByChunk(torch.autograd.Function):
    """Chunks of torch's cross-entropy, each with its own backward pass as soon as it is computed."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, next_N: torch.Tensor, chunk: int) -> Any:
        weight_VD = head_VD.detach().to(hidden_ND.dtype)
        grad_hidden_ND, grad_head_VD = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        total = torch.zeros(())
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                logits_CV = (hidden_ND[rows] @ weight_VD.T).detach().requires_grad_()
                loss = functional.cross_entropy(logits_CV.float(), next_N[rows], reduction="sum")
                (grad_CV,) = torch.autograd.grad(loss, logits_CV)
            total += loss.detach()
            grad_hidden_ND[rows] = grad_CV @ weight_VD
            grad_head_VD += grad_CV.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        return total / hidden_ND.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden_ND, head_VD = ctx.saved_tensors
        scale = grads[0] / hidden_ND.shape[0]
        return hidden_ND * scale.to(hidden_ND.dtype), head_VD * scale, None, None


def ce_by_chunk(chunk: int) -> LossFunction:
    """Gradients in the forward pass, torch's cross-entropy inside."""
    return lambda hidden_ND, head_VD, targets: _CeByChunk.apply(hidden_ND, head_VD, targets.next_N, chunk)


def ce_whole(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Torch's cross-entropy on all logits at once."""
    return _ce_sum(hidden_ND, head_VD, targets.next_N) / hidden_ND.shape[0]


def kd_whole(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The same mix as the product's from its definition, on all logits at once, with autograd."""
    logits_NV = hidden_ND @ head_VD.to(hidden_ND.dtype).T
    logq_NV = (logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()).log_softmax(-1)
    logq_NK = logq_NV.gather(1, targets.ids_NK)
    rest_N = logq_NV.scatter(1, targets.ids_NK, -torch.inf).logsumexp(-1)
    inside_N = (targets.logp_NK.exp() * (targets.logp_NK - logq_NK)).sum(-1)
    kd_N = inside_N + targets.tail_N.exp() * (targets.tail_N - rest_N)
    ce_N = -logq_NV.gather(1, targets.next_N[:, None])[:, 0]
    return (KD_WEIGHT * kd_N + CE_WEIGHT * ce_N).mean()


def losses(chunk: int) -> dict[str, LossFunction]:
    """Every way that is timed; those with bounded memory are `kd` and the candidates for rival."""
    return {
        "kd": fused("decoupled_topk", chunk),
        "ce_fused": fused("ce", chunk),
        "ce_by_chunk": ce_by_chunk(chunk),
        "ce_recomputed": ce_recomputed(chunk),
        "ce_whole": ce_whole,
    }


BOUNDED = ("ce_fused", "ce_by_chunk", "ce_recomputed")


@dataclass
class Spent:
    """Seconds of one way, round by round: of the clock, and of all cores together."""

    clock: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    def take(self, work: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
        """Time one forward and backward; gradients start from nothing, as after `zero_grad`."""
        for leaf in leaves:
            leaf.grad = None
        clock, cores = time.perf_counter(), time.process_time()
        work().backward()
        self.clock.append(time.perf_counter() - clock)
        self.cores.append(time.process_time() - cores)


def in_turns(ways: dict[str, Callable[[], torch.Tensor]], leaves: list[torch.Tensor], rounds: int) -> dict[str, Spent]:
    """What each way spent, after one round that warms up."""
    spent = {name: Spent() for name in ways}
    for work in ways.values():
        Spent().take(work, leaves)
    for _ in range(rounds):
        for name, work in ways.items():
            spent[name].take(work, leaves)
    return spent


def summary(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, digits), "q1": round(first, digits), "q3": round(third, digits)}


def ratios(own: list[float], other: list[float]) -> dict[str, float]:
    """Summary of `own` over `other`, round by round."""
    return summary([mine / its for mine, its in zip(own, other, strict=True)], 3)


def against_rival(spent: dict[str, Spent]) -> dict[str, Any]:
    """KD's time over that of the fastest cross-entropy and of our own; all seconds."""
    kd, own = spent["kd"], spent["ce_fused"]
    rival = min((name for name in BOUNDED if name in spent), key=lambda name: statistics.median(spent[name].clock))
    return {
        "kd_over_ce": ratios(kd.clock, spent[rival].clock),
        "kd_over_ce_cores": ratios(kd.cores, spent[rival].cores),
        "rival": rival,
        "kd_over_ce_fused": ratios(kd.clock, own.clock),
        "kd_over_ce_fused_cores": ratios(kd.cores, own.cores),
        "seconds": {name: summary(one.clock) for name, one in spent.items()},
        "core_seconds": {name: summary(one.cores) for name, one in spent.items()},
    }


def time_losses(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Head and loss alone."""
    targets = targets_of(args.tokens, args.vocab, args.k)
    hidden_ND, head_VD = inputs_of(args.tokens, args.width, args.vocab, dtype)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        name: (lambda way=way: way(hidden_ND, head_VD, targets))
        for name, way in losses(args.chunk).items()
        if dtype == torch.bfloat16 or name not in ("ce_recomputed", "ce_whole")
    }
    rounds = args.rounds if dtype == torch.bfloat16 else max(2, args.rounds // 2)
    return against_rival(in_turns(ways, [hidden_ND, head_VD], rounds))


def student_of(args: argparse.Namespace) -> Any:
    """A random student of the teacher's widths in recipes/lfm_small's shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lmdistill.stages.student import StudentConfig
    from lmdistill.students.shape import random_config

    heads = args.width // 64
    teacher = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
    )
    config = StudentConfig(init="random", layers=args.layers, attention_layers=args.attention_layers)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(random_config(config, teacher)).train()


def time_steps(args: argparse.Namespace, rival: str) -> dict[str, Any]:
    """The losses inside a whole forward and backward of the student, bfloat16 products, float32 weights."""
    model = student_of(args)
    targets = targets_of(args.tokens, args.vocab, args.k)
    rows = max(1, args.tokens // ROW_TOKENS)
    tokens_RT = torch.randint(args.vocab, (rows, args.tokens // rows), generator=torch.Generator().manual_seed(3))

    def step(way: LossFunction) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden_RTD = model.model(input_ids=tokens_RT, use_cache=False).last_hidden_state
        return way(hidden_RTD.flatten(0, 1).bfloat16(), model.lm_head.weight, targets)

    chosen = {name: way for name, way in losses(args.chunk).items() if name in ("kd", "ce_fused", rival)}
    ways: dict[str, Callable[[], torch.Tensor]] = {name: (lambda way=way: step(way)) for name, way in chosen.items()}
    spent = in_turns(ways, list(model.parameters()), args.step_rounds)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**against_rival(spent), "parameters": parameters, "layers": list(model.config.layer_types)}


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {field}: peak memory can only be measured on Linux")


def peak_of(way: str, args: argparse.Namespace) -> int:
    """Bytes that one step of `way` adds to this process at its peak, gradients included."""
    step = {**losses(args.chunk), "kd_whole": kd_whole}[way]
    small = inputs_of(8, args.width, 8 * args.k, torch.bfloat16)
    step(*small, targets_of(8, 8 * args.k, args.k)).backward()  # loads the libraries
    hidden_ND, head_VD = inputs_of(args.tokens, args.width, args.vocab, torch.bfloat16)
    targets = targets_of(args.tokens, args.vocab, args.k)
    before = status_bytes("VmRSS")
    step(hidden_ND, head_VD, targets).backward()
    return status_bytes("VmHWM") - before


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Each way in a fresh process."""
    shape = [f"--{key}={getattr(args, key)}" for key in ("vocab", "tokens", "k", "width", "chunk")]
    peaks = {}
    for way in ("kd", "ce_fused", "kd_whole"):
        command = [sys.executable, __file__, "--peak-of", way, *shape]
        peaks[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "bytes": peaks,
        "naive_over_fused": round(peaks["kd_whole"] / peaks["kd"], 2),
        "head_gradient_bytes": 4 * args.vocab * args.width,  # in every one of them: the result itself
    }


def gradient_error(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """‖gradient − float64 autograd's‖ / ‖float64 autograd's‖ for hidden states and head, and the loss' error."""
    targets = targets_of(CHECKED_TOKENS, args.vocab, args.k)
    exact = Targets(targets.next_N, targets.ids_NK, targets.logp_NK.double(), targets.tail_N.double())
    hidden_ND, head_VD = inputs_of(CHECKED_TOKENS, args.width, args.vocab, dtype)
    loss = fused("decoupled_topk", args.chunk)(hidden_ND, head_VD, targets)
    loss.backward()
    hidden64_ND = hidden_ND.detach().double().requires_grad_()
    head64_VD = head_VD.detach().to(dtype).double().requires_grad_()
    loss64 = kd_whole(hidden64_ND, head64_VD, exact)
    loss64.backward()
    found = {"loss": abs(loss.item() - loss64.item()) / loss64.item()}
    for name, own, wanted in (("hidden", hidden_ND, hidden64_ND), ("head", head_VD, head64_VD)):
        found[name] = ((own.grad.double() - wanted.grad).norm() / wanted.grad.norm()).item()
    return {name: float(f"{value:.2e}") for name, value in found.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    load = hardware()
    memory = measure_memory(args)
    alone = {name: time_losses(args, getattr(torch, name)) for name in ("bfloat16", "float32")}
    kept = ("vocab", "width", "tokens", "k", "chunk", "rounds", "step_rounds", "layers", "attention_layers")
    return {
        "loss": alone,
        "step": {"bfloat16": time_steps(args, alone["bfloat16"]["rival"])},
        "memory": memory,
        "gradient_error": {name: gradient_error(args, getattr(torch, name)) for name in ("bfloat16", "float32")},
        "setting": {key: getattr(args, key) for key in kept},
        "hardware": load,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/loss.py", *sys.argv[1:]]),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--vocab", type=int, default=49_152, help="V")
    parser.add_argument("--width", type=int, default=576, help="D, a multiple of 64")
    parser.add_argument("--tokens", type=int, default=2_048, help="N, a multiple of 256 or less than that")
    parser.add_argument("--k", type=int, default=32, help="K")
    parser.add_argument("--chunk", type=int, default=512, help="C, the distill stage's default")
    parser.add_argument("--rounds", type=int, default=4, help="of the losses in bfloat16; half as many in float32")
    parser.add_argument("--step-rounds", type=int, default=3, help="of the whole steps")
    parser.add_argument("--layers", type=int, default=21, help="of the student")
    parser.add_argument("--attention-layers", type=int, default=9, help="of the student")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is kept")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, keep the result, print it."""
    args = parse()
    if args.peak_of:
        print(peak_of(args.peak_of, args))
        return
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
