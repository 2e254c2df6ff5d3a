"""LLMs by the names that benchmarks give them, and the numbers of a step that follow from an LLM and a precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import shown
from .estimate import StepModel, StepProfile
from .llm import LLMConfig
from .presets import LLMS
from .roofline import Array

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "llama-2-7b": "llama2-7b",
        "llama-2-13b": "llama2-13b",
        "llama-2-70b": "llama2-70b",
        "llama-3-8b": "llama3.1-8b",
        "llama-3-70b": "llama3.1-70b",
        "llama-3.1-8b": "llama3.1-8b",
        "llama-3.1-70b": "llama3.1-70b",
        "llama-3.1-405b": "llama3.1-405b",
        "mistral-7b-v0.1": "mistral-7b",
        "mixtral-8x7b-v0.1": "mixtral-8x7b",
    }
)
"""Names of the same shapes: Llama 3 and 3.1 differ in their rotary embedding only."""

STEP = StepProfile(name="step_with_head", lm_head=True)


def step_llm(name: str | Path | LLMConfig) -> LLMConfig:
    """An LLM by our name or a benchmark's ("llama2-7b", "meta-llama/Llama-2-7b-hf", "LLaMA-3 8B"), or by the path of its config.json.

    An LLMConfig is itself. ValueError names the ones there are.
    """
    if isinstance(name, LLMConfig):
        return name
    found = _published(str(name))
    if found is None and "\0" not in str(name) and Path(name).is_file():
        return LLMConfig.from_hf(name)
    if found is None:
        raise ValueError(
            f"there is no LLM {shown(str(name))}; name one of {', '.join(LLMS)}, or one of its Hugging Face names, the path of a "
            "config.json, or give an LLMConfig"
        )
    return found


def _published(name: str) -> LLMConfig | None:
    """The LLM of that name, ours or a benchmark's; None if there is none."""
    plain = name.rpartition("/")[2].casefold().replace(" ", "-").replace("_", "-").removeprefix("meta-")
    for tail in ("-hf", "-instruct", "-chat"):
        plain = plain.removesuffix(tail)
    return LLMS.get(plain) or LLMS.get(ALIASES.get(plain, ""))


def weight_bits(dtype: str) -> float:
    """Bits of a weight: "bf16", "fp16", "fp8", "int8", "w4" or, for mixed formats, "w4.85"; ValueError for anything else."""
    plain = str(dtype).casefold()
    fixed = {"bf16": 16.0, "fp16": 16.0, "float16": 16.0, "bfloat16": 16.0, "half": 16.0, "fp8": 8.0, "int8": 8.0}
    if plain in fixed:
        return fixed[plain]
    try:
        bits = float(plain.removeprefix("w")) if plain.startswith("w") else 0.0
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise ValueError(f"dtype {shown(dtype)} is not known; use {', '.join(fixed)}, or w and the bits of a weight, as w4")
    return bits


def peak_name(dtype: str) -> str:
    """The precision in which products of such weights are computed: their own, or 16 bits for weights that are unpacked first."""
    plain = str(dtype).casefold()
    return plain if plain in ("fp8", "int8") else "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """What a step of N rows is made of, [N] each; bytes with the row's bits for weights and 16 for the rest, FLOPs.

    ``weights`` of dense layers, ``experts`` all together of which a token uses a share ``used``, ``head``; ``held`` with embeddings;
    ``state`` a token of context; ``activations`` and ``flops`` of products a token; ``head_flops`` and ``pair_flops`` of attention a
    request and a pair of tokens; ``layers`` and how many they are worth in launches, ``launches``; ``heads`` of keys and values;
    ``grouped``: 1 where query heads share these, else 0; ``width`` of the residual stream.
    """

    weights: Array
    experts: Array
    used: Array
    head: Array
    held: Array
    state: Array
    activations: Array
    flops: Array
    head_flops: Array
    pair_flops: Array
    layers: Array
    launches: Array
    heads: Array
    grouped: Array
    width: Array


@lru_cache(maxsize=256)
def _sizes(llm: LLMConfig, dtype: str) -> tuple[float, ...]:
    bits = weight_bits(dtype)
    step = StepModel.build(llm, weight_bits=bits, kv_bits=16, activation_bits=16, profile=STEP)
    head = llm.hidden_size * llm.vocab_size * bits / 8
    layers = llm.num_hidden_layers
    # Router, top-k, sort, gather and combine are about half as many kernels again as a dense layer has.
    launches = layers + (0.5 * (layers - llm.num_dense_layers) if llm.num_experts else 0.0)
    return (
        *(step.weights - head, step.experts, step.used, head, step.held_weights, step.state, step.activations, step.product_flops),
        *(
            step.head_flops,
            step.attention_flops,
            float(layers),
            launches,
            float(llm.num_kv_heads),
            float(llm.attention_kind != "MHA"),
            float(llm.hidden_size),
        ),
    )


def step_configs(llms: NDArray[Any]) -> NDArray[Any]:
    """``llms`` [N] with the LLMConfig in place of the path of a config.json, which is read once; ValueError for what is no LLM.

    Names stay names.
    """
    column = np.asarray(llms)
    texts = (column if column.dtype.kind == "O" else column.astype(str)).reshape(-1).tolist()
    wrong = [one for one in texts if not isinstance(one, str | Path | LLMConfig)]
    if wrong:
        raise ValueError(f"an LLM must be a name, the path of a config.json, or an LLMConfig, not {shown(wrong[0])}; give one of these")
    known = {one: one if isinstance(one, str) and _published(one) else step_llm(one) for one in dict.fromkeys(texts)}
    if all(isinstance(one, str) for one in known.values()):
        return column.astype(str)
    found = np.empty(len(texts), dtype=object)
    found[:] = [known[one] for one in texts]
    return found


def _configs(llms: NDArray[Any]) -> tuple[list[LLMConfig], NDArray[np.int64]]:
    """The different LLMs of rows [N], and the place [N] of each row's among them."""
    column = np.asarray(llms)
    if column.dtype.kind == "O":
        places: dict[Any, int] = {}
        row = [places.setdefault(one, len(places)) for one in column.reshape(-1).tolist()]
        return [step_llm(one) for one in places], np.array(row, dtype=np.int64)
    names, row_of_name = np.unique(column.astype(str), return_inverse=True)
    return [step_llm(str(name)) for name in names], np.asarray(row_of_name, dtype=np.int64).reshape(-1)


def step_sizes(llms: NDArray[Any], dtypes: NDArray[Any]) -> StepSizes:
    """The sizes of rows [N] by their LLMs, names or LLMConfigs, and precisions; each pair is looked up once."""
    configs, of_llm = _configs(llms)
    dtype_names, of_dtype = np.unique(np.asarray(dtypes).astype(str), return_inverse=True)
    pairs, row = np.unique(of_llm * len(dtype_names) + of_dtype, return_inverse=True)
    table = np.array([_sizes(configs[pair // len(dtype_names)], str(dtype_names[pair % len(dtype_names)])) for pair in pairs])
    return StepSizes(**dict(zip(StepSizes.__dataclass_fields__, table[row].T.reshape(len(table.T), -1), strict=True)))
