"""Training speed: `distill` from a teacher cache against TRL's GKDTrainer with the teacher beside the student.

    python benchmarks/train.py [--json] [--run runs/lfm_small] [--rows 4] [--steps 12] [--compile]

Both run their own `train()` in this process, on the same student, rows, order, batch and precision, and take turns: a
turn is one whole optimiser step, from fetching the batch to the optimiser's update. GKD is off-policy (lmbda 0: nothing
is sampled) with the forward KL (beta 0, its cheapest loss), the teacher's weights in the precision of the products.
Student and cache come from the run folder of recipes/lfm_small.yaml; where there is none, a cache of a few rows is made
first, and a student of that shape with random weights.

`flops_bound` is what the teacher's forward pass costs by itself: (2·Nt + 6·Ns) / (6·Ns) for Nt and Ns parameters. A
ratio above it is what else a cache and a loss fused with the head save. Under six minutes on two free cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import hardware
from teacher_cache.text import ROW_TOKENS, TEACHER, build_corpus
from transformers import AutoModelForCausalLM, TrainerCallback

from lmdistill import assets
from lmdistill.checkpoints import load_model, load_tokenizer, save_model
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.signals.capture import Capture
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.student import StudentConfig
from lmdistill.students.shape import random_config
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.registry import create_engine
from lmdistill.training import run as distilling
from lmdistill.training.config import DistillConfig
from lmdistill.training.data import row_order, to_inputs

RESULT = Path(__file__).parent / "results" / "train.json"
WARM = 2  # steps of each that are not counted
OURS, THEIRS = "ours", "trl_gkd"


@dataclass
class Turns:
    """Whose step it is; both trainers run in threads of their own, one of them at a time."""

    order: list[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: list[BaseException] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, name: str) -> None:
        """Until it is this trainer's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == name or self.failed)
        if self.failed:
            raise SystemExit("the other trainer failed")

    def pass_on(self) -> None:
        """The turn goes to the other."""
        with self.changed:
            self.order.append(self.order.pop(0))
            self.changed.notify_all()

    def run(self, trainers: dict[str, Callable[[], Any]]) -> None:
        """All trainers, until each is done; raises what the first one raised."""

        def work(train: Callable[[], Any]) -> None:
            try:
                train()
            except BaseException as error:
                with self.changed:
                    self.failed.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=work, args=(train,)) for train in trainers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]


class TakesTurns(TrainerCallback):  # type: ignore[misc]
    """Times every step of a trainer, and lets the other one make its own in between."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns, self.name, self.seconds = turns, name, turns.seconds.setdefault(name, [])

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first turn."""
        self.turns.wait(self.name)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A turn ends where a step does; no checkpoint is written."""
        self.seconds.append(time.perf_counter() - self.started)
        control.should_save = False
        self.turns.pass_on()
        if state.global_step < state.max_steps:
            self.turns.wait(self.name)
        self.started = time.perf_counter()
        return control


def make_cache(folder: Path, teacher: ModelRef, tokens: int) -> None:
    """The teacher's top 32 on a little real text."""
    corpus = build_corpus(folder.parent / "corpus", teacher, tokens)
    engine = create_engine("transformers")
    engine.open(teacher, EngineOptions(32, corpus.meta.vocab_size, "bfloat16"))
    info = TeacherInfo(teacher.source, teacher.digest, "bfloat16", "transformers", engine.version())
    layout = Layout(ROW_TOKENS, 32, corpus.meta.vocab_size)
    Capture(folder, corpus, ("train",), layout, info, lambda: engine, 10_000, 8, progress=SilentProgress()).run()


