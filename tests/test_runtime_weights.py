"""Weights from a folder: a decoder in NumPy writes its own as safetensors, and the runtime says what that decoder says."""

import json
from dataclasses import replace

import numpy as np
import pytest
from decoder import Array, Decoder, Shape, generate

from memsplit.dse.runtime import CachePlan, Runtime, SplitKV
from memsplit.models import CacheRatioPlan, LLMConfig

torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs memsplit[runtime]")

ROUNDING = 2e-3
"""Logits, about 1 and some tens at the most, in single precision against double, through sums of 48 terms in two layers and ten tokens;
OPT's norms have an epsilon of 1e-5 and the NumPy decoder's 1e-6, which is 1e-5 of logits of norms about 1. A wrong name is 1 off."""

STEPS = 10

KINDS = {
    "OPT": Shape(norm="layer", positions="learned", gated=False),
    "Llama, MHA": Shape(),
    "Llama, GQA": Shape(kv_heads=2),
    "Qwen3": Shape(kv_heads=2, qk_norm=True, head_dim=12),
}
each_kind = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)


def centred(decoder: Decoder) -> Decoder:
    """All that is added to the hidden state without its mean: LayerNorm and the NumPy decoder's last norm are then the same."""
    for matrix in (decoder.embeddings, decoder.learned, *(layer[name] for layer in decoder.weights for name in ("o", "down"))):
        matrix -= matrix.mean(axis=1, keepdims=True)
    return decoder


def opt_tensors(decoder: Decoder) -> dict[str, Array]:
    """OPT's names, older files' without "model."; the shifts of norms are written as biases of what follows, which is the same."""
    hidden = decoder.shape.hidden
    unused = np.full((2, hidden), 1e3)  # rows that no token's position may read
    tensors = {
        "decoder.embed_tokens.weight": decoder.embeddings,
        "decoder.embed_positions.weight": np.concatenate([unused, decoder.learned]),
        "decoder.final_layer_norm.weight": np.ones(hidden),
        "decoder.final_layer_norm.bias": np.zeros(hidden),
        "lm_head.weight": decoder.head.T,
    }
    for index, weights in enumerate(decoder.weights):
        stem = f"decoder.layers.{index}"
        for which, norm, names in (
            (0, "self_attn_layer_norm", {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}),
            (1, "final_layer_norm", {"up": "fc1"}),
        ):
            tensors[f"{stem}.{norm}.weight"] = decoder.gains[index, which]
            tensors[f"{stem}.{norm}.bias"] = np.zeros(hidden)
            for own, name in names.items():
                tensors[f"{stem}.{name}.weight"] = weights[own].T
                tensors[f"{stem}.{name}.bias"] = decoder.shifts[index, which] @ weights[own]
        for own, name in (("o", "self_attn.out_proj"), ("down", "fc2")):
            tensors[f"{stem}.{name}.weight"] = weights[own].T
            tensors[f"{stem}.{name}.bias"] = np.zeros(hidden)
    return tensors


def llama_tensors(decoder: Decoder) -> dict[str, Array]:
    tensors = {
        "model.embed_tokens.weight": decoder.embeddings,
        "model.norm.weight": np.ones(decoder.shape.hidden),
        "lm_head.weight": decoder.head.T,
    }
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    for index, weights in enumerate(decoder.weights):
        stem = f"model.layers.{index}"
        tensors |= {f"{stem}.{name}.weight": weights[own].T for own, name in names.items()}
        tensors[f"{stem}.input_layernorm.weight"], tensors[f"{stem}.post_attention_layernorm.weight"] = decoder.gains[index]
        if decoder.shape.qk_norm:
            tensors[f"{stem}.self_attn.q_norm.weight"], tensors[f"{stem}.self_attn.k_norm.weight"] = decoder.head_gains[index]
    return tensors


