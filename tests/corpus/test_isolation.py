"""What each packing promises about documents seeing each other, measured on random models.

Axes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lmdistill.corpus.format import DOC_START, PAD, CorpusReader

Make = Callable[..., CorpusReader]
Write = Callable[..., str]
T, KERNEL = 32, 3
TEXTS = [f"Fox {n} jumps over {n * 7} lazy dogs." for n in range(12)]


def toy(kind: str, vocab_size: int) -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    layers = ["conv", "conv"] if kind == "conv" else ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=layers, conv_L_cache=KERNEL)).eval()


@torch.no_grad()
def logits(model: Any, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(tokens_BT, use_cache=False, **options).logits


def packed_row(make: Make, write: Write, packing: str) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """A row [1, T] with at least two whole documents, its positions within documents, and where the second lies."""
    reader = make(sources=[write([{"text": text} for text in TEXTS])], packing=packing, sequence_length=T)
    split = reader.split("train")
    for row, flags_T in zip(split.tokens_RT, split.flags_RT, strict=True):
        starts = np.flatnonzero(flags_T & DOC_START)
        inner = starts[starts > 0]
        if len(inner) and inner[0] < T - 8:
            first = int(inner[0])
            stop = int(inner[1]) if len(inner) > 1 else T
            begins_T = np.maximum.accumulate(np.where(flags_T & DOC_START, np.arange(T), 0))
            positions_BT = torch.from_numpy(np.arange(T) - begins_T)[None]
            return torch.from_numpy(row.astype(np.int64))[None], positions_BT, first, stop
    raise AssertionError("no row with two documents")


def other_before(tokens_BT: torch.Tensor, stop: int, vocab_size: int) -> torch.Tensor:
    """The same row with other tokens before `stop`."""
    changed_BT = tokens_BT.clone()
    changed_BT[:, :stop] = (changed_BT[:, :stop] + 7) % vocab_size
    return changed_BT


def changes(make: Make, write: Write, kind: str, packing: str, reset: bool) -> torch.Tensor:
    """Largest change of the second document's logits, by position in it, when the first document is another."""
    tokens_BT, positions_BT, first, stop = packed_row(make, write, packing)
    model = toy(kind, 400)
    options = {"position_ids": positions_BT} if reset else {}
    before = logits(model, tokens_BT, **options)
    after = logits(model, other_before(tokens_BT, first, 400), **options)
    return (before - after)[0, first:stop].abs().amax(-1)


def test_concat_leaks(make: Make, write: Write) -> None:
    for kind in ("llama", "hybrid"):
        assert changes(make, write, kind, "concat", reset=False).min() > 1e-4


def test_isolate_is_exact_for_attention(make: Make, write: Write) -> None:
    assert changes(make, write, "llama", "isolate", reset=True).max() == 0


def test_isolate_leaks_k_minus_1_tokens_a_convolution(make: Make, write: Write) -> None:
    """Two convolutions of kernel k reach 2(k-1) tokens into the next document, and no further."""
    change = changes(make, write, "conv", "isolate", reset=True)
    reach = 2 * (KERNEL - 1)
    assert (change[:reach] > 1e-4).all()
    assert change[reach:].max() == 0


def test_attention_after_a_convolution_carries_the_leak_on(make: Make, write: Write) -> None:
    """Why `isolate` promises nothing more for hybrids: later tokens attend to the first ones."""
    change = changes(make, write, "hybrid", "isolate", reset=True)
    assert change.max() > 1e-4
    assert change[2 * (KERNEL - 1) :].max() > 0


@pytest.mark.parametrize("kind", ["llama", "conv", "hybrid"])
def test_single_is_exact(make: Make, write: Write, kind: str) -> None:
    """Neither another row nor what is in the padding reaches a document's logits."""
    reader = make(sources=[write([{"text": text} for text in TEXTS])], packing="single", sequence_length=T)
    split = reader.split("train")
    tokens_BT = torch.from_numpy(split.tokens_RT[:3].astype(np.int64))
    padding_BT = torch.from_numpy((split.flags_RT[:3] & PAD) != 0)
    assert padding_BT[1].any()
    model = toy(kind, 400)
    changed_BT = torch.where(padding_BT, (tokens_BT + 7) % 400, tokens_BT)
    changed_BT[0] = (changed_BT[0] + 11) % 400
    before, after = logits(model, tokens_BT), logits(model, changed_BT)
    assert torch.equal(before[1:][~padding_BT[1:]], after[1:][~padding_BT[1:]])
