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


def tensors_of(decoder: Decoder) -> dict[str, Array]:
    return llama_tensors(decoder) if decoder.shape.gated else opt_tensors(decoder)


def write(folder, decoder: Decoder, drop: str = "", **changes: object) -> LLMConfig:
    """Two files, as large checkpoints come in several; without the tensor whose name ends in ``drop``; ``changes`` of config.json."""
    kept = {name: np.ascontiguousarray(one) for name, one in tensors_of(decoder).items() if not (drop and name.endswith(drop))}
    names = sorted(kept)
    for part in range(2):
        safetensors_numpy.save_file({name: kept[name] for name in names[part::2]}, folder / f"model-{part + 1}-of-2.safetensors")
    return say(folder, decoder.shape, **changes)


def say(folder, shape: Shape, **changes: object) -> LLMConfig:
    """Write config.json with ``changes``; the LLM is the one without them."""
    (folder / "config.json").write_text(json.dumps({**config(shape), **changes}))
    return LLMConfig.from_hf(config(shape), name=folder.name)


def add(folder, **tensors: object) -> None:
    """A third file, of tensors whose names have __ for a point."""
    held = {name.replace("__", "."): torch.as_tensor(one).contiguous() for name, one in tensors.items()}
    pytest.importorskip("safetensors.torch").save_file(held, folder / "more.safetensors")


def replaced(folder, decoder: Decoder, name: str, tensor: object) -> LLMConfig:
    """A folder with another tensor under a name."""
    llm = write(folder, decoder, drop=name)
    add(folder, **{next(one for one in tensors_of(decoder) if one.endswith(name)): tensor})
    return llm


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


def logits_of(llm: LLMConfig, folder, prompts: Array) -> Array:
    with Runtime(llm, weights=folder) as runtime:
        return runtime.generate(prompts, 4, logits=True).logits


PROMPTS = np.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
            "num_attention_heads of its LLMConfig is 4, but .* is 2; take",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings of its LLMConfig is False, but .* is True; take"),
        ({"qk_norm": True}, "'model.layers.0.self_attn.k_norm.weight' .* is missing"),
        ({"qkv_bias": True}, "'model.layers.0.self_attn.k_proj.bias' .* is missing"),
    ],
)
def test_an_llm_that_config_json_does_not_say_is_refused(tmp_path, changes, message):
    """All tensors of the first two have the shapes that the LLM has."""
    llm = write(tmp_path, Decoder(KINDS["Llama, GQA"], 0))
    with refused(message):
        Runtime(replace(llm, **changes), weights=tmp_path)


def test_a_config_json_of_other_layers_than_its_tensors_is_refused(tmp_path):
    """A download that is not whole would run as a shorter LLM; rows of the vocabulary are what the tensors have."""
    llm = write(tmp_path, Decoder(KINDS["Llama, GQA"], 0), num_hidden_layers=3)
    with refused("num_hidden_layers of its LLMConfig is 3, but .* is 2"):
        Runtime(llm, weights=tmp_path)
    say(tmp_path, KINDS["Llama, GQA"], vocab_size=64)
    assert np.isfinite(logits_of(llm, tmp_path, PROMPTS)).all()


def test_biases_of_llama_are_as_config_json_says(tmp_path):
    shape = KINDS["Llama, MHA"]
    llm = write(tmp_path, Decoder(shape, 0))
    plain = logits_of(llm, tmp_path, PROMPTS)
    say(tmp_path, shape, attention_bias=True)
    names = {"k": shape.hidden, "v": shape.hidden, "q": shape.hidden, "o": shape.hidden}
    biases = {f"model.layers.{layer}.self_attn.{one}_proj.bias": np.ones(size) for layer in range(2) for one, size in names.items()}
    with refused("attention_bias of its LLMConfig is True, but .* is False"):
        Runtime(llm, weights=tmp_path)
    add(tmp_path, **biases)
    biased = LLMConfig.from_hf(tmp_path / "config.json")
    assert np.abs(logits_of(biased, tmp_path, PROMPTS) - plain).max() > 100 * ROUNDING
    # attention_bias is the bias of queries, keys and values, too: who says both asks for the same LLM
    np.testing.assert_array_equal(logits_of(replace(biased, qkv_bias=True), tmp_path, PROMPTS), logits_of(biased, tmp_path, PROMPTS))
    with refused(r"tensor 'model.layers.0.self_attn.k_proj.bias' of 'more.safetensors' is there, but nothing of .* reads it"):
        Runtime(llm, weights=tmp_path)
    say(tmp_path, shape, mlp_bias=True)
    with refused("attention_bias of its LLMConfig is False, but .* is True"):
        Runtime(biased, weights=tmp_path)


