"""Several processes that train one student: who goes first, and how the student is whole again at the end.

Rank 0 alone reads and writes what lies beside the training: bindings, seals, the model folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lmdistill.pipeline.stage import Runtime

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    processes: int = 1
    way: str | None = None  # how they share the model, where the form of a checkpoint depends on it

    @classmethod
    def of(cls, runtime: Runtime) -> Ranks:
        """This process as the stage's runtime describes it."""
        way = runtime.launch.way if runtime.launch else "ddp"
        return cls(runtime.rank, runtime.processes, None if way == "ddp" else way)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def meet(self, device: str) -> None:
        """Connect with the others, before anything waits for them."""
        if self.processes > 1:
            from accelerate import PartialState

            PartialState(cpu=device == "cpu")

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.processes > 1:
            import torch.distributed

            torch.distributed.barrier()

    def first_then_all(self, work: Callable[[], Result]) -> Result:
        """`work` in the first process, and then in the others, which find its effects."""
        if self.first:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()

    def share_of(self, rows: int, at_once: int | None) -> tuple[int, int]:
        """(rows a process takes at once, how often it does in a step) for a step of `rows` rows."""
        own = rows // self.processes
        micro = min(at_once or own, own)
        return micro, own // micro


def is_sharded(trainer: Any) -> bool:
    """Whether the processes have spread the weights."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def gathered(trainer: Any) -> dict[str, Any]:
    """The weights of a spread model, whole, on the host of the first process; all processes must ask."""
    weights: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def keep_precision(trainer: Any) -> None:
    """Have FSDP gather float32 weights: products are in bfloat16 by autocast, as with one process, and nothing else."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy()
