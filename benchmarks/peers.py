"""One decode step beside other tools: points per CPU-second and predicted milliseconds of each, and the physical bound: ``make peers``.

Every peer is installed from PyPI into a virtual environment of its own below --env, runs in its own process, and is asked through its own
interface for the same decoder stack, machine, batch and context: 16 bits, no LM head, efficiencies of 1 where it has them. A prediction
reads "18.10", or "18.10 + 0.21" with the communication that a peer adds for tensor parallelism. One core; CPU seconds of the process.
Nothing here is a remembered result: what a peer cannot install, load or predict is said in its own words.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PEERS = {"genz": "genz-llm", "llm_analysis": "llm-analysis", "aiconfigurator": "aiconfigurator==0.12.*"}
"""What each function of that name below needs from PyPI."""

SPEED_CASE = 1
"""The case that points per CPU-second are counted on: Llama2-70B, whose LLM and machine every peer knows."""

Row = dict[str, Any]


def main() -> int:
    """Install, run and print; 0 also where a peer cannot be had, 1 only if memsplit itself is below the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path("build/peers"), help="folder of the environments (default: %(default)s)")
    parser.add_argument("--run", nargs=3, metavar=("PEER", "CASES", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return _run_here(*arguments.run)
    cases = _cases()
    rows = _ours(cases)
    for peer, requirement in PEERS.items():
        print(f"{peer}: {requirement} ...", file=sys.stderr, flush=True)
        rows += _peer(peer, requirement, cases, arguments.env)
    _print(cases, rows)
    ours = [row for row in rows if row["name"].startswith("memsplit")]
    bound = rows[0]["ms"]
    return int(any(ms < least * (1 - 1e-12) for row in ours for ms, least in zip(row["ms"], bound, strict=True)))


def _cases() -> list[dict[str, Any]]:
    """LLM, machine, batch and context of each case as plain data; rates from NVIDIA's data sheets of A100-SXM-80GB and H100-SXM."""
    from memsplit.models.presets import GPT3_175B, LLAMA2_70B, OPT_30B

    a100 = {
        "bandwidth_GBps": 2039.0,
        "capacity_GB": 80.0,
        "matrix_TFLOPps": 312.0,
        "vector_TFLOPps": 78.0,
        "link_GBps": 300.0,
        "part": "a100_sxm",
    }
    h100 = {
        "bandwidth_GBps": 3350.0,
        "capacity_GB": 80.0,
        "matrix_TFLOPps": 989.0,
        "vector_TFLOPps": 133.8,
        "link_GBps": 450.0,
        "part": "h100_sxm",
    }
    chosen = (
        (OPT_30B, "OPTForCausalLM", a100, 1, 8, 1024),
        (LLAMA2_70B, "LlamaForCausalLM", a100, 4, 16, 2048),
        (LLAMA2_70B, "LlamaForCausalLM", h100, 4, 16, 2048),
        (GPT3_175B, "GPT2LMHeadModel", a100, 8, 8, 2048),
    )
    fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
        *("gated_ffn", "tie_word_embeddings"),
    )
    return [
        {
            "title": f"{llm.name} {devices}x{machine['part'].split('_')[0].upper()} {batch}x{context}",
            "name": llm.name,
            "llm": {field: getattr(llm, field) for field in fields} | {"architecture": architecture},
            **machine,
            "devices": devices,
            "batch": batch,
            "context": context,
        }
        for llm, architecture, machine, devices, batch, context in chosen
    ]


def _ours(cases: list[dict[str, Any]]) -> list[Row]:
    """The bound (bytes of weights, keys and values over the bandwidth), and memsplit fused, unfused and with soft overlap."""
    import numpy as np

    from memsplit.models import ComputeUnit, MemoryTier, System, Workload
    from memsplit.models.estimate import STEP_DATASHEET, STEP_FUSED, StepMachines, StepModel, StepProfile
    from memsplit.models.presets import LLMS
    from memsplit.models.systems import Systems
    from memsplit.models.units import GB, TFLOPS

    bits = {"weight_bits": 16, "kv_bits": 16, "activation_bits": 16}
    bound = []
    machines = []
    for case in cases:
        work = Workload(llm=LLMS[case["name"]], batch=case["batch"], context=case["context"], **bits)
        bound.append((work.weight_bytes + work.state_bytes) / (case["bandwidth_GBps"] * GB * case["devices"]) * 1e3)
        tier = MemoryTier(name="HBM", capacity=case["capacity_GB"] * GB, bandwidth=case["bandwidth_GBps"] * GB)
        peaks = {"matrix_peak": case["matrix_TFLOPps"] * TFLOPS, "vector_peak": case["vector_TFLOPps"] * TFLOPS}
        machines.append(System(name="GPU", tiers=(tier,), units=(ComputeUnit(name="GPU", tier="HBM", **peaks),)))
    rows: list[Row] = [{"name": "physical bound", "ms": bound, "rates": {}}]
    rng = np.random.default_rng(0)
    number = 200_000
    columns = {"HBM_bandwidth_TBps": rng.uniform(1, 8, number), "GPU_matrix_peak_TFLOPps": rng.uniform(100, 2000, number)}
    many = StepMachines.build(Systems.from_columns(machines[SPEED_CASE], columns), devices=cases[SPEED_CASE]["devices"])
    one = StepMachines.build([machines[SPEED_CASE]], devices=cases[SPEED_CASE]["devices"])
    batch, context = rng.integers(1, 33, number), rng.integers(128, 4096, number)
    for profile in (STEP_FUSED, STEP_DATASHEET, StepProfile(name="soft overlap, p = 4", overlap=4)):
        found = []
        for case, system in zip(cases, machines, strict=True):
            model = StepModel.build(LLMS[case["name"]], profile=profile, **bits)
            step = model.estimate(StepMachines.build([system], devices=case["devices"]), case["batch"], case["context"])
            found.append(float(step.latency[0]) * 1e3)
        model = StepModel.build(LLMS[cases[SPEED_CASE]["name"]], profile=profile, **bits)
        rates = {
            "as arrays": number * _per_cpu_second(lambda i, model=model: model.estimate(many, batch, context)),
            "one by one": _per_cpu_second(lambda i, model=model: model.estimate(one, *_point(i))),
        }
        rows.append({"name": f"memsplit, {profile.name}", "ms": found, "rates": rates})
    return rows


def _peer(peer: str, requirement: str, cases: list[dict[str, Any]], folder: Path) -> list[Row]:
    """The rows of one peer, or one row that says why there are none."""
    home = folder / peer
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = home / "installed"
    if not done.exists() or done.read_text() != requirement:
        venv.create(home, with_pip=True, clear=True)
        found = subprocess.run([python, "-m", "pip", "install", "-q", requirement], capture_output=True, text=True, check=False)
        if found.returncode:
            return [{"name": peer, "why": f"{requirement} could not be installed: {_last_line(found.stderr)}"}]
        done.write_text(requirement)
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "cases.json"), Path(scratch, "rows.json")
        given.write_text(json.dumps(cases))
        # A folder of its own, in which peers may leave files; one thread; the parent's packages out of sight.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
        command = [python.absolute(), "-P", Path(__file__).absolute(), "--run", peer, given, out]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment, timeout=600, check=False)
        except subprocess.TimeoutExpired:
            return [{"name": peer, "why": "no answer in 600 s"}]
        if ran.returncode or not out.exists():
            return [{"name": peer, "why": f"it failed: {_last_line(ran.stderr)}"}]
        rows: list[Row] = json.loads(out.read_text())
        return rows