@pytest.mark.parametrize("kind", ["Llama, GQA", "OPT"])
def test_tensors_that_nothing_reads_are_refused_but_harmless_ones(tmp_path, kind):
    decoder = Decoder(KINDS[kind], 0)
    llm = write(tmp_path, decoder)
    alone = logits_of(llm, tmp_path, PROMPTS)
    if decoder.shape.gated:
        harmless = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4) for layer in range(2)}
        odd = ("model.layers.0.self_attn.o_proj.bias", "layers.1.self_attn.k_proj.weight_scale", "model.layers.7.x", "v_head.weight")
    else:
        harmless = {"decoder.version": np.ones(1)}
        odd = ("model.decoder.project_in.weight", "decoder.layers.1.self_attn.rotary_emb.inv_freq")
    add(tmp_path, **harmless)
    np.testing.assert_array_equal(logits_of(llm, tmp_path, PROMPTS), alone)
    for name in odd:
        add(tmp_path, **harmless, **{name: np.ones(32)})
        with refused(f"tensor '{name}' of 'more.safetensors' is there, but nothing of .* reads it; take the folder .*, or move a file"):
            Runtime(llm, weights=tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.weight"])
def test_a_tensor_in_two_files_is_refused(tmp_path, name):
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0))
    add(tmp_path, **{name: np.zeros((32, 32))})
    with refused(
        r"layers.0.self_attn.q_proj.weight' must be there once, .* is twice, in 'model-\d-of-2.safetensors' and 'more.safetensors'; mo"
    ):
        Runtime(llm, weights=tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "bool", "float8_e4m3fn", "int64"])
def test_numbers_that_need_scales_are_refused(tmp_path, dtype):
    decoder, name = Decoder(KINDS["Llama, MHA"], 0), "layers.1.mlp.up_proj.weight"
    llm = replaced(tmp_path, decoder, name, torch.ones(48, 32).to(getattr(torch, dtype)))
    kind = {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "int64": "I64"}.get(dtype, "BOOL")
    with refused(rf"tensor 'model.layers.1.mlp.up_proj.weight' must be of dtype F16, BF16, F32, F64, not {kind}; take"):
        Runtime(llm, weights=tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_tensor_of_any_float_is_read(tmp_path, dtype):
    """Halves are sums of a few powers of two, which all dtypes hold: the logits are the same to the bit."""
    decoder, name = Decoder(KINDS["Llama, MHA"], 0), "layers.1.mlp.up_proj.weight"
    halves = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (48, 32)) / 8)
    expected = logits_of(replaced(tmp_path, decoder, name, halves), tmp_path, PROMPTS)
    np.testing.assert_array_equal(
        logits_of(replaced(tmp_path, decoder, name, halves.to(getattr(torch, dtype))), tmp_path, PROMPTS), expected
    )


