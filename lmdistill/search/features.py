"""What a candidate's cost is made of: amounts of work, each of which a device does at a pace of its own.

Matrices are counted in weights, by operator, because each is read (or multiplied) at its own pace; the head by the
type its row length lets it have; then a fixed part for a token, a call and a layer. Axes: F features.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmdistill.search.candidate import Candidate

_MEGA = 1e6
_SUPER_BLOCK = 256  # weights; where rows are no multiple of it, the head takes a larger type
_MICRO_BATCH = 512  # tokens that llama.cpp evaluates at once
_KV_BYTES = 2 * 2  # a key and a value of 16 bits
DECODE_KINDS = (  # what `decode` counts, in its order
    "tokens",
    "layers of attention",
    "layers of convolution",
    "M weights of attention",
    "M weights of convolution",
    "M weights of MLPs",
    "M weights of a head with rows of 256",
    "M weights of a head with other rows",
)


def _attention_weights(candidate: Candidate) -> int:
    query, key = candidate.heads * candidate.head_dim, candidate.kv_heads * candidate.head_dim
    return candidate.attention_layers * candidate.hidden_size * 2 * (query + key)


def _conv_weights(candidate: Candidate) -> int:
    return _convs(candidate) * 4 * candidate.hidden_size**2


def _convs(candidate: Candidate) -> int:
    return candidate.depth - candidate.attention_layers


def _matrices(candidate: Candidate) -> list[float]:
    """Millions of weights in attention, convolution and MLP."""
    mlp = candidate.depth * 3 * candidate.hidden_size * candidate.intermediate_size
    return [_attention_weights(candidate) / _MEGA, _conv_weights(candidate) / _MEGA, mlp / _MEGA]


def _head(candidate: Candidate) -> list[float]:
    """Millions of weights of the head, in the slot of its type."""
    weights = candidate.vocab_size * candidate.hidden_size / _MEGA
    return [0.0, weights] if candidate.hidden_size % _SUPER_BLOCK else [weights, 0.0]


def decode(candidate: Candidate) -> list[float]:
    """Of one generated token `[F]`: a fixed part, layers by operator, matrices, the head."""
    return [1.0, candidate.attention_layers, _convs(candidate), *_matrices(candidate), *_head(candidate)]


def prefill(candidate: Candidate, tokens: int) -> list[float]:
    """Of a prompt of `tokens` tokens `[F]`.

    A fixed part for each micro-batch and its layers; for each token the matrices, each layer's element-wise work, and
    in attention its scores; the head once a prompt.
    """
    batches = -(-tokens // _MICRO_BATCH)
    share = tokens / _MICRO_BATCH
    attended = tokens * (tokens + 1) / 2 / _MICRO_BATCH**2
    query = candidate.heads * candidate.head_dim
    return [
        batches,
        batches * candidate.depth,
        *(share * weights for weights in _matrices(candidate)),
        share * candidate.attention_layers * query / 1e3,
        share * _convs(candidate) * candidate.hidden_size / 1e3,
        share * candidate.depth * candidate.intermediate_size / 1e3,
        attended * candidate.attention_layers * query / 1e3,
        *_head(candidate),
    ]


def file(candidate: Candidate) -> list[float]:
    """Of the file's bytes `[F]`: matrices, head, vocabulary, and the vectors that stay 32-bit."""
    width, convs = candidate.hidden_size, _convs(candidate)
    vectors = (candidate.depth * 2 + 1) * width + 2 * candidate.attention_layers * candidate.head_dim
    taps = convs * candidate.kernel * width
    return [1.0, candidate.vocab_size / 1e3, *_matrices(candidate), *_head(candidate), (vectors + taps) / 1e3]


def memory(candidate: Candidate, context: int) -> list[float]:
    """Of the process's peak memory with a context of `context` tokens `[F]`.

    The interpreter; what a token of the vocabulary costs; the weights; keys and values; a micro-batch's activations.
    """
    keys_and_values = candidate.attention_layers * candidate.kv_heads * candidate.head_dim * context * _KV_BYTES
    activations = _MICRO_BATCH * (candidate.hidden_size + candidate.intermediate_size)
    return [*file(candidate)[:-1], keys_and_values / _MEGA, activations / _MEGA, candidate.depth]


def matrix(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Feature vectors stacked, as floats."""
    return [[float(value) for value in row] for row in rows]