def _run_here(peer: str, cases: str, out: str) -> int:
    """What runs in a peer's environment: its rows, as JSON."""
    from importlib.metadata import version

    rows = list({"genz": genz, "llm_analysis": llm_analysis, "aiconfigurator": aiconfigurator}[peer](json.loads(Path(cases).read_text())))
    for row in rows:
        row["name"] = row["name"].replace("VERSION", version(PEERS[peer].partition("=")[0]))
    Path(out).write_text(json.dumps(rows))
    return 0


def _asked(cases: list[dict[str, Any]], predict: Callable[[dict[str, Any]], tuple[float, float]]) -> Row:
    """The milliseconds of each case without communication, those of communication, and a peer's own words where it has none."""
    row: Row = {"ms": [], "communication": [], "said": []}
    for case in cases:
        try:
            stack, communication = predict(case)
            said = ""
        except Exception as error:  # a peer may fail in any way; its other cases still count
            stack, communication, said = None, None, f"{case['title']}: {type(error).__name__}: {_last_line(str(error))}"
        row["ms"].append(stack)
        row["communication"].append(communication)
        row["said"] += [said] if said else []
    return row


def genz(cases: list[dict[str, Any]]) -> Iterator[Row]:
    """GenZ: ``decode_moddeling`` of its own ModelConfig on a system given by its numbers."""
    import warnings

    warnings.filterwarnings("ignore")
    from GenZ import decode_moddeling
    from GenZ.Models import ModelConfig

    def step(case: dict[str, Any], batch: int, context: int) -> Any:
        llm = case["llm"]
        sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
        model = ModelConfig(
            model=case["name"],
            num_decoder_layers=llm["num_hidden_layers"],
            num_ffi=1 + llm["gated_ffn"],
            **{size: llm[size] for size in sizes},
        )
        system = {
            "Flops": case["matrix_TFLOPps"],
            "Memory_size": case["capacity_GB"],
            "Memory_BW": case["bandwidth_GBps"],
            "ICN": case["link_GBps"],
            "real_values": True,
        }
        settings = {"input_tokens": context, "output_tokens": 0, "Bb": 1, "bits": "bf16", "tensor_parallel": case["devices"]}
        return decode_moddeling(model=model, batch_size=batch, system_name=system, **settings)

    def predict(case: dict[str, Any]) -> tuple[float, float]:
        parts = step(case, case["batch"], case["context"])["Runtime_breakdown"]
        stack = parts.LA_layers + parts.QKVO_layers + parts.FFN_layers
        return stack, parts.MHA + parts.FFN - stack

    rates = {"one by one": _per_cpu_second(lambda i: step(cases[SPEED_CASE], *_point(i)))}
    yield _asked(cases, predict) | {"name": "GenZ VERSION", "rates": rates}


