"""`runtime.launch`: how many processes train together, and how they share the model; read by accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FsdpKeys(BaseModel):
    """Fully sharded data parallel (FSDP2): weights, gradients and moments are spread over the processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reshard_after_forward: bool = Field(
        default=True, description="give gathered weights back after a block's forward: less memory, more traffic"
    )
    offload: bool = Field(default=False, description="keep the shards in the host's memory")


class DeepspeedKeys(BaseModel):
    """DeepSpeed's ZeRO."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Literal[1, 2, 3] = Field(default=2, description="spreads moments (1), gradients too (2), weights too (3)")
    offload: bool = Field(default=False, description="keep the moments in the host's memory")


class LaunchSection(BaseModel):
    """Processes of one machine that train together; without fsdp, deepspeed or config: DDP."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_processes: Annotated[int, Field(ge=1)] = Field(description="processes; with GPUs: one each")
    fsdp: FsdpKeys | None = Field(default=None, description="{}: spread the model over the processes with FSDP2")
    deepspeed: DeepspeedKeys | None = Field(default=None, description="{}: spread the model with DeepSpeed")
    config: str | None = Field(
        default=None, description="file of `accelerate config`, for what the keys above do not say"
    )

    @model_validator(mode="after")
    def _one_way(self) -> LaunchSection:
        if sum(way is not None for way in (self.fsdp, self.deepspeed, self.config)) > 1:
            raise ValueError("fsdp, deepspeed and config are three ways to say the same; name one")
        return self

    @property
    def way(self) -> str:
        """How the processes share the model: ddp, fsdp, deepspeed or config."""
        return next((name for name in ("fsdp", "deepspeed", "config") if getattr(self, name) is not None), "ddp")

    def accelerate_config(self) -> dict[str, Any]:
        """What the file of `accelerate config` says for these keys; precision is the stage's own."""
        settings: dict[str, Any] = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}.get(self.way, "MULTI_GPU"),
            "mixed_precision": "no",
            "num_machines": 1,
            "machine_rank": 0,
            "num_processes": self.num_processes,
            "main_training_function": "main",
            "use_cpu": False,
            "same_network": True,
        }
        if self.fsdp is not None:
            settings["fsdp_config"] = {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_reshard_after_forward": self.fsdp.reshard_after_forward,
                "fsdp_offload_params": self.fsdp.offload,
                "fsdp_state_dict_type": "SHARDED_STATE_DICT",
                "fsdp_cpu_ram_efficient_loading": False,
            }
        if self.deepspeed is not None:
            device = "cpu" if self.deepspeed.offload else "none"
            settings["deepspeed_config"] = {
                "zero_stage": self.deepspeed.stage,
                "offload_optimizer_device": device,
                "offload_param_device": device if self.deepspeed.stage == 3 else "none",
                "zero3_init_flag": False,
                "zero3_save_16bit_model": True,
            }
        return settings

    def file(self, folder: Path) -> Path:
        """The configuration that accelerate is given: the user's own file, or one written into `folder`."""
        if self.config is not None:
            return Path(self.config).absolute()
        import json

        path = folder / "accelerate.json"
        path.write_text(json.dumps(self.accelerate_config(), indent=1))
        return path
