"""Plain NumPy oracles for every op and for a tiny decoder: slow, unpaged, in float64.

Arrays that ops take hold float32, float16 or, as uint16, the bits of bfloat16: `encode` and
`decode` convert. Oracles take and give float64 and round where the ops round to their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow import _core

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

DTYPES = ("float32", "bfloat16", "float16")
INVALID_LOGITS = -2


def to_bf16(x: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def encode(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """As the array an op takes."""
    return to_bf16(x) if dtype == "bfloat16" else np.asarray(x).astype(dtype)


def decode(array: NDArray[Any]) -> Floats:
    values = from_bf16(array) if array.dtype == np.uint16 else array
    return values.astype(np.float64)


def rounded(x: NDArray[Any], dtype: str) -> Floats:
    return decode(encode(x, dtype))


def poisoned(shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """An output that holds NaN until an op writes it."""
    return encode(np.full(shape, np.nan), dtype)


def randn(rng: np.random.Generator, dtype: str, *shape: int) -> NDArray[Any]:
    return encode(rng.standard_normal(shape, np.float32), dtype)


def with_gaps(array: NDArray[Any]) -> NDArray[Any]:
    """The same rows, further apart in memory, as q is a part of qkv: at multiples of 16 bytes if
    their length is one, as GPUs want it."""
    before, after = (16, 8) if array.shape[1] % 8 == 0 else (3, 2)
    wide = np.zeros((array.shape[0], before + array.shape[1] + after), array.dtype)
    wide[:, before:-after] = array
    return wide[:, before:-after]


def embed(tokens: Ints, token_pool: Ints, table: Floats) -> Floats:
    rows: Floats = table[np.where(tokens >= 0, tokens, token_pool[-1 - np.minimum(tokens, -1)])]
    return rows


def rms_norm(
    x: Floats, weight: Floats, eps: float, dtype: str, unit_offset: bool = False
) -> Floats:
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return normed * (1 + weight) if unit_offset else rounded(normed, dtype) * weight


def gemm(x: Floats, weight: Floats, bias: Floats | float = 0.0) -> Floats:
    return x @ weight.T + bias


def interleave(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """[I, ...] each as the engine keeps them: 8 rows of gate, then 8 of up, and so on."""
    groups = [part.reshape(-1, 8, *part.shape[1:]) for part in (gate, up)]
    return np.stack(groups, axis=1).reshape(-1, *gate.shape[1:])


def gate_and_up(weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """What `interleave` was given."""
    groups = weight.reshape(-1, 2, 8, *weight.shape[1:])
    gate, up = (groups[:, i].reshape(-1, *weight.shape[1:]) for i in range(2))
    return gate, up


def gemm_silu_mul(x: Floats, weight: Floats, activation: str = "silu") -> Floats:
    gate, up = (gemm(x, part) for part in gate_and_up(weight))
    if activation == "gelu_tanh":
        return gelu_tanh(gate) * up
    with np.errstate(over="ignore"):
        product: Floats = gate / (1 + np.exp(-gate)) * up
    return product


def gelu_tanh(x: Floats) -> Floats:
    activated: Floats = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return activated


def rope_table(inv_freq: NDArray[Any], positions: int) -> NDArray[np.float32]:
    """[positions, D]: D/2 cosines, then D/2 sines."""
    angles = np.arange(positions)[:, None] * np.asarray(inv_freq, np.float64)[None, :]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rotate(heads: Floats, cos_sin: NDArray[np.float32]) -> Floats:
    """heads [T, heads, D] by cos_sin [T, D]; element i is paired with i + D/2."""
    cosine, sine = (part[:, None, :] for part in np.split(cos_sin.astype(np.float64), 2, axis=1))
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def attention(q: Floats, k: Floats, v: Floats, scale: float, window: int = 0) -> Floats:
    """Causal: q [n, Hq, D] are the last n of the positions of k and v [kv_len, Hkv, D].

    With a window, each sees the last so many positions up to its own.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("nhd,khd->hnk", q, k) * scale
    visible = np.tri(len(q), len(k), len(k) - len(q), dtype=bool)
    if window:
        visible &= ~np.tri(len(q), len(k), len(k) - len(q) - window, dtype=bool)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended: Floats = np.einsum("hnk,khd->nhd", weights, v)
    return attended


