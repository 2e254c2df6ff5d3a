"""A decoder-only LLM in PyTorch, of OPT's or Llama's architecture, in pieces that the executed plans put together.

State is kept with tokens first, [tokens, requests, ...]: a range of tokens is then one piece of memory, which one copy moves, and what a
projection writes is the state itself. The weights of a layer are one piece of memory, too, those that keys and values need first:

    norm, W_K, W_V | W_Q, W_O, norm of the FFN, FFN

so that the first tensors of a layer can be streamed by one or two copies while the others stay on the device. The input X of a layer, the
hidden state before its norm, gives keys and values again: K = rotate(norm(X) W_K, position), V = norm(X) W_V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ...models.llm import LLMConfig

ALIGNED = 64
"""Elements that a tensor of a layer starts at a multiple of: 128 bytes and more, which every copy and matrix kernel likes."""

OPT_OFFSET = 2
"""Rows of OPT's table of positions that come before the first token's."""

Family = Literal["opt", "llama"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """RoPE of Llama 3.1 and later: slow turns are slower by ``factor``, fast ones as they were, those between are blended.

    ``low`` and ``high``: turns within the ``original`` context below which all of the factor counts, and above which none does.
    """

    factor: float
    low: float
    high: float
    original: float

    def __call__(self, turns: torch.Tensor) -> torch.Tensor:
        """Radians a token, of those without scaling."""
        kept = ((self.original * turns / (2 * math.pi) - self.low) / (self.high - self.low)).clamp(0, 1)
        return turns * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What an ``LLMConfig`` leaves open: ``theta`` of RoPE and its scaling, ``epsilon`` of the norms, the longest context (0: any)."""

    family: Family
    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None
    epsilon: float = 1e-5
    longest: int = 0