def config(shape: Shape) -> dict[str, object]:
    common = {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    common |= {"vocab_size": shape.vocab, "tie_word_embeddings": False}
    if not shape.gated:
        return {**common, "model_type": "opt", "ffn_dim": shape.ffn, "max_position_embeddings": shape.longest}
    return {
        **common,
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-6,
    }


def write(folder, decoder: Decoder, drop: str = "") -> LLMConfig:
    """Two files, as large checkpoints come in several; without the tensor whose name ends in ``drop``."""
    tensors = opt_tensors(decoder) if not decoder.shape.gated else llama_tensors(decoder)
    kept = {name: np.ascontiguousarray(one) for name, one in tensors.items() if not (drop and name.endswith(drop))}
    names = sorted(kept)
    for part in range(2):
        safetensors_numpy.save_file({name: kept[name] for name in names[part::2]}, folder / f"model-{part + 1}-of-2.safetensors")
    (folder / "config.json").write_text(json.dumps(config(decoder.shape)))
    return LLMConfig.from_hf(folder / "config.json")


@each_kind
def test_the_runtime_says_what_the_numpy_decoder_says(tmp_path, shape):
    """Names, orientation, offsets, biases, norms, angles and heads of both architectures, by an implementation of its own."""
    decoder = Decoder(shape, 3)
    decoder = decoder if shape.gated else centred(decoder)
    prompts = np.random.default_rng(0).integers(0, shape.vocab, (3, 21))
    expected = generate(decoder, list(prompts), STEPS)
    assert expected.margin > 2 * ROUNDING, "the best two tokens are too close for this seed to prove anything"
    with Runtime(write(tmp_path, decoder), weights=tmp_path) as runtime:
        for plan in (None, SplitKV(split=13), CachePlan(blocks=CacheRatioPlan(act_gpu=1, kv_host=1, act_host=2))):
            found = runtime.generate(prompts, STEPS, plan, logits=True, state=True)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_allclose(found.logits, expected.logits.transpose(1, 0, 2), rtol=0, atol=ROUNDING)
            for request, cache in enumerate(expected.caches):
                np.testing.assert_allclose(found.keys[:, :, request], cache.keys[:, : cache.length], rtol=0, atol=ROUNDING)
                np.testing.assert_allclose(found.values[:, :, request], cache.values[:, : cache.length], rtol=0, atol=ROUNDING)


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_the_first_missing_or_odd_tensor_is_named(tmp_path):
    shape = KINDS["Llama, GQA"]
    llm = write(tmp_path, Decoder(shape, 0), drop="layers.1.self_attn.v_proj.weight")
    with refused(r"tensor 'model.layers.1.self_attn.v_proj.weight' of shape \(16, 32\), which .* has, is missing; take the folder"):
        Runtime(llm, weights=tmp_path)
    llm = write(tmp_path, Decoder(shape, 0))
    for other, message in (
        (replace(llm, intermediate_size=64), r"'model.layers.0.mlp.gate_proj.weight' has shape \(48, 32\), but .* has \(64, 32\)"),
        (replace(llm, num_hidden_layers=1), r"'model.layers.1.self_attn.k_proj.weight' is there, but .* has 1 layers"),
        (replace(llm, num_hidden_layers=3), r"'model.layers.2.* is missing"),
        (replace(llm, qkv_bias=True), r"'model.layers.0.self_attn.k_proj.bias' of shape \(16,\)"),
    ):
        with refused(message):
            Runtime(other, weights=tmp_path)


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0))
    opt = replace(llm, gated_ffn=False, norm_bias=True, max_position_embeddings=130, attention_bias=True, mlp_bias=True)
    with refused("model_type 'llama' is not the opt architecture"):
        Runtime(opt, weights=tmp_path)
    for change, message in (
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is .*, which the runtime does not execute"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config(KINDS["Llama, MHA"]), **change}))
        with refused(message):
            Runtime(llm, weights=tmp_path)


def test_a_sliding_window_is_the_longest_context(tmp_path):
    """Every token is attended to, so that a longer context would not be the LLM's."""
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0))
    (tmp_path / "config.json").write_text(json.dumps({**config(KINDS["Llama, MHA"]), "model_type": "mistral", "sliding_window": 24}))
    with Runtime(llm, weights=tmp_path) as runtime:
        runtime.generate(runtime.random_prompts(1, 20), 5)
        with refused("has positions for 24 tokens, not for 25"):
            runtime.generate(runtime.random_prompts(1, 20), 6)


def test_folders_without_weights_are_refused(tmp_path):
    llm = LLMConfig.from_hf(config(KINDS["Llama, MHA"]))
    with refused("cannot read its config.json"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused("no JSON file"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(KINDS["Llama, MHA"])))
    with refused("no \\*.safetensors there"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with refused("no safetensors file can be read there"):
        Runtime(llm, weights=tmp_path)
