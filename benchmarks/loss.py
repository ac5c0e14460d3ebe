"""The distillation loss in figures: time against the best cross-entropy, peak memory, exactness, and two rivals.

    python benchmarks/loss.py [--json] [--vocabs 49152 65536 151936] [--tokens 2048] [--k 32] [--rounds 2]

One object by vocabulary, the student's size being recipes/lfm_small's (random weights, bfloat16 products):

- `kd_over_ce_time`: seconds of a whole training step, forward and backward, with the KD mix (0.9 KD + 0.1 CE) over
  those of the same step with cross-entropy alone, computed by the way that is fastest here: the product's, torch's by
  chunks with gradients in the forward pass, torch's `linear_cross_entropy`, torch's on all logits at once;
- `fused_over_naive_peak`: peak memory beyond the inputs over that of the same loss with autograd on all logits, each in
  a process of its own (VmHWM of one step less VmRSS before it); `measured` has two and four times the tokens too;
- `grad_error`: float32 gradients against float64 autograd's, the largest difference over the largest entry;
- `rivals`: time and peak of the fused loss over those of Liger's chunked JSD and of the one in TRL's
  DistillationTrainer, over the whole vocabulary from a live teacher's hidden states (its forward is not counted).
  `pip install lmdistill[bench]`; without triton: `pip install --no-deps liger-kernel`.

`measured` says on what, when and how, with every round's ratio, and what each loss of the family costs. Ways come in
turns within a round. Also written to benchmarks/results/loss.json. About ten minutes on two free cores.

Axes: R rows, T positions, D hidden width.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from head.case import Case, Shape, Way, case_of, warm_up
from head.memory import in_child, peaks_of
from head.rivals import RIVALS, rival
from head.timing import Work, fastest, in_turns, medians, ratio
from head.ways import fused, kd_whole, plain_ce
from machine import hardware

from lmdistill.losses import registry
from lmdistill.losses.registry import Targets

RESULT = Path(__file__).parent / "results" / "loss.json"
ROW_TOKENS = 256
CHECKED_TOKENS = 32  # of the comparison with float64
LOSS = "decoupled_topk"
ABSENT = {"cut_cross_entropy": "its kernels are for Triton on a GPU"}


def time_head(shape: Shape, rounds: int) -> tuple[str, dict[str, Any]]:
    """Head and loss alone, KD and every plain cross-entropy: the fastest of these, and the seconds."""
    case = case_of(shape, torch.bfloat16)
    ways = {"kd": fused(LOSS, shape.chunk), **plain_ce(shape.chunk)}
    warm_up(ways.values(), shape, live=False)
    spent = in_turns({name: (lambda way=way: way(case)) for name, way in ways.items()}, case.leaves, rounds, warm=False)
    kd = spent.pop("kd")
    best = fastest(spent)
    return best, {"kd_over_ce": ratio(kd, spent[best]), "best_ce": best, "seconds": medians({"kd": kd, **spent})}


def student_of(args: argparse.Namespace, vocab: int) -> Any:
    """A random student of the teacher's widths in recipes/lfm_small's shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lmdistill.stages.student import StudentConfig
    from lmdistill.students.shape import random_config

    heads = args.width // 64
    teacher = LlamaConfig(
        vocab_size=vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
    )
    config = StudentConfig(init="random", layers=args.layers, attention_layers=args.attention_layers)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(random_config(config, teacher)).train()


