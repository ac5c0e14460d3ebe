"""The super-network: one set of weights that every candidate of a sub-space is a part of.

It is the teacher, in the students' architecture, with its units in their order of importance and a short convolution
beside each attention. A candidate runs as an empty model of its own shape, given its parts of the shared tensors for
the call: so what the super-network computes under a candidate is what the extracted model computes, and whatever
works on a student (the fused loss, hooks) works here.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call

from lmdistill.search.candidate import Candidate
from lmdistill.search.slicing import Full, axes_of, parts_of, take
from lmdistill.search.unit_order import UnitOrder, restore

SKELETONS = 8  # empty models kept; the largest and the smallest come back in every step
Prepare = Callable[[Any], None]


class SuperNet(torch.nn.Module):  # type: ignore[misc]
    """Shared weights; `forward` runs the part called `candidate`, prepared by `prepare` (see student_forward.py)."""

    accepts_loss_kwargs = True  # so that Trainer says how many positions count in all of a step

    def __init__(self, base: Any, convolutions: list[Any], kernel: int) -> None:
        """Of an all-attention model and, for a hybrid, its convolutions block by block (else an empty list)."""
        super().__init__()
        config = base.config
        self.config, self.body = config, base.model
        self.convolutions = torch.nn.ModuleList(convolutions)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.full = Full(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            kernel,
        )
        self.order: UnitOrder | None = None  # of its units, where it is not the teacher's
        self.candidate: Candidate | None = None
        self.share = 1.0  # of what `forward` returns: a step is a mean over its candidates
        self.prepare: Prepare = lambda model: None
        self._skeletons: OrderedDict[str, Any] = OrderedDict()

    @property
    def device(self) -> str:
        """Where it is."""
        return str(self.body.embed_tokens.weight.device)

    def weights(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        """A candidate's parts of the shared tensors, by their names in its own model; gradients flow back."""
        parts = parts_of(candidate, self.full)
        found = {name: take(tensor, axes_of(name), parts) for name, tensor in self._tensors(candidate).items()}
        return {**found, "lm_head.weight": found["model.embed_tokens.weight"]}

    def top(self) -> dict[str, torch.Tensor]:
        """Embeddings and final norm: what all candidates have, by its name in theirs. (Their heads are tied.)"""
        norm = "embedding_norm" if hasattr(self.body, "embedding_norm") else "norm"
        return {
            "model.embed_tokens.weight": self.body.embed_tokens.weight,
            f"model.{norm}.weight": getattr(self.body, norm).weight,
        }

    def _tensors(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        """The whole tensors that a candidate is cut from, by their names in its model."""
        found = self.top()
        for place, layer in enumerate(candidate.layers):
            prefix, block = f"model.layers.{place}.", self.body.layers[layer.source]
            convolves = layer.operator == "conv"
            for inner, parameter in block.named_parameters():
                if not (convolves and inner.startswith("self_attn.")):
                    found[prefix + inner] = parameter
            if convolves:
                operator = self.convolutions[layer.source]
                found |= {f"{prefix}conv.{inner}": parameter for inner, parameter in operator.named_parameters()}
        return found

    def skeleton(self, candidate: Candidate) -> Any:
        """A model of the candidate's shape without weights, made ready by `prepare`."""
        key = json.dumps(candidate.shape_config())  # which layer convolves matters, which block it was does not
        if key not in self._skeletons:
            self._skeletons[key] = self._empty(candidate)
            while len(self._skeletons) > SKELETONS:
                self._skeletons.popitem(last=False)
        self._skeletons.move_to_end(key)
        return self._skeletons[key]

    def _empty(self, candidate: Candidate) -> Any:
        model = empty_model(self.config_of(candidate), self.body.embed_tokens.weight.device)
        self.prepare(model)
        return model

    def config_of(self, candidate: Candidate) -> Any:
        """The transformers config of a candidate."""
        return candidate.config(self.config, getattr(self.config, "norm_eps", None))

    def prepare_with(self, prepare: Prepare) -> None:
        """Make every model that runs from now on ready with `prepare`."""
        self.prepare = prepare
        self._skeletons.clear()

    def run(self, candidate: Candidate, **inputs: Any) -> Any:
        """What a candidate's model returns for these inputs."""
        return functional_call(self.skeleton(candidate), self.weights(candidate), kwargs=inputs)

    def forward(self, **inputs: Any) -> Any:
        """Loss and parts of the candidate at hand, times its share in the step."""
        assert self.candidate is not None, "set `candidate` first"
        return {name: value * self.share for name, value in self.run(self.candidate, **inputs).items()}

    def extract(self, candidate: Candidate) -> Any:
        """A stand-alone model with a candidate's weights."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config_of(candidate)).float().eval()
        model.load_state_dict({name: tensor.detach() for name, tensor in self.weights(candidate).items()}, strict=False)
        model.tie_weights()
        return model.to(self.body.embed_tokens.weight.device)

    def restored(self, model: Any, candidate: Candidate) -> Any:
        """A candidate's model with the units that it keeps all of where the teacher has them."""
        if self.order is not None:
            restore(model, candidate, self.full, self.order)
        return model


def empty_model(config: Any, device: torch.device) -> Any:
    """A causal LM whose parameters hold nothing and whose buffers (rotary frequencies) are real, on `device`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    return model.eval()
