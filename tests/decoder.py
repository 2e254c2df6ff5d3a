"""A small decoder in NumPy, with random weights, that keeps for each token either keys and values or the layer's input.

The input X of a layer is the hidden state that enters it, before the norm: with the token's own position it gives

    K = rotate(norm(X) W_K, position)     V = norm(X) W_V

(learned positions are in X already and nothing is rotated). Keeping norm(X) instead works the same and saves the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and kinds; ``qk_norm``: keys and queries get an RMSNorm over a head's elements before they are rotated, as in Qwen3."""

    norm: Literal["layer", "rms"] = "rms"
    positions: Literal["rope", "learned"] = "rope"
    gated: bool = True
    qk_norm: bool = False
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    ffn: int = 48
    vocab: int = 61
    longest: int = 128


@dataclass(slots=True)
class Count:
    """FLOPs of recomputation (2 for each multiply-add), elements of X and of keys and values that were fetched."""

    flops: int = 0
    act_elements: int = 0
    kv_elements: int = 0


class Cache:
    """The state of one request, for each layer and token: [layers, tokens, ...]. What is not held is NaN, so that nobody can use it.

    ``as_inputs`` [longest] says which tokens are held as X and not as keys and values; None: both are held of every token.
    """

    def __init__(self, shape: Shape, dtype: type, as_inputs: Array | None = None) -> None:
        self.length = 0
        self.as_inputs = np.zeros(shape.longest, bool) if as_inputs is None else as_inputs
        self.holds_inputs = np.ones(shape.longest, bool) if as_inputs is None else as_inputs
        self.inputs = np.full((shape.layers, shape.longest, shape.hidden), np.nan, dtype)
        self.keys = np.full((shape.layers, shape.longest, shape.kv_heads, shape.head_dim), np.nan, dtype)
        self.values = self.keys.copy()

    def store(self, layer: int, inputs: Array, keys: Array, values: Array) -> None:
        """Keep what is to be held of the tokens that follow the first ``length``."""
        for row in range(len(inputs)):
            token = self.length + row
            if self.holds_inputs[token]:
                self.inputs[layer, token] = inputs[row]
            if not self.as_inputs[token]:
                self.keys[layer, token], self.values[layer, token] = keys[row], values[row]


