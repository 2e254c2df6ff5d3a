"""Shapes, parameter counts and state of LLMs, and what from_hf refuses."""

import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsplit.models import presets
from memsplit.models.llm import LARGEST_SIZE, LLMConfig
from memsplit.models.presets import DATA, DEEPSEEK_V3, LLAMA2_70B, LLMS, MIXTRAL_8X7B

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 96}
TINY_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32}
TINY_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
TINY_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
VALID = {
    "llama": TINY,
    "mistral": TINY | {"num_key_value_heads": 2},
    "qwen2": TINY | {"num_key_value_heads": 2},
    "qwen3": TINY | {"num_key_value_heads": 2, "head_dim": 16},
    "mixtral": TINY | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": TINY | TINY_EXPERTS | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4},
    "deepseek_v2": TINY
    | TINY_EXPERTS
    | TINY_MLA
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "opt": {key: value for key, value in TINY.items() if key != "intermediate_size"} | {"ffn_dim": 256, "max_position_embeddings": 32},
    "gpt2": TINY_GPT2,
    "gpt_bigcode": TINY_GPT2,
    "gemma": TINY | {"num_key_value_heads": 1, "head_dim": 32},
    "phi3": TINY,
    "gopher": TINY | {"num_key_value_heads": 4},
}
VALID["deepseek_v3"] = VALID["deepseek_v2"]


def config(model_type: str, /, **changes: object) -> dict[str, object]:
    """The smallest config.json of that kind; a change to ``...`` leaves the key out."""
    return {key: value for key, value in {"model_type": model_type, **VALID[model_type], **changes}.items() if value is not ...}


def elements(llm: LLMConfig, sublayer: str) -> list[int]:
    """Elements of a sublayer's matrices, for each kind of layer."""
    return [sum(matrix.elements for matrix in matrices if matrix.sublayer == sublayer) for _, matrices in llm.layers]


# Parameters


