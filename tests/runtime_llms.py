"""LLMs that a runtime decodes in milliseconds."""

from dataclasses import replace

from memsplit.models import LLMConfig

TINY_OPT = LLMConfig(
    name="tiny OPT",
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=256,
    vocab_size=128,
    gated_ffn=False,
    tie_word_embeddings=True,
    max_position_embeddings=514,
    attention_bias=True,
    mlp_bias=True,
    norm_bias=True,
)
TINY_LLAMA = LLMConfig(
    name="tiny Llama",
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=128,
    gated_ffn=True,
    tie_word_embeddings=False,
)
TINY_QWEN3 = replace(TINY_LLAMA, name="tiny Qwen3", qk_norm=True, head_dim=24, num_hidden_layers=2)


def alone(llm: LLMConfig) -> LLMConfig:
    """The LLM with a single layer: what is sent ahead is then for the same layer."""
    return replace(llm, name=f"{llm.name} of one layer", num_hidden_layers=1)
