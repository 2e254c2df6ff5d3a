"""Where the runtime's weights come from: drawn by a seed, or the *.safetensors of a local folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...models.checks import shown
from ...models.llm import LLMConfig
from ._decoder import Architecture, Family, Layout, Llama3Scaling, Weights, architecture_of


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

_UNREAD: dict[Family, re.Pattern[str]] = {
    "opt": re.compile(r"decoder\.version"),
    "llama": re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
}
"""Tensors that nothing reads and that change nothing: a format's number that fairseq left in OPT; RoPE's frequencies, which follow from
rope_theta and head_dim. Any other tensor that nothing reads is a part of the LLM that would be left out."""

_FLOATING = ("F16", "BF16", "F32", "F64")
"""Safetensors' names of the dtypes that are read as they are: integers and 8-bit numbers need scales to mean anything."""

_ROWS = 8192
"""Rows of an LM head that are compared with the embeddings at once: the table of a large vocabulary is gigabytes."""

_OTHER = "take the folder of this LLM, or the LLMConfig of this folder (LLMConfig.from_hf)"


def _files(folder: Path) -> list[Path]:
    """The safetensors files of an LLM: those that its index names, if it has one, as the same weights may lie there in another form."""
    index = folder / "model.safetensors.index.json"
    try:
        listed: Any = json.loads(index.read_bytes()) if index.exists() else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"weights {index}: it cannot be read: {shown(str(error))}; copy it again") from None
    if listed is None:
        return sorted(folder.glob("*.safetensors"))
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
        raise ValueError(f"weights {index}: weight_map must name a file of this folder for each tensor; copy it again")
    return [folder / name for name in sorted(set(names.values()))]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of an open file: its name there, with or without "model."."""

    name: str
    path: Path
    file: Any

    @property
    def rows(self) -> Any:
        """What tells shape and dtype, and reads some rows."""
        return self.file.get_slice(self.name)

    def read(self) -> torch.Tensor:
        """All of it."""
        return self.file.get_tensor(self.name)


class FolderWeights:
    """Weights from the *.safetensors of a local folder, with the numbers that its config.json adds; nothing is downloaded.

    The folder must be this LLM's: heads, tied embeddings and all else that the shapes of tensors do not show are compared with its
    config.json, every tensor is read or known to be harmless, and none lies in two files. Values that are not finite are refused when a
    tensor is read, so that no file is read twice.
    """

    def __init__(self, llm: LLMConfig, folder: Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError:
            raise ValueError("reading weights needs safetensors: pip install 'memsplit[runtime]'") from None
        self.llm, self.folder, self.layout = llm, folder, Layout.of(llm)
        self.architecture, stated = _from_config(architecture_of(llm), folder)
        files = _files(folder)
        if not files:
            raise ValueError(f"weights {folder}: no *.safetensors there; name the folder of an LLM that holds them")
        self._of: dict[str, _Stored] = {}
        for path in files:
            try:
                opened: Any = safe_open(str(path), framework="pt")
                names = list(opened.keys())
            except Exception as error:  # the package raises its own kinds, of OSError or not
                raise ValueError(f"weights {path}: no safetensors file can be read there: {shown(str(error))}; copy it again") from None
            for name in names:
                self._add(_Stored(name, path, opened))
        self._check_tensors()
        self._compare(stated)

    def _add(self, stored: _Stored) -> None:
        first = self._of.setdefault(stored.name.removeprefix("model."), stored)
        if first is not stored:
            files = " and ".join(sorted({shown(one.path.name) for one in (first, stored)}))
            raise ValueError(
                f"weights {self.folder}: tensor {shown(stored.name)} must be there once, with or without 'model.' in front, but is twice, "
                f"in {files}; move the file that does not belong to the LLM out of the folder"
            )

    def _check_tensors(self) -> None:
        """All tensors of the LLM, of its shapes, and no others."""
        llm, shapes = self.llm, outside_shapes(self.llm)
        if "lm_head.weight" in self._of:  # of tied embeddings, too, whose values are compared when they are read
            shapes.setdefault("head", shapes["embedding"])
        read = [self._check(self._outside_name(name), shape) for name, shape in shapes.items()]
        for layer in range(llm.num_hidden_layers):
            read += [self._check(self._layer_name(layer, part.name), part.shape) for part in self.layout.parts]
        extra = self._layer_name(llm.num_hidden_layers, "k.weight")
        if self._found(extra) is not None:
            what = f"weights {self.folder}: tensor {extra!r}"
            raise ValueError(f"{what} is there, but {shown(llm.name)} has {llm.num_hidden_layers} layers; {_OTHER}")
        harmless = _UNREAD[self.architecture.family]
        for key in sorted(self._of.keys() - {stored.name.removeprefix("model.") for stored in read}):
            stored = self._of[key]
            if not harmless.fullmatch(key):
                raise ValueError(
                    f"weights {self.folder}: tensor {shown(stored.name)} of {shown(stored.path.name)} is there, but nothing of "
                    f"{shown(llm.name)} reads it; {_OTHER}, or move a file that does not belong to it out of the folder"
                )

    def _compare(self, stated: LLMConfig) -> None:
        """What config.json says against the LLM: what shapes do not show, and what a folder lacks that is not whole."""
        for field in _COMPARED:
            said, asked = getattr(stated, field), getattr(self.llm, field)
            if field == "qkv_bias":  # attention_bias is one of these three, too
                said, asked = said or stated.attention_bias, asked or self.llm.attention_bias
            if said != asked:
                raise ValueError(
                    f"weights {self.folder / 'config.json'}: {field} of its LLMConfig is {said}, but that of {shown(self.llm.name)} is "
                    f"{asked}; {_OTHER}"
                )

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

    def _found(self, name: str) -> _Stored | None:
        return self._of.get(name.removeprefix("model."))

    def _check(self, name: str, shape: tuple[int, ...]) -> _Stored:
        found, llm = self._found(name), shown(self.llm.name)
        if found is None:
            raise ValueError(f"weights {self.folder}: tensor {name!r} of shape {shape}, which {llm} has, is missing; {_OTHER}")
        rows = found.rows
        if (held := tuple(rows.get_shape())) != shape:
            raise ValueError(f"weights {self.folder}: tensor {name!r} has shape {shown(held)}, but {llm} has {shape}; {_OTHER}")
        if (dtype := rows.get_dtype()) not in _FLOATING:
            raise ValueError(
                f"weights {self.folder}: tensor {name!r} must be of dtype {', '.join(_FLOATING)}, not {dtype}; take weights that are not "
                "quantized"
            )
        return found

    def _read(self, name: str, into: torch.Tensor) -> None:
        """Copy a tensor; ValueError if what arrives is not finite."""
        stored = self._of[name.removeprefix("model.")].read()
        into.copy_(stored)
        if all(map(math.isfinite, _ends(into))):
            return
        where = f"weights {self.folder}: tensor {name!r}"
        low, high = _ends(stored)
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{where} must hold finite values, but has NaN or infinite ones; copy its file again, or take other weights")
        largest = max(-low, high)
        wider = [f"{one!r}" for one in ("bfloat16", "float32") if largest <= torch.finfo(getattr(torch, one)).max]
        kind = str(into.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where} has values up to {largest:.4g}, but {kind} ends at {torch.finfo(into.dtype).max:.4g}; "
            f"take {'dtype ' + ' or '.join(wider) if wider else 'other weights'}"
        )

    def fill(self, layer: int, memory: torch.Tensor) -> None:
        """Read the weights of a layer into its memory."""
        memory.zero_()
        for part in self.layout.parts:
            self._read(self._layer_name(layer, part.name), memory[part.begin : part.begin + part.elements].view(part.shape))

    def outside(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """Read what is outside the layers."""
        read = {}
        for name, shape in outside_shapes(self.llm).items():
            read[name] = torch.empty(shape, dtype=dtype, device=device)
            self._read(self._outside_name(name), read[name])
        if "head" in read:
            return read
        self._check_tied(read["embedding"])
        return {**read, "head": read["embedding"]}

    def _check_tied(self, embedding: torch.Tensor) -> None:
        """An LM head that a folder stores beside tied embeddings must say the same, in the runtime's dtype."""
        head = self._of.get("lm_head.weight")
        if head is None:
            return
        for begin in range(0, len(embedding), _ROWS):
            wanted, held = embedding[begin : begin + _ROWS], head.rows[begin : begin + _ROWS]
            if not torch.equal(held.to(wanted.device, wanted.dtype), wanted):
                raise ValueError(
                    f"weights {self.folder}: tensor 'lm_head.weight' must equal the embeddings, as {shown(self.llm.name)} has tied ones, "
                    "but differs; set tie_word_embeddings to False in its config.json and its LLMConfig, or take other weights"
                )


