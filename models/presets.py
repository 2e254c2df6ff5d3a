"""Published LLMs and machines, each from a file in ``data/``, where its source stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .hardware import System
from .llm import LLMConfig

DATA = Path(__file__).parent / "data"


LLMS: dict[str, LLMConfig] = {path.stem: LLMConfig.from_hf(path) for path in sorted(DATA.glob("*.json"))}
"""All LLMs by name: ``LLMS["llama2-70b"]``."""

GPT3_175B = LLMS["gpt3-175b"]
CHINCHILLA_70B = LLMS["chinchilla-70b"]
LLAMA2_7B = LLMS["llama2-7b"]
LLAMA2_13B = LLMS["llama2-13b"]
LLAMA2_70B = LLMS["llama2-70b"]
LLAMA3_1_8B = LLMS["llama3.1-8b"]
LLAMA3_1_70B = LLMS["llama3.1-70b"]
LLAMA3_1_405B = LLMS["llama3.1-405b"]
OPT_125M = LLMS["opt-125m"]
OPT_6_7B = LLMS["opt-6.7b"]
OPT_13B = LLMS["opt-13b"]
OPT_30B = LLMS["opt-30b"]
OPT_66B = LLMS["opt-66b"]
OPT_175B = LLMS["opt-175b"]
MISTRAL_7B = LLMS["mistral-7b"]
QWEN2_7B = LLMS["qwen2-7b"]
QWEN2_72B = LLMS["qwen2-72b"]
QWEN3_0_6B = LLMS["qwen3-0.6b"]
QWEN3_8B = LLMS["qwen3-8b"]
QWEN3_32B = LLMS["qwen3-32b"]
GEMMA_7B = LLMS["gemma-7b"]
MIXTRAL_8X7B = LLMS["mixtral-8x7b"]
DEEPSEEK_V3 = LLMS["deepseek-v3"]

SYSTEMS: dict[str, System] = {path.stem: System.from_toml(path) for path in sorted(DATA.glob("*.toml"))}
"""All machines by name: ``SYSTEMS["h2m2"]``."""

H2M2_SYSTEM = SYSTEMS["h2m2"]
"""H2M2's machine, arXiv 2504.14893: 96 GB of HBM beside 512 GB of LPDDR, one chip on each."""
LPDDR_ONLY_SYSTEM = SYSTEMS["lpddr_only"]
"""H2M2's baseline: LPDDR only, both chips on it."""
H2M2_CXL_SYSTEM = SYSTEMS["h2m2_cxl"]
"""H2M2's machine with a third memory behind CXL; the expander's numbers are assumptions."""
HBM_8_SYSTEM = SYSTEMS["hbm_8"]
"""Eight HBM devices, no LPDDR, the compute of two chips."""
A100_SYSTEM = SYSTEMS["a100_pcie4"]
"""An A100 of 40 GB behind PCIe 4.0 x16, as in KVPR (arXiv 2411.17089)."""
RTX4090_SYSTEM = SYSTEMS["rtx4090_pcie4"]
"""An RTX 4090 behind PCIe 4.0 x16 with 882 GB on the host, as in HybridServe (arXiv 2501.01792)."""
T4_SYSTEM = SYSTEMS["t4_disk"]
"""A T4 behind PCIe 3.0 x16 with a host and a disk, as in FlexGen (arXiv 2303.06865)."""


def llm_named(name: str | Path) -> LLMConfig:
    """A published LLM by name ("llama2-70b"), or that of a Hugging Face config.json; ValueError names the ones there are."""
    if str(name) in LLMS:
        return LLMS[str(name)]
    _check_file(name, "LLM", LLMS, "config.json")
    return LLMConfig.from_hf(name)


def system_named(name: str | Path) -> System:
    """A machine by name ("h2m2"), or that of a TOML data sheet; ValueError names the ones there are."""
    if str(name) in SYSTEMS:
        return SYSTEMS[str(name)]
    _check_file(name, "system", SYSTEMS, "data sheet (.toml)")
    return System.from_toml(name)


def _check_file(name: str | Path, what: str, known: Mapping[str, object], kind: str) -> None:
    if not Path(name).is_file():
        raise ValueError(f"there is no {what} and no file {str(name)!r}; name a {kind} or one of {', '.join(known)}")