@pytest.mark.parametrize("name", LLMS)
def test_presets_have_the_published_parameters(name):
    """Within 2 %, the rounding of names such as OPT-13B; to the digit where the checkpoint was counted."""
    file = json.loads((DATA / f"{name}.json").read_text())
    tolerance = 0 if "published checkpoint" in file["_source"] else 0.02
    assert LLMS[name].parameters == pytest.approx(file["_published_parameters"], rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("parameters", "file"),
    [
        (7_241_732_096, config("mistral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
         | {"intermediate_size": 14336, "vocab_size": 32000}),
        (7_615_616_512, config("qwen2", hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
         | {"intermediate_size": 18944, "vocab_size": 152064}),
        (3_821_079_552, config("phi3", hidden_size=3072, num_hidden_layers=32, num_attention_heads=32, intermediate_size=8192)
         | {"vocab_size": 32064}),
        (2_506_172_416, config("gemma", hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, head_dim=256)
         | {"intermediate_size": 16384, "vocab_size": 256000}),
        (30_532_122_624, config("qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4)
         | {"head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8}
         | {"moe_intermediate_size": 768}),
        (15_706_484_224, config("deepseek_v2", hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16)
         | {"intermediate_size": 10944, "vocab_size": 102400, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
         | {"qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2}
         | {"moe_intermediate_size": 1408}),
        (124_439_808, config("gpt2", n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50257)),
        (15_517_456_384, config("gpt_bigcode", n_embd=6144, n_layer=40, n_head=48, n_positions=8192, vocab_size=49152)),
    ],
    ids=["Mistral-7B-v0.1", "Qwen2.5-7B", "Phi-3-mini", "gemma-2b", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "GPT-2", "StarCoder"],
)  # fmt: skip
def test_other_architectures_count_to_the_digit(parameters, file):
    """Parameters of the checkpoints on Hugging Face, where each architecture has details of its own (biases, norms, tied heads)."""
    assert LLMConfig.from_hf(file).parameters == parameters


@pytest.mark.parametrize(
    ("millions", "d", "head_dim", "heads", "layers"),
    [(44, 512, 64, 8, 8), (90, 640, 64, 10, 13), (306, 1024, 64, 16, 20), (489, 1280, 128, 10, 21), (1143, 1792, 128, 14, 26),
     (3530, 2688, 128, 22, 36), (12569, 4608, 128, 32, 47), (16183, 5120, 128, 40, 47)],
)  # fmt: skip
def test_gopher_counts_as_in_chinchillas_table(millions, d, head_dim, heads, layers):
    """Hoffmann et al. 2022, Table A9: only relative positions of d x (H dh) a layer and tied embeddings give these sizes.

    The table is rounded to millions; one vector a layer is left open, as the paper does not say what has a bias.
    """
    sizes = {"hidden_size": d, "intermediate_size": 4 * d, "head_dim": head_dim, "num_attention_heads": heads}
    llm = LLMConfig.from_hf(config("gopher", **sizes, num_hidden_layers=layers, num_key_value_heads=heads, vocab_size=32000))
    assert llm.parameters / 1e6 == pytest.approx(millions, rel=0, abs=0.5 + layers * d / 1e6)
    without = dataclasses.replace(llm, relative_position_projection=False)
    assert without.parameters == llm.parameters - layers * d * heads * head_dim
    assert without.layers == llm.layers


def test_active_parameters_leave_out_experts_that_a_token_does_not_use():
    """Mixtral: 12.9e9 (arXiv 2401.04088). DeepSeek-V3: 36.6e9 with the LM head, without the embeddings (README of the weights)."""
    assert MIXTRAL_8X7B.active_parameters / 1e9 == pytest.approx(12.9, abs=0.05)
    embeddings = DEEPSEEK_V3.vocab_size * DEEPSEEK_V3.hidden_size
    assert (DEEPSEEK_V3.active_parameters - embeddings) / 1e9 == pytest.approx(36.6, abs=0.05)
    assert LLAMA2_70B.active_parameters == LLAMA2_70B.parameters


# Shapes


@pytest.mark.parametrize("llm", [llm for llm in LLMS.values() if not llm.num_experts], ids=lambda llm: llm.name)
def test_matrices_follow_the_equations_of_h2m2(llm):
    """arXiv 2504.14893: d (H + 2 KV) dh for qkv; H dh d + 2 d ff for fc, with a third d ff where the FFN is gated."""
    d, heads, kv, head_dim = llm.hidden_size, llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim
    ffn = 3 if llm.name.startswith(("llama", "mistral", "qwen", "gemma")) else 2
    assert elements(llm, "qkv") == [d * (heads + 2 * kv) * head_dim]
    assert elements(llm, "fc") == [heads * head_dim * d + ffn * d * llm.intermediate_size]
    assert sum(count for count, _ in llm.layers) == llm.num_hidden_layers


@pytest.mark.parametrize("llm", LLMS.values(), ids=LLMS)
def test_matrices_chain(llm):
    """Each matrix reads what the one before it wrote, and each is split by something that its columns are a multiple of."""
    parts = {"query_head": llm.num_attention_heads, "kv_head": llm.num_kv_heads, "column": 1}
    for _, matrices in llm.layers:
        by_name = {matrix.name: matrix for matrix in matrices}
        assert len(by_name) == len(matrices)
        assert by_name["o_proj"].outputs == llm.hidden_size
        for prefix in {matrix.name.removesuffix("up_proj") for matrix in matrices if matrix.name.endswith("up_proj")}:
            up, down = by_name[f"{prefix}up_proj"], by_name[f"{prefix}down_proj"]
            assert (up.inputs, up.outputs) == (down.outputs, down.inputs)
        for matrix in matrices:
            assert matrix.outputs % parts[matrix.split] == 0
            assert 1 <= matrix.experts_per_token <= matrix.experts


def test_state_is_kept_once_for_each_kv_head():
    """Llama2-70B: 8 KV heads of 128, keys and values; counting it for each of 64 query heads would be 8 times as much."""
    assert LLAMA2_70B.attention_kind == "GQA"
    assert LLAMA2_70B.state_elements == 2 * 8 * 128
    assert LLAMA2_70B.attention_flops == 2 * (64 * 128) + 2 * (64 * 128)


def test_deepseek_v3_sizes_by_hand():
    """arXiv 2412.19437, section 4.2: latent 512, rotary key 64, 128 heads; 3 dense layers, 58 of 1 shared and 256 routed experts."""
    assert DEEPSEEK_V3.attention_kind == "MLA"
    assert DEEPSEEK_V3.num_kv_heads == 1
    assert DEEPSEEK_V3.state_elements == 576
    assert DEEPSEEK_V3.attention_flops == 2 * 128 * (512 + 64) + 2 * 128 * 512
    assert [count for count, _ in DEEPSEEK_V3.layers] == [3, 58]
    qkv = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256
    assert elements(DEEPSEEK_V3, "qkv") == [qkv, qkv]
    output = 128 * 128 * 7168
    assert elements(DEEPSEEK_V3, "fc") == [output + 3 * 7168 * 18432, output + 7168 * 256 + 257 * 3 * 7168 * 2048]


@pytest.mark.parametrize(("kv_heads", "kind"), [(4, "MHA"), (2, "GQA"), (1, "MQA")])
def test_attention_kind_follows_the_kv_heads(kv_heads, kind):
    llm = LLMConfig.from_hf(config("llama", num_key_value_heads=kv_heads))
    assert (llm.attention_kind, llm.num_kv_heads, llm.state_elements) == (kind, kv_heads, 2 * kv_heads * 16)


def test_every_layer_may_be_dense_or_of_experts():
    """Layers that do not exist are not listed with a count of 0."""
    first, last = (
        LLMConfig.from_hf(config("deepseek_v3", first_k_dense_replace=0)),
        LLMConfig.from_hf(config("deepseek_v3", first_k_dense_replace=2)),
    )
    assert [count for count, _ in first.layers] == [count for count, _ in last.layers] == [2]
    assert any(matrix.experts > 1 for matrix in first.layers[0][1])
    assert all(matrix.experts == 1 for matrix in last.layers[0][1])


# Reading


def test_names_of_presets():
    assert presets.LLMS["gpt3-175b"] is presets.GPT3_175B
    assert all(llm.name == name for name, llm in LLMS.items())
    constants = [value for value in vars(presets).values() if isinstance(value, LLMConfig)]
    assert sorted(llm.name for llm in constants) == sorted(LLMS)
    assert pickle.loads(pickle.dumps(DEEPSEEK_V3)) == DEEPSEEK_V3


def test_the_name_is_by_default_that_of_the_file_or_folder(tmp_path):
    folder = tmp_path / "my-llm-1.5b"
    folder.mkdir()
    for path in (folder / "config.json", tmp_path / "other-7b.json"):
        path.write_text(json.dumps(config("llama")), encoding="utf-8")
    assert LLMConfig.from_hf(folder / "config.json").name == "my-llm-1.5b"
    assert LLMConfig.from_hf(str(tmp_path / "other-7b.json")).name == "other-7b"
    assert LLMConfig.from_hf(config("llama")).name == "llama"
    assert LLMConfig.from_hf(config("llama"), "mine").name == "mine"


def test_keys_that_may_be_left_out():
    """head_dim is hidden / heads, KV heads are heads, GPT-2's FFN is four times as wide, and multimodal files are nested."""
    llama = LLMConfig.from_hf(config("llama", head_dim=None))
    assert (llama.head_dim, llama.num_key_value_heads, llama.tie_word_embeddings) == (16, 4, False)
    gpt2 = LLMConfig.from_hf(config("gpt2", n_inner=None))
    assert (gpt2.intermediate_size, gpt2.tie_word_embeddings) == (256, True)
    assert LLMConfig.from_hf(config("gpt_bigcode", multi_query=False)).attention_kind == "MHA"
    assert LLMConfig.from_hf({"model_type": "llava", "text_config": config("llama")}, "llama") == dataclasses.replace(llama, name="llama")


@pytest.mark.parametrize("model_type", VALID)
def test_every_architecture_is_read(model_type):
    assert LLMConfig.from_hf(config(model_type)).parameters > 0


def refused(error: pytest.ExceptionInfo[ValueError], *words: str) -> None:
    """One sentence with those words, not pydantic's report."""
    message = str(error.value)
    assert "\n" not in message
    assert ". " not in message
    assert type(error.value) is ValueError
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        *(("llama", "hidden_size", value) for value in ("4096", "x" * 999, None, True, -64, 0, 64.0, [64], {}, 10**30, ...)),
        *(("llama", "hidden_size", value) for value in (math.nan, math.inf)),
        ("llama", "num_attention_heads", 5),
        ("llama", "num_key_value_heads", 3),
        ("llama", "head_dim", 0),
        ("llama", "tie_word_embeddings", "false"),
        ("llama", "tie_word_embeddings", 0),
        ("llama", "attention_bias", None),
        ("llama", "vocab_size", LARGEST_SIZE + 1),
        ("mistral", "num_key_value_heads", ...),
        ("qwen3", "head_dim", ...),
        ("opt", "ffn_dim", None),
        ("opt", "word_embed_proj_dim", 32),
        ("opt", "enable_bias", False),
        ("gpt2", "n_head", 5),
        ("gpt2", "n_embd", ...),
        ("gpt_bigcode", "multi_query", 1),
        ("mixtral", "num_local_experts", ...),
        ("mixtral", "num_experts_per_tok", 5),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("deepseek_v3", "first_k_dense_replace", -1),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "kv_lora_rank", None),
        ("deepseek_v3", "q_lora_rank", 0),
        ("deepseek_v3", "attention_bias", True),
        *(("llama", "model_type", value) for value in ("mamba", None, 3, ["llama"], ...)),
    ],
)  # fmt: skip
def test_bad_keys_are_named_in_one_sentence(model_type, key, value):
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        LLMConfig.from_hf(config(model_type, **{key: value}))
    refused(error, key)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff\xfe", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_files_that_hold_no_object_are_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="JSON") as error:
        LLMConfig.from_hf(path)
    refused(error, str(path), "name a Hugging Face config.json")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="cannot read") as error:
            LLMConfig.from_hf(path)
        refused(error, str(path))


def test_json_that_python_reads_and_the_standard_does_not(tmp_path):
    """NaN is refused with its key; of a key that is there twice the last counts, as in transformers."""
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(config("llama", hidden_size=math.nan)))
    with pytest.raises(ValueError, match="hidden_size") as error:
        LLMConfig.from_hf(path)
    refused(error, str(path))
    path.write_text(json.dumps(config("llama")).replace("{", '{"hidden_size": "x", ', 1))
    assert LLMConfig.from_hf(path).hidden_size == 64


LLAMA = LLMConfig.from_hf(config("llama"))
MIXTRAL = LLMConfig.from_hf(config("mixtral"))
DEEPSEEK = LLMConfig.from_hf(config("deepseek_v3"))


@pytest.mark.parametrize(
    ("llm", "field", "value"),
    [
        (LLAMA, "name", " "),
        (LLAMA, "name", None),
        (LLAMA, "hidden_size", 0),
        (LLAMA, "hidden_size", 64.0),
        (LLAMA, "num_hidden_layers", True),
        (LLAMA, "vocab_size", LARGEST_SIZE + 1),
        (LLAMA, "max_position_embeddings", -1),
        (LLAMA, "gated_ffn", 1),
        (LLAMA, "num_key_value_heads", 3),
        (LLAMA, "num_key_value_heads", 8),
        (LLAMA, "num_experts_per_tok", 2),
        (LLAMA, "num_shared_experts", 1),
        (LLAMA, "router_bias", True),
        (LLAMA, "q_lora_rank", 8),
        (LLAMA, "v_head_dim", 8),
        (LLAMA, "kv_lora_rank", 8),
        (MIXTRAL, "num_experts_per_tok", 0),
        (MIXTRAL, "num_experts_per_tok", 5),
        (MIXTRAL, "moe_intermediate_size", 0),
        (MIXTRAL, "num_dense_layers", 3),
        (DEEPSEEK, "kv_lora_rank", 0),
        (DEEPSEEK, "qk_rope_head_dim", 0),
        (DEEPSEEK, "q_lora_rank", -1),
        (DEEPSEEK, "head_dim", 64),
    ],
)
def test_impossible_llms_are_refused_in_one_sentence(llm, field, value):
    with pytest.raises(ValueError, match="LLM") as error:
        dataclasses.replace(llm, **{field: value})
    refused(error, field)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = sorted({key for valid in VALID.values() for key in valid} | {"model_type", "text_config", "multi_query", "n_inner", "mlp_bias"})


@given(
    file=st.sampled_from(sorted(VALID)).map(config) | st.just({}),
    changes=st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), json_values, max_size=4),
)
def test_from_hf_returns_an_llm_or_one_sentence(file, changes):
    """Whatever the file holds: an LLM whose numbers can be computed, or a ValueError."""
    try:
        llm = LLMConfig.from_hf(file | changes)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
        assert 0 < llm.active_parameters <= llm.parameters
        assert sum(count for count, _ in llm.layers) == llm.num_hidden_layers
        assert llm.state_elements > 0
        assert llm.attention_flops > 0
    assert "\n" not in message
    assert "pydantic" not in message
