"""Keys and values recomputed from a layer's input are the cached ones, so that no split changes what an LLM says.

Shown in NumPy for KVPR's split (arXiv 2411.17089: the first tokens of every request are recomputed) and HybridServe's blocks of 16 tokens
(arXiv 2501.01792: any blocks, others for each request). What is not held is NaN in the cache: a result without NaN used nothing else.
"""

from dataclasses import replace

import numpy as np
import pytest
from decoder import Array, Cache, Count, Decoder, Generated, Shape, generate
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.models import LLMConfig, Workload
from memsplit.models.offload import OffloadLayer, offload_layers

BLOCK = 16
PROMPTS = (40, 23, 17)
"""Tokens of three prompts: none fills its last block."""
STEPS = 12

KINDS = {
    "LayerNorm, learned positions, plain FFN, MHA (OPT)": Shape(norm="layer", positions="learned", gated=False),
    "RMSNorm, RoPE, gated FFN, MHA (Llama-2-7B)": Shape(),
    "LayerNorm, RoPE": Shape(norm="layer"),
    "RMSNorm, learned positions": Shape(positions="learned"),
    "GQA (Llama-3)": Shape(kv_heads=2),
    "MQA, wide heads (Gemma-2B)": Shape(kv_heads=1, head_dim=16),
    "GQA, norm of queries and keys (Qwen3)": Shape(kv_heads=2, qk_norm=True),
    "one head": Shape(heads=1, kv_heads=1),
    "one layer": Shape(layers=1),
}
each_kind = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)


def rounding(shape: Shape, dtype: type) -> float:
    """How far two equal keys may be apart that were computed in products of different size.

    Each is a sum of ``hidden`` products in an order that the product's size may change: off by at most hidden * eps * sum |x_i w_i|, and
    sum |x_i w_i| <= |x| |w| = sqrt(hidden) * O(1) as normed inputs are about 1 and weights about 1 / sqrt(hidden). 8 for both sums, gains
    up to 1.5, columns of weights longer than 1, and the rotation.
    """
    return 8 * shape.hidden**1.5 * float(np.finfo(dtype).eps)


def prompts(shape: Shape, seed: int) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.integers(0, shape.vocab, length) for length in PROMPTS]


def prefix(shape: Shape, split: int) -> list[Array]:
    """KVPR: the first ``split`` tokens of every request are kept as inputs."""
    return [np.arange(shape.longest) < split for _ in PROMPTS]


