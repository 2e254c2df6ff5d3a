"""Where the runtime's weights come from: drawn by a seed, or the *.safetensors of a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..models.llm import LLMConfig
from ._runtime_decoder import Architecture, Family, Layout, Weights, architecture_of


def outside_shapes(llm: LLMConfig) -> dict[str, tuple[int, ...]]:
    """Tensors outside the layers; without "head" the embeddings are the LM head."""
    d = llm.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding": (llm.vocab_size, d), "norm.weight": (d,)}
    if llm.norm_bias:
        shapes["norm.bias"] = (d,)
    if llm.max_position_embeddings:
        shapes["positions"] = (llm.max_position_embeddings, d)
    if not llm.tie_word_embeddings:
        shapes["head"] = (llm.vocab_size, d)
    return shapes


class RandomWeights:
    """Weights by seed, drawn on the device: the same for a device of one kind, and of each layer on its own.

    Matrices are normal with deviation 1 / sqrt(inputs), so that signals neither vanish nor grow. Queries and values are twice as large,
    so that attention looks at a few tokens, not at the mean of all, and counts. Embeddings are as small as 1 / sqrt(hidden): with larger
    ones a tied LM head would repeat the last token for ever. Gains of norms are far from 1 and biases from 0: who forgets one is seen.
    """

    def __init__(self, llm: LLMConfig, seed: int) -> None:
        self.llm, self.seed, self.layout = llm, seed, Layout.of(llm)
        self.architecture = architecture_of(llm)

    def fill(self, layer: int, memory: torch.Tensor) -> None:
        """Draw the weights of a layer into its memory."""
        random = torch.Generator(memory.device).manual_seed(self.seed * 1_000_003 + layer + 1)
        memory.zero_()
        for part in self.layout.parts:
            view = memory[part.begin : part.begin + part.elements].view(part.shape)
            _draw(view, part.name, part.shape[-1], random)
            if part.name in ("q.weight", "v.weight"):
                view.mul_(2)

    def outside(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """Draw what is outside the layers."""
        random = torch.Generator(device).manual_seed(self.seed * 1_000_003)
        drawn = {}
        for name, shape in outside_shapes(self.llm).items():
            drawn[name] = torch.empty(shape, dtype=dtype, device=device)
            _draw(drawn[name], name, self.llm.hidden_size, random)
        return drawn if "head" in drawn else {**drawn, "head": drawn["embedding"]}


def _draw(view: torch.Tensor, name: str, inputs: int, random: torch.Generator) -> None:
    if name.endswith("bias"):
        view.uniform_(-0.1, 0.1, generator=random)
    elif name.startswith(("norm", "q_norm", "k_norm")):
        view.uniform_(0.5, 1.5, generator=random)
    else:
        view.normal_(0, inputs**-0.5, generator=random)


_NAMES: dict[Family, dict[str, str]] = {
    "opt": {
        "norm1": "self_attn_layer_norm",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q": "self_attn.q_proj",
        "o": "self_attn.out_proj",
        "norm2": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
        "embedding": "decoder.embed_tokens.weight",
        "positions": "decoder.embed_positions.weight",
        "norm": "decoder.final_layer_norm",
        "layer": "decoder.layers",
    },
    "llama": {
        "norm1": "input_layernorm",
        "k": "self_attn.k_proj",
        "k_norm": "self_attn.k_norm",
        "v": "self_attn.v_proj",
        "q": "self_attn.q_proj",
        "q_norm": "self_attn.q_norm",
        "o": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "embedding": "embed_tokens.weight",
        "norm": "norm",
        "layer": "layers",
    },
}
"""Hugging Face's names of the tensors, without "model." in front, which older OPT files leave out."""


