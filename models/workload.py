"""A step of an LLM as kernels with FLOPs and bytes: prefill of a prompt, or decode of one token for each request of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_number, shown, whole
from .llm import LLMConfig, Matrix
from .roofline import Array

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is served: ``batch`` requests of ``context`` tokens each, in one decode step or one prefill.

    Precisions are bits an element, 8 (INT8, as in H2M2) unless said: ``weight_bits``, ``kv_bits``, ``activation_bits``. The peaks of
    a ``ComputeUnit`` are those at this precision. In decode, ``context`` is the number of tokens whose keys and values are read.

    ``state_tokens``: tokens whose keys and values are read in a decode step of requests of unequal contexts, all requests together; None:
    batch x context. Bytes and FLOPs of attention are linear in it, so they are exact; ``context`` then only says about how long one is.
    """

    llm: LLMConfig
    batch: int
    context: int
    phase: Phase = "decode"
    weight_bits: float = 8
    kv_bits: float = 8
    activation_bits: float = 8
    state_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.llm, LLMConfig):
            raise ValueError(f"workload: llm must be an LLMConfig, not {shown(self.llm)}; take one of presets.LLMS or read a config.json")
        object.__setattr__(self, "batch", whole("workload", "batch", self.batch, "requests"))
        object.__setattr__(self, "context", whole("workload", "context", self.context, "tokens", least=0))
        if self.phase not in ("decode", "prefill"):
            raise ValueError(f"workload: phase must be 'decode' or 'prefill', not {self.phase!r}")
        for field in ("weight_bits", "kv_bits", "activation_bits"):
            check_number("workload", field, getattr(self, field), "bits an element")
            if getattr(self, field) > 64:
                raise ValueError(f"workload: {field} must be at most 64 bits an element, not {getattr(self, field)!r}")
        if self.state_tokens is not None:
            object.__setattr__(self, "state_tokens", whole("workload", "state_tokens", self.state_tokens, "tokens", least=0))
            if self.phase != "decode":
                raise ValueError(
                    "workload: state_tokens is for decode, as attention of a prefill grows with the square of each prompt; "
                    "leave it out and price prompts one by one"
                )
            if self.state_tokens and not self.context:
                raise ValueError(f"workload: {self.state_tokens} state_tokens need a context of at least 1 token, not 0; give their mean")

    @property
    def tokens(self) -> int:
        """Tokens that pass through each layer in the step."""
        return self.batch if self.phase == "decode" else self.batch * self.context

    @property
    def tokens_held(self) -> int:
        """Tokens whose keys and values all requests have together: batch x context, unless ``state_tokens`` says otherwise."""
        return self.batch * self.context if self.state_tokens is None else self.state_tokens

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights of all decoder layers (embeddings and LM head are not part of a step)."""
        return sum(count * sum(m.elements for m in matrices) for count, matrices in self.llm.layers) * self.weight_bits / 8

    @property
    def state_bytes(self) -> float:
        """Bytes of the keys and values of all layers and requests."""
        return self.llm.num_hidden_layers * self.llm.state_elements * self.tokens_held * self.kv_bits / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of one layer in one step; sizes are those of the whole kernel on one machine.

    ``sublayer``: "qkv", "attention" or "fc". ``split``: what it can be divided by: "query_head", "kv_head" or "column".
    ``engine``: "matrix" or "vector" peak. ``rows``: input rows that meet each element of weights. ``touched``: share of the
    weights that the step reads (below 1 for experts that no token chose). ``tensors``: equal tensors its data are stored in.
    """

    name: str
    sublayer: str
    split: str
    engine: Literal["matrix", "vector"]
    rows: float
    flops: float
    weight_bytes: float = 0.0
    state_bytes: float = 0.0
    activation_bytes: float = 0.0
    touched: float = 1.0
    tensors: int = 1

    @property
    def held_bytes(self) -> float:
        """Bytes that occupy memory between steps."""
        return self.weight_bytes + self.state_bytes

    @property
    def read_bytes(self) -> float:
        """Bytes read (in prefill: state written) from memory in a step, activations left out."""
        return self.weight_bytes * self.touched + self.state_bytes


def kernels(workload: Workload) -> tuple[tuple[int, tuple[Kernel, ...]], ...]:
    """How many decoder layers run which kernels, in order: ``((80, (q_proj, k_proj, v_proj, attention, o_proj, ...)),)``."""
    attention = _attention(workload)
    listed = []
    for count, matrices in workload.llm.layers:
        products = [_product(matrix, workload) for matrix in matrices]
        before = [kernel for kernel in products if kernel.sublayer == "qkv"]
        after = [kernel for kernel in products if kernel.sublayer != "qkv"]
        listed.append((count, (*before, attention, *after)))
    return tuple(listed)