@pytest.mark.parametrize("kind", ["Llama, GQA", "OPT"])
def test_tied_embeddings_are_the_head_that_a_folder_stores(tmp_path, kind):
    """Files of tied LLMs may hold the LM head once more: it must say the same; no head is fine, and no head of an untied LLM is not."""
    decoder = Decoder(KINDS[kind], 0)
    untied = write(tmp_path, decoder, drop="lm_head.weight", tie_word_embeddings=True)
    llm = replace(untied, tie_word_embeddings=True)
    expected = logits_of(llm, tmp_path, PROMPTS)
    for tied, message in ((True, "tie_word_embeddings of its"), (False, r"'lm_head.weight' of shape \(61, 32\), which .* has, is missing")):
        say(tmp_path, decoder.shape, tie_word_embeddings=not tied)
        with refused(message):
            Runtime(replace(llm, tie_word_embeddings=tied), weights=tmp_path)
    say(tmp_path, decoder.shape, tie_word_embeddings=True)
    add(tmp_path, lm_head__weight=decoder.embeddings)
    np.testing.assert_array_equal(logits_of(llm, tmp_path, PROMPTS), expected)
    decoder.embeddings[-1, -1] += 1
    add(tmp_path, lm_head__weight=decoder.embeddings)
    with refused("'lm_head.weight' must equal the embeddings, .* but differs; set tie_word_embeddings to False"):
        Runtime(llm, weights=tmp_path)
    add(tmp_path, lm_head__weight=decoder.embeddings[:-1])
    with refused(r"'lm_head.weight' has shape \(60, 32\)"):
        Runtime(llm, weights=tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(tmp_path, value):
    decoder = Decoder(KINDS["Llama, MHA"], 0)
    decoder.weights[1]["down"][5, 7] = value
    llm = write(tmp_path, decoder)
    message = "tensor 'model.layers.1.mlp.down_proj.weight' must hold finite values, but has NaN or infinite ones; copy"
    with Runtime(llm, weights=tmp_path) as runtime, refused(message):
        runtime.generate(PROMPTS, 2)
    decoder.embeddings[5, 7] = value
    llm = write(tmp_path, decoder)
    with refused("tensor 'model.embed_tokens.weight' must hold finite values"):
        Runtime(llm, weights=tmp_path)


def test_a_value_beyond_the_dtype_is_named(tmp_path):
    """Files of 32 bits, or of bfloat16, hold what float16 does not."""
    decoder = Decoder(KINDS["Llama, MHA"], 0)
    llm = write(tmp_path, decoder)
    for value, dtype, message in (
        (-7e4, "float16", r"up to 7e\+04, but float16 ends at 6.55e\+04; take dtype 'bfloat16' or 'float32'"),
        (3.4e38, "bfloat16", r"up to 3.4e\+38, but bfloat16 ends at 3.39e\+38; take dtype 'float32'"),
        (1e300, "float32", r"up to 1e\+300, but float32 ends at 3.403e\+38; take other weights"),
    ):
        decoder.embeddings[3, 1] = value
        write(tmp_path, decoder)
        with refused("'model.embed_tokens.weight' has values " + message):
            Runtime(llm, weights=tmp_path, dtype=dtype)


LONG = "no\nnumber " * 5_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"rope_theta": bad}, "rope_theta must be a number from 1 to 1e\\+30, not")
            for bad in (0, -5, float("nan"), 10**400, None, "x", True)
        ),
        *(({"rms_norm_eps": bad}, "rms_norm_eps must be a number from 1e-30 to 1, not") for bad in (-1, 0, float("inf"), None, [1], LONG)),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, not 'linear'"),
        ({"rope_scaling": []}, r"rope_scaling must be an object or null, not \[\]"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object or null, not \[1\]"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta must be a number .*, not None"),
        ({"rope_parameters": {"rope_theta": 200.0}}, r"rope_theta must be one number, not \[100.0, 200.0\]"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*, which the runtime does not execute"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling is .*, which the runtime does not execute"),
        ({"rope_scaling": {"rope_type": LONG}}, "rope_scaling is .*, which the runtime does not execute"),
        ({"rope_parameters": {}, "rope_scaling": {"type": "linear"}}, "rope_scaling is .*, which the runtime does not execute"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which"),
        ({"hidden_act": None}, "hidden_act is None, which"),
        ({"hidden_act": LONG}, "hidden_act is 'no"),
        ({"model_type": LONG}, "model_type 'no"),
        ({"text_config": {"model_type": "llama"}}, "text_config is"),
        (
            {"quantization_config": {"quant_method": LONG}},
            "quantization_config is .*, but quantized weights are not read; take those of 16 bits",
        ),
        ({"compression_config": {}}, "compression_config is {}, but quantized"),
        ({"attention_bias": None}, "key 'attention_bias' is None, but"),
        ({"num_attention_heads": LONG}, "key 'num_attention_heads' is 'no"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types is .*, which the runtime"),
        ({"layer_types": 3}, "layer_types is 3, which"),
        ({"use_sliding_window": "no"}, "use_sliding_window must be true or false, not 'no'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a whole number of tokens, at least 1, not 0"),
        ({"use_sliding_window": True, "sliding_window": None}, "sliding_window must be a whole .*, not None"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window must be a whole .*, not '4096'"),
    ],
)
def test_what_is_odd_in_config_json_is_named_in_a_short_sentence(tmp_path, changes, message):
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0), **changes)
    with refused(message) as caught:
        Runtime(llm, weights=tmp_path)
    text = str(caught.value)
    assert len(text) < 400 + 2 * len(str(tmp_path))
    assert "\n" not in text
    assert "; " in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before is False, which"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True, which"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False, which"),
        ({"word_embed_proj_dim": 16}, r"word_embed_proj_dim must equal hidden_size \(32\), not 16"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', which"),
        ({"enable_bias": False}, "key 'enable_bias' is False"),
    ],
)
def test_an_opt_that_is_not_executed_is_refused(tmp_path, changes, message):
    llm = write(tmp_path, Decoder(KINDS["OPT"], 0), **changes)
    with refused(message):
        Runtime(llm, weights=tmp_path)


