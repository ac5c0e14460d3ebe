"""How much of an engine's bare forward is left when it scores into a written cache; both in turns, round by round.

    python -m teacher_cache.shares JOB.json    (in benchmarks/; for vLLM, in its own environment)

Axes: B rows, T tokens in a row.
Bare: body and head at every position, nothing kept. vLLM is asked for the log-prob of the prompt's own tokens alone:
the least for which it runs its head at every position.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, CorpusReader
from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import ModelRef, Runtime, SilentProgress
from lmdistill.signals.capture import Capture
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.registry import check_engine, create_engine
from teacher_cache.reading import quartiles

BATCH_ROWS, SHARD_ROWS = 8, 256  # the teach stage's defaults
Bare = Callable[[NDArray[Any], NDArray[np.bool_]], None]


class Seconds(NamedTuple):
    """How long something took."""

    wall: float
    cores: float  # of this process' processor time, all threads together


@dataclass(frozen=True)
class Job:
    """What is captured, how often."""

    engine: str
    teacher: ModelRef
    corpus: Path
    k: int
    precision: str
    rounds: int

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        fields = json.loads(text)
        teacher = fields.pop("teacher")
        gguf = teacher.pop("gguf")
        model = ModelRef(**{**teacher, "path": Path(teacher["path"])}, gguf=gguf and Path(gguf))
        return cls(**{**fields, "corpus": Path(fields["corpus"])}, teacher=model)


def measure(job: Job) -> dict[str, Any] | None:
    """The share with its spread, and tokens a second; None where the engine is not installed."""
    try:
        check_engine(job.engine)
    except PreflightError:
        return None
    corpus, engine, device = CorpusReader(job.corpus), create_engine(job.engine), Runtime().resolve_device()
    length, vocab = corpus.meta.sequence_length, corpus.meta.vocab_size
    engine.open(job.teacher, EngineOptions(job.k, vocab, job.precision, device, row_tokens=length))
    info = TeacherInfo(job.teacher.source, job.teacher.digest, job.precision, job.engine, engine.version())
    bare = _asked(engine) if job.engine == "vllm" else _by_chunks(engine)
    layout = Layout(length, job.k, vocab)
    _run_bare(bare, corpus, BATCH_ROWS)  # kernels are chosen, buffers made
    ways = {"bare": lambda: _run_bare(bare, corpus), "capture": lambda: _capture(engine, corpus, layout, info)}
    spent: dict[str, list[Seconds]] = {name: [] for name in ways}
    for number in range(job.rounds):
        for name in [*ways] if number % 2 == 0 else [*ways][::-1]:
            spent[name].append(_timed(ways[name]))
    figures = _figures(spent, len(corpus.split("train")) * length)
    return figures | {"engine_version": info.engine_version, "device": device}


def measure_elsewhere(job: Job, python: Path) -> dict[str, Any] | None:
    """The same with another interpreter."""
    benchmarks = Path(__file__).parents[1]
    path = os.pathsep.join([str(benchmarks.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.json").write_text(job.to_json())
        command = [str(python.absolute()), "-m", "teacher_cache.shares", str(Path(folder) / "job.json")]
        done = subprocess.run(
            command, cwd=benchmarks, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
    if done.returncode != 0:
        raise SystemExit(f"{python} could not measure {job.engine}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _timed(work: Callable[[], None]) -> Seconds:
    wall, cores = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cores)


def _figures(spent: dict[str, list[Seconds]], tokens: int) -> dict[str, Any]:
    pairs = list(zip(spent["bare"], spent["capture"], strict=True))
    shares, cores = [bare.wall / ours.wall for bare, ours in pairs], [bare.cores / ours.cores for bare, ours in pairs]
    return {
        "share": round(statistics.median(shares), 3),
        "share_quartiles": quartiles(shares, 3),
        "share_of_processor_time": round(statistics.median(cores), 3),
        "share_of_processor_time_quartiles": quartiles(cores, 3),
        **{f"{name}_tps": round(tokens / statistics.median(s.wall for s in all_)) for name, all_ in spent.items()},
        "rounds": len(pairs),
        "tokens_of_a_round": tokens,
    }


def _by_chunks(engine: Any) -> Bare:
    """Logits of every position, dropped chunk by chunk."""
    import torch

    def run(tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> None:
        with torch.inference_mode():
            for _, logits_CV in engine.logit_chunks(tokens_BT, starts_BT):
                last = logits_CV[-1:]
            last[0, 0].item()  # waits for a GPU

    return run


def _asked(engine: Any) -> Bare:
    """vLLM's log-prob of each token that is there."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)

    def run(tokens_BT: NDArray[Any], _: NDArray[np.bool_]) -> None:
        prompts = [TokensPrompt(prompt_token_ids=[*row.tolist(), int(row[-1])]) for row in tokens_BT]
        engine._llm.generate(prompts, parameters, use_tqdm=False)

    return run


def _run_bare(bare: Bare, corpus: CorpusReader, rows: int | None = None) -> None:
    split = corpus.split("train")
    for start in range(0, rows or len(split), BATCH_ROWS):
        batch = slice(start, start + BATCH_ROWS)
        bare(split.tokens_RT[batch].astype(np.int32), (split.flags_RT[batch] & DOC_START) != 0)


def _capture(engine: Any, corpus: CorpusReader, layout: Layout, info: TeacherInfo) -> None:
    """Until the cache is whole and durable."""
    with tempfile.TemporaryDirectory() as folder:
        Capture(
            folder=Path(folder),
            corpus=corpus,
            splits=("train",),
            layout=layout,
            teacher=info,
            open_engine=lambda: engine,
            shard_rows=SHARD_ROWS,
            batch_rows=BATCH_ROWS,
            progress=SilentProgress(),
        ).run()


if __name__ == "__main__":
    print(json.dumps(measure(Job.from_json(Path(sys.argv[1]).read_text()))))