def step_kernels(workload: Workload, *, activations: bool = True, lm_head: bool = False) -> tuple[tuple[int, tuple[Kernel, ...]], ...]:
    """How often a step runs which kernels: the products and the attention of ``kernels``, and what lies between them.

    ``activations`` False: what lies between is fused into them, and activations stay on chip. ``lm_head``: the final norm and LM head too.
    Attention is two kernels, one over keys and one over values (one with MLA, whose latent is both), with its scores on chip. FLOPs of
    element-wise kernels count each operation of their formula once, exp included: RMSNorm 4 and LayerNorm 7 an element, rotary 3, SiLU or
    GELU 4 (5 with a gate), residual 1. ``kv_write``: a decode step also writes the new token's state. Left out: biases, weights of norms,
    the router's softmax, the look-up of embeddings.
    """
    llm, tokens, nbytes = workload.llm, workload.tokens, workload.activation_bits / 8
    d = llm.hidden_size

    def between(name: str, elements: float, per_element: float, moved: float) -> Kernel:
        return Kernel(
            name=name,
            sublayer="fc",
            split="column",
            engine="vector",
            rows=float(tokens),
            flops=tokens * elements * per_element,
            activation_bytes=tokens * moved,
        )

    norm_flops = 7 if llm.norm_bias else 4
    rotated = llm.num_attention_heads * llm.qk_rope_head_dim + llm.qk_rope_head_dim
    if llm.attention_kind != "MLA":
        rotated = (llm.num_attention_heads + llm.num_key_value_heads) * llm.head_dim
    rotary = not llm.max_position_embeddings and not llm.relative_position_projection
    after_qkv = []
    if llm.qk_norm:
        after_qkv.append(between("qk_norm", rotated, 4, 2 * rotated * nbytes))
    if rotary:
        after_qkv.append(between("rotary", rotated, 3, 2 * rotated * nbytes))
    if workload.phase == "decode":  # in prefill the state written is among the bytes of attention
        after_qkv.append(between("kv_write", 0, 0, llm.state_elements * (nbytes + workload.kv_bits / 8)))
    listed = []
    for (count, layer), (_, matrices) in zip(kernels(workload), llm.layers, strict=True):
        qkv, (attention,), (output, *ffn) = ([k for k in layer if k.sublayer == part] for part in ("qkv", "attention", "fc"))
        passes = _two_passes(attention, llm)
        if not activations:
            fused = [replace(kernel, activation_bytes=0.0) for kernel in (*qkv, *passes, output, *ffn)]
            listed.append((count, tuple(fused)))
            continue
        down = [kernel for kernel in ffn if kernel.name.endswith("down_proj")]
        width = sum(matrix.outputs * matrix.experts_per_token for matrix in matrices if matrix.name.endswith("up_proj"))
        ordered = [
            *(between("attention_norm", d, norm_flops, 2 * d * nbytes), *qkv, *after_qkv, *passes),
            *(output, between("attention_residual", d, 1, 3 * d * nbytes)),
            *(between("ffn_norm", d, norm_flops, 2 * d * nbytes), *(kernel for kernel in ffn if kernel not in down)),
            between("activation", width, 4 + llm.gated_ffn, (2 + llm.gated_ffn) * width * nbytes),
            *(*down, between("ffn_residual", d, 1, 3 * d * nbytes)),
        ]
        listed.append((count, tuple(ordered)))
    if lm_head:
        head = Kernel(
            name="lm_head",
            sublayer="head",
            split="column",
            engine="matrix",
            rows=float(workload.batch),
            flops=2.0 * workload.batch * d * llm.vocab_size,
            weight_bytes=d * llm.vocab_size * workload.weight_bits / 8,
            activation_bytes=workload.batch * (d + llm.vocab_size) * nbytes if activations else 0.0,
        )
        listed.append((1, (between("final_norm", d, norm_flops, 2 * d * nbytes), head) if activations else (head,)))
    return tuple(listed)


def _two_passes(attention: Kernel, llm: LLMConfig) -> tuple[Kernel, ...]:
    """Attention over keys, then over values: half of everything each."""
    if llm.attention_kind == "MLA":
        return (attention,)
    half = {field: getattr(attention, field) / 2 for field in ("flops", "state_bytes", "activation_bytes")}
    return (replace(attention, name="attention_scores", tensors=1, **half), replace(attention, name="attention_values", tensors=1, **half))


def touched_share(tokens: ArrayLike, used: float) -> Array:
    """Share of the experts that a step of n ``tokens`` touches: 1 - (1 - used)^n, where each token uses a share ``used`` of them.

    Tokens choose uniformly and alone. One number and an array of them give the same bits; with powers they would not, as NumPy squares
    a single number whose exponent is 2.
    """
    number = np.asarray(tokens, dtype=np.float64)
    if used == 1:
        return np.minimum(number, 1.0)
    return -np.expm1(number * math.log1p(-used))


def _product(matrix: Matrix, workload: Workload) -> Kernel:
    """Activations times a weight matrix: 2 FLOP for each weight a token uses.

    With E experts of which a token uses k, a step of n tokens touches the ``touched_share`` of k/E, each expert by n k / (E share) tokens.
    """
    tokens = workload.tokens
    used = matrix.experts_per_token / matrix.experts
    touched = float(touched_share(tokens, used))
    copy = matrix.inputs * matrix.outputs
    return Kernel(
        name=matrix.name,
        sublayer=matrix.sublayer,
        split=matrix.split,
        engine="matrix",
        rows=tokens * used / touched if touched else 0.0,
        flops=2.0 * tokens * copy * matrix.experts_per_token,
        weight_bytes=matrix.elements * workload.weight_bits / 8,
        activation_bytes=tokens * matrix.experts_per_token * (matrix.inputs + matrix.outputs) * workload.activation_bits / 8,
        touched=touched,
    )


def _attention(workload: Workload) -> Kernel:
    """Scores and weighted values: every query token against the tokens before it (in prefill on average half of them)."""
    llm = workload.llm
    decode = workload.phase == "decode"
    pairs = workload.tokens_held * (1.0 if decode else (workload.context + 1) / 2)
    return Kernel(
        name="attention",
        sublayer="attention",
        split="kv_head",
        engine="vector" if decode else "matrix",
        rows=float(workload.batch if decode else workload.tokens),
        flops=llm.attention_flops * pairs,
        state_bytes=llm.state_elements * workload.tokens_held * workload.kv_bits / 8,
        activation_bytes=2.0 * workload.tokens * llm.num_attention_heads * llm.head_dim * workload.activation_bits / 8,
        tensors=1 if llm.attention_kind == "MLA" else 2,
    )