def time_steps(args: argparse.Namespace, shape: Shape, best_ce: str) -> dict[str, Any]:
    """KD and the best cross-entropy inside a whole forward and backward, bfloat16 products, float32 weights."""
    model, targets = student_of(args, shape.vocab), case_of(shape, torch.bfloat16).targets
    rows = max(1, shape.tokens // ROW_TOKENS)
    tokens_RT = torch.randint(shape.vocab, (rows, shape.tokens // rows), generator=torch.Generator().manual_seed(3))

    def step(way: Way) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden_RTD = model.model(input_ids=tokens_RT, use_cache=False).last_hidden_state
        return way(Case(hidden_RTD.flatten(0, 1).bfloat16(), model.lm_head.weight, targets))

    ways = {"kd": fused(LOSS, shape.chunk), "ce": plain_ce(shape.chunk)[best_ce]}
    works: dict[str, Work] = {name: (lambda way=way: step(way)) for name, way in ways.items()}
    spent = in_turns(works, list(model.parameters()), args.step_rounds, warm=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"kd_over_ce": ratio(spent["kd"], spent["ce"]), "seconds": medians(spent), "parameters": parameters}


def time_rivals(shape: Shape, rounds: int) -> dict[str, Any]:
    """Ours over each rival in time, or why there is no figure."""
    case = case_of(shape, torch.bfloat16, live=True)
    ways = {"ours": fused(LOSS, shape.chunk)}
    absent = {}
    for name in RIVALS:
        found = rival(name)
        if isinstance(found, str):
            absent[name] = found
        else:
            ways[name] = found
    warm_up(ways.values(), shape, live=True)
    spent = in_turns({name: (lambda way=way: way(case)) for name, way in ways.items()}, case.leaves, rounds, warm=False)
    ratios = {name: ratio(spent["ours"], seconds) for name, seconds in spent.items() if name != "ours"}
    return {"ratios": ratios, "absent": absent, "seconds": medians(spent), "tokens": shape.tokens}


def peak_memory(args: argparse.Namespace, shape: Shape, rivals: list[str]) -> dict[str, list[int]]:
    """Peak bytes of each way at the tokens asked for; of the fused loss at twice and four times as many too."""
    arguments = [f"--{key}={getattr(args, key)}" for key in ("width", "k", "chunk", "tokens")]
    arguments += ["--vocabs", str(shape.vocab)]
    sizes = [shape.tokens, 2 * shape.tokens, 4 * shape.tokens]
    peaks = {"kd": in_child(__file__, "kd", sizes, arguments)}
    for way in ("ce", "kd_whole", *rivals):
        peaks[way] = in_child(__file__, way, sizes[:1], arguments)
    return peaks


def _peak_of(name: str, shape: Shape, sizes: list[int]) -> list[int]:
    own = {"kd": fused(LOSS, shape.chunk), "ce": fused("ce", shape.chunk), "kd_whole": kd_whole}
    way = own.get(name) or rival(name)
    assert not isinstance(way, str), way
    return peaks_of(way, shape, sizes, live=name not in own)


def gradient_error(shape: Shape, dtype: torch.dtype) -> float:
    """Largest difference from float64 autograd's gradients, over their largest entry; hidden states and head."""
    case = case_of(shape.of(CHECKED_TOKENS), dtype)
    fused(LOSS, shape.chunk)(case).backward()
    next_N, ids_NK, logp_NK, tail_N = (getattr(case.targets, one) for one in ("next_N", "ids_NK", "logp_NK", "tail_N"))
    exact = Case(
        case.hidden_ND.detach().double().requires_grad_(),
        case.head_VD.detach().to(dtype).double().requires_grad_(),
        Targets(next_N, ids_NK, logp_NK.double(), tail_N.double()),
    )
    kd_whole(exact).backward()
    errors = []
    for own, wanted in zip(case.leaves, exact.leaves, strict=True):
        assert own.grad is not None and wanted.grad is not None
        errors.append(((own.grad.double() - wanted.grad).abs().max() / wanted.grad.abs().max()).item())
    return float(f"{max(errors):.2e}")


def family_cost(shape: Shape, rounds: int) -> dict[str, float]:
    """Seconds of each loss of the family, head and all, over those of decoupled_topk."""
    case = case_of(shape, torch.bfloat16, live=True)
    ways = {name: fused(name, shape.chunk) for name in registry.catalogue()}
    works: dict[str, Work] = {name: (lambda way=way: way(case)) for name, way in ways.items()}
    spent = in_turns(works, case.leaves, rounds, warm=True)
    return {name: ratio(seconds, spent[LOSS])["median"] for name, seconds in spent.items()}


def measure_one(args: argparse.Namespace, shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of one vocabulary, and what lies behind them."""
    best_ce, alone = time_head(shape, args.rounds)
    against = time_rivals(shape.of(max(1, shape.tokens // 2)), args.rounds)
    peaks = peak_memory(args, shape, list(against["ratios"]))
    step = time_steps(args, shape, best_ce)
    rivals: dict[str, Any] = {
        name: {"time_ratio": found["median"], "peak_ratio": round(peaks["kd"][0] / peaks[name][0], 4)}
        for name, found in against["ratios"].items()
    }
    rivals |= {name: {"time_ratio": None, "peak_ratio": None, "why": why} for name, why in against["absent"].items()}
    figures = {
        "kd_over_ce_time": step["kd_over_ce"]["median"],
        "fused_over_naive_peak": round(peaks["kd"][0] / peaks["kd_whole"][0], 4),
        "grad_error": gradient_error(shape, torch.float32),
        "rivals": rivals,
    }
    behind = {"step": step, "head_alone": alone, "rivals": against, "peak_bytes": peaks}
    return figures, {**behind, "grad_error_bfloat16": gradient_error(shape, torch.bfloat16)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    kept = ("tokens", "k", "chunk", "rounds", "step_rounds", "layers", "attention_layers")
    measured: dict[str, Any] = {
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/loss.py", *sys.argv[1:]]),
        "hidden_width": args.width,
        **{key: getattr(args, key) for key in kept},
        "absent": ABSENT,
        "by_vocabulary": {},
    }
    figures: dict[str, Any] = {}
    for vocab in args.vocabs:
        found = measure_one(args, _shape(args, vocab))
        figures[str(vocab)], measured["by_vocabulary"][str(vocab)] = found
    first = _shape(args, args.vocabs[0])
    measured["family_over_decoupled_topk"] = family_cost(first.of(max(1, args.tokens // 4)), args.rounds)
    return {**figures, "measured": measured}


def _shape(args: argparse.Namespace, vocab: int) -> Shape:
    return Shape(args.tokens, vocab, args.width, args.k, args.chunk)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--vocabs", type=int, nargs="+", default=[49_152, 65_536, 151_936], help="V")
    parser.add_argument("--width", type=int, default=576, help="D, a multiple of 64")
    parser.add_argument("--tokens", type=int, default=2_048, help="N, a multiple of 256; half of it with rivals")
    parser.add_argument("--k", type=int, default=32, help="K")
    parser.add_argument("--chunk", type=int, default=512, help="C, the distill stage's default")
    parser.add_argument("--rounds", type=int, default=2, help="of heads and losses alone")
    parser.add_argument("--step-rounds", type=int, default=3, help="of the whole steps")
    parser.add_argument("--layers", type=int, default=19, help="of the student")
    parser.add_argument("--attention-layers", type=int, default=12, help="of the student")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is kept")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, keep the result, print it."""
    args = parse()
    if args.peak_of:
        print(json.dumps(_peak_of(args.peak_of, _shape(args, args.vocabs[0]), args.sizes)))
        return
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