def test_what_says_the_same_in_other_words_is_read(tmp_path):
    """The names of RoPE's numbers changed with the versions of transformers; keys that are null are as good as left out."""
    shape = KINDS["Llama, GQA"]
    llm = write(tmp_path, Decoder(shape, 0))
    expected = logits_of(llm, tmp_path, PROMPTS)
    for changes in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100}},
        {"rope_scaling": None, "partial_rotary_factor": 1.0, "hidden_act": "swish", "quantization_config": None, "text_config": None},
        {"rope_scaling": {"type": "default", "factor": None}, "sliding_window": 3, "layer_types": ["full_attention"] * 2},
    ):
        say(tmp_path, shape, **changes)
        np.testing.assert_array_equal(logits_of(llm, tmp_path, PROMPTS), expected)
    said = {key: value for key, value in config(shape).items() if key != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps({**said, "rope_parameters": {"rope_theta": 100.0}}))
    np.testing.assert_array_equal(logits_of(llm, tmp_path, PROMPTS), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 24},
        {"use_sliding_window": True, "sliding_window": 24},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 24},
    ],
)
def test_a_sliding_window_is_the_longest_context(tmp_path, changes):
    """Every token is attended to, so that a longer context would not be the LLM's."""
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0), **changes)
    with Runtime(llm, weights=tmp_path) as runtime:
        runtime.generate(runtime.random_prompts(1, 20), 5)
        with refused("has positions for 24 tokens, not for 25"):
            runtime.generate(runtime.random_prompts(1, 20), 6)


def test_a_window_that_is_not_said_is_that_of_transformers(tmp_path):
    """Mistral's is 4096 where config.json leaves it out, and none where it is null."""
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0), model_type="mistral")
    with Runtime(llm, weights=tmp_path) as runtime, refused("has positions for 4096 tokens, not for 4097"):
        runtime.generate(runtime.random_prompts(1, 4096), 2)
    say(tmp_path, KINDS["Llama, MHA"], model_type="mistral", sliding_window=None)
    with Runtime(llm, weights=tmp_path) as runtime:
        runtime.layer_times(1, 4096, repeats=1)


def test_hostile_names_are_shown_shortened(tmp_path):
    llm = write(tmp_path, Decoder(KINDS["Llama, MHA"], 0))
    add(tmp_path, **{"no\ntensor" * 1_000: np.ones(1)})
    with refused(r"tensor 'no\\ntensor.*\.\.\. of 'more.safetensors' is there") as caught:
        Runtime(replace(llm, name="no\nname" * 1_000), weights=tmp_path)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folders_without_weights_are_refused(tmp_path):
    llm = LLMConfig.from_hf(config(KINDS["Llama, MHA"]))
    with refused("cannot read its config.json"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused("no JSON file"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with refused("no JSON file"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with refused(r"config.json: it must hold a JSON object, not \[1\]; copy"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(KINDS["Llama, MHA"])))
    with refused("no \\*.safetensors there"):
        Runtime(llm, weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with refused("no safetensors file can be read there"):
        Runtime(llm, weights=tmp_path)
