"""When does keeping activations instead of keys and values pay?

A layer's input (ACT) is h p_x bytes a token, its keys and values (KV) 2 n_kv d p_kv: only if r = ACT / KV is below 1 does recomputing KV
from ACT save bytes of the link (HybridServe, arXiv 2501.01792; KVPR, arXiv 2411.17089; the comparison is derived here). For every LLM and
precision: r, the time of its most frequent layer with weights and state streamed from the host (template fluid), the alternatives, the
break-even points, and what to do. What quantised keys and values do to accuracy is not modelled, nor is the work of unpacking them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, finished_rows, positive, show, study_arguments, write_csv
from memsplit.models import Workload
from memsplit.models.offload import OffloadLayer, OffloadMachine, OffloadRatios, offload_layers, offload_ratios
from memsplit.models.offload_profiles import DATASHEET, HYBRIDSERVE_PAPER
from memsplit.models.overlap import best_fluid_share, fluid
from memsplit.models.presets import LLMS, SYSTEMS, system_named
from memsplit.models.units import GB

GROUP = 64
"""Elements that share a scale and a zero point of 16 bits each where 4 bits are used."""
INT4 = 4 + 2 * 16 / GROUP
"""Bits an element of 4 bits takes with its share of scale and zero point: 4.5."""

PRECISIONS = ((16, 16), (8, 8), (4, 16), (INT4, 16), (16, 4), (16, INT4))
"""Bits of an element of activations and of keys and values; 4 without and with scales and zero points."""

WORTH = 0.05
"""Share of the layer's time from which on a saving is called worth it: a choice."""
LONGEST = 2**17
"""Tokens of context up to which break-even points are looked for: the longest of the LLMs here."""

QUICK = ("deepseek-v3", "gemma-7b", "llama2-70b", "llama3.1-8b", "mixtral-8x7b", "opt-30b", "qwen3-0.6b")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of a layer, by what becomes of its state; ``share`` of the tokens is kept as ACT in ``best_act``.

    ``cpu_attention`` is None on a host without a CPU.
    """

    share: float
    kv_only: float
    best_act: float
    act_only: float
    cpu_attention: float | None
    int4_kv: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each LLM and pair of precisions."""
    arguments = study_arguments(__doc__ or "", argv, default_out="when_offload_pays.csv", extra=machine_arguments)
    system = system_named(arguments.system)
    profile = HYBRIDSERVE_PAPER if arguments.system == "rtx4090_pcie4" else DATASHEET
    machine = OffloadMachine.build(system, profile)
    known = {"system": system.name, "profile": profile.name, "template": "fluid", "seed": arguments.seed, "version": __version__}
    # Of one LLM all precisions or none.
    parts, interrupted = finished_rows(
        [priced(workload, machine) | known for workload in workloads_of(name, arguments)] for name in (QUICK if arguments.quick else LLMS)
    )
    rows = [row for part in parts for row in part]
    # Whole numbers stay so beside empty cells.
    frame = pd.DataFrame(rows).astype({"pays_from_context_tokens": "Int64", "worth_it_from_context_tokens": "Int64"})
    write_csv(arguments.out, frame, provenance={"system": system, "profile": asdict(profile), "group": GROUP})
    if not interrupted:
        explain(frame, machine)
    print(f"Written: {arguments.out}")
    return INTERRUPTED if interrupted else 0


def workloads_of(name: str, arguments: argparse.Namespace) -> list[Workload]:
    """The workload of an LLM at each pair of precisions."""
    return [
        Workload(
            llm=LLMS[name],
            batch=arguments.batch,
            context=arguments.context,
            weight_bits=arguments.weight_bits,
            activation_bits=act_bits,
            kv_bits=kv_bits,
        )
        for act_bits, kv_bits in PRECISIONS
    ]


def machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --system --batch --context --weight-bits."""
    names = ", ".join(SYSTEMS)
    parser.add_argument("--system", default="rtx4090_pcie4", help=f"data sheet (.toml) or one of {names} (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=32, help="requests (default: %(default)s)")
    parser.add_argument("--context", type=positive, default=1024, help="tokens a request (default: %(default)s)")
    parser.add_argument("--weight-bits", type=float, default=16, help="bits of a weight (default: %(default)s)")


def priced(workload: Workload, machine: OffloadMachine) -> dict[str, Any]:
    """The row of a workload: ratios, times, break-even points and a recommendation, of the layer that the LLM has most of."""
    layer = most_frequent_layer(workload)
    tokens = workload.batch * workload.context
    ratios = offload_ratios(layer, machine, tokens)
    times = layer_times(workload, machine)
    link = break_even_link(layer, machine, tokens)
    worth = worth_it_link(layer, machine, tokens)
    cpu = break_even_cpu(layer, machine, tokens, times.best_act)
    return {
        "llm": workload.llm.name,
        "attention": workload.llm.attention_kind,
        "experts": workload.llm.num_experts,
        "layers": layer.layers,
        "batch": workload.batch,
        "context_tokens": workload.context,
        "weight_bits": workload.weight_bits,
        "act_bits": workload.activation_bits,
        "kv_bits": workload.kv_bits,
        "r": ratios.r,
        "rho": ratios.rho,
        "w": ratios.w,
        "c": ratios.c,
        "act_can_pay": ratios.act_pays,
        "fits_on_gpu": fits_on_gpu(workload, machine),
        "host_holds_kv": workload.weight_bytes + workload.state_bytes <= machine.host_capacity,
        "best_act_share": times.share,
        "kv_only_layer_s": times.kv_only,
        "best_act_layer_s": times.best_act,
        "act_only_layer_s": times.act_only,
        "cpu_attention_layer_s": times.cpu_attention,
        "int4_kv_layer_s": times.int4_kv,
        "speedup": times.kv_only / times.best_act,
        "break_even_link_GBps": None if link is None else link / GB,
        "worth_it_to_link_GBps": None if worth is None else worth / GB,
        "pays_from_context_tokens": first_context(layer, machine, least=0.0),
        "worth_it_from_context_tokens": first_context(layer, machine, least=WORTH),
        "cpu_bandwidth_to_win_over_link": None if cpu is None else cpu / machine.to_device,
        "recommendation": recommendation(workload, machine, ratios, times),
    }


def fits_on_gpu(workload: Workload, machine: OffloadMachine) -> bool:
    """Whether the GPU holds all weights, keys and values, so that nothing needs to be offloaded."""
    return workload.weight_bytes + workload.state_bytes <= machine.gpu_capacity


def most_frequent_layer(workload: Workload) -> OffloadLayer:
    """The kind of layer that an LLM has most of: DeepSeek-V3's 58 layers with experts, not its first three."""
    return max(offload_layers(workload), key=lambda layer: layer.layers)


def fluid_terms(layer: OffloadLayer, machine: OffloadMachine, tokens: Any) -> dict[str, Any]:
    """The seconds that ``fluid`` and ``best_fluid_share`` take, for ``tokens`` of state (an array or a number)."""
    return {
        "kv": layer.kv_time(machine, tokens),
        "act": layer.act_time(machine, tokens),
        "recompute": layer.recompute_time(machine, tokens),
        "weights": layer.weight_time(machine),
        "compute": layer.compute_time(machine, tokens),
    }


def layer_times(workload: Workload, machine: OffloadMachine) -> LayerTimes:
    """The layer's time with KV only, the best share of ACT, ACT only, attention on the CPU, and KV of 4 bits in groups."""
    layer = most_frequent_layer(workload)
    tokens = workload.batch * workload.context
    terms = fluid_terms(layer, machine, tokens)
    share = float(best_fluid_share(**terms))
    quantised = most_frequent_layer(replace(workload, kv_bits=INT4))
    return LayerTimes(
        share=share,
        kv_only=float(fluid(0.0, **terms)),
        best_act=float(fluid(share, **terms)),
        act_only=float(fluid(1.0, **terms)),
        cpu_attention=cpu_attention_time(layer, machine, tokens),
        int4_kv=float(fluid(0.0, **fluid_terms(quantised, machine, tokens))),
    )