def _ends(values: torch.Tensor) -> tuple[float, float]:
    """Least and largest; NaN if any is, so that they tell whether all are finite at a tenth of the cost of asking each."""
    low, high = values.aminmax()
    return float(low), float(high)


_EXECUTED = ("opt", "llama", "mistral", "qwen2", "qwen3")

_COMPARED = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "gated_ffn",
    "attention_bias",
    "qkv_bias",
    "mlp_bias",
    "norm_bias",
    "qk_norm",
)
"""Fields of an LLMConfig that the arithmetic follows, without vocab_size: rows are the tensors', whatever config.json counts."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "activation_function": ("relu",),
    "do_layer_norm_before": (True,),
    "_remove_final_layer_norm": (False, None),
    "layer_norm_elementwise_affine": (True,),
    "partial_rotary_factor": (1, None),
    "text_config": (None,),
}
"""Keys of config.json that change the arithmetic, and the values that are executed, first what a file without the key means."""

_WINDOW = 4096
"""Tokens of a sliding window where config.json does not say: transformers' default, which is none only if the key is there and null."""


def _from_config(architecture: Architecture, folder: Path) -> tuple[Architecture, LLMConfig]:
    """The architecture with what the folder's config.json says of norms and positions, and its LLM; ValueError for what is not executed."""
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"weights {folder}: cannot read its config.json: {error.strerror}; name the folder of an LLM") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"weights {path}: no JSON file: {error}; copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"weights {path}: it must hold a JSON object, not {shown(config)}; copy it again")
    kind = config.get("model_type")
    if kind not in _EXECUTED or (kind == "opt") != (architecture.family == "opt"):
        raise ValueError(
            f"weights {path}: model_type {shown(kind)} is not the {architecture.family} architecture of the LLMConfig; {_OTHER}"
        )
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise ValueError(f"weights {path}: {key} is {shown(config[key])}, but quantized weights are not read; take those of 16 bits")
    for key, executed in _ONLY.items():
        if (value := config.get(key, executed[0])) not in executed:
            raise ValueError(f"weights {path}: {key} is {shown(value)}, which the runtime does not execute; take another LLM")
    try:
        stated = LLMConfig.from_hf(config, name="of the folder")
    except ValueError as error:
        raise ValueError(f"weights {folder}: {error}") from None
    if kind == "opt":
        return architecture, stated
    epsilon = _number(path, "rms_norm_eps", config.get("rms_norm_eps", 1e-6), 1e-30, 1)
    theta, scaling = _rope(path, config)
    return Architecture(family="llama", theta=theta, scaling=scaling, epsilon=epsilon, longest=_window(path, config)), stated


