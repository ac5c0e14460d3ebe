"""A checkpoint into a `.pte`: exported, lowered to XNNPACK, and refused where too little of its work went there.

Axes: S tokens of a call, P positions they see, N wanted logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.deployment.executorch.layouts import layout_of
from lmdistill.deployment.executorch.runtime import METHOD, unwarned
from lmdistill.deployment.gguf_writer import check_tensors, open_checkpoint, read_config
from lmdistill.errors import IntegrityError
from lmdistill.quantization.placement import Placement

CHUNK = 128  # tokens of a call at most: 24 MiB of logits at V = 49,152


@dataclass(frozen=True)
class ProgramSizes:
    """What a program is built for."""

    context: int  # positions of its caches
    chunk: int = CHUNK

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Of tokens `[S]`, positions `[S]`, mask `[S, P]` and wanted `[N]`."""
        from torch.export import Dim

        chunk = min(self.chunk, self.context)
        S, P, N = Dim("S", min=1, max=chunk), Dim("P", min=1, max=self.context), Dim("N", min=1, max=chunk)
        return {0: S}, {0: S}, {0: S, 1: P}, {0: N}

    def example(self) -> tuple[Any, ...]:
        """Inputs of unequal sizes, none of them 1, so that tracing takes no two for the same."""
        import torch

        S, P, N = min(self.chunk, self.context) - 2, self.context - 1, min(self.chunk, self.context) - 3
        return torch.zeros(S, dtype=torch.long), torch.arange(S), torch.zeros(S, P), torch.arange(N)


def build_decoder(folder: Path, placement: Placement, context: int) -> Any:
    """The model in `folder` over caches of `context` positions, its tensors where `placement` has them."""
    from lmdistill.deployment.architectures import ARCHITECTURES
    from lmdistill.deployment.executorch.decoder import Decoder
    from lmdistill.deployment.executorch.weights import CheckpointWeights

    config = read_config(folder)
    layout = layout_of(config)
    with open_checkpoint(folder) as checkpoint:
        check_tensors(ARCHITECTURES[config["model_type"]](config), checkpoint)
        return Decoder(layout, CheckpointWeights(checkpoint, placement), rope_tables(folder, context)).eval()


def rope_tables(folder: Path, context: int) -> tuple[Any, Any]:
    """Cosines and sines `[C, D]` of all positions, by transformers' own rotary embedding."""
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder, local_files_only=True))
    cos_1CD, sin_1CD = rotary(torch.zeros(1), torch.arange(context)[None])
    return cos_1CD[0].contiguous(), sin_1CD[0].contiguous()


def write_program(
    folder: Path, target: Path, placement: Placement, sizes: ProgramSizes, *, min_delegated: float
) -> float:
    """Write the model in `folder` to `target`; returns the share of its compute that runs in XNNPACK.

    Raises IntegrityError where that is below `min_delegated`, or where a weight is not on the grid it should be on.
    """
    import torch

    from lmdistill.deployment.executorch.delegation import check_share, delegated_work

    decoder = build_decoder(folder, placement, sizes.context)
    with unwarned(), torch.no_grad():
        exported = _exported(decoder, sizes)
        lowered = _lowered(
            exported, {"context": sizes.context, "chunk": sizes.chunk, "vocab_size": _vocabulary(folder)}
        )
        work = delegated_work(lowered.exported_program(METHOD))
        check_share(work, min_delegated)
        with target.open("wb") as file:
            _emitted(lowered).write_to_file(file)
    return work.share


def _exported(decoder: Any, sizes: ProgramSizes) -> Any:
    import torch

    with _refused("torch.export could not trace this model"):
        return torch.export.export(decoder, sizes.example(), dynamic_shapes=sizes.dynamic_shapes(), strict=False)


def _lowered(exported: Any, constants: dict[str, int]) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    config = EdgeCompileConfig(_check_ir_validity=False)  # the embedding's operator is no core ATen one
    with _refused("XNNPACK could not take this model"):
        return to_edge_transform_and_lower(
            exported, partitioner=[XnnpackPartitioner()], constant_methods=constants, compile_config=config
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raise IntegrityError with the first line of what PyTorch or ExecuTorch says."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise IntegrityError(what, why=(str(error) or type(error).__name__).splitlines()[0]) from error


def _emitted(lowered: Any) -> Any:
    """The program; caches are written in place, or each token would copy all of them twice."""
    from executorch.exir import ExecutorchBackendConfig

    return lowered.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))


def _vocabulary(folder: Path) -> int:
    return int(read_config(folder)["vocab_size"])
