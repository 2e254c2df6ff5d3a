"""Public measurements in a folder of CSVs: which file is which kernel on which device, and which of its rows are sound.

Each kind of file is a reader: it knows the columns that a collector wrote, what its rows mean, and which of them its own authors or
others found to be wrong. The files and where they are from: AIConfigurator (ai-dynamo/aiconfigurator, Apache-2.0), Vidur
(microsoft/vidur, MIT), LLM-Inference-Bench (argonne-lcf, BSD-3), LLMServingSim (casys-kaist, MIT), FlexLLMGen and DeepSpeed (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..models.calibration import Calibration, check_shapes
from ..models.device import Device, device_named
from ..models.kernel_models import kernel_model
from ..models.kernel_offload import HOSTS, offload_columns
from .measurements import Measurements, calibrate
from .table import read_table

Part = tuple[str, str, str, pd.DataFrame]
"""Device, kernel, variant, and rows with the model's columns and ``measured_s``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredSet:
    """Rows of one file that are of one device and one kernel model. ``source``: file and repository. ``dropped``: rows left out because
    their collector marks them as wrong."""

    file: str
    source: str
    device: Device
    measurements: Measurements
    dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Files whose name matches ``pattern``, from ``source``; ``parts`` takes the frame and the match."""

    pattern: str
    source: str
    parts: Callable[[pd.DataFrame, re.Match[str]], Iterator[Part]]


def measured_sets(folder: str | Path) -> tuple[tuple[MeasuredSet, ...], tuple[str, ...]]:
    """The sets in the CSVs of ``folder``, in order of file names; and a sentence for each file or device that is not known.

    ValueError if there is no CSV, or a file of a known name has not what such files have.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"there are no CSVs in {folder}; name a folder of measurements")
    found, unknown = list[MeasuredSet](), list[str]()
    for path in files:
        reader = next(((one, match) for one in _READERS if (match := re.fullmatch(one.pattern, path.stem))), None)
        if reader is None:
            unknown.append(f"{path.name}: no reader knows files of that name")
            continue
        one, match = reader
        try:
            frame = read_table(path)
        except ValueError as error:
            raise ValueError(f"{str(error).partition('; name a table')[0]}; mend the file, or leave it out") from None
        for name, kernel, variant, rows in _parts(path, one, frame, match):
            try:
                device = device_named(name)
            except ValueError:
                unknown.append(f"{path.name}: there is no device {name!r}; add it to a data sheet")
                continue
            if len(rows):
                found.append(_set_of(path, one.source, device, kernel, variant, rows))
    return tuple(found), tuple(unknown)


def calibrated_sets(
    sets: Sequence[MeasuredSet], *, seed: int = 0, date: str = "", progress: Callable[[str], object] | None = None
) -> Iterator[tuple[MeasuredSet, Calibration]]:
    """The record of each device, kernel and variant, one after the other, fitted on the first set that has it: what several collectors
    measured is not mixed."""
    known = set[tuple[str, str, str]]()
    for each in sets:
        key = (each.device.name, each.measurements.model.name, each.measurements.model.variant)
        if key in known:
            continue
        known.add(key)
        source = f"{each.file} of {each.source}"
        tell = None if progress is None else _beginning_with(f"{each.device.name} {each.file}", progress)
        # All rows, also of large sets: shipped records are those of all.
        (record,) = calibrate((each.measurements,), each.device, seed=seed, source=source, date=date, progress=tell, most_rows=None)
        if each.dropped:
            left_out = (
                f"{each.dropped} rows were left out: marked as wrong, of another collector, or of a kind that the model does not have"
            )
            record = replace(record, warnings=(*record.warnings, left_out))
        yield each, record


