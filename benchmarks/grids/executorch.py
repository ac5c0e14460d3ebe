"""A parent as `.pte` programs beside llama.cpp's files.

    python benchmarks/quantize.py runs/lfm_small --ways executorch

Exactness: logits of pte_f32 against transformers', and a model on the 8da4w grid with scales of its own (those of least
squared error, which no runtime would find again) packed and read back, every tensor. Size, share of the compute in
XNNPACK, held-out loss, and prefill and decode in turns with llama.cpp's f32 and q4_0. Lowering is most of the time:
some 8 CPU seconds a layer in float32 and twice that on the grid.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from grids.parent import Figures, Parent, Piece
from lmdistill.checkpoints import load_model, save_model
from lmdistill.deployment.export import RECORD, Export
from lmdistill.deployment.llama_cpp_runtime import default_threads
from lmdistill.deployment.targets import target_of
from lmdistill.evaluation.runtimes import runtime_class
from lmdistill.evaluation.speed import SpeedPlan, SpeedTarget, measure
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.on_grid import kept_on_its_grids
from lmdistill.quantization.start import put_on_grids
from lmdistill.quantization.wanted import wanted

NAME = "executorch"
FLOAT, SMALL = "pte_f32", "pte_8da4w_all"
BESIDE = {FLOAT: "f32", SMALL: "q4_0"}  # what llama.cpp has of the same precision
SPEED = SpeedPlan(prefill=512, decode=128, repeats=11, threads=default_threads())
CONTEXT = 1024
PARITY_TOKENS = 512
LOWERING = 1e-5  # seconds a parameter that f32, 8da4w and the packed model take together on two quiet cores


def pieces(parent: Parent) -> dict[str, Piece]:
    """All figures of one parent, in the order in which they need each other."""
    formats = (*BESIDE.values(), *BESIDE)
    lowering = LOWERING * parent.weights / 2
    made = {
        "export": (lambda: _exported(parent, parent.folder, "plain", formats, CONTEXT), lowering),
        "packed": (lambda: _packed(parent, CONTEXT), lowering),
        **{name: (partial(_scored, parent, name), 60.0) for name in (SMALL, BESIDE[SMALL])},
        "rounding": (lambda: _rounding(parent), parent.forward_seconds(6 * PARITY_TOKENS)),
        "digits": (lambda: _last_digits(parent), parent.forward_seconds(4 * PARITY_TOKENS)),
        "speed": (lambda: _speed(parent, SPEED), 120.0),
    }
    own = {name: Piece(f"{NAME}-{name}", make, seconds) for name, (make, seconds) in made.items()}
    return {"parent": parent.alone, **own}


def figures(parent: Parent) -> Figures:
    """Those figures, as the page has them."""
    made = {name: parent.kept(piece) for name, piece in pieces(parent).items()}
    entries, packed, rows = _entries(parent), made["packed"], made["speed"]["rows"]
    return {
        "fp32_max_abs": entries[FLOAT]["parity"]["max_abs"],
        "fp32_of_transformers": made["rounding"]["max_abs"],
        "fp32_mean_kl": entries[FLOAT]["parity"]["mean_kl"],
        "delegated": {name: entries[name]["delegated"] for name in BESIDE},
        "bit_equal": packed["bit_equal"] == packed["tensors"],
        "tensors": packed["tensors"],
        "packed_max_abs": packed["max_abs"],
        "packed_mean_kl": _entries(parent, "packed")[SMALL]["parity"]["mean_kl"],
        "packed_kl_of_last_digits": made["digits"]["kl"],
        "files": {name: _row(entries[name], made.get(name, {}), rows[name]) for name in entries},
        "over_llama_cpp": {
            name: {kind: round(rows[name][kind]["median"] / rows[beside][kind]["median"], 3) for kind in _RATES}
            for name, beside in BESIDE.items()
        },
        "threads": SPEED.threads,
        "context": CONTEXT,
    }


def _entries(parent: Parent, kind: str = "plain") -> dict[str, Figures]:
    """What the export says of each file, by format."""
    record = json.loads((_out(parent, kind) / RECORD).read_text())
    return {entry["format"]: entry for entry in record["files"]}


def _files(parent: Parent) -> dict[str, Path]:
    return {name: _out(parent, "plain") / entry["file"] for name, entry in _entries(parent).items()}


_RATES = ("prefill_tps", "decode_tps")


def _out(parent: Parent, kind: str) -> Path:
    return parent.work / f"{NAME}-{kind}" / "out"


def _exported(parent: Parent, model: Path, kind: str, formats: tuple[str, ...], context: int) -> Figures:
    """deployment.json of the parent's files, made and proven as the export stage does."""
    out = _out(parent, kind)
    out.mkdir(parents=True, exist_ok=True)
    _export(parent, model, out, formats, context).run(SilentProgress())
    found: Figures = json.loads((out / RECORD).read_text())
    return found


