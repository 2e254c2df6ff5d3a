"""Offloaded generation: what is moved and computed, by hand; laws; and published runs."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.models.calibration import check_shapes, error_of
from memsplit.models.device import Device, device_named
from memsplit.models.kernel_offload import PACKED, READ_SHARE, HostStepTime, OffloadStepTime, offload_columns
from memsplit.models.presets import LLMS
from memsplit.solvers.calibration import fit

T4 = device_named("T4")
HOST = Device(name="2 x Xeon, DDR5", family="CPU", memory="DDR5", capacity=1e12, bandwidth=614.4e9, peaks={"bf16": 327e12})
"""Two sockets of eight channels DDR5-4800; 80 cores at 2 GHz with matrix units of 2048 FLOP a cycle."""

OPT = LLMS["opt-30b"]
WEIGHTS = 2.0 * sum(count * sum(matrix.elements for matrix in matrices) for count, matrices in OPT.layers)
STATE = 2.0 * OPT.state_elements * OPT.num_hidden_layers

VALUES = {"share": 0.8, "staging": 2e10, "compute": 0.5, "host_memory": 1e10, "unpack": 0.05, "overhead": 1e-3}

FIELDS = (
    "system,device,host,link_peak_GBps,n_gpu,model,prompt,gen,gpu_batch,num_batches,batch,w_gpu,w_cpu,w_disk,kv_gpu,kv_cpu,kv_disk,act_gpu,"
    "act_cpu,cpu_attn,int4_w,int4_kv,metric,prefill_s,decode_s,tok_s,evidence"
)
RUNS = (
    # FMInference/FlexLLMGen, bench_suite.py, Apache-2.0
    "FlexGen,T4,,15.75,1,opt-6.7b,256,32,4,1,4,100,0,0,100,0,0,100,0,0,0,0,tok_s_e2e,,,53.29,",
    "FlexGen,T4,,15.75,1,opt-6.7b,256,32,128,1,128,100,0,0,100,0,0,100,0,0,1,1,tok_s_e2e,,,56.72,",
    "FlexGen,T4,,15.75,1,opt-30b,256,32,160,2,320,10,90,0,0,100,0,0,100,1,0,0,tok_s_e2e,,,16.01,",
    "FlexGen,T4,,15.75,1,opt-30b,256,32,128,8,1024,0,100,0,0,100,0,0,100,0,0,1,tok_s_e2e,,,16.86,",
    "FlexGen,T4,,15.75,1,opt-175b,256,32,64,8,512,0,50,50,0,0,100,0,100,1,0,0,tok_s_e2e,,,1.36,",
    "FlexGen,T4,,15.75,1,opt-175b,256,32,96,3,288,0,100,0,0,100,0,0,100,0,1,1,tok_s_e2e,,,2.26,",
    # DeepSpeed, ZeRO-Inference (September 2022), table 3
    "ZeRO-Inference 2022,V100,,15.75,1,opt-30b,4,10,256,1,256,0,100,0,100,0,0,100,0,0,0,0,tok_s_per_gpu_decode,,,43,",
    "ZeRO-Inference 2022,V100,,15.75,1,opt-30b,4,10,256,1,256,0,0,100,100,0,0,100,0,0,0,0,tok_s_per_gpu_decode,,,30,no prefetch",
    # Hyungyo1/microbenchmark, logs of FlexGen
    "FlexGen,H100-PCIe,pin_weight=0,63,1,opt-66b,1792,256,1,1,1,50,50,0,100,0,0,100,0,1,0,0,log,2.964,647.985,0.393,",
    "FlexGen,H100-PCIe,pin_weight=0,63,1,opt-66b,32,32,100,9,900,0,100,0,0,100,0,0,100,1,0,0,log,15.968,444.499,62.545,",
)


def runs() -> list[dict[str, str]]:
    """The published runs above."""
    return list(csv.DictReader([FIELDS, *RUNS]))


def row(**changes: Any) -> dict[str, np.ndarray]:
    """OPT-30B on a V100 of PCIe 3.0, weights on the host, the rest on the GPU; one step of 16 requests of 500 + 20 / 2 tokens."""
    plain: dict[str, Any] = {"device": "V100-PCIe-32GB", "model": "opt-30b", "phase": "step", "prompt": 500, "gen": 20, "gpu_batch": 16}
    plain |= {"num_batches": 1, "n_gpu": 1, "link_peak_GBps": 15.75, "disk_GBps": 25.6, "pinned": 1, "prefetch": 1, "fused": 0}
    plain |= {"w_gpu": 0, "w_cpu": 100, "w_disk": 0, "kv_gpu": 100, "kv_cpu": 0, "kv_disk": 0, "act_gpu": 100}
    plain |= {"cpu_attn": 0, "int4_w": 0, "int4_kv": 0, **changes}
    return check_shapes(OffloadStepTime(), plain)


def step(**changes: Any) -> float:
    """Seconds of that row with ``VALUES``."""
    return float(OffloadStepTime().seconds(T4, row(**changes), VALUES)[0])


LINK = WEIGHTS / (0.8 * 15.75e9)
GPU = (WEIGHTS + 16 * 510 * STATE) / (READ_SHARE * 900e9)
BEGUN = 48 * 1e-3


def test_a_step_by_hand() -> None:
    """The load is not hidden; GPU and overhead follow it. Then each way in which a run may differ."""
    assert step() == pytest.approx(LINK + GPU + BEGUN)
    assert step(pinned=0) == pytest.approx(LINK + WEIGHTS / 2e10 + GPU + BEGUN)
    assert step(w_gpu=40, w_cpu=60) == pytest.approx(0.6 * LINK + GPU + BEGUN)
    assert step(n_gpu=4) == pytest.approx(LINK / 4 + GPU + BEGUN)
    assert step(num_batches=3) == pytest.approx(LINK + 3 * (GPU + BEGUN))
    cache = 16 * 510 * STATE
    attended = cache / 1e10
    assert step(kv_gpu=0, kv_cpu=100, cpu_attn=1) == pytest.approx(LINK + WEIGHTS / (READ_SHARE * 900e9) + attended + BEGUN)
    assert step(kv_gpu=0, kv_cpu=100) == pytest.approx(LINK + cache / (0.8 * 15.75e9) + GPU + BEGUN)


def test_disks_are_read_ahead_or_before() -> None:
    """Ahead, a disk works beside GPU and host and is seen where it is slower; else its time is added."""
    disk = WEIGHTS / 25.6e9
    assert disk > GPU + BEGUN
    assert step(w_cpu=0, w_disk=100) == pytest.approx(LINK + disk)
    assert step(w_cpu=0, w_disk=100, prefetch=0) == pytest.approx(LINK + disk + GPU + BEGUN)


def test_packed_weights_are_unpacked_for_every_gpu_batch() -> None:
    """Unless one kernel unpacks and multiplies."""
    unpacked = WEIGHTS / (0.05 * 900e9)
    assert step(int4_w=1) == pytest.approx(PACKED * LINK + GPU + unpacked + BEGUN)
    assert step(int4_w=1, num_batches=2) == pytest.approx(PACKED * LINK + 2 * (GPU + unpacked + BEGUN))
    assert step(int4_w=1, fused=1) == pytest.approx(PACKED * LINK + GPU + BEGUN)


def test_a_generation_is_its_prefill_and_its_steps() -> None:
    assert step(phase="decode") == pytest.approx(19 * step())
    assert step(phase="total") == pytest.approx(step(phase="prefill") + step(phase="decode"))


SHARES = st.sampled_from([0.0, 25.0, 100.0])


@settings(max_examples=60)
@given(weights=SHARES, cache=SHARES, requests=st.integers(1, 64), blocks=st.integers(1, 4), packed=st.booleans(), host=st.booleans())
def test_no_prediction_beats_the_data_sheet(weights: float, cache: float, requests: int, blocks: int, packed: bool, host: bool) -> None:
    """Also with all rates reached; and a faster link or more on the GPU, of a plan that attends there, never takes longer."""
    plan: dict[str, Any] = {
        "w_gpu": weights,
        "w_cpu": 100 - weights,
        "kv_gpu": cache,
        "kv_cpu": 100 - cache,
        "gpu_batch": requests,
        "num_batches": blocks,
    }
    plan |= {"int4_w": packed, "cpu_attn": host, "phase": "total"}
    ideal = dict.fromkeys(VALUES, 1.0) | {"host_memory": 1e12, "staging": 1e12, "overhead": 1e-9}
    model = OffloadStepTime()
    for values in (VALUES, ideal):
        seconds = model.seconds(T4, row(**plan), values)
        assert (seconds >= model.bound(T4, row(**plan))).all()
        assert (model.seconds(T4, row(**plan | {"link_peak_GBps": 63}), values) <= seconds).all()
    if not host:
        assert step(**plan | {"kv_gpu": 100, "kv_cpu": 0}) <= step(**plan) * (1 + 1e-12)


def test_rows_of_several_machines_are_priced_at_once() -> None:
    """A table gives what its rows give one by one."""
    columns, seconds = offload_columns(runs())
    together = OffloadStepTime().seconds(T4, columns, VALUES)
    single = [OffloadStepTime().seconds(T4, {name: column[i : i + 1] for name, column in columns.items()}, VALUES)[0] for i in range(10)]
    assert together == pytest.approx(single)
    assert (OffloadStepTime().bound(T4, columns) < seconds).all()


def test_what_published_runs_do_not_say() -> None:
    columns, seconds = offload_columns(runs())
    assert columns["device"].tolist() == ["T4"] * 6 + ["V100"] * 2 + ["H100-PCIe"] * 2
    assert columns["pinned"].tolist() == [1.0] * 8 + [0.0] * 2
    assert columns["prefetch"].tolist() == [1.0] * 6 + [0.0] * 2 + [1.0] * 2
    assert seconds[[0, 6, 8]] == pytest.approx([4 * 32 / 53.29, 256 / 43, 2.964 + 647.985])
    split, each = offload_columns(runs(), split=True)
    assert split["phase"].tolist() == ["total"] * 6 + ["step"] * 2 + ["prefill", "decode"] * 2
    assert each[-2:] == pytest.approx([15.968, 444.499])


def test_published_runs_are_fitted() -> None:
    """Ten runs on three machines, six parameters: within 8 % on the mean, each value a plausible share."""
    columns, seconds = offload_columns(runs())
    found = fit(OffloadStepTime(), T4, columns, seconds, folds=0)
    assert found.fitted.mape_pct < 8
    assert 0.4 < found.values["share"] < 0.9
    assert 10e9 < found.values["staging"] < 614.4e9  # below what its memory can be read at


def host_row(**changes: Any) -> dict[str, np.ndarray]:
    """OPT-30B on the host alone, one step of a request of no context."""
    plain: dict[str, Any] = {"gpu": "", "model": "opt-30b", "phase": "step", "prompt": 0, "gen": 0, "batch": 1, "link_peak_GBps": 63.0}
    return check_shapes(HostStepTime(), plain | changes)


def test_a_host_step_by_hand() -> None:
    """Weights read and multiplied; a GPU with room for all of them takes them over; one with little room leaves most to the host."""
    values = {"memory": 0.5, "compute": 0.1, "step_compute": 0.05, "attention": 0.1, "share": 0.5}
    alone = float(HostStepTime().seconds(HOST, host_row(), values)[0])
    assert alone == pytest.approx(WEIGHTS / (0.5 * 614.4e9) + WEIGHTS / (0.05 * 327e12))
    beside = float(HostStepTime().seconds(HOST, host_row(gpu="H100-PCIe"), values)[0])
    assert beside == pytest.approx(WEIGHTS / (READ_SHARE * 2000e9))
    little = float(HostStepTime().seconds(HOST, host_row(gpu="V100"), values)[0])
    assert beside < little < alone


@given(batch=st.integers(1, 2000), prompt=st.integers(1, 2000), gpu=st.sampled_from(["", "T4", "H100-PCIe"]))
def test_no_host_step_beats_the_data_sheet(batch: int, prompt: int, gpu: str) -> None:
    shapes = host_row(batch=batch, prompt=prompt, gen=32, gpu=gpu, phase="total")
    ideal = {one.name: 1.0 for one in HostStepTime().parameters}
    assert (HostStepTime().seconds(HOST, shapes, ideal) >= HostStepTime().bound(HOST, shapes)).all()


def test_names_that_are_not_known_are_named() -> None:
    with pytest.raises(ValueError, match=r"there is no LLM 'opt-1b'; name one of .*opt-30b"):
        step(model="opt-1b")
    with pytest.raises(ValueError, match="phase must be one of total, prefill, decode, step, not 'warmup'"):
        step(phase="warmup")
    with pytest.raises(ValueError, match="there is no device and no file 'Voodoo'"):
        step(device="Voodoo")


FOLDER = os.environ.get("MEMSPLIT_MEASURED", "")
measured = pytest.mark.skipif(not FOLDER, reason="MEMSPLIT_MEASURED does not name a folder with measured times")


def measured_rows(part: str) -> list[dict[str, str]]:
    """Published runs to fit on ("calibration") or to score on ("devtest")."""
    with (Path(FOLDER) / part / "offload_throughput.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@measured
def test_machines_that_were_fitted_are_predicted_in_other_settings() -> None:
    """V100, settings not fitted: the bar is 8 %. The data sheet alone is off by half."""
    known = [run for run in measured_rows("calibration") if run["w_gpu"]]
    columns, seconds = offload_columns(known, split=True)
    found = fit(OffloadStepTime(), T4, columns, seconds, folds=0)
    assert found.fitted.mape_pct < 8
    assert found.flagged == 0
    new, truth = offload_columns([run for run in measured_rows("devtest") if run["device"].startswith("V100")])
    assert len(truth) >= 5
    assert error_of(OffloadStepTime().seconds(T4, new, found.values), truth).mape_pct < 8
    assert error_of(OffloadStepTime().bound(T4, new), truth).mape_pct > 30


@measured
def test_hosts_with_matrix_units_are_predicted() -> None:
    """Medians, as one run of 900 requests is off by half: what such a batch leaves on the GPU is not known."""
    for system in ("IPEX", "LIA"):
        columns, seconds = offload_columns([run for run in measured_rows("calibration") if run["system"].startswith(system)], split=True)
        found = fit(HostStepTime(), HOST, columns, seconds)
        assert found.fitted.median_pct < 8, system