@dataclass(frozen=True)
class PagedCache:
    """Keys and values [P, Hkv, page_size, D] with the page table of some requests."""

    k_cache: NDArray[Any]
    v_cache: NDArray[Any]
    kv_len: Ints
    page_indptr: Ints
    page_indices: Ints

    @property
    def page_size(self) -> int:
        return int(self.k_cache.shape[2])

    def slots(self, request: int, positions: NDArray[Any]) -> Ints:
        """Where those positions of a request lie: page * page_size + offset."""
        pages: Ints = self.page_indices[self.page_indptr[request] + positions // self.page_size]
        slots: Ints = (pages * self.page_size + positions % self.page_size).astype(np.int32)
        return slots

    def gather(self, cache: NDArray[Any], request: int) -> Floats:
        """A request's keys or values [kv_len, Hkv, D]."""
        slots = self.slots(request, np.arange(self.kv_len[request]))
        return decode(cache[slots // self.page_size, :, slots % self.page_size])


def paged_cache(
    rng: np.random.Generator,
    kv_len: Sequence[int],
    *,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    spare_pages: int = 2,
) -> PagedCache:
    """Random keys and values of requests on shuffled pages; all unused room holds NaN.

    k_cache and v_cache are interleaved as in the engine: the views have gaps between pages.
    """
    counts = [-(-length // page_size) for length in kv_len]
    order = rng.permutation(sum(counts) + spare_pages)
    both = poisoned((len(order), 2, kv_heads, page_size, head_dim), dtype)
    cache = PagedCache(
        k_cache=both[:, 0],
        v_cache=both[:, 1],
        kv_len=np.array(kv_len, np.int32),
        page_indptr=np.cumsum([0, *counts]).astype(np.int32),
        page_indices=order[: sum(counts)].astype(np.int32),
    )
    for request, length in enumerate(kv_len):
        slots = cache.slots(request, np.arange(length))
        for view in (cache.k_cache, cache.v_cache):
            values = encode(rng.standard_normal((length, kv_heads, head_dim)), dtype)
            view[slots // page_size, :, slots % page_size] = values
    return cache


def allowed_probabilities(
    logits: NDArray[np.float32],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    banned: Sequence[int] = (),
) -> Floats:
    """The distribution a row is drawn from: temperature, min_p, top_k, top_p in this order."""
    x = logits.astype(np.float64)
    x[list(banned)] = -np.inf
    p: Floats = np.exp((x - x.max()) / temperature)
    p[p < min_p] = 0.0
    if 0 < top_k < len(p):
        p[x < np.sort(x)[-top_k]] = 0.0
    p /= p.sum()
    order = np.lexsort((np.arange(len(x)), -x))
    before = np.cumsum(p[order]) - p[order]
    dropped = order[1:][before[1:] >= top_p]
    if top_p < 1.0:
        p[dropped] = 0.0
    p /= p.sum()
    return p


def penalize(
    logits: NDArray[np.float32],
    history: Sequence[int],
    generated: int,
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
) -> Floats:
    """Logits after the penalties for a prompt and the `generated` tokens at the end of it."""
    x = logits.astype(np.float64)
    seen = np.unique(np.asarray(history, np.int64))
    x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    tokens, counts = np.unique(history[len(history) - generated :], return_counts=True)
    x[tokens.astype(np.int64)] -= frequency * counts + presence
    return x


def log_softmax(logits: NDArray[Any]) -> Floats:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    logprobs: Floats = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return logprobs


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def uniform(seed: int, counter: int) -> float:
    """The number in [0, 1) that a draw uses."""
    words = philox4x32([counter, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
    return float(((words[1] << 32 | words[0]) >> 11) * 2.0**-53)


def llama_logits(
    spec: _core.ModelSpec, weights: Mapping[str, NDArray[Any]], tokens: Sequence[int]
) -> Floats:
    """Logits [T, V] of one whole sequence; weights by the names of `_core.Weights.shapes()`."""

    def w(name: str) -> Floats:
        return rounded(weights[name], spec.dtype)

    def store(x: Floats) -> Floats:
        return rounded(x, spec.dtype)

    length, width = len(tokens), spec.head_dim
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    cos_sin = rope_table(np.asarray(spec.rope_inv_freq), length) * spec.rope_attention_factor
    residual = w("embed")[np.asarray(tokens)]
    for layer in range(spec.num_layers):
        name = f"layers.{layer}."
        normed = store(rms_norm(residual, w(name + "input_norm"), spec.rms_norm_eps, spec.dtype))
        bias = w(name + "qkv_bias") if spec.qkv_bias else 0.0
        qkv = store(gemm(normed, w(name + "qkv"), bias))
        qkv = qkv.reshape(length, heads + 2 * kv_heads, width)
        queries_and_keys = qkv[:, : heads + kv_heads]
        if spec.qk_norm:
            norms = np.stack([w(name + "q_norm")] * heads + [w(name + "k_norm")] * kv_heads)
            normed = rms_norm(queries_and_keys, norms, spec.rms_norm_eps, spec.dtype)
            queries_and_keys = store(normed)
        rotated = store(rotate(queries_and_keys, cos_sin))
        values = qkv[:, heads + kv_heads :]
        window = spec.layer_windows[layer] if spec.layer_windows else 0
        attended = attention(rotated[:, :heads], rotated[:, heads:], values, width**-0.5, window)
        attended = store(attended.reshape(length, heads * width))
        residual = store(residual + gemm(attended, w(name + "o")))
        normed = store(rms_norm(residual, w(name + "post_norm"), spec.rms_norm_eps, spec.dtype))
        inner = store(gemm_silu_mul(normed, w(name + "gate_up")))
        residual = store(residual + gemm(inner, w(name + "down")))
    normed = store(rms_norm(residual, w("norm"), spec.rms_norm_eps, spec.dtype))
    return gemm(normed, w("embed" if spec.tie_word_embeddings else "lm_head"))