def _export(parent: Parent, model: Path, out: Path, formats: tuple[str, ...], context: int) -> Export:
    return Export(
        model=ModelRef(parent.name, model, "0" * 64),
        name=parent.name,
        formats=formats,
        conversations=16,
        parity_tokens=PARITY_TOKENS,
        out=out,
        work=out.parent / "work",
        context=context,
    )


def _rounding(parent: Parent) -> Figures:
    """How far float32 takes transformers itself from float64 on the same tokens: no program can be held to less."""
    import torch

    sequences = _export(parent, parent.folder, _out(parent, "plain"), (FLOAT,), CONTEXT).sequences()
    single, double = (load_model(parent.folder, dtype) for dtype in ("float32", "float64"))
    with torch.inference_mode():
        tokens = [torch.tensor([ids]) for ids in sequences]
        return {"max_abs": max(float((double(ids).logits - single(ids).logits).abs().max()) for ids in tokens)}


def _packed(parent: Parent, context: int) -> Figures:
    """The parent on the grid with fitted scales, packed into a program that must hold its very codes and scales."""
    folder = parent.work / f"{NAME}-grid"
    keys = QuantizeKeys(grid="8da4w", embeddings="8da4w", start="fitted", scales="fixed")
    if not (folder / "grids" / "grids.json").exists():
        model = load_model(parent.folder)
        placement = wanted(keys, json.loads((parent.folder / "config.json").read_text()))
        handle = put_on_grids(model, keys, placement, iter(()))
        placed = handle.settle()
        save_model(model, folder, parent.folder)
        placed.save(folder)
    [entry] = _exported(parent, folder, "packed", (SMALL,), context)["files"]
    tensors = len(json.loads((folder / "grids" / "grids.json").read_text())["tensors"])
    return {"bit_equal": entry["bit_equal"], "tensors": tensors, "max_abs": entry["parity"]["max_abs"]}


def _last_digits(parent: Parent) -> Figures:
    """What activations rounded to 8 bits make of a change in the last digits: KL in transformers to itself.

    The model on its grid, with embeddings changed by 1e-6 of themselves: no two runtimes can be expected nearer.
    """
    import torch

    from lmdistill.evaluation.divergence import kl

    folder = parent.work / f"{NAME}-grid"
    sequences = _export(parent, folder, _out(parent, "packed"), (SMALL,), CONTEXT).sequences()
    spoken = []
    for change in (0.0, 1e-6):
        model = load_model(folder)
        kept_on_its_grids(model, folder)
        torch.manual_seed(0)
        model.model.embed_tokens.register_forward_hook(
            lambda _, ids, found, size=change: found * (1 + size * torch.randn_like(found))
        )
        with torch.no_grad():
            spoken.append(torch.cat([model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in sequences]))
    return {"kl": float(kl(*spoken).mean())}


def _scored(parent: Parent, name: str) -> Figures:
    opened = runtime_class(target_of(name).runtime).open(_files(parent)[name], parent.options, exact=True)
    return parent.scored(opened)


def _speed(parent: Parent, plan: SpeedPlan) -> Figures:
    """All files in turns."""
    targets = [SpeedTarget(name, target_of(name).runtime, file) for name, file in _files(parent).items()]
    return {"rows": measure(targets, plan, parent.work / f"{NAME}-logs")}


def _row(entry: Figures, score: Figures, speed: Figures) -> Figures:
    """One file as the page has it."""
    rates = {kind: {key: round(speed[kind][key], 1) for key in ("median", "q1", "q3")} for kind in _RATES}
    kept = {key: score[key] for key in ("kl", "nll") if key in score}
    return {"bytes": entry["bytes"], **rates, "peak_rss_bytes": speed["peak_rss_bytes"], **kept}
