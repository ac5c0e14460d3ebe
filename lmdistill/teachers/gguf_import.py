"""A GGUF as a teacher: f32 safetensors, config, chat template, and a tokenizer proven against llama.cpp's.

The tokenizer is built from the GGUF's own metadata (tokens, merges, token types, pre-tokenizer's name); the proof
runs on the built-in probe texts before the folder gets its final name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.assets.cache import make_folder, need_disk, sha256_of
from lmdistill.deployment import pretokenizers
from lmdistill.deployment.llama_cpp_runtime import llama_library
from lmdistill.deployment.probes import probe_conversations, probe_texts
from lmdistill.deployment.tokenizer_parity import GgufVocabulary, compare
from lmdistill.errors import AssetError, IntegrityError
from lmdistill.pipeline.stage import Progress

CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2  # GGUF's token types
STEPS = 4


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF says of its tokenizer, with llama.cpp's defaults filled in by llama.cpp itself."""

    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    add_bos: bool
    add_eos: bool
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    padding_id: int | None
    chat_template: str | None
    context_length: int | None


def import_gguf(gguf_path: Path, folder: Path, progress: Progress) -> None:
    """Convert `gguf_path` into the model folder `folder`, all or nothing.

    Raises AssetError where the file cannot be converted, PreflightError where llama.cpp is missing, IntegrityError
    where weights are missing or the tokenizer gives other ids than llama.cpp's.
    """
    llama_library()  # the proof needs llama.cpp: say so before any work
    metadata, elements = read_metadata(gguf_path)
    tokenizer = read_tokenizer(gguf_path, metadata)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    need_disk(partial, elements * 4, f"{gguf_path.name} as float32")
    progress.update(0, STEPS, "steps")
    write_tokenizer(tokenizer, partial)
    progress.update(1, STEPS, "steps")
    conversations = probe_conversations() if tokenizer.chat_template else []
    result = compare(partial, gguf_path, probe_texts(), conversations)
    result.require(gguf_path.name)
    progress.note(f"tokenizer of {gguf_path.name}: same ids as llama.cpp on {result.checked} probe texts")
    progress.update(2, STEPS, "steps")
    _write_weights(gguf_path, partial, elements)
    progress.update(3, STEPS, "steps")
    _write_manifest(gguf_path, partial, result.checked)
    partial.replace(folder)
    progress.update(STEPS, STEPS, "steps")


def read_metadata(gguf_path: Path) -> tuple[dict[str, Any], int]:
    """The GGUF's key-value metadata and its number of weights; raises AssetError for a file that is no GGUF."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise AssetError("a GGUF teacher needs gguf", why=str(error), fix="pip install 'lmdistill[gguf]'") from error
    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError) as error:
        raise AssetError(f"{gguf_path} is not a readable GGUF", why=str(error), fix="fetch the file again") from error
    metadata = {name: value.contents() for name, value in reader.fields.items()}
    return metadata, sum(int(tensor.n_elements) for tensor in reader.tensors)


def read_tokenizer(gguf_path: Path, metadata: dict[str, Any]) -> GgufTokenizer:
    """The tokenizer part of `metadata`; raises AssetError for kinds other than byte-level BPE."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise AssetError(
            f"{gguf_path.name} has a tokenizer of kind '{kind}'",
            why="byte-level BPE ('gpt2') is what a GGUF teacher can have",
            fix="use the model's Hugging Face repository as the teacher: `hf:org/name@revision`",
        )
    get = metadata.get
    vocabulary = GgufVocabulary(gguf_path)
    with vocabulary:
        add_bos, add_eos = vocabulary.add_bos, vocabulary.add_eos
    return GgufTokenizer(
        pre=get("tokenizer.ggml.pre", "default"),
        tokens=metadata["tokenizer.ggml.tokens"],
        token_types=metadata["tokenizer.ggml.token_type"],
        merges=metadata["tokenizer.ggml.merges"],
        add_bos=add_bos,
        add_eos=add_eos,
        bos_id=get("tokenizer.ggml.bos_token_id"),
        eos_id=get("tokenizer.ggml.eos_token_id"),
        unknown_id=get("tokenizer.ggml.unknown_token_id"),
        padding_id=get("tokenizer.ggml.padding_token_id"),
        chat_template=get("tokenizer.chat_template"),
        context_length=get(f"{get('general.architecture')}.context_length"),
    )


def write_tokenizer(source: GgufTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and tokenizer.gguf.json into `folder`."""
    from transformers import PreTrainedTokenizerFast

    def named(index: int | None) -> str | None:
        return None if index is None else source.tokens[index]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(source),
        bos_token=named(source.bos_id),
        eos_token=named(source.eos_id),
        unk_token=named(source.unknown_id),
        pad_token=named(source.padding_id),
        clean_up_tokenization_spaces=False,
        **({"model_max_length": source.context_length} if source.context_length else {}),
    )
    tokenizer.chat_template = source.chat_template
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.gguf.json").write_text(json.dumps({"pre": source.pre}) + "\n")


def _backend(source: GgufTokenizer) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    entry = pretokenizers.find(source.pre)
    vocabulary = {token: index for index, token in enumerate(source.tokens)}
    merges = [(left, right) for left, right in (merge.split(" ", 1) for merge in source.merges)]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=entry.ignore_merges))
    backend.pre_tokenizer = pretokenizers.build(entry)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(source.tokens, source.token_types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    around = [source.bos_id] if source.add_bos else [], [source.eos_id] if source.add_eos else []
    pieces = [[(source.tokens[i], i) for i in ids if i is not None] for ids in around]
    if any(pieces):
        before, after = ([token for token, _ in side] for side in pieces)
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=pieces[0] + pieces[1]
        )
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _write_weights(gguf_path: Path, folder: Path, elements: int) -> None:
    """Dequantise into f32 safetensors; raises IntegrityError unless every weight of the GGUF found its place."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars; failures are raised
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf_path.parent,
                gguf_file=gguf_path.name,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise AssetError(
            f"transformers cannot convert {gguf_path.name}",
            why=str(error),
            fix="use the model's Hugging Face repository as the teacher: `hf:org/name@revision`",
        ) from error
    missing = sorted(set(info["missing_keys"]) - {"lm_head.weight"}) + sorted(map(str, info["mismatched_keys"]))
    loaded = sum(parameter.numel() for parameter in model.parameters())
    if missing or loaded != elements:
        raise IntegrityError(
            f"{gguf_path.name} did not fill the model",
            why=f"{loaded} weights where the GGUF has {elements}; not filled: {', '.join(missing) or 'none'}",
        )
    for holder in (model, model.config):  # else save_pretrained refuses a model that was read from a quantised file
        for mark in ("hf_quantizer", "quantization_config", "is_quantized"):
            if mark in vars(holder):
                delattr(holder, mark)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, max_shard_size="1TB")
    (folder / "model.safetensors").chmod(0o644)


def _write_manifest(gguf_path: Path, folder: Path, probes: int) -> None:
    """import.json: where the folder comes from and what its files are; written last, then all is forced to disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    listing = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
    manifest = {"source": gguf_path.name, "source_sha256": sha256_of(gguf_path), "probes": probes, "files": listing}
    target = folder / "import.json"
    target.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for path in [*files, target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