class Decoder:
    """Weights drawn from a seed, all arithmetic in ``dtype``."""

    def __init__(self, shape: Shape, seed: int, dtype: type = np.float64) -> None:
        self.shape, self.dtype = shape, dtype
        random = np.random.default_rng(seed)

        def matrix(inputs: int, outputs: int) -> Array:
            return (random.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(dtype)

        h, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.embeddings = random.standard_normal((shape.vocab, h)).astype(dtype)
        # A head of its own: with tied embeddings a random decoder repeats the last token, whatever its keys and values are.
        self.head = matrix(h, shape.vocab)
        self.learned = random.standard_normal((shape.longest, h)).astype(dtype)
        sizes = {"q": (h, queries), "k": (h, keys), "v": (h, keys), "o": (queries, h)}
        sizes |= {"gate": (h, shape.ffn), "up": (h, shape.ffn), "down": (shape.ffn, h)}
        self.weights = [{name: matrix(*size) for name, size in sizes.items()} for _ in range(shape.layers)]
        # Gains and shifts far from 1 and 0: who forgets the norm cannot come near.
        self.gains = random.uniform(0.5, 1.5, (shape.layers, 2, h)).astype(dtype)
        self.shifts = random.uniform(-0.5, 0.5, (shape.layers, 2, h)).astype(dtype)
        self.head_gains = random.uniform(0.5, 1.5, (shape.layers, 2, shape.head_dim)).astype(dtype)

    def norm(self, layer: int, which: int, x: Array) -> Array:
        """LayerNorm or RMSNorm over the last axis; ``which``: 0 before attention, 1 before the FFN."""
        if self.shape.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = _unit(x) * self.gains[layer, which]
        return x + self.shifts[layer, which] if self.shape.norm == "layer" else x

    def rotate(self, x: Array, positions: Array) -> Array:
        """RoPE: pairs of elements of [tokens, heads, head_dim] turn by angles that grow with the position."""
        if self.shape.positions == "learned":
            return x
        half = self.shape.head_dim // 2
        angles = positions[:, None] * 100.0 ** (-np.arange(half) / half)
        cos, sin = (part.astype(self.dtype)[:, None, :] for part in (np.cos(angles), np.sin(angles)))
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def keys_values(
        self, layer: int, x: Array, positions: Array, *, normed: bool = False, count: Count | None = None
    ) -> tuple[Array, Array]:
        """Keys and values [tokens, kv_heads, head_dim] of inputs [tokens, hidden]; ``normed``: the inputs are normed already."""
        x = x if normed else self.norm(layer, 0, x)
        parts = []
        for name in ("k", "v"):
            weight = self.weights[layer][name]
            if count is not None:
                count.flops += 2 * len(x) * weight.size
            parts.append((x @ weight).reshape(len(x), self.shape.kv_heads, self.shape.head_dim))
        keys, values = parts
        if self.shape.qk_norm:
            keys = _unit(keys) * self.head_gains[layer, 1]
        return self.rotate(keys, positions), values

    def restore(self, layer: int, caches: list[Cache], count: Count | None = None) -> list[tuple[Array, Array]]:
        """Keys and values of all tokens of every request: those held, and those recomputed, for all requests in one product."""
        wanted = [np.flatnonzero(cache.as_inputs[: cache.length]) for cache in caches]
        inputs = np.concatenate([cache.inputs[layer, tokens] for cache, tokens in zip(caches, wanted, strict=True)])
        recomputed = self.keys_values(layer, inputs, np.concatenate(wanted), count=count)
        if count is not None:
            count.act_elements += inputs.size
        restored, start = [], 0
        for cache, tokens in zip(caches, wanted, strict=True):
            whole = []
            for held, new in zip((cache.keys, cache.values), recomputed, strict=True):
                part = held[layer, : cache.length].copy()
                if count is not None:
                    count.kv_elements += int((~np.isnan(part)).sum())
                part[tokens] = new[start : start + len(tokens)]
                whole.append(part)
            restored.append((whole[0], whole[1]))
            start += len(tokens)
        return restored

    def step(self, caches: list[Cache], new: list[Array], count: Count | None = None) -> Array:
        """Logits [requests, vocab] after the ``new`` tokens of each request, which join the caches: prefill, or decode of one token."""
        positions = [np.arange(cache.length, cache.length + len(tokens)) for cache, tokens in zip(caches, new, strict=True)]
        hidden = [self.embeddings[tokens] for tokens in new]
        if self.shape.positions == "learned":
            hidden = [x + self.learned[places] for x, places in zip(hidden, positions, strict=True)]
        for layer in range(self.shape.layers):
            past = self.restore(layer, caches, count)
            for index, (cache, places) in enumerate(zip(caches, positions, strict=True)):
                x = hidden[index]
                keys, values = self.keys_values(layer, x, places)
                cache.store(layer, x, keys, values)
                keys, values = (np.concatenate(pair) for pair in zip(past[index], (keys, values), strict=True))
                x = x + self._attention(layer, x, places, keys, values)
                hidden[index] = x + self._ffn(layer, x)
        for cache, tokens in zip(caches, new, strict=True):
            cache.length += len(tokens)
        return np.stack([_unit(x[-1]) @ self.head for x in hidden])

    def _attention(self, layer: int, x: Array, places: Array, keys: Array, values: Array) -> Array:
        shape = self.shape
        queries = (self.norm(layer, 0, x) @ self.weights[layer]["q"]).reshape(len(x), shape.heads, shape.head_dim)
        if shape.qk_norm:
            queries = _unit(queries) * self.head_gains[layer, 0]
        queries = self.rotate(queries, places)
        group = shape.heads // shape.kv_heads
        keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(self.dtype(shape.head_dim))
        scores = np.where(np.arange(len(keys)) <= places[:, None], scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", shares, values).reshape(len(x), -1) @ self.weights[layer]["o"]

    def _ffn(self, layer: int, x: Array) -> Array:
        weights, x = self.weights[layer], self.norm(layer, 1, x)
        up = x @ weights["up"]
        inner = _silu(x @ weights["gate"]) * up if self.shape.gated else np.maximum(up, 0)
        return inner @ weights["down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Greedy ``tokens`` [requests, steps], all ``logits`` [steps, requests, vocab], the ``caches``, and what restoring took."""

    tokens: Array
    logits: Array
    caches: list[Cache]
    count: Count

    @property
    def margin(self) -> float:
        """The least distance of the best logit from the second best: above it, no rounding changes a token."""
        best = np.sort(self.logits, axis=-1)
        return float((best[..., -1] - best[..., -2]).min())


def generate(decoder: Decoder, prompts: list[Array], steps: int, as_inputs: list[Array] | None = None) -> Generated:
    """Greedy decoding of requests whose prompts may differ in length; ``as_inputs``: see ``Cache``, one for each request."""
    masks: list[Array | None] = [None] * len(prompts) if as_inputs is None else list(as_inputs)
    caches = [Cache(decoder.shape, decoder.dtype, mask) for mask in masks]
    count, new = Count(), prompts
    tokens: list[Array] = []
    logits: list[Array] = []
    for _ in range(steps):
        logits.append(decoder.step(caches, new, count))
        tokens.append(logits[-1].argmax(axis=-1))
        new = [tokens[-1][index : index + 1] for index in range(len(prompts))]
    return Generated(tokens=np.stack(tokens, axis=1), logits=np.stack(logits), caches=caches, count=count)


def _unit(x: Array) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(1e-6))


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
