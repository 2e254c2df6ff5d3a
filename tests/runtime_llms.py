"""LLMs that a runtime decodes in milliseconds."""

from dataclasses import replace

from memsplit.models import LLMConfig
from memsplit.models.presets import LLMS

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 128}
TINY_OPT = replace(LLMS["opt-125m"], name="tiny OPT", num_key_value_heads=4, intermediate_size=256, max_position_embeddings=514, **SMALL)
TINY_LLAMA = replace(LLMS["llama2-7b"], name="tiny Llama", num_key_value_heads=2, intermediate_size=160, **SMALL)
TINY_QWEN3 = replace(TINY_LLAMA, name="tiny Qwen3", qk_norm=True, head_dim=24, num_hidden_layers=2)


def alone(llm: LLMConfig) -> LLMConfig:
    """The LLM with a single layer: what is sent ahead is then for the same layer."""
    return replace(llm, name=f"{llm.name} of one layer", num_hidden_layers=1)