def llm_analysis(cases: list[dict[str, Any]]) -> Iterator[Row]:
    """llm-analysis: ``LLMAnalysis.inference``, one generated token, built once for each LLM and machine.

    Its FFN has two matrices; a gated one is given as two that are half as wide again, which have as many weights.
    """
    import logging

    from llm_analysis.analysis import LLMAnalysis
    from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig

    logging.disable(logging.CRITICAL)

    def built(case: dict[str, Any]) -> Any:
        llm = case["llm"]
        width = llm["intermediate_size"] * (1.5 if llm["gated_ffn"] else 1)
        model = ModelConfig(
            name=case["name"],
            num_layers=llm["num_hidden_layers"],
            n_head=llm["num_attention_heads"],
            hidden_dim=llm["hidden_size"],
            vocab_size=llm["vocab_size"],
            num_key_value_heads=llm["num_key_value_heads"],
            ffn_embed_dim=width,
            expansion_ratio=width / llm["hidden_size"],
            model_type="llama" if llm["gated_ffn"] else "opt",
        )
        gpu = GPUConfig(
            name=case["part"],
            mem_per_GPU_in_GB=case["capacity_GB"],
            hbm_bandwidth_in_GB_per_sec=case["bandwidth_GBps"],
            intra_node_bandwidth_in_GB_per_sec=case["link_GBps"],
            intra_node_min_message_latency=0.0,
            peak_fp16_TFLOPS=case["matrix_TFLOPps"],
        )
        shares = {"flops_efficiency": 1.0, "hbm_memory_efficiency": 1.0, "intra_node_memory_efficiency": 1.0}
        return LLMAnalysis(model, gpu, DtypeConfig(), ParallelismConfig(tp_size=case["devices"]), **shares)

    def step(analysis: Any, batch: int, context: int) -> dict[str, Any]:
        # it counts the generated token to the state
        found: dict[str, Any] = analysis.inference(batch_size_per_gpu=batch, seq_len=context - 1, num_tokens_to_generate=1)
        return found

    def predict(case: dict[str, Any]) -> tuple[float, float]:
        found = step(built(case), case["batch"], case["context"])
        ends = found["decode_latency_fwd_input_embedding"] + found["decode_latency_fwd_output_embedding_loss"]
        communication = found["decode_latency_fwd_tp_comm"]
        return (found["decode_latency"] - ends - communication) * 1e3, communication * 1e3

    analysis = built(cases[SPEED_CASE])
    rates = {"one by one": _per_cpu_second(lambda i: step(analysis, *_point(i)))}
    yield _asked(cases, predict) | {"name": "llm-analysis VERSION", "rates": rates}


