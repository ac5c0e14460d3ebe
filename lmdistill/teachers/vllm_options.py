"""What a recipe can say of vLLM: as a library in the stage's own process, and as a server somewhere else."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class VllmOptions(BaseModel):
    """`engine: vllm`: where it runs. On GPUs the last bits of log-probs may depend on it; their meaning does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor_parallel_size: Annotated[int, Field(ge=1)] = Field(
        default=1, description="GPUs that share the teacher's weights"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.85, description="share of a GPU's memory that vLLM takes"
    )


class EndpointOptions(BaseModel):
    """`engine: vllm_server`: the `vllm serve` that is asked. A key for it is read from VLLM_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(pattern=r"^https?://[^/]+")] = Field(
        description="the server's address, such as http://localhost:8000"
    )
    model: str | None = Field(default=None, description="the model's name there; null: the only one it serves")
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(default=8, description="requests under way at once")
    timeout: Annotated[float, Field(gt=0)] = Field(default=600.0, description="seconds to wait for one answer")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=5, description="further tries where the server is away or overloaded, each after twice the wait"
    )
