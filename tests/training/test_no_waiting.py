"""A training step never waits for the device: no operation in it needs a value or a shape back on the host.

Checked on the CPU by the operations themselves; where there is a GPU, by CUDA's own watch over synchronisations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distill_stage import KEYS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from lmdistill.corpus.format import document_positions
from lmdistill.pipeline.stage import Artefact, ModelRef, SilentProgress
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.config import DistillConfig
from lmdistill.training.packing_known import documents_of, packing_known
from lmdistill.training.run import Place, _trainer

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class Watch(TorchDispatchMode):
    """Collects operations whose result the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen += 1
        masks = [one for one in torch.utils._pytree.tree_leaves(args[1:]) if isinstance(one, torch.Tensor)]
        by_mask = name in ("index", "index_put", "index_put_") and any(one.dtype == torch.bool for one in masks[:1])
        if name in WAITING or by_mask:
            self.waited.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchSteps(TrainerCallback):  # type: ignore[misc]
    """Watches from the beginning of a step to its end, log and checkpoint left out."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.watch.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.__exit__(None, None, None)


def _watched(
    signals: Artefact, student: Artefact, folder: Path, device: str, teacher: ModelRef | None, **keys: Any
) -> Any:
    from lmdistill.checkpoints import load_model

    config = DistillConfig(**{**KEYS, "tokens": 1024, "log_steps": 100, "micro_rows": 4, **keys})
    place = Place(student.out / "model", folder / "model", folder / "work", device, student.fingerprint, teacher)
    model = load_model(student.out / "model", device=device)
    return _trainer(model, SignalsReader(signals.out, "train"), config, place, SilentProgress())


@pytest.mark.parametrize(
    "keys", [{}, {"loss": "ce"}, {"loss": "full_kl"}, {"precision": "bfloat16", "temperature": 2.0}]
)
def test_no_operation_of_a_step_needs_a_value_on_the_host(
    keys: dict[str, Any], signals: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    live = teacher if keys.get("loss") == "full_kl" else None
    trainer = _watched(signals, student, tmp_path, "cpu", live, **keys)
    watch = Watch()
    trainer.add_callback(WatchSteps(watch))
    trainer.train()
    assert watch.seen > 100
    assert watch.waited == []


def test_the_watch_sees_what_waits() -> None:
    values = torch.arange(4.0)
    with Watch() as watch:
        values[values > 1]
        values.sum().item()
        (values > 2).nonzero()
    assert len(watch.waited) >= 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4))
def test_documents_are_numbered_as_transformers_numbers_them(rows: list[list[bool]]) -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    positions_RT = torch.from_numpy(document_positions(np.array(rows)))
    theirs = find_packed_sequence_indices(positions_RT)
    ours = documents_of(positions_RT)
    assert (theirs is None and not ours.any()) or torch.equal(ours, theirs)


def test_states_are_the_same_without_the_look(student: Artefact) -> None:
    from transformers import masking_utils

    from lmdistill.checkpoints import load_model

    model, asked = load_model(student.out / "model"), masking_utils.find_packed_sequence_indices
    tokens = torch.arange(24).reshape(2, 12)
    for positions in (None, torch.tensor([[*range(5), *range(7)], [*range(12)]])):
        with torch.no_grad():
            looked = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
            with packing_known(positions is not None), Watch() as watch:
                known = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        assert torch.equal(looked, known)
        assert watch.waited == []
    with torch.no_grad():  # rows of one document need no position ids
        counted = model(input_ids=tokens, position_ids=torch.arange(12).expand(2, -1), use_cache=False).logits
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, counted)
    assert masking_utils.find_packed_sequence_indices is asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: waits are then seen by operation only")
def test_cuda_sees_no_synchronisation_in_a_step(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    trainer = _watched(signals, student, tmp_path, "cuda", None)

    class Strict(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer.add_callback(Strict())
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