def aiconfigurator(cases: list[dict[str, Any]]) -> Iterator[Row]:
    """AIConfigurator: its compiled engine for TensorRT-LLM, at the speed of light and from measured kernels of the listed parts."""
    from aiconfigurator_core import _aiconfigurator_core as core
    from aiconfigurator_core.sdk.config_builders import build_model_config
    from aiconfigurator_core.sdk.engine import EngineHandle, build_engine_spec_json
    from aiconfigurator_core.sdk.models import get_model
    from aiconfigurator_core.sdk.perf_database import get_database_view, get_latest_database_version

    def compiled(case: dict[str, Any], mode: str) -> Any:
        llm, folder = case["llm"], Path(case["name"])
        folder.mkdir(exist_ok=True)
        config = {name: value for name, value in llm.items() if name not in ("architecture", "gated_ffn")}
        config |= {"architectures": [llm["architecture"]], "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(config))
        part, backend = case["part"], "trtllm"
        version = get_latest_database_version(system=part, backend=backend)
        database = get_database_view(part, backend, version, allow_missing_data=mode != "SILICON", database_mode=mode)
        parallel = {"tp_size": case["devices"], "pp_size": 1, "attention_dp_size": 1, "moe_tp_size": 1, "moe_ep_size": 1}
        model = get_model(str(folder), build_model_config(**parallel), backend)
        names = {"model_path": str(folder), "system": part, "backend": backend, "backend_version": version}
        spec = build_engine_spec_json(model, database=database, kv_block_size=None, systems_path=None, nextn=0, **names)
        return EngineHandle(core.engine_spec_bincode_from_json(spec))

    for mode, what in (("SOL", "speed of light"), ("SILICON", "measured kernels")):

        def predict(case: dict[str, Any], mode: str = mode) -> tuple[float, float]:
            # it decodes the second of osl = 2 tokens, which attends to isl + 1
            _, kernels = compiled(case, mode).run_static_per_op(batch_size=case["batch"], isl=case["context"] - 1, osl=2, mode="static_gen")
            stack = [kernel for kernel in kernels if not kernel[0].startswith(("generation_embedding", "generation_logits"))]
            communication = sum(kernel[1] for kernel in stack if kernel[0].startswith(("generation_ar", "generation_p2p")))
            return sum(kernel[1] for kernel in stack) - communication, communication

        row = _asked(cases, predict) | {"name": f"AIConfigurator VERSION, {what}"}
        engine = compiled(cases[SPEED_CASE], mode)

        def step(i: int, engine: Any = engine) -> float:
            batch, context = _point(i)
            found: float = engine.predict_decode_latency(batch, context - 1, 2)
            return found

        yield row | {"rates": {"one by one": _per_cpu_second(step)}}


def _point(i: int) -> tuple[int, int]:
    """Batch and context of point ``i``: no two of the first 120,000 are equal, so that no memory of earlier answers helps."""
    return 1 + i % 32, 129 + i // 32 % 3900


def _per_cpu_second(work: Callable[[int], object], seconds: float = 0.5, times: int = 3) -> float:
    """Calls of ``work`` a second of CPU time of this process: the best of several stretches, after one that warms up."""
    work(0)
    done, best = 1, 0.0
    for _ in range(times):
        started, first = time.process_time(), done
        while (spent := time.process_time() - started) < seconds:
            for _ in range(10):
                work(done)
                done += 1
        best = max(best, (done - first) / spent)
    return best


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it said nothing"


def _print(cases: list[dict[str, Any]], rows: list[Row]) -> None:
    bound = rows[0]["ms"]
    print("One decode step, ms: decoder stack without LM head, 16 bits; + communication; * below the physical bound")
    widths = [max(len(case["title"]), 20) for case in cases]
    print(f"{'':40}" + "".join(f"  {case['title']:>{width}}" for case, width in zip(cases, widths, strict=True)))
    for row in rows:
        if "why" in row:
            print(f"{row['name']:40}  {row['why']}")
            continue
        texts = []
        for i, ms in enumerate(row["ms"]):
            if ms is None:
                texts.append("-")
                continue
            added = (row.get("communication") or [0.0] * len(cases))[i]
            texts.append(f"{ms:.2f}" + (f" + {added:.2f}" if added else "") + ("*" if ms < bound[i] * (1 - 1e-9) else ""))
        print(f"{row['name']:40}" + "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True)))
    print(f"\nPoints per CPU-second, one core, {cases[SPEED_CASE]['title'].rsplit(' ', 1)[0]}, batch and context varied")
    for row in rows:
        for how, rate in row.get("rates", {}).items():
            print(f"{row['name']:40}  {how:12} {rate:14,.0f}")
    for row in rows:
        for said in row.get("said", ()):
            print(f"{row['name']} on {said}")


if __name__ == "__main__":
    sys.exit(main())
