"""One proof for a GGUF's tokenizer: its ids, its chat template and the training data's ids are the checkpoint's.

Axes: T tokens of a corpus' row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmdistill.corpus.format import DOC_START, PAD, TRAIN, VALID, CorpusReader, CorpusSplit
from lmdistill.deployment.golden import accepted_conversations
from lmdistill.deployment.probes import probe_texts
from lmdistill.deployment.template_parity import differing_renderings
from lmdistill.deployment.tokenizer_parity import GgufVocabulary, compare
from lmdistill.errors import IntegrityError
from lmdistill.teachers.token_maps import check_same_tokens, token_map

DOCUMENTS = 200  # of the training data


def prove_tokenizer(folder: Path, gguf_path: Path, conversations: int, corpus: CorpusReader | None) -> dict[str, Any]:
    """Compare tokenizer and template of `gguf_path` with those in `folder`; the counts for deployment.json.

    Raises IntegrityError that names what differs.
    """
    from lmdistill.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(folder)
    golden = accepted_conversations(tokenizer, conversations)
    texts = probe_texts()
    compare(folder, gguf_path, texts, golden).require(f"the tokenizer of {gguf_path.name}")
    if differing := differing_renderings(tokenizer, gguf_path, golden):
        raise IntegrityError(
            f"the chat template in {gguf_path.name} is not the checkpoint's",
            why=f"{differing} of {2 * len(golden)} golden conversations are rendered otherwise",
            fix="keep to Jinja that both transformers and llama-cpp-python run",
        )
    proof = {"texts": len(texts), "conversations": len(golden), "differing": 0}
    if corpus is not None:
        check_same_tokens(token_map(corpus.tokenizer_folder), token_map(folder), "the corpus", "the model")
        proof["training_documents"] = prove_training_ids(gguf_path, tokenizer, corpus)
    return proof


def prove_training_ids(gguf_path: Path, tokenizer: Any, corpus: CorpusReader) -> int:
    """Tokenise documents of the held-out split again in llama.cpp; how many there were.

    Raises IntegrityError where one gets other ids than it has in the corpus.
    """
    documents = list(whole_documents(corpus, DOCUMENTS))
    with GgufVocabulary(gguf_path) as vocabulary:
        for ids in documents:
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if ids not in (vocabulary.tokenize(text, parse_special=special) for special in (False, True)):
                raise IntegrityError(
                    f"{gguf_path.name} gives a training document other ids than the corpus has",
                    why=f"the document begins {text[:60]!r}",
                    fix="run the corpus stage again with the model's tokenizer",
                )
    return len(documents)


def held_out(corpus: CorpusReader) -> CorpusSplit:
    """The split that no model was trained on; the training split where the corpus has no other."""
    return corpus.split(VALID if VALID in corpus.meta.splits else TRAIN)


def whole_documents(corpus: CorpusReader, limit: int) -> Iterator[list[int]]:
    """Ids of at most `limit` documents that begin and end within one row of the held-out split."""
    split, meta = held_out(corpus), corpus.meta
    found = 0
    for tokens_T, flags_T in zip(split.tokens_RT, split.flags_RT, strict=True):
        kept = int((flags_T & PAD == 0).sum())
        starts = [int(at) for at in (flags_T[:kept] & DOC_START).nonzero()[0]]
        ends = [*starts[1:], *([kept] if kept < len(tokens_T) else [])]  # a full row's last one may go on in the next
        for begin, end in zip(starts, ends, strict=False):
            ids = [int(token) for token in tokens_T[begin:end]]
            ids = ids[:-1] if ids[-1] == meta.separator_id else ids
            if ids and (found := found + 1) <= limit:
                yield ids
        if found >= limit:
            return
