"""Do intermediate losses help beside distillation? One start, few tokens, held-out loss, with and without them.

    python benchmarks/intermediate.py runs/lfm_small [--json] [--tokens 10240] [--seeds 1] [--heldout 4096]

The grown student, the teacher cache and the corpus are those of a finished run of recipes/lfm_small.yaml; the teacher
runs beside the student for what the cache does not hold. Every way trains on the same rows in the same order with the
loss at the head of that recipe; the last one has no loss at the head. Differences from `kd` are paired by held-out row,
with their standard error over rows; seeds are orders of the rows. The result is also written to
benchmarks/results/intermediate.json. About three minutes a way and seed on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import hardware
from signals import TEACHER

from lmdistill.assets import model_folder
from lmdistill.evaluation.heldout import HeldOut, read_heldout
from lmdistill.evaluation.references import Reference, ReferenceWriter
from lmdistill.evaluation.runtimes import RuntimeOptions
from lmdistill.evaluation.runtimes.checkpoint import CheckpointRuntime
from lmdistill.evaluation.scorer import RowSums, paired_gap, score, summarise
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.config import DistillConfig
from lmdistill.training.run import Place, train

RESULT = Path(__file__).parent / "results" / "intermediate.json"
GROWN = {"layers": "grown", "live": True}
WAYS: dict[str, dict[str, Any]] = {
    "kd": {},
    "kd + hidden_mse": {"intermediate": [{"loss": "hidden_mse", **GROWN}]},
    "kd + 10 hidden_mse": {"intermediate": [{"loss": "hidden_mse", "weight": 10, **GROWN}]},
    "kd + 100 hidden_mse": {"intermediate": [{"loss": "hidden_mse", "weight": 100, **GROWN}]},
    "kd + hidden_cosine": {"intermediate": [{"loss": "hidden_cosine", **GROWN}]},
    "kd + hidden_cka": {"intermediate": [{"loss": "hidden_cka", **GROWN}]},
    "kd + mi_alpha": {"intermediate": [{"loss": "mi_alpha", "weight": 0.1, "layers": {-1: -1}, "live": True}]},
    "kd + relation_kl": {"intermediate": [{"loss": "relation_kl", "layers": "grown"}]},
    "kd + 10 relation_kl": {"intermediate": [{"loss": "relation_kl", "weight": 10, "layers": "grown"}]},
    "kd + relation_mse": {"intermediate": [{"loss": "relation_mse", "weight": 0.01, "layers": "grown"}]},
    "kd + block_local": {"intermediate": [{"loss": "block_local", **GROWN}]},
    "hidden_mse alone": {"loss": "none", "intermediate": [{"loss": "hidden_mse", **GROWN}]},
}


def _stage(run: Path, name: str) -> Path:
    """The files of a run's stage."""
    found = sorted(run.glob(f"[0-9]*-{name}-*/out"))
    if not found:
        sys.exit(f"{run} has no finished stage '{name}': run recipes/lfm_small.yaml first")
    return found[0]


def _score(model: Path, heldout: HeldOut, reference: Path) -> RowSums:
    runtime = CheckpointRuntime.open(model, RuntimeOptions(heldout.sequence_length), exact=True)
    if reference.exists():
        known = Reference(reference, heldout.predictions, heldout.vocab_size)
        return score(runtime, heldout, teacher=known)
    with ReferenceWriter(reference) as writer:
        return score(runtime, heldout, keep=writer)


def _trained(name: str, seed: int, arguments: argparse.Namespace, teacher: ModelRef, folder: Path) -> dict[str, Any]:
    """Train one way into `folder`; its curve and the CPU seconds it took."""
    keys = {"kd_weight": 0.5, "tokens": arguments.tokens, "batch_rows": 4, "seed": seed}
    config = DistillConfig.model_validate({**keys, **WAYS[name]})
    student = _stage(arguments.run, "student") / "model"
    live = teacher if config.runs_teacher else None
    begin = time.process_time()
    place = Place(student, folder / "model", folder / "work", "cpu", "", live, teacher)
    record = train(SignalsReader(_stage(arguments.run, "teach")), config, place, SilentProgress())
    return {"cpu_seconds": round(time.process_time() - begin, 1), "log": record["log"]}


def _measured(arguments: argparse.Namespace, teacher: ModelRef) -> Iterator[dict[str, Any]]:
    """One record a way and seed, each as soon as it is there."""
    heldout = read_heldout(_stage(arguments.run, "corpus"), "valid", arguments.heldout)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "teacher.f32"
        yield {"way": "teacher", "seed": 0, **summarise(_score(teacher.path, heldout, reference))}
        start = _score(_stage(arguments.run, "student") / "model", heldout, reference)
        yield {"way": "start", "seed": 0, **summarise(start)}
        for seed in range(arguments.seeds):
            plain: RowSums | None = None
            for name in arguments.ways:
                where = Path(folder) / f"{name}-{seed}"
                trained = _trained(name, seed, arguments, teacher, where)
                rows = _score(where / "model", heldout, reference)
                shutil.rmtree(where)
                plain = plain or rows
                gap = dict(zip(("nll_gap", "nll_gap_se"), paired_gap(rows, plain), strict=True))
                gap |= dict(zip(("kl_gap", "kl_gap_se"), paired_gap(rows, plain, "kl_to_teacher"), strict=True))
                yield {"way": name, "seed": seed, **summarise(rows), **(gap if rows is not plain else {}), **trained}


def _table(records: list[dict[str, Any]]) -> str:
    lines = ["| way | seed | NLL | minus kd | KL to teacher | minus kd | CPU s |", "|---|---|---|---|---|---|---|"]
    for one in records:
        cells = [one["way"], str(one["seed"])]
        for figure, gap in (("nll", "nll_gap"), ("kl_to_teacher", "kl_gap")):
            cells.append("" if one[figure] is None else f"{one[figure]:.4f}")
            cells.append(f"{one[gap]:+.4f} ± {one[gap + '_se']:.4f}" if gap in one else "")
        lines.append(f"| {' | '.join(cells)} | {one.get('cpu_seconds', 0):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write after every way, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of recipes/lfm_small.yaml")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--tokens", type=int, default=10_240, help="to train on")
    parser.add_argument("--heldout", type=int, default=4096, help="held-out tokens to score")
    parser.add_argument("--seeds", type=int, default=1, help="orders of the rows")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS), help="which; kd first")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is written")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python benchmarks/intermediate.py {' '.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "setting": {"tokens": arguments.tokens, "heldout": arguments.heldout, "seeds": arguments.seeds},
        "ways": [],
    }
    for record in _measured(arguments, model_folder(TEACHER, SilentProgress())):
        result["ways"].append(record)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if arguments.json else _table(result["ways"]))


if __name__ == "__main__":
    main()
