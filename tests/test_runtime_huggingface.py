"""Folders as Hugging Face's transformers writes them: the runtime decodes what it does, and reads the files that an index names."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from memsplit.dse.runtime import CachePlan, EmulatedLink, FullKV, Placement, Runtime, SplitKV
from memsplit.models import CacheRatioPlan, LLMConfig

torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs memsplit[runtime]")

ROUNDING = 1e-3
"""Logits up to some tens in single precision, through three layers, in another order of sums; a wrong angle or bias is 1 off."""

SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
OPT = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"ffn_dim": 128, "word_embed_proj_dim": 64}
KINDS = {
    "OPT": OPT | {"max_position_embeddings": 128, "dropout": 0.0, "init_std": 0.3},
    "Llama": LLAMA | {"rope_theta": 5000.0},
    "Llama, scaled": LLAMA | {"rope_theta": 5000.0, "rope_scaling": SCALING},
    "Llama, tied": LLAMA | {"tie_word_embeddings": True},
    "Mistral": LLAMA | {"sliding_window": None, "head_dim": 16},
    "Qwen2": LLAMA,
    "Qwen3": LLAMA | {"head_dim": 24},
}
PLANS = (
    FullKV(),
    SplitKV(split=25, weights="host"),
    CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_gpu=1, kv_host=1, act_host=2)),
    Placement(weights=0.3, cache=0.4, attention="host"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers, against which this was run at 4.57")
    name = kind.partition(",")[0]
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**KINDS[kind])).float().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 1:  # norms of 1 and biases of 0 would hide that they are left out
                weight.add_(torch.randn_like(weight) * 0.2)
    made.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    prompts = np.random.default_rng(1).integers(0, 160, (3, 40))
    given = {"attention_mask": torch.ones(3, 40, dtype=torch.long), "pad_token_id": 0, "eos_token_id": None}
    asked = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    reference = made.generate(torch.tensor(prompts), **given, **asked)
    for plan in PLANS:
        with Runtime(LLMConfig.from_hf(tmp_path / "config.json"), weights=tmp_path, link=EmulatedLink(bandwidth=1e11)) as runtime:
            found = runtime.generate(prompts, 10, plan, logits=True)
        np.testing.assert_allclose(found.logits, torch.stack(reference.logits, dim=1).numpy(), rtol=0, atol=ROUNDING)
        np.testing.assert_array_equal(found.tokens, reference.sequences[:, 40:].numpy())


def test_scaled_turns_are_those_of_llama_3():
    """Piece by piece in double precision: below, between and above the two wavelengths of Llama 3.1's config.json."""
    from memsplit.dse.runtime._decoder import Llama3Scaling

    turns = 500_000.0 ** (-np.arange(64) / 64)
    expected = []
    for turn in turns:
        wavelength = 2 * math.pi / turn
        blend = (8192 / wavelength - 1) / (4 - 1)
        between = (1 - blend) * turn / 8 + blend * turn
        expected.append(turn if wavelength < 8192 / 4 else turn / 8 if wavelength > 8192 / 1 else between)
    found = Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=8192.0)(torch.tensor(turns))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert len({round(float(a / b), 6) for a, b in zip(found, turns, strict=True)}) > 4, "all three pieces are there"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of one layer in two files, with its index."""
    shape = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 12, "num_attention_heads": 2}
    config = shape | {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": SCALING}
    (tmp_path / "config.json").write_text(json.dumps(config))
    random, tensors = np.random.default_rng(0), {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    stem = "model.layers.0"
    tensors |= {f"{stem}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
    tensors |= {f"{stem}.mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")} | {f"{stem}.mlp.down_proj.weight": (8, 12)}
    tensors |= {f"{stem}.{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    listed = {}
    for number, part in enumerate((sorted(tensors)[:5], sorted(tensors)[5:])):
        made = {name: random.standard_normal(tensors[name]).astype(np.float32) for name in part}
        safetensors_numpy.save_file(made, tmp_path / f"model-{number}.safetensors")
        listed |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return tmp_path


def tokens(folder: Path) -> np.ndarray:
    with Runtime(LLMConfig.from_hf(folder / "config.json"), weights=folder) as runtime:
        return runtime.generate([[1, 2, 3]], 8, logits=True).logits


def test_only_the_files_of_the_index_are_read(folder):
    """Mistral's folders have the same weights once more, under other names."""
    expected = tokens(folder)
    safetensors_numpy.save_file({"layers.0.attention.wq.weight": np.zeros((8, 8), np.float32)}, folder / "consolidated.safetensors")
    np.testing.assert_array_equal(tokens(folder), expected)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"consolidated\.safetensors' is there, but nothing of"):
        tokens(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 5}}', "[" * 99999])
def test_a_damaged_index_is_one_sentence(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: .*copy it again"):
        tokens(folder)


def test_a_file_of_the_index_that_is_missing_is_named(folder):
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors: no safetensors file can be read there"):
        tokens(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_freq_factor": 4.0}, "low_freq_factor below its high_freq_factor"),
        ({"factor": "x"}, "rope_scaling: factor must be a number"),
        ({"original_max_position_embeddings": 0}, "must be a number"),
        ({"attention_factor": 2.0}, "which the runtime does not execute"),
    ],
)
def test_bad_scalings_are_refused(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": SCALING | changes}))
    with pytest.raises(ValueError, match=message):
        tokens(folder)


def test_scaling_counts_and_must_be_said_once(folder):
    scaled, config = tokens(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default"}}))
    with pytest.raises(ValueError, match="say different things of RoPE"):
        tokens(folder)
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert not np.array_equal(tokens(folder), scaled)