def _rope(path: Path, config: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """What config.json says of RoPE, under any of the names that transformers has had for it: plain, or that of Llama 3.1 and later."""
    thetas = [config["rope_theta"]] if "rope_theta" in config else []
    scalings: list[Llama3Scaling | None] = []
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"weights {path}: {key} must be an object or null, not {shown(given)}; correct it, or copy the file again")
        if "rope_theta" in given:
            thetas.append(given["rope_theta"])
        rest = {field: value for field, value in given.items() if field != "rope_theta" and value is not None}
        if rest.get("rope_type", rest.get("type")) == "llama3" and rest.keys() - {"type", "rope_type"} == _LLAMA3.keys():
            scale = {name: _number(path, f"{key}: {field}", rest[field], 1e-6, 1e9) for field, name in _LLAMA3.items()}
            if scale["low"] >= scale["high"]:
                raise ValueError(
                    f"weights {path}: {key} must have a low_freq_factor below its high_freq_factor, not {shown(given)}; correct it"
                )
            scalings.append(Llama3Scaling(**scale))
        elif any(_PLAIN.get(field) != value for field, value in rest.items()):
            raise ValueError(f"weights {path}: {key} is {shown(given)}, which the runtime does not execute; take another LLM")
        elif rest:
            scalings.append(None)
    numbers = [_number(path, "rope_theta", theta, 1, 1e30) for theta in thetas] or [10_000.0]
    if min(numbers) != max(numbers):
        raise ValueError(f"weights {path}: rope_theta must be one number, not {shown(numbers)}; correct it where it is wrong")
    if len(set(scalings)) > 1:
        raise ValueError(f"weights {path}: rope_scaling and rope_parameters say different things of RoPE; correct the wrong one")
    return numbers[0], scalings[0] if scalings else None


_PLAIN = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "original",
}
"""What transformers calls the numbers of ``Llama3Scaling``."""


def _window(path: Path, config: dict[str, Any]) -> int:
    """Tokens of context up to which a sliding window hides none, 0 without a window.

    All tokens are attended to, so that a longer context would not be the LLM's. A window of some layers bounds all contexts, too.
    """
    used, kinds = config.get("use_sliding_window"), config.get("layer_types")
    if used not in (None, True, False):
        raise ValueError(f"weights {path}: use_sliding_window must be true or false, not {shown(used)}; correct it, or copy the file again")
    kinds = [] if kinds is None else kinds
    if not isinstance(kinds, list) or any(one not in ("full_attention", "sliding_attention") for one in kinds):
        raise ValueError(f"weights {path}: layer_types is {shown(kinds)}, which the runtime does not execute; take another LLM")
    window = config.get("sliding_window", _WINDOW)
    if not used and "sliding_attention" not in kinds and (config["model_type"] != "mistral" or window is None):
        return 0
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < 2**62:
        rule = "a whole number of tokens, at least 1"
        raise ValueError(f"weights {path}: sliding_window must be {rule}, not {shown(window)}; correct it, or copy the file again")
    return window


def _number(path: Path, key: str, value: object, least: float, most: float) -> float:
    """A number that single precision holds with room for what is made of it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(
            f"weights {path}: {key} must be a number from {least:g} to {most:g}, not {shown(value)}; correct it, or copy the file again"
        )
    return float(value)
