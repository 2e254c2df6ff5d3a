"""Run a plan: decode with keys and values where the plan puts them, on CUDA or on a CPU with an emulated link, and measure it.

    with Runtime(LLMS["opt-6.7b"], device="cuda", dtype="float16") as runtime:
        prompts = runtime.random_prompts(32, 1024)
        whole = runtime.generate(prompts, 32, TransferKV())
        split = runtime.generate(prompts, 32, SplitKV(split=600))

Every plan gives the same tokens, in half precision but for those whose logits are closer than its rounding; what differs is the time of a
step and the memory. Needs PyTorch: ``pip install 'memsplit[runtime]'``.
The plans executed are those of KVPR (arXiv 2411.17089), HybridServe (arXiv 2501.01792) and FlexGen (arXiv 2303.06865).
"""

from .plans import CachePlan, ExecutedPlan, FullKV, Placement, SplitKV, TransferKV
from .runtime import EmulatedLink, Generation, Runtime
from .times import LayerTimes

__all__ = [
    "CachePlan",
    "EmulatedLink",
    "ExecutedPlan",
    "FullKV",
    "Generation",
    "LayerTimes",
    "Placement",
    "Runtime",
    "SplitKV",
    "TransferKV",
]