class FolderWeights:
    """Weights from the *.safetensors of a local folder, with the numbers that its config.json adds; nothing is downloaded."""

    def __init__(self, llm: LLMConfig, folder: Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError:
            raise ValueError("reading weights needs safetensors: pip install 'memsplit[runtime]'") from None
        self.llm, self.folder, self.layout = llm, folder, Layout.of(llm)
        self.architecture = _from_config(architecture_of(llm), folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"weights {folder}: no *.safetensors there; name the folder of an LLM that holds them")
        self._of: dict[str, Any] = {}
        for path in files:
            try:
                opened: Any = safe_open(str(path), framework="pt")
                self._of |= dict.fromkeys(opened.keys(), opened)
            except Exception as error:  # the package raises its own kinds, of OSError or not
                raise ValueError(f"weights {path}: no safetensors file can be read there: {error}; copy it again") from None
        for name, shape in outside_shapes(llm).items():
            self._check(self._outside_name(name), shape)
        for layer in range(llm.num_hidden_layers):
            for part in self.layout.parts:
                self._check(self._layer_name(layer, part.name), part.shape)
        extra = self._layer_name(llm.num_hidden_layers, "k.weight")
        if self._found(extra) is not None:
            raise ValueError(f"weights {folder}: tensor {extra!r} is there, but {llm.name!r} has {llm.num_hidden_layers} layers; {_OTHER}")

    def _layer_name(self, layer: int, name: str) -> str:
        stem, _, kind = name.partition(".")
        names = _NAMES[self.architecture.family]
        return f"model.{names['layer']}.{layer}.{names[stem]}.{kind}"

    def _outside_name(self, name: str) -> str:
        if name == "head":
            return "lm_head.weight"
        stem, _, kind = name.partition(".")
        found = f"model.{_NAMES[self.architecture.family][stem]}"
        return f"{found}.{kind}" if kind else found

    def _found(self, name: str) -> str | None:
        return next((one for one in (name, name.removeprefix("model.")) if one in self._of), None)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._found(name)
        if found is None:
            raise ValueError(f"weights {self.folder}: tensor {name!r} of shape {shape}, which {self.llm.name!r} has, is missing; {_OTHER}")
        held = tuple(self._of[found].get_slice(found).get_shape())
        if held != shape:
            raise ValueError(f"weights {self.folder}: tensor {name!r} has shape {held}, but {self.llm.name!r} has {shape}; {_OTHER}")

    def _read(self, name: str) -> torch.Tensor:
        found = self._found(name) or name
        return self._of[found].get_tensor(found)

    def fill(self, layer: int, memory: torch.Tensor) -> None:
        """Read the weights of a layer into its memory."""
        memory.zero_()
        for part in self.layout.parts:
            memory[part.begin : part.begin + part.elements].view(part.shape).copy_(self._read(self._layer_name(layer, part.name)))

    def outside(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """Read what is outside the layers."""
        read = {name: self._read(self._outside_name(name)).to(device, dtype) for name in outside_shapes(self.llm)}
        return read if "head" in read else {**read, "head": read["embedding"]}


_OTHER = "take the folder of this LLM, or the LLMConfig of this folder (LLMConfig.from_hf)"

_EXECUTED = ("opt", "llama", "mistral", "qwen2", "qwen3")


def _from_config(architecture: Architecture, folder: Path) -> Architecture:
    """The architecture with what the folder's config.json says of norms and positions; ValueError for what is not executed."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"weights {folder}: cannot read its config.json: {error.strerror}; name the folder of an LLM") from None
    except ValueError as error:
        raise ValueError(f"weights {path}: no JSON file: {error}; copy it again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _EXECUTED or (kind == "opt") != (architecture.family == "opt"):
        raise ValueError(f"weights {path}: model_type {kind!r} is not the {architecture.family} architecture of the LLMConfig; {_OTHER}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    odd: list[tuple[str, Callable[[], bool]]] = [
        ("rope_scaling", lambda: rope.get("rope_type", rope.get("type", "default")) != "default"),
        ("do_layer_norm_before", lambda: config.get("do_layer_norm_before", True) is not True),
        ("hidden_act", lambda: config.get("hidden_act", "silu") != "silu"),
        ("activation_function", lambda: config.get("activation_function", "relu") != "relu"),
    ]
    for key, differs in odd:
        if differs():
            raise ValueError(f"weights {path}: {key} is {config.get(key, rope)!r}, which the runtime does not execute; take another LLM")
    if kind == "opt":
        return architecture
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    return Architecture(
        family="llama",
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        longest=int(window or 0),
    )