def _beginning_with(lead: str, progress: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: progress(f"{lead} {text}")


def _parts(path: Path, reader: _Reader, frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    """What ``reader`` makes of a file; ValueError if this is no file of that kind, whatever its name."""
    otherwise = "rename the file, or leave it out"
    try:
        yield from reader.parts(frame, match)
    except KeyError as error:
        raise ValueError(f"{path} has no column {error.args[0]!r}, which files of that name have; {otherwise}") from None
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(f"{path} does not hold what files of that name do ({reason}); {otherwise}") from None


def _set_of(path: Path, source: str, device: Device, kernel: str, variant: str, rows: pd.DataFrame) -> MeasuredSet:
    model = kernel_model(kernel, variant)
    sound = rows["sound"].to_numpy(dtype=np.bool_) if "sound" in rows else np.ones(len(rows), dtype=np.bool_)
    kept = rows[sound]
    missing = [name for name in (*model.columns, "measured_s") if name not in kept]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}, which files of that name have; rename the file, or leave it out")
    try:
        columns: dict[str, Any] = {
            name: kept[name].astype(str).to_numpy() if name in model.texts else kept[name].to_numpy(dtype=np.float64)
            for name in model.columns
        }
        shapes, seconds = check_shapes(model, columns), kept["measured_s"].to_numpy(dtype=np.float64)
        if not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError("measured_s must be above 0 and finite")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; correct that, or leave the file out") from None
    return MeasuredSet(
        file=path.name,
        source=source,
        device=device,
        measurements=Measurements(
            model=model,
            shapes=shapes,
            seconds=seconds,
            line=kept.index.to_numpy(dtype=np.int64) + 2,
        ),
        dropped=int((~sound).sum()),
    )


PRECISIONS = {"fp16": "bf16", "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8", "w4": "w4", "w8": "w8", "fp8_block": "fp8_block"}
PRECISIONS |= {"int4_wo": "w4", "w4a16_mxfp4": "mxfp4"}
"""Our names of the precisions that collectors write."""

ENGINES = {"vLLM": "vLLM", "TensorRT-LLM": "TensorRT-LLM", "Deepspeed-MII": "Deepspeed-MII"}
"""Serving engines whose steps have a model."""

ARGONNE_DEVICES = {"Nvidia A100 GPU": "A100-SXM-40GB", "Nvidia H100 GPU": "H100-SXM"}
"""LLM-Inference-Bench ran on A100 of 40 GB (its README: A100 nodes of Polaris)."""

STATE_BYTES = {"LLaMA-3 8B": 131072, "LLaMA-3 70B": 327680, "Llama-2-7B": 524288, "Qwen3-32B": 262144}
"""Bytes of 16-bit keys and values a token, from the configurations of these LLMs."""


def _gemm(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    # Where two collectors measured the same shapes, one of them multiplied constants, which takes less power and 11 to 15 % less time.
    chosen = frame["src"].str.startswith("sglang")
    frame = frame.assign(sound=chosen if chosen.any() else True)
    for precision, rows in frame.groupby("dtype", sort=False):
        if precision in PRECISIONS:
            yield match["device"], "gemm", PRECISIONS[str(precision)], rows


def _attention(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    # Heads of more than 256 elements have kernels of their own.
    sound = (frame["phys_ok"] == 1) & (frame["head_dim"] <= 256)
    yield match["device"], f"{match['phase']}_attention", match["engine"], frame.assign(sound=sound)


def _experts(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    for precision, rows in frame.groupby("dtype", sort=False):
        if precision in PRECISIONS:
            yield match["device"], "moe_gemm", PRECISIONS[str(precision)], rows


def _vidur_gemm(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    yield match["device"], "gemm", "bf16", frame


def _vidur_elementwise(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    parallel = (frame["model"] == "phi-2").astype(float)  # attention and FFN side by side, and no gate
    yield match["device"], "elementwise", "", frame.assign(gated=1 - parallel, parallel=parallel)


def _collectives(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    frame = frame.assign(bytes=frame["elements"] * np.where(frame["dtype"] == "half", 2, 1))
    for (device, operation), rows in frame.groupby(["device", "op"], sort=False):
        yield str(device), "all_reduce", str(operation), rows


def _host_link(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    frame = frame.assign(measured_s=frame["bytes"] / (frame["GBps"] * 1e9))
    for (device, direction), rows in frame.groupby(["device", "direction"], sort=False):
        yield str(device).partition(" (")[0], "host_link", str(direction), rows


def _decode_rates(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    frame = frame[frame["phase"] == "tg"]
    state = [next(size for name, size in STATE_BYTES.items() if model.startswith(name)) for model in frame["model"]]
    frame = frame.assign(
        measured_s=1 / frame["tok_s"],
        weight_bytes=frame["model_GiB"] * 2**30,
        state_bytes=np.array(state) * (frame["depth"] + frame["tokens"] / 2),
    )
    for device, rows in frame.groupby("device", sort=False):
        name, strix, software = str(device).partition("Strix Halo 8060S ")
        yield (strix.strip(), "stream", software, rows) if strix else (name, "stream", "", rows)


def _served(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    # Mixtral with several requests is faster there than any choice of experts by tokens that differ: but with vLLM, prompts were repeated.
    repeated = frame["model"].str.contains("Mixtral") & (frame["batch"] > 1) & (frame["framework"] != "vLLM")
    frame = frame.assign(
        llm=frame["model"],
        prompt=frame["in_out_len"],
        generated=frame["in_out_len"],
        devices=frame["n_gpu"],
        dtype="fp16",
        measured_s=frame["latency_s"],
        sound=(frame["consistent"] == 1) & ~repeated,
    )
    for (device, engine), rows in frame.groupby(["device", "framework"], sort=False):
        if device in ARGONNE_DEVICES and engine in ENGINES:
            yield ARGONNE_DEVICES[str(device)], "serving", ENGINES[str(engine)], rows


def _layers(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    products = frame[(frame["n"] > 0) & (frame["k"] > 0)]
    for device, rows in products.groupby("device", sort=False):
        yield str(device), "gemm", "bf16", rows


def _engine_steps(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    alone = (frame["attention_dp_size"] == 1) & (frame["precision"] == "fp8") & (frame["model_path"] == "meta-llama/Llama-3.1-70B")
    frame = frame[alone & (frame["silicon_tpot_ms"] > 0)]
    frame = frame.assign(
        llm=frame["model_path"],
        batch=frame["batch_size"],
        prompt=frame["isl"],
        generated=frame["osl"],
        devices=frame["tp_size"],
        dtype="fp8",
        # Requests follow each other: while one generates, the prompts of others are read between its tokens, and tell on its rate.
        measured_s=frame["silicon_tpot_ms"] / 1000 * frame["osl"],
    )
    engines = {"vllm": "vLLM", "trtllm": "TensorRT-LLM"}
    for (device, engine), rows in frame.groupby(["system", "backend"], sort=False):
        yield str(device), "serving", engines[str(engine)], rows


def _offloaded(frame: pd.DataFrame, match: re.Match[str]) -> Iterator[Part]:
    table = frame.astype(object).where(frame.notna(), "").astype(str)
    texts = [dict(zip(map(str, table.columns), row, strict=True)) for row in table.itertuples(index=False, name=None)]
    host = [row["system"].startswith(HOSTS) for row in texts]
    for on_host in (False, True):
        rows = [row for row, is_host in zip(texts, host, strict=True) if is_host == on_host]
        if not rows:
            continue
        columns, seconds = offload_columns(rows, split=True)
        part = pd.DataFrame({**columns, "measured_s": seconds})
        if not on_host:
            yield OFFLOAD_DEVICE, "offload", "", part
            continue
        for system, found in part.groupby("system", sort=False):
            yield OFFLOAD_HOST, "offload_host", str(system).split()[0], found


OFFLOAD_DEVICE = "T4"
"""Rows of offloaded runs name their own GPUs; one record, which serves them all, stands under this one."""

OFFLOAD_HOST = "xeon_2s"
"""Two sockets of Xeon with eight channels of DDR5-4800 each."""

_AICONFIGURATOR = "AIConfigurator, github.com/ai-dynamo/aiconfigurator, Apache-2.0"
_VIDUR = "Vidur, github.com/microsoft/vidur, MIT"

_READERS = (
    _Reader(pattern=r"aic_gemm_(?:fp8_|wo_)?(?P<device>\w+)", source=_AICONFIGURATOR, parts=_gemm),
    _Reader(
        pattern=r"aic_attn_(?P<phase>decode|prefill)_(?P<device>\w+)_(?P<engine>vllm|sglang|trtllm)",
        source=_AICONFIGURATOR,
        parts=_attention,
    ),
    _Reader(pattern=r"aic_moe_(?P<device>\w+)", source=_AICONFIGURATOR, parts=_experts),
    _Reader(pattern=r"vidur_gemm_(?P<device>\w+)", source=_VIDUR, parts=_vidur_gemm),
    _Reader(pattern=r"vidur_elementwise_(?P<device>\w+)", source=_VIDUR, parts=_vidur_elementwise),
    _Reader(pattern=r"aic_nccl", source=_AICONFIGURATOR, parts=_collectives),
    _Reader(pattern=r"aic_silicon_serving", source=_AICONFIGURATOR, parts=_engine_steps),
    _Reader(pattern=r"llmservingsim_layers", source="LLMServingSim, github.com/casys-kaist/LLMServingSim, MIT", parts=_layers),
    _Reader(pattern=r"host_link_bandwidth", source="github.com/npho/cse554, facts only", parts=_host_link),
    _Reader(
        pattern=r"llamacpp_decode", source="llama.cpp token rates: XiongjieDai/GPU-Benchmarks, lhl/strix-halo-testing", parts=_decode_rates
    ),
    _Reader(
        pattern=r"argonne_llm_inference_bench",
        source="LLM-Inference-Bench, github.com/argonne-lcf/LLM-Inference-Bench, BSD-3",
        parts=_served,
    ),
    _Reader(
        pattern=r"offload_throughput",
        source="published logs of FlexLLMGen and DeepSpeed (Apache-2.0), github.com/Hyungyo1/microbenchmark (facts only)",
        parts=_offloaded,
    ),
)