def cpu_attention_time(layer: OffloadLayer, machine: OffloadMachine, tokens: float) -> float | None:
    """Seconds of a layer whose state stays on the host, where a CPU attends to it; None without a CPU.

        max(t_W, t_c + t_cpu, (weights + KV) / host)     t_cpu = max(KV / host, attention FLOPs / CPU peak)

    t_c is the GPU's part, weights only; a layer's two parts follow each other. The third term is the host's memory, which sends the
    weights and feeds the CPU.
    """
    if machine.cpu_peak is None:
        return None
    state = tokens * layer.kv_bytes
    cpu = max(state / machine.host_bandwidth, tokens * layer.attention_flops / machine.cpu_peak)
    host = (layer.read_bytes + state) / machine.host_bandwidth
    return max(layer.weight_time(machine), float(layer.compute_time(machine, 0)) + cpu, host)


def break_even_link(layer: OffloadLayer, machine: OffloadMachine, tokens: float) -> float | None:
    """B/s of the link from which on recomputing no longer helps against sending all KV; None if it never helps.

    With r < 1 a share of ACT helps while the link is busy longer than the GPU, (weights + KV) / link > t_c: the link at equality,
    infinite for a GPU that takes no time.
    """
    if layer.act_bytes >= layer.kv_bytes:
        return None
    compute = float(layer.compute_time(machine, tokens))
    return (layer.read_bytes + tokens * layer.kv_bytes) / compute if compute > 0 else math.inf


def worth_it_link(layer: OffloadLayer, machine: OffloadMachine, tokens: float) -> float | None:
    """B/s of the link up to which the best share of ACT saves more than ``WORTH`` of the time of KV only; None if it never does.

    Bisection: on a slow link the saving is (1 - r) / (w + 1); a faster one leaves less time to recompute in, and the saving falls.
    """
    least, most = 1.0, break_even_link(layer, machine, tokens)
    if most is None or not saving(layer, replace(machine, to_device=least), tokens) > WORTH:
        return None
    if math.isinf(most):  # a GPU that takes no time: the saving is the same on every link
        return most
    while most > least * (1 + 1e-9):
        middle = float(np.sqrt(least * most))
        if saving(layer, replace(machine, to_device=middle), tokens) > WORTH:
            least = middle
        else:
            most = middle
    return least


def saving(layer: OffloadLayer, machine: OffloadMachine, tokens: Any) -> Any:
    """Share of the time of KV only that the best share of ACT saves, for ``tokens`` of state (an array or a number)."""
    terms = fluid_terms(layer, machine, tokens)
    return 1 - fluid(best_fluid_share(**terms), **terms) / fluid(0.0, **terms)


def break_even_cpu(layer: OffloadLayer, machine: OffloadMachine, tokens: float, best: float) -> float | None:
    """B/s of the host's memory above which attention on the CPU beats a layer of ``best`` seconds; None if no bandwidth is enough.

    ``cpu_attention_time`` < ``best`` solved for the host's bandwidth; its terms without it must be below ``best`` by themselves.
    At least the link's, which a slower memory would slow down, too.
    """
    if machine.cpu_peak is None:
        return None
    gpu = float(layer.compute_time(machine, 0))
    if max(layer.weight_time(machine), gpu + tokens * layer.attention_flops / machine.cpu_peak) >= best:
        return None
    state = tokens * layer.kv_bytes
    return max(state / (best - gpu), (layer.read_bytes + state) / best, machine.to_device)


def first_context(layer: OffloadLayer, machine: OffloadMachine, *, least: float) -> int | None:
    """The fewest tokens a request for which the best share of ACT saves more than ``least`` of the time of KV only; None to LONGEST.

    Below it the GPU's work (``least`` 0) or the transfer of the weights hides what ACT could save.
    """
    if layer.act_bytes >= layer.kv_bytes:
        return None
    contexts = np.arange(1, LONGEST + 1, dtype=np.float64)
    # Equal times that were added in another order differ in their last digits, which is no saving.
    found = np.flatnonzero(saving(layer, machine, layer.batch * contexts) > max(least, 1e-12))
    return int(contexts[found[0]]) if len(found) else None


