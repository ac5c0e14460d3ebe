"""The keys of `search`: those of space, device and budgets (keys.py), and how candidates are made, tried and chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmdistill.pipeline.stage import RuntimeKey
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.training.config import DistillConfig

if TYPE_CHECKING:
    from lmdistill.intermediate.keys import IntermediateKeys

Objective = Literal["decode_ms", "ttft_ms", "ram_mb", "file_mb"]


class Keys(BaseModel):
    """Base of the nested keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class TrainingKeys(Keys):
    """How the super-network and the finalists learn; the rest is as distill's defaults."""

    loss: str = Field(default="decoupled_topk", description="at the head, by name, as distill's key of this name")
    kd_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="λ: weight of the distillation loss; cross-entropy has the rest"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="τ of losses that read it")
    batch_rows: Annotated[int, Field(ge=1)] = Field(default=4, description="rows of the cache in an optimiser step")
    lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-3, description="peak step, in units of each tensor's root mean square"
    )
    micro_rows: Annotated[int | None, RuntimeKey()] = Field(
        default=None, description="rows at once; the rest of batch_rows is accumulated"
    )
    chunk: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=512, description="positions whose logits are held at once"
    )
    checkpoint_steps: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=50, description="steps from one resume point to the next"
    )


class RelationKeys(Keys):
    """Attention relations between each candidate's last attention and the teacher's, which then runs beside it."""

    loss: Literal["relation_kl", "relation_mse"] = Field(
        default="relation_kl", description="KL of softmaxed relations, or squared error of raw ones"
    )
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="beside the loss at the head")
    relations: Annotated[tuple[Literal["q", "k", "v"], ...], Field(min_length=1)] = Field(
        default=("q", "k", "v"), description="relations of queries, keys, values"
    )
    relation_heads: Annotated[int, Field(ge=1)] = Field(
        default=1, description="heads that both sides are split into anew; divides the widths of all candidates"
    )

    @property
    def as_intermediate(self) -> IntermediateKeys:
        """The same as an entry of distill's `intermediate`, with the teacher beside it."""
        from lmdistill.intermediate.keys import IntermediateKeys

        return IntermediateKeys(loss=self.loss, relations=self.relations, relation_heads=self.relation_heads, live=True)


class SupernetKeys(Keys):
    """The super-network of each sub-space."""

    tokens: Annotated[int, Field(ge=1)] = Field(
        default=500_000, description="tokens that it trains on, each seen by every candidate of a step"
    )
    random_candidates: Annotated[int, Field(ge=0)] = Field(
        default=2, description="candidates of a step beside the largest and the smallest"
    )
    placement_noise: Annotated[float, Field(ge=0)] = Field(
        default=3.0, description="how far the blocks of a random candidate are from the ranked ones, in ranks"
    )
    relations: RelationKeys | None = Field(
        default=None, description="attention relations beside the loss at the head; null: none"
    )
    keep: bool = Field(
        default=False, description="keep its trained weights in the artefact, for other candidates to be cut from"
    )
    importance_rows: Annotated[int, Field(ge=1)] = Field(
        default=1024, description="rows on which the importance of channels and heads is measured"
    )
    fit_rows: Annotated[int, Field(ge=1)] = Field(default=48, description="rows on which convolutions are fitted")
    fit_steps: Annotated[int, Field(ge=0)] = Field(default=30, description="steps of the block-local regression")
    fit_batch_rows: Annotated[int, Field(ge=1)] = Field(default=8, description="rows in a step of it")
    fit_lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-3, description="its step, in units of each tensor's root mean square"
    )


class EvolutionKeys(Keys):
    """The evolution of candidates in each sub-space, or how many shapes `method: prune` tries."""

    population: Annotated[int, Field(ge=2)] = Field(default=24, description="candidates of a generation")
    generations: Annotated[int, Field(ge=1)] = Field(default=8, description="of evolution (prune has one)")
    crossover: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="share of children that have two parents; the others are mutants of one"
    )


class FinalistKeys(Keys):
    """The candidates that are trained for a short while, and halved, and trained on."""

    count: Annotated[int, Field(ge=1)] = Field(default=4, description="how many; 1: the best inherited loss wins")
    fit_steps: Annotated[int, Field(ge=0)] = Field(
        default=30, description="steps of block-local regression on each block first, kept where it helps; 0: none"
    )
    tokens: Annotated[int, Field(ge=1)] = Field(
        default=16_384, description="each trains on in the first round; twice as many in each further one"
    )


class SearchConfig(DeviceSearchConfig):
    """Keys of `search`."""

    method: str = Field(default="supernet", description="by name, see below")
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        default=("decode_ms", "ttft_ms", "ram_mb"), description="what is traded against the held-out loss"
    )
    heldout_rows: Annotated[int, Field(ge=1)] = Field(
        default=8, description="last rows of the cache, on which candidates are scored and none is trained"
    )
    selection_rows: Annotated[int, Field(ge=1)] = Field(
        default=4, description="rows of the corpus on which blocks are ranked"
    )
    selection_width: Annotated[int, Field(ge=0)] = Field(
        default=4, description="cheapest blocks tried at every step of the ranking; 0: one-shot, each block by itself"
    )
    training: TrainingKeys = Field(default=TrainingKeys(), description="of super-network and finalists")
    supernet: SupernetKeys = Field(default=SupernetKeys(), description="the shared weights")
    evolution: EvolutionKeys = Field(default=EvolutionKeys(), description="the search itself")
    finalists: FinalistKeys = Field(default=FinalistKeys(), description="who is trained before the choice")
    weights: Literal["inherited", "fitted", "tuned"] = Field(
        default="inherited",
        description="the student's: those of the super-network, fitted where that helped; the teacher's, cut to the "
        "winner's shape and fitted block by block; or those after its rounds",
    )
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of matrix products")
    seed: int = Field(default=0, description="of candidates, rows and steps")

    def distilling(self, tokens: int) -> DistillConfig:
        """The keys of distill with which super-network and finalists train."""
        training = self.training
        return DistillConfig(
            loss=training.loss,
            kd_weight=training.kd_weight,
            temperature=training.temperature,
            tokens=tokens,
            batch_rows=training.batch_rows,
            lr=training.lr,
            micro_rows=training.micro_rows,
            chunk=training.chunk,
            checkpoint_steps=training.checkpoint_steps,
            precision=self.precision,
            save_grid="float32",
            seed=self.seed,
        )