def blocks(shape: Shape, chosen: list[set[int]]) -> list[Array]:
    """HybridServe: the chosen blocks of each request are kept as inputs, full or not."""
    return [np.isin(np.arange(shape.longest) // BLOCK, list(one)) for one in chosen]


def assert_same_answers(shape: Shape, seed: int, *splits: list[Array]) -> None:
    """Every split generates the tokens of a decoder that keeps keys and values only."""
    decoder = Decoder(shape, seed)
    everything = generate(decoder, prompts(shape, seed), STEPS)
    for split in splits:
        found = generate(decoder, prompts(shape, seed), STEPS, split)
        assert np.isfinite(found.logits).all()
        # Errors of one layer pass through all later layers and tokens; 1000 roundings are far below the distance of two logits.
        allowed = 1000 * rounding(shape, np.float64)
        assert everything.margin > 2 * allowed, "the best two tokens are too close for this seed to prove anything"
        np.testing.assert_allclose(found.logits, everything.logits, rtol=0, atol=allowed)
        np.testing.assert_array_equal(found.tokens, everything.tokens)


# Keys and values


@each_kind
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_recomputed_keys_and_values_are_the_cached_ones(shape: Shape, dtype: type):
    """One decoder keeps both forms of every token, written in prefill and in decode; each layer's X gives its K and V again."""
    decoder = Decoder(shape, 0, dtype)
    run = generate(decoder, prompts(shape, 0), STEPS)
    for cache in run.caches:
        for layer in range(shape.layers):
            for rows in (np.arange(cache.length), np.arange(7), np.array([3, 16, cache.length - 1])):
                keys, values = decoder.keys_values(layer, cache.inputs[layer, rows], rows)
                assert keys.dtype == values.dtype == dtype
                np.testing.assert_allclose(keys, cache.keys[layer, rows], rtol=0, atol=rounding(shape, dtype))
                np.testing.assert_allclose(values, cache.values[layer, rows], rtol=0, atol=rounding(shape, dtype))


@each_kind
def test_the_normed_input_may_be_kept_instead(shape: Shape):
    """norm(X) gives the same keys and values without another norm."""
    decoder = Decoder(shape, 1)
    cache = generate(decoder, prompts(shape, 1), 1).caches[0]
    rows = np.arange(cache.length)
    for layer in range(shape.layers):
        normed = decoder.norm(layer, 0, cache.inputs[layer, rows])
        keys, values = decoder.keys_values(layer, normed, rows, normed=True)
        np.testing.assert_allclose(keys, cache.keys[layer, rows], rtol=0, atol=rounding(shape, np.float64))
        np.testing.assert_allclose(values, cache.values[layer, rows], rtol=0, atol=rounding(shape, np.float64))


@each_kind
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_positions_off_by_one_or_a_forgotten_norm_are_seen(shape: Shape, dtype: type):
    """Control: with rotary positions the keys, and only they, need the right position; without the norm nothing is right."""
    decoder = Decoder(shape, 2, dtype)
    cache = generate(decoder, prompts(shape, 2), 1).caches[0]
    rows = np.arange(cache.length)
    for layer in range(shape.layers):
        inputs, keys, values = cache.inputs[layer, rows], cache.keys[layer, rows], cache.values[layer, rows]
        late_keys, late_values = decoder.keys_values(layer, inputs, rows + 1)
        raw_keys, raw_values = decoder.keys_values(layer, inputs, rows, normed=True)
        tolerance = rounding(shape, dtype)
        assert np.abs(raw_values - values).max() > 100 * tolerance
        # A norm of the keys takes out a scale, not the gains of each input.
        assert np.abs(raw_keys - keys).max() > 100 * tolerance
        assert np.abs(late_values - values).max() <= tolerance
        assert (np.abs(late_keys - keys).max() > 100 * tolerance) == (shape.positions == "rope")


# Answers


@each_kind
@pytest.mark.parametrize("seed", range(3))
def test_every_prefix_gives_the_same_answer(shape: Shape, seed: int):
    """KVPR, for nothing, one token, part of a block, beyond the shortest prompt, beyond every prompt, and all tokens."""
    assert_same_answers(shape, seed, *(prefix(shape, split) for split in (0, 1, 15, 16, 20, 45, shape.longest)))


@each_kind
@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_every_request_may_be_kept_as_they_like(shape: Shape, seed: int):
    """HybridServe: the last block, partly filled in the prompt and filled up in decode, among them."""
    everything = set(range(shape.longest // BLOCK))
    assert_same_answers(
        shape,
        seed,
        blocks(shape, [{0, 2}, {1}, set()]),
        blocks(shape, [set(), {0}, {1}]),
        blocks(shape, [{1, 3}, everything, {0}]),
        blocks(shape, [everything, everything, everything]),
    )


@settings(max_examples=15)
@given(
    shape=st.sampled_from(list(KINDS.values())),
    seed=st.integers(0, 4),
    chosen=st.lists(st.sets(st.integers(0, 3)), min_size=3, max_size=3),
)
def test_any_subset_of_blocks_gives_the_same_answer(shape: Shape, seed: int, chosen: list[set[int]]):
    assert_same_answers(shape, seed, blocks(shape, chosen))


def test_single_precision_answers_the_same_where_tokens_are_apart():
    """float32: logits agree to rounding, so tokens do wherever the best two logits are further apart than that."""
    shape, compared = KINDS["GQA (Llama-3)"], 0
    # Through two layers and the steps' tokens errors grow: ten times a key's own.
    allowed = 10 * rounding(shape, np.float32)
    for seed in range(6):
        decoder = Decoder(shape, seed, np.float32)
        whole = generate(decoder, prompts(shape, seed), STEPS)
        if whole.margin > 2 * allowed:
            compared += 1
            split = generate(decoder, prompts(shape, seed), STEPS, blocks(shape, [{0, 2}, {1}, {0, 1}]))
            np.testing.assert_allclose(split.logits, whole.logits, rtol=0, atol=allowed)
            np.testing.assert_array_equal(split.tokens, whole.tokens)
    assert compared >= 2


class ShiftedDecoder(Decoder):
    """Recomputes keys as if tokens stood one place later."""

    def restore(self, layer: int, caches: list[Cache], count: Count | None = None) -> list[tuple[Array, Array]]:
        """As the decoder's own, after the positions of the recomputed tokens were moved."""
        own = self.keys_values
        self.keys_values = lambda layer, x, positions, **settings: own(layer, x, positions + 1, **settings)  # type: ignore[method-assign]
        try:
            return super().restore(layer, caches, count)
        finally:
            self.keys_values = own  # type: ignore[method-assign]


def answers(decoder: Decoder, seed: int) -> tuple[Generated, Generated]:
    shape = decoder.shape
    whole = generate(decoder, prompts(shape, seed), STEPS)
    return whole, generate(decoder, prompts(shape, seed), STEPS, blocks(shape, [{0, 2}, {1}, {0}]))


def test_wrong_positions_change_answers():
    """Control: the comparison of answers fails for a decoder that gets rotary positions wrong by one; learned ones it cannot get wrong."""
    shape, changed = KINDS["GQA (Llama-3)"], 0
    for seed in range(3):
        whole, split = answers(ShiftedDecoder(shape, seed), seed)
        assert np.abs(split.logits - whole.logits).max() > 1e6 * rounding(shape, np.float64)
        changed += not np.array_equal(split.tokens, whole.tokens)
        learned = replace(shape, positions="learned")
        whole, split = answers(ShiftedDecoder(learned, seed), seed)
        np.testing.assert_array_equal(split.tokens, whole.tokens)
    assert changed


# What it costs


def as_layer(shape: Shape, dtype: type) -> OffloadLayer:
    """The library's layer of the same shape, at the precision of the decoder's arrays."""
    bits = 8 * np.dtype(dtype).itemsize
    llm = LLMConfig(
        name="small",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        gated_ffn=shape.gated,
        tie_word_embeddings=False,
    )
    workload = Workload(llm=llm, batch=len(PROMPTS), context=1, weight_bits=bits, kv_bits=bits, activation_bits=bits)
    (layer,) = offload_layers(workload)
    return layer


@each_kind
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_flops_and_bytes_are_those_of_the_cost_model(shape: Shape, dtype: type):
    """Counted while the decoder restores its state in one step after the prompts: exactly recompute_flops, act_bytes and kv_bytes."""
    decoder, layer, itemsize = Decoder(shape, 0, dtype), as_layer(shape, dtype), np.dtype(dtype).itemsize
    for masks in (prefix(shape, 20), blocks(shape, [{0, 2}, {1}, set()]), prefix(shape, 0), prefix(shape, shape.longest)):
        count = generate(decoder, prompts(shape, 0), 2, masks).count
        as_inputs = sum(int(mask[:length].sum()) for mask, length in zip(masks, PROMPTS, strict=True))
        as_keys = sum(PROMPTS) - as_inputs
        assert count.flops == layer.layers * as_inputs * layer.recompute_flops
        assert count.act_elements * itemsize == layer.layers * as_inputs * layer.act_bytes
        assert count.kv_elements * itemsize == layer.layers * as_keys * layer.kv_bytes


@each_kind
def test_weights_of_the_decoder_are_those_of_the_cost_model(shape: Shape):
    """Sum of the matrices' bytes of a layer, without norms; keys' and values' projections are what recomputation reads."""
    layer = as_layer(shape, np.float64)
    weights = Decoder(shape, 0).weights[0]
    used = [weight for name, weight in weights.items() if shape.gated or name != "gate"]
    assert layer.weight_bytes == sum(weight.nbytes for weight in used)
    assert layer.projection_bytes == weights["k"].nbytes + weights["v"].nbytes
