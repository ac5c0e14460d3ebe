"""What every architecture tells the GGUF writer: its metadata, its tensors and how each is laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

Shape = tuple[int, ...]


class Architecture:
    """One architecture of a checkpoint (`model_type` in config.json) and its namesake in llama.cpp.

    Subclasses give the tensors' names and shapes, so that sizes are known before a model is there and a
    checkpoint with a tensor too many or too few is refused instead of written.
    """

    model_type: ClassVar[str]
    gguf_name: ClassVar[str]  # general.architecture

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Keep the parsed config.json."""
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return int(self.config["vocab_size"])

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        width = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        return int(width)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding matrix; llama.cpp then reads token_embd for both."""
        return bool(self.config.get("tie_word_embeddings", self.tied_by_default))

    tied_by_default: ClassVar[bool] = False

    @property
    def rope(self) -> Mapping[str, Any]:
        """Rotary parameters, wherever this version of transformers put them."""
        nested = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = nested.get("rope_theta", self.config.get("rope_theta", 10_000.0))
        return {**nested, "rope_theta": float(theta), "rope_type": nested.get("rope_type", "default")}

    def refusals(self) -> list[str]:
        """What this config asks for that llama.cpp would compute otherwise; empty where all is well."""
        kind = self.rope["rope_type"]
        return [] if kind in self.rope_types else [f"rope_type '{kind}' is not one of {', '.join(self.rope_types)}"]

    rope_types: ClassVar[tuple[str, ...]] = ("default",)

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the checkpoint by its name there, without the head where it is tied."""
        raise NotImplementedError

    def add_metadata(self, writer: Any) -> None:
        """Describe the architecture to a `gguf.GGUFWriter`; subclasses add what is theirs."""
        config = self.config
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_rope_freq_base(self.rope["rope_theta"])
        writer.add_vocab_size(self.vocab_size)

    def convert(self, source: str, tensor: Any) -> Any:
        """A checkpoint's torch tensor as llama.cpp wants it laid out."""
        return tensor

    def written_shape(self, shape: Shape) -> Shape:
        """The shape `convert` gives a tensor of this shape: only matrices and vectors are written."""
        return tuple(size for i, size in enumerate(shape) if len(shape) < 3 or i != 1)

    def extra_tensors(self) -> dict[str, Any]:
        """Float32 torch tensors that are computed from the config, by their GGUF names."""
        return {}

    def keeps_f32(self, shape: Shape) -> bool:
        """Whether a tensor of this (GGUF) shape stays 32-bit in every file: norms and biases do."""
        return len(shape) < 2

    def gguf_names(self) -> dict[str, str]:
        """GGUF name of each tensor by its name in the checkpoint."""
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf_name)
        names = gguf.get_tensor_name_map(arch, self.config["num_hidden_layers"])
        found = {source: names.get_name(source, try_suffixes=(".weight", ".bias")) for source in self.tensors()}
        return {source: name for source, name in found.items() if name is not None}


ARCHITECTURES: dict[str, type[Architecture]] = {}


def architecture(model_type: str, gguf_name: str) -> Callable[[type[Architecture]], type[Architecture]]:
    """Register a class as the writer of `model_type`, called `gguf_name` in llama.cpp."""

    def register(cls: type[Architecture]) -> type[Architecture]:
        cls.model_type, cls.gguf_name = model_type, gguf_name
        ARCHITECTURES[model_type] = cls
        return cls

    return register
