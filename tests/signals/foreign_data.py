"""Other programs' data as those programs write it, made from a teacher's exact predictions.

Axes: P positions, K entries, N entries that are approximated, B bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from signals_synthetic import VOCAB, BigramEngine, exact_top_k

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
LENGTHS = [20, 9, 31, 12, 31, 17]  # of documents
SPECIAL = ("<user>", "<assistant>", "<end>", "<pad>")


def save_tokenizer(folder: Path, prefix: str = "w", template: str = TEMPLATE) -> Path:
    """A tokenizer of VOCAB words, four of them special; it has a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [*SPECIAL, *(f"{prefix}{i}" for i in range(len(SPECIAL), VOCAB))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def spoken(seed: int, lengths: list[int], k: int, scale: float = 3.0) -> list[tuple[NDArray[Any], Any]]:
    """Documents that a toy teacher said, each with its K best at every position."""
    teacher = BigramEngine()
    teacher.table_VV = np.random.default_rng(7).normal(0, scale, (VOCAB, VOCAB)).astype("f4")
    teacher.table_VV[:, : len(SPECIAL)] -= 20  # words only
    found = []
    for place, length in enumerate(lengths):
        tokens = teacher.text(seed + place, 1, length)
        tokens[tokens < len(SPECIAL)] = len(SPECIAL)
        found.append((tokens[0], exact_top_k(teacher.table_VV[tokens], tokens, k)))
    return found


def pack_bits(numbers: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """`[P, N]` whole numbers as bit strings, the highest bit first."""
    spread = (numbers[..., None].astype(np.uint64) >> np.arange(bits - 1, -1, -1, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(spread.astype(np.uint8).reshape(len(numbers), -1), axis=1)


def raw_bytes(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """`[P, N]` numbers in a type, as bytes."""
    numbers = torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(getattr(torch, dtype))
    return numbers.contiguous().view(torch.uint8).reshape(len(values), -1).numpy()


def compress(logp_PK: NDArray[Any], settings: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Log-probs as DistillKit's compressor lays them out, and what its decompressor would read."""
    values = logp_PK.astype(np.float64)
    if settings["delta_encoding"]:
        values = np.concatenate([values[:, :1], np.diff(values, axis=1)], axis=1)
    exact_k, dtype = settings["exact_k"], settings["exact_dtype"]
    stored = [raw_bytes(values[:, :exact_k], dtype)]
    read = [torch.from_numpy(values[:, :exact_k]).to(getattr(torch, dtype)).double().numpy()]
    rest, curve = values[:, exact_k:], np.zeros_like(values[:, exact_k:])
    if settings["polynomial_terms"]:
        count = rest.shape[1]
        at = np.linspace(0, 1, count) if settings["normalize_t"] else np.arange(count, dtype=np.float64)
        powers = {"sqrt": np.sqrt(at), "exp": np.exp(at)}
        terms = np.stack([powers[t] if isinstance(t, str) else at**t for t in settings["polynomial_terms"]], -1)
        fitted = np.linalg.lstsq(terms, rest.T, rcond=None)[0].T
        stored.append(raw_bytes(fitted, settings["term_dtype"]))
        curve = torch.from_numpy(fitted).to(getattr(torch, settings["term_dtype"])).double().numpy() @ terms.T
    rest, first = rest - curve, 0
    for part in settings["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        some = rest[:, first : first + count]
        scale = np.abs(some).max(axis=1, keepdims=True) / (1 if bits == 1 else 2 ** (bits - 1))
        stored.append(raw_bytes(scale, part["scale_dtype"]))
        scale = torch.from_numpy(scale).to(getattr(torch, part["scale_dtype"])).double().numpy()
        if bits == 1:
            codes = (some >= 0).astype(np.int64)
            curve[:, first : first + count] += (codes * 2 - 1) * scale
        else:
            codes = np.clip(np.rint(some / np.maximum(scale, 1e-12)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            curve[:, first : first + count] += codes * scale
            codes = codes + 2 ** (bits - 1)
        stored.append(pack_bits(codes, bits))
        first += count
    read = np.concatenate([*read, curve], axis=1)
    return np.concatenate(stored, axis=1), np.cumsum(read, axis=1) if settings["delta_encoding"] else read


SETTINGS = {
    "d": VOCAB + 1,
    "k": 16,
    "exact_k": 16,
    "exact_dtype": "float32",
    "polynomial_terms": [],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}


def write_compressed(
    folder: Path,
    documents: list[tuple[NDArray[Any], Any]],
    settings: dict[str, Any],
    whole: bool = False,
    **columns: Any,
) -> None:
    """A capture as `sample_logits_vllm` leaves it: Parquet beside compression_config.yaml; the last row is missing."""
    from ruamel.yaml import YAML

    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | settings
    bits, rows = (settings["d"] - 1).bit_length(), {"compressed_logprobs": [], "bytepacked_indices": []}
    for tokens, exact in documents:
        stop = len(tokens) if whole else len(tokens) - 1
        rows["compressed_logprobs"].append(compress(exact.logp_BTK[0, :stop], settings)[0].tolist())
        rows["bytepacked_indices"].append(pack_bits(exact.ids_BTK[0, :stop], bits).tolist())
    nested = pa.list_(pa.list_(pa.uint8()))
    table = {
        "input_ids": pa.array([tokens.tolist() for tokens, _ in documents], pa.list_(pa.uint64())),
        **{name: pa.array(values, nested) for name, values in rows.items()},
        **{name: pa.array(values) for name, values in columns.items()},
    }
    pq.write_table(pa.table(table), folder / "data_0.parquet", row_group_size=2)
    with (folder / "compression_config.yaml").open("w") as file:
        YAML(typ="safe").dump(settings, file)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(tokens: NDArray[Any], exact: Any, prompt: int, shift: int = 0) -> dict[str, Any]:
    """A record as axolotl prepares it: row j predicts token j + 1 − `shift`; the first `prompt` tokens do not count."""
    length, k = len(tokens), exact.ids_BTK.shape[-1]
    ids, logp = np.zeros((length, k), int), np.full((length, k), -1e9)
    labels = np.where(np.arange(length) < prompt, -100, tokens)
    for position in range(length - 1):
        ids[position + shift], logp[position + shift] = exact.ids_BTK[0, position], exact.logp_BTK[0, position]
    target = np.roll(labels, shift - 1)
    mask = np.repeat((target != -100)[:, None], k, 1).astype(int)
    mask[0 if shift else -1] = 0
    return {
        "input_ids": tokens.tolist(),
        "attention_mask": [1] * length,
        "labels": labels.tolist(),
        "target_token_ids": ids.tolist(),
        "target_logprobs": logp.tolist(),
        "target_mask": mask.tolist(),
    }