def architecture_of(llm: LLMConfig) -> Architecture:
    """OPT: LayerNorm and learned positions; Llama (Mistral, Qwen2, Qwen3): RMSNorm, RoPE, gated FFN; ValueError for any other."""
    what = f"runtime: LLM {llm.name!r}"
    for field, found in (("MLA", llm.kv_lora_rank), ("experts", llm.num_experts), ("relative positions", llm.relative_position_projection)):
        if found:
            raise ValueError(f"{what} has {field}, which the runtime does not execute; take an LLM of OPT's or Llama's architecture")
    if llm.norm_bias and llm.max_position_embeddings > OPT_OFFSET and not llm.gated_ffn and not llm.qk_norm:
        return Architecture(family="opt", longest=llm.max_position_embeddings - OPT_OFFSET)
    if llm.gated_ffn and not llm.norm_bias and not llm.max_position_embeddings:
        if llm.head_dim % 2:
            raise ValueError(f"{what} has a head_dim of {llm.head_dim}, but rotary positions turn pairs; make it even")
        return Architecture(family="llama")
    raise ValueError(
        f"{what} is neither of OPT's architecture (LayerNorm, learned positions, plain FFN) nor of Llama's (RMSNorm, rotary positions, "
        "gated FFN); take an LLM that is"
    )


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a layer: its name, shape, and where it lies in the layer's memory, in elements."""

    name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def elements(self) -> int:
        """Elements, without what alignment adds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a layer in order, the elements of those that recomputation needs (``first``), and of all."""

    parts: tuple[Part, ...]
    first: int
    total: int

    @classmethod
    def of(cls, llm: LLMConfig) -> Layout:
        """The layout of every layer of an LLM; matrices are [outputs, inputs]."""
        d, queries, keys, ff = (
            llm.hidden_size,
            llm.num_attention_heads * llm.head_dim,
            llm.num_key_value_heads * llm.head_dim,
            llm.intermediate_size,
        )
        qkv = llm.attention_bias or llm.qkv_bias
        shapes: list[tuple[str, tuple[int, ...], bool]] = [
            ("norm1.weight", (d,), True),
            ("norm1.bias", (d,), llm.norm_bias),
            ("k.weight", (keys, d), True),
            ("k.bias", (keys,), qkv),
            ("k_norm.weight", (llm.head_dim,), llm.qk_norm),
            ("v.weight", (keys, d), True),
            ("v.bias", (keys,), qkv),
            ("q.weight", (queries, d), True),
            ("q.bias", (queries,), qkv),
            ("q_norm.weight", (llm.head_dim,), llm.qk_norm),
            ("o.weight", (d, queries), True),
            ("o.bias", (d,), llm.attention_bias),
            ("norm2.weight", (d,), True),
            ("norm2.bias", (d,), llm.norm_bias),
            ("gate.weight", (ff, d), llm.gated_ffn),
            ("gate.bias", (ff,), llm.gated_ffn and llm.mlp_bias),
            ("up.weight", (ff, d), True),
            ("up.bias", (ff,), llm.mlp_bias),
            ("down.weight", (d, ff), True),
            ("down.bias", (d,), llm.mlp_bias),
        ]
        parts, at, first = [], 0, 0
        for name, shape, used in shapes:
            if name == "q.weight":
                first = at
            if used:
                parts.append(Part(name, shape, at))
                at += -(-math.prod(shape) // ALIGNED) * ALIGNED
        return cls(tuple(parts), first, at)

    def cut(self, share: float) -> int:
        """Elements at the front of a layer to stream, whole tensors, nearest to ``share`` of its memory."""
        ends = [part.begin for part in self.parts] + [self.total]
        return min(ends, key=lambda end: (abs(end - share * self.total), end))

    def views(self, *pieces: tuple[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a layer whose memory lies in ``pieces``: (element of the layer at which it begins, memory)."""
        found: dict[str, torch.Tensor] = {}
        for part in self.parts:
            for begin, memory in pieces:
                if begin <= part.begin < begin + len(memory):
                    found[part.name] = memory[part.begin - begin : part.begin - begin + part.elements].view(part.shape)
        return found


Weights = dict[str, torch.Tensor]


class Decoder:
    """The arithmetic of one LLM on one device; ``outside`` has the embeddings, the last norm and the LM head."""

    def __init__(self, llm: LLMConfig, architecture: Architecture, dtype: torch.dtype, device: torch.device, outside: Weights) -> None:
        self.llm, self.architecture, self.dtype, self.device, self.outside = llm, architecture, dtype, device, outside
        self.layout = Layout.of(llm)
        self.key_width = llm.num_key_value_heads * llm.head_dim
        self._angles = torch.empty(0)
        self._cos = self._sin = torch.empty(0)

    def check_reach(self, tokens: int) -> None:
        """ValueError if there are no positions below ``tokens``."""
        longest = self.architecture.longest
        if longest and tokens > longest:
            raise ValueError(
                f"runtime: {self.llm.name!r} has positions for {longest} tokens, not for {tokens}; shorten the prompts or generate fewer"
            )

    def table_bytes(self, tokens: int) -> int:
        """Bytes of the tables of angles below ``tokens``, while they are made."""
        rotary = self.architecture.family == "llama" and len(self._cos) < tokens
        return tokens * self.llm.head_dim * (2 * self.dtype.itemsize + 16) if rotary else 0

    def reach(self, tokens: int) -> None:
        """Make ready for positions below ``tokens``."""
        if self.architecture.family == "llama" and len(self._cos) < tokens:
            half = self.llm.head_dim // 2
            # Angles in single precision on any device and for any dtype, as Hugging Face computes them.
            turns = self.architecture.theta ** (-torch.arange(half, dtype=torch.float32) / half)
            if self.architecture.scaling is not None:
                turns = self.architecture.scaling(turns)
            angles = torch.arange(tokens, dtype=torch.float32)[:, None] * turns
            angles = torch.cat([angles, angles], dim=-1)[:, None, None, :]
            self._cos, self._sin = (part.to(self.device, self.dtype) for part in (angles.cos(), angles.sin()))

    def embed(self, tokens: torch.Tensor, begin: int) -> torch.Tensor:
        """Hidden states [tokens, requests, hidden] of tokens [tokens, requests], the first at position ``begin``."""
        x = F.embedding(tokens, self.outside["embedding"])
        if self.architecture.family == "opt":
            rows = begin + OPT_OFFSET
            x = x + self.outside["positions"][rows : rows + len(tokens)][:, None, :]
        return x

    def norm(self, x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
        """LayerNorm with a bias, else RMSNorm, over the last dimension."""
        weight, epsilon = weights[f"{name}.weight"], self.architecture.epsilon
        if self.architecture.family == "opt":
            return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], epsilon)
        return _rms_norm(x, weight, epsilon)

    def rotate(self, x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        """RoPE: the halves of each head of [tokens, requests, heads, head_dim] turn by the angles of the tokens' positions."""
        first, second = x.chunk(2, dim=-1)
        return x * self._cos[positions] + torch.cat([-second, first], dim=-1) * self._sin[positions]

    def keys_values(
        self, weights: Weights, x: torch.Tensor, positions: slice | torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Write keys and values of inputs [tokens, requests, hidden] to contiguous [tokens, requests, KV x head_dim]; returns norm(x).

        ``positions``: of the tokens, a slice or an index for each.
        """
        normed = self.norm(x, weights, "norm1")
        rows = normed.reshape(-1, x.shape[-1])
        for name, out in (("k", keys), ("v", values)):
            _linear(weights, name, rows, out.view(-1, self.key_width))
        if self.architecture.family == "llama":
            heads = keys.view(*keys.shape[:2], self.llm.num_key_value_heads, self.llm.head_dim)
            turned = heads
            if self.llm.qk_norm:
                turned = _rms_norm(heads, weights["k_norm.weight"], self.architecture.epsilon)
            heads.copy_(self.rotate(turned, positions))
        return normed

    def _queries(self, weights: Weights, normed: torch.Tensor, positions: slice) -> torch.Tensor:
        """Queries [tokens, requests, heads, head_dim]."""
        queries = F.linear(normed, weights["q.weight"], weights.get("q.bias"))
        queries = queries.view(*normed.shape[:2], self.llm.num_attention_heads, self.llm.head_dim)
        if self.architecture.family == "llama":
            if self.llm.qk_norm:
                queries = _rms_norm(queries, weights["q_norm.weight"], self.architecture.epsilon)
            queries = self.rotate(queries, positions)
        return queries

    def prefill_layer(self, weights: Weights, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The layer's output [tokens, requests, hidden] of whole prompts; their keys and values are written."""
        return self._rest(weights, x, self._seen(weights, x, keys, values))

    def _seen(self, weights: Weights, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What each token of the prompts sees of those up to it; what it takes is free again before the FFN begins."""
        tokens, requests = x.shape[:2]
        places = slice(0, tokens)
        queries = self._queries(weights, self.keys_values(weights, x, places, keys, values), places).permute(1, 2, 0, 3)
        shape = (tokens, requests, self.llm.num_key_value_heads, self.llm.head_dim)
        seen, held = ((one.view(shape).permute(1, 2, 0, 3)) for one in (keys, values))
        group = self.llm.num_attention_heads // self.llm.num_key_value_heads
        if group > 1 and self.dtype == torch.float32:
            # On CUDA only its kernels of half precision share heads; the others would write out all scores.
            seen, held = (one.repeat_interleave(group, dim=1) for one in (seen, held))
        shared = seen.shape[1] != queries.shape[1]
        found = F.scaled_dot_product_attention(queries, seen, held, is_causal=True, enable_gqa=shared)
        return found.permute(2, 0, 1, 3).reshape(tokens, requests, -1)

    def decode_layer(
        self,
        weights: Weights,
        x: torch.Tensor,
        place: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        attend: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The layer's output [1, requests, hidden] of one new token a request at position ``place``.

        The token's keys and values are written to ``keys`` and ``values`` [1, requests, KV x head_dim]; then ``attend`` gives what its
        queries [requests x KV heads, group, head_dim] see.
        """
        normed = self.keys_values(weights, x, slice(place, place + 1), keys, values)
        llm, requests = self.llm, x.shape[1]
        queries = self._queries(weights, normed, slice(place, place + 1))
        shape = (requests * llm.num_key_value_heads, llm.num_attention_heads // llm.num_key_value_heads, llm.head_dim)
        return self._rest(weights, x, attend(queries.reshape(shape)).view(1, requests, -1))

    def _rest(self, weights: Weights, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """What follows attention: its output projection and the FFN, each added to what came in."""
        x = x + F.linear(seen, weights["o.weight"], weights.get("o.bias"))
        normed = self.norm(x, weights, "norm2")
        inner = F.linear(normed, weights["up.weight"], weights.get("up.bias"))
        if self.llm.gated_ffn:
            inner *= F.silu(F.linear(normed, weights["gate.weight"], weights.get("gate.bias")), inplace=True)
        else:
            inner.relu_()
        return x + F.linear(inner, weights["down.weight"], weights.get("down.bias"))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[requests, vocabulary] of hidden states [requests, hidden]: rounded to the LLM's dtype, as single precision."""
        return F.linear(self.norm(x, self.outside, "norm"), self.outside["head"]).float()


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What queries [heads, group, head_dim] see of contiguous keys, values [tokens, ...] of as many heads; softmax in single precision."""
    heads, _, width = queries.shape
    scores = torch.bmm(queries, keys.view(len(keys), heads, width).permute(1, 2, 0))
    shares = torch.softmax(scores.float() * width**-0.5, dim=-1).to(queries.dtype)
    return torch.bmm(shares, values.view(len(values), heads, width).transpose(0, 1))


def _linear(weights: Weights, name: str, rows: torch.Tensor, out: torch.Tensor) -> None:
    """out = rows W^T + b, written where it is wanted."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """In single precision inside, as in Llama."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype) * weight
