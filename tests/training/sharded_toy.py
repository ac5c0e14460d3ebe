"""One of two gloo processes: trains a toy student spread as accelerate's FSDP2 spreads it, and whole, and compares.

Started by test_launch.py with the student's folder, the signals' and a folder for the result.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from lmdistill.checkpoints import load_model
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix
from lmdistill.losses.registry import LossOptions
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.data import to_inputs
from lmdistill.training.student_forward import attach_loss

ROWS, STEPS = 4, 3


def learner(student: Path) -> Any:
    """The student with the fused loss in its forward."""
    mix = Mix(registry.get("decoupled_topk"), LossOptions(), 0.9, 0.1)
    return attach_loss(load_model(student), lambda: mix, 7)


def spread(model: Any) -> Any:
    """The model sharded by accelerate's own code; only its Accelerator refuses FSDP on CPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    stand_in = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True, device="cpu"
    )
    return fsdp2_prepare_model(stand_in, model)


def train(model: Any, signals: SignalsReader, share: slice, processes: int) -> list[float]:
    """Losses of a few steps of plain AdamW on `share` of each step's rows; FSDP averages gradients over processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        rows = list(range(step * ROWS, (step + 1) * ROWS))
        count = int((to_inputs(signals.read(rows))["labels"] != -100).sum())
        loss = model(**to_inputs(signals.read(rows[share])), num_items_in_batch=count)["loss"]
        (loss * processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(one) for one in losses]


def main(student: str, signals: str, result: str) -> None:
    """Both trainings; the first process writes how far apart they end."""
    rank = int(os.environ["RANK"])
    store = dist.FileStore(str(Path(result) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    reader = SignalsReader(Path(signals), "train")
    sharded = spread(learner(Path(student)))
    own = torch.tensor(train(sharded, reader, slice(2 * rank, 2 * rank + 2), 2))
    dist.all_reduce(own)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        whole = learner(Path(student))
        before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
        losses = train(whole, reader, slice(None), 1)
        after = dict(whole.named_parameters())
        found = {
            "sharded": sum(isinstance(module, FSDPModule) for module in sharded.modules()),
            "losses": own.tolist(),
            "losses_whole": losses,
            "apart": max((state[name] - after[name]).abs().max().item() for name in after),
            "moved": min((before[name] - after[name]).abs().max().item() for name in after),
        }
        (Path(result) / "sharded.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