def recommendation(workload: Workload, machine: OffloadMachine, ratios: OffloadRatios, times: LayerTimes) -> str:
    """What to do: why ACT does not pay, or what share of it; and what is faster still."""
    if fits_on_gpu(workload, machine):
        held = (workload.weight_bytes + workload.state_bytes) / GB
        return f"nothing needs offloading: weights, keys and values are {held:.3g} GB and the GPU holds {machine.gpu_capacity / GB:.3g} GB"
    if not ratios.act_pays:
        text = f"does not pay: r = {ratios.r:.2f} >= 1"
    elif times.share == 0:
        text = "does not pay: the GPU is busy longer than the link"
    else:
        text = f"pays: {times.share:.0%} as activations, {times.kv_only / times.best_act:.2f}x"
    others = (("attention on the CPU", times.cpu_attention, ""), (f"KV of {INT4:g} bits", times.int4_kv, ", accuracy not modelled"))
    for what, seconds, caveat in others:
        if seconds is not None and seconds < times.best_act * (1 - 1e-12):
            text += f"; {what} is faster ({1 - seconds / times.best_act:.1%} less time{caveat})"
    return text


def explain(frame: pd.DataFrame, machine: OffloadMachine) -> None:
    """Print the table at equal precision and what it means."""
    columns = ["llm", "attention", "r", "best_act_share", "kv_only_layer_s", "best_act_layer_s", "cpu_attention_layer_s", "int4_kv_layer_s"]
    equal = frame[(frame["act_bits"] == 16) & (frame["kv_bits"] == 16)]
    show(equal[columns], title=f"16-bit activations and KV, {equal['batch'].iloc[0]} x {equal['context_tokens'].iloc[0]} tokens")
    pairs = {f"X{act:g}/KV{kv:g}": (frame["act_bits"] == act) & (frame["kv_bits"] == kv) for act, kv in PRECISIONS}
    by_llm = {pair: frame[rows].set_index("llm")["r"] for pair, rows in pairs.items()}
    show(pd.DataFrame(by_llm).rename_axis("llm").reset_index(), title="r = ACT / KV bytes")
    paying, never = equal[equal["act_can_pay"]], equal[~equal["act_can_pay"]]
    print(f"\nAt equal precision ACT can pay (r < 1) for {len(paying)} of {len(equal)} LLMs: {listed(paying)}.")
    print(f"It cannot for {listed(never[never['attention'] != 'MLA'])}: few KV heads make keys and values smaller than the layer's input.")
    for row in equal[equal["attention"] == "MLA"].itertuples():
        print(f"{row.llm}: MLA's latent is the state already, from which keys and values are recomputed; ACT is {row.r:.1f} times larger.")
    experts = equal[equal["experts"] > 0]
    print(f"{listed(experts)}: the experts' weights lengthen the transfer behind which recomputing hides (w), and do not change r.")
    revived = frame[(frame["act_bits"] == INT4) & (frame["kv_bits"] == 16) & frame["act_can_pay"] & frame["llm"].isin(never["llm"])]
    print(f"ACT of {INT4:g} bits against KV of 16 can pay for these, too: {listed(revived)} (accuracy is not modelled).")
    small = frame[(frame["act_bits"] == 16) & (frame["kv_bits"] == INT4) & frame["act_can_pay"]]
    print(f"ACT of 16 bits against KV of {INT4:g} can pay for: {listed(small)}.")
    resident = equal[equal["fits_on_gpu"]]
    if len(resident):
        print(f"Nothing needs offloading for {listed(resident)}: the GPU holds weights, keys and values. All times here stream both.")
    if machine.cpu_peak is None:
        print("Attention on the CPU is not priced: the host has no compute unit; add one to the data sheet.")
    for column, what in (("cpu_attention_layer_s", "attention on the CPU"), ("int4_kv_layer_s", f"KV of {INT4:g} bits")):
        if column == "cpu_attention_layer_s" and machine.cpu_peak is None:
            continue
        faster = paying[paying[column] < paying["best_act_layer_s"]]
        print(f"Where ACT can pay, {what} is faster still for {len(faster)} of {len(paying)} LLMs.")
    cpu = paying["cpu_bandwidth_to_win_over_link"].dropna()
    if len(cpu):
        times = machine.host_bandwidth / machine.to_device
        print(f"A CPU beats the best share of ACT from {cpu.min():.1f} to {cpu.max():.1f} times the link's bandwidth on.")
        print(f"This host's memory has {times:.1f} times, its data sheet's rate, which is not calibrated.")


def listed(part: pd.DataFrame) -> str:
    """The LLMs of a part of the table."""
    return ", ".join(part["llm"]) or "none"


if __name__ == "__main__":
    sys.exit(main())
