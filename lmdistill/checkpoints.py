"""Model folders in Hugging Face layout: load a model or tokenizer from one, save one deterministically.

A model folder holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
chat_template.jinja. Remote code never runs and nothing is fetched: assets.py brings folders here first.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lmdistill.errors import PreflightError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.gguf.json",  # the pre-tokenizer's name in llama.cpp, where it is known
)


def load_model(
    folder: Path, dtype: str = "float32", device: str = "cpu", attn: str = "sdpa", load_in: str | None = None
) -> Any:
    """The causal LM in `folder`, in evaluation mode, weights in `dtype` on `device`.

    With `load_in` (nf4, int8) its linear layers, but the head, are in so few bits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    smaller: dict[str, Any] = {}
    if load_in is not None:
        from lmdistill.teachers.low_bits import bits_config

        smaller = {"quantization_config": bits_config(load_in, getattr(torch, dtype)), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation=attn,
        **smaller,
    )
    return (model if smaller else model.to(device)).eval()


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def refuse_packed(folder: Path, fix: str) -> None:
    """Raise PreflightError where the weights in a model folder are another program's packed integers."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if packed := config.get("quantization_config"):
        raise PreflightError(
            f"the checkpoint {folder} is converted: its weights are packed integers",
            why=f"its config.json has quantization_config ({packed.get('quant_method', '?')})",
            fix=fix,
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and chat template files of one model folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def save_model(model: Any, folder: Path, tokenizer_from: Path) -> None:
    """Write `model` as one safetensors file with its config, and the tokenizer of `tokenizer_from`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="1TB")
    copy_tokenizer(tokenizer_from, folder)


def stored_tensors(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype (F32, BF16, …) and shape of every tensor in a folder's safetensors, read from the headers alone."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no mapping
            found += [(part.get_dtype(), tuple(part.get_shape())) for part in slices]
    return found