def make_student(folder: Path, teacher: ModelRef, layers: int, attention_layers: int) -> None:
    """A student with random weights: they do not change how long a step takes."""
    config = StudentConfig(init="random", layers=layers, attention_layers=attention_layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(random_config(config, load_model(teacher.path).config))
    save_model(model, folder, teacher.path)


def find(args: argparse.Namespace, teacher: ModelRef, scratch: Path) -> tuple[Path, Path, str]:
    """Folders of the cache and of the student, and where they come from."""
    caches, students = (sorted(args.run.glob(f"[0-9]*-{stage}-*/out")) for stage in ("teach", "student"))
    if caches and students:
        return caches[0], students[0] / "model", str(args.run)
    make_cache(scratch / "signals", teacher, (WARM + args.steps) * args.rows * ROW_TOKENS)
    make_student(scratch / "student", teacher, args.layers, args.attention_layers)
    return scratch / "signals", scratch / "student", "made for this"


def ours(reader: SignalsReader, student: Path, args: argparse.Namespace, scratch: Path) -> Any:
    """The trainer of `distill`, with the keys of recipes/lfm_small.yaml."""
    config = DistillConfig(
        kd_weight=0.5,
        tokens=(WARM + args.steps) * args.rows * reader.row_tokens,
        batch_rows=args.rows,
        precision=args.precision,
    )
    place = distilling.Place(student, scratch / "out", scratch / "work", "cpu", "")
    model = load_model(student)
    if args.compile:
        distilling.compile_blocks(model)
    return distilling._trainer(model, reader, config, place, SilentProgress())


def trl_gkd(reader: SignalsReader, student: Path, teacher: Path, args: argparse.Namespace, scratch: Path) -> Any:
    """TRL's, on the same rows in the same order."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(records: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        inputs = to_inputs(reader.read([record["row"] for record in records]))
        tokens_RT = inputs["input_ids"]
        labels_RT = tokens_RT.clone()  # TRL shifts them itself
        labels_RT[:, 1:] = labels_RT[:, 1:].where(inputs["labels"][:, :-1] != -100, -100)
        return {"input_ids": tokens_RT, "attention_mask": torch.ones_like(tokens_RT), "labels": labels_RT}

    steps = WARM + args.steps
    model = load_model(student)
    if args.compile:
        distilling.compile_blocks(model)
    return GKDTrainer(
        model=model,
        teacher_model=load_model(teacher, args.precision),
        args=GKDConfig(
            output_dir=str(scratch / "gkd"),
            max_steps=steps,
            per_device_train_batch_size=args.rows,
            lmbda=0.0,
            beta=0.0,
            bf16=args.precision == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            logging_steps=5,
            save_strategy="no",
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"row": row_order(reader.rows, steps * args.rows, 0)}),
        processing_class=load_tokenizer(student),
    )


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median and quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, digits), "q1": round(first, digits), "q3": round(third, digits)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    if args.teacher:
        teacher = ModelRef("teacher", args.teacher, "0" * 64, str(args.teacher))
    else:
        teacher = assets.model_folder(TEACHER, SilentProgress())
    with tempfile.TemporaryDirectory() as folder:
        signals, student, origin = find(args, teacher, Path(folder))
        reader = SignalsReader(signals, "train")
        turns = Turns([OURS, THEIRS])
        mine, other = (
            ours(reader, student, args, Path(folder)),
            trl_gkd(reader, student, teacher.path, args, Path(folder)),
        )
        for name, trainer in ((OURS, mine), (THEIRS, other)):
            trainer.add_callback(TakesTurns(turns, name))
        parameters = {
            "student": sum(one.numel() for one in mine.model.parameters()),
            "teacher": sum(one.numel() for one in other.teacher_model.parameters()),
        }
        turns.run({OURS: mine.train, THEIRS: other.train})
    seconds = {name: values[WARM:] for name, values in turns.seconds.items()}
    ratios = [theirs / own for own, theirs in zip(seconds[OURS], seconds[THEIRS], strict=True)]
    tokens = args.rows * reader.row_tokens
    bound = (2 * parameters["teacher"] + 6 * parameters["student"]) / (6 * parameters["student"])
    return {
        "ours_tps": round(tokens / statistics.median(seconds[OURS]), 1),
        "trl_gkd_tps": round(tokens / statistics.median(seconds[THEIRS]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "flops_bound": round(bound, 3),
        "ratio_spread": spread(ratios, 3),
        "seconds_a_step": {name: spread(values, 3) for name, values in seconds.items()},
        "setting": {
            "rows": args.rows,
            "row_tokens": reader.row_tokens,
            "steps": args.steps,
            "precision": args.precision,
            "compile": args.compile,
            "parameters": parameters,
            "student": origin,
        },
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/train.py " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/lfm_small"), help="run folder with a cache and a student"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of the cache in a step")
    parser.add_argument("--steps", type=int, default=12, help="steps of each that are counted")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="of matrix products")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both students")
    parser.add_argument("--teacher", type=Path, default=None, help="a model folder; the embedded teacher without it")
    parser.add_argument("--layers", type=int, default=19, help="of a student made for this")
    parser.add_argument("--attention-layers", type=int, default=12, help="likewise")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    args = parser.parse_args()
    stdout, sys.stdout = sys.stdout, sys.stderr  # trainers print their logs
    result = measure(args)
    sys.stdout = stdout
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
