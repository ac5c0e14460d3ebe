"""Where a distillation step's time goes on a GPU: python benchmarks/gpu_profile.py [--json] [--rows 16] [--length 1024]

A random student of recipes/lfm_350m's shape learns from made-up teacher entries, as `distill` trains it: bfloat16
products, float32 weights, the fused head, AdamW; batches come from pinned memory by copies that overlap with the work.
Said are, for blocks as they are and compiled: milliseconds a step, tokens a second, the share of the GPU's peak that
the model's operations reach (MFU), peak memory, how often a step waits for the device (none should), and the kernels
that take the most time.

Without a GPU there is nothing to profile: it says so, prints null with --json, and ends well. `--device cpu` walks
through the same code to try it; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from machine import hardware

from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix
from lmdistill.losses.registry import LossOptions
from lmdistill.training import optimizer
from lmdistill.training.run import compile_blocks
from lmdistill.training.student_forward import attach_loss

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 operations a second, as the maker says
WARM, TIMED, SHOWN = 3, 10, 8  # steps before, steps timed, kernels listed


def student(args: argparse.Namespace) -> Any:
    """A random student of the recipe's shape on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lmdistill.stages.student import StudentConfig
    from lmdistill.students.shape import random_config

    heads = max(1, args.width // 64)
    teacher = LlamaConfig(vocab_size=args.vocab, hidden_size=args.width, num_attention_heads=heads)
    shape = StudentConfig(
        init="random",
        layers=args.layers,
        attention_layers=max(1, args.layers * 3 // 8),
        hidden_size=args.width,
        intermediate_size=args.width * 9 // 2,
        heads=heads,
        kv_heads=max(1, heads // 2),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(random_config(shape, teacher)).to(args.device).train()
    mix = Mix(registry.get("decoupled_topk"), LossOptions(temperature=2.0), 0.9, 0.1)
    return attach_loss(model, lambda: mix, args.chunk)


def batches(args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """The same made-up batch from pinned memory, copied to the device without waiting, for ever."""
    shape = (args.rows, args.length)
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(*shape, args.k + 1, generator=generator).sort(-1, descending=True).values.log_softmax(-1)
    tokens = torch.randint(args.vocab, shape, generator=generator)
    step = torch.arange(args.k) * (args.vocab // args.k)
    held = {
        "input_ids": tokens,
        "labels": tokens.roll(-1, 1),
        "counted": torch.arange(tokens.numel()),
        "teacher_ids": ((tokens[..., None] + step) % args.vocab).int(),
        "teacher_logp": spread[..., :-1].contiguous(),
        "teacher_tail": spread[..., -1].contiguous(),
    }
    if args.device != "cpu":
        held = {name: tensor.pin_memory() for name, tensor in held.items()}
    while True:
        yield {name: tensor.to(args.device, non_blocking=True) for name, tensor in held.items()}


def stepper(model: Any, args: argparse.Namespace) -> Any:
    """A function that makes one step."""
    sizes = optimizer.step_sizes(model, 1e-4, relative=False)
    built = optimizer.build(model, sizes, 0.1, (0.9, 0.95))
    given = batches(args)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(**next(given))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        built.step()
        built.zero_grad()

    return step


def settle(args: argparse.Namespace) -> None:
    """Until the device has done all it was given."""
    if args.device != "cpu":
        torch.cuda.synchronize()


def waits(step: Any, args: argparse.Namespace) -> int | None:
    """How often a step waits for the device, as CUDA counts; None where there is none."""
    if args.device == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def kernels(step: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The operations with the most time of their own, with their share of all."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if args.device == "cpu" else activity.CUDA]) as seen:
        step()
        settle(args)
    field = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
    spent = sorted(((getattr(one, field), one.key, one.count) for one in seen.key_averages()), reverse=True)
    total = sum(time for time, _, _ in spent) or 1
    return [{"name": name[:80], "share": round(own / total, 4), "calls": count} for own, name, count in spent[:SHOWN]]


def profile(args: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    """One way to train: its time, memory, waits and kernels."""
    model = student(args)
    if compiled:
        compile_blocks(model)
    step = stepper(model, args)
    for _ in range(WARM):
        step()
    settle(args)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(TIMED):
        step()
    settle(args)
    seconds = (time.perf_counter() - began) / TIMED
    tokens = args.rows * args.length
    operations = 6 * sum(parameter.numel() for parameter in model.parameters()) * tokens
    peak = next((peak for name, peak in PEAKS.items() if name in str(hardware()["gpu"])), None)
    return {
        "step_ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "mfu": None if peak is None else round(operations / seconds / peak, 4),
        "peak_bytes": None if args.device == "cpu" else torch.cuda.max_memory_allocated(),
        "waits": waits(step, args),
        "kernels": kernels(step, args),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object, or null without a GPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script")
    for name, default in {
        "rows": 16, "length": 1024, "vocab": 65536, "width": 1024, "layers": 16, "k": 32, "chunk": 4096
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Profile, or say that there is nothing to profile."""
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing to profile", file=sys.stderr)
        if args.json:
            print("null")
        return
    found = {
        "command": "python benchmarks/gpu_profile.py --json",
        "setting": {name: value for name, value in vars(args).items() if name != "json"},
        "hardware": hardware(),
        "eager": profile(args, compiled=False),
        "compiled": profile(args, compiled=True) if args.device == "cuda" else None,
    }
    if args.json:
        print(json.dumps(found))
        return
    for way in ("eager", "compiled"):
        print(f"{way}: {json.dumps(found[way], indent=1)}")


if __name__ == "__main__":
    main()
