"""A profile's files, its command, and a short profile of this very machine."""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsplit.dse import _machine_kernels, machine
from memsplit.dse._machine_kernels import LEAST, MOST, Cell, HostKernels, Machine, Rate
from memsplit.dse._machine_torch import TorchKernels
from memsplit.dse.cli import main
from memsplit.dse.machine import (
    MachineProfile,
    check_same_machine,
    profile_arguments,
    profile_command,
    profile_machine,
    profile_paths,
    write_profile,
)
from memsplit.dse.measurements import read_measurements
from memsplit.models import KernelMappingProblem, StepMachines, StepModel, System, Workload
from memsplit.models.calibration_records import read_records
from memsplit.models.device import device_named, read_devices
from memsplit.models.presets import QWEN3_0_6B, SYSTEMS
from memsplit.models.units import GB, MiB, quantity
from memsplit.solvers import PatternMapping, TableMapping

HOST = Machine(cpu="Example CPU", cores=4, memory=64 * GB, cache=32 * MiB, software="Example OS")
BOTH = dataclasses.replace(
    HOST, gpu="Example GPU", gpu_memory=80 * GB, gpu_cache=40 * MiB, multiprocessors=108, capability=(8, 0), software="Example OS"
)


def rates_of(cells: Sequence[Cell], bandwidth: float, compute: float) -> tuple[Rate, ...]:
    """Rates by a roofline with a launch, as a machine would give them."""
    return tuple(Rate(one, 2e-6 + max(one.nbytes / bandwidth, one.flops / compute), 0.02, 9) for one in cells)


def host_profile() -> MachineProfile:
    cells = HostKernels(threads=2, quick=True, machine=HOST).cells()
    return MachineProfile(machine=HOST, device="cpu", threads=2, rates=rates_of(cells, 20e9, 1e11), date="2026-01-02")


def gpu_profile() -> MachineProfile:
    on_gpu = TorchKernels(torch=None, machine=BOTH, quick=True, size=4 * 2**30).cells()
    copies = [one for one in on_gpu if one.kind == "host_link"]
    kernels = [one for one in on_gpu if one.kind != "host_link"]
    on_host = HostKernels(threads=4, alone=False, machine=BOTH).cells()
    rates = rates_of(kernels, 1.5e12, 2e14) + rates_of(copies, 25e9, 1.0) + rates_of(on_host, 1e11, 1e12)
    return MachineProfile(machine=BOTH, device="cuda", threads=4, rates=rates, date="2026-01-02")


@pytest.fixture(scope="module", params=[host_profile, gpu_profile], ids=["cpu", "cuda"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MachineProfile, Path]:
    """A profile and the folder of its files, which tests only read."""
    made, folder = request.param(), tmp_path_factory.mktemp("profile")
    write(made, folder)
    return made, folder


def write(made: MachineProfile, folder: Path) -> Path:
    out = folder / "my_machine.toml"
    written = write_profile(made, out)
    assert out in written.paths, written.missing
    return out


def test_the_files_say_what_the_profile_says(written: tuple[MachineProfile, Path]):
    made, folder = written
    out = folder / "my_machine.toml"
    assert System.from_toml(out) == made.system()
    (device,) = read_devices(folder / "my_machine_device.toml")[0].values()
    assert device == made.profiled()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in profile_paths(out))
    text = out.read_text()
    assert "measured by memsplit profile" in text
    assert "2026-01-02" in text
    assert os.uname().nodename not in text


def test_no_row_beats_the_sheet_and_the_fit_can_be_repeated(written: tuple[MachineProfile, Path], tmp_path: Path):
    """``memsplit calibrate`` on the rows and the device beside them finds the same records."""
    made, folder = written
    device, measured = folder / "my_machine_device.toml", folder / "my_machine_measured.csv"
    for each in read_measurements(measured):
        assert (each.seconds >= each.model.bound(device_named(device), each.shapes)).all(), each.model.name
    records = read_records(folder / "my_machine_records.toml")
    assert records
    assert all(record.flagged == 0 for record in records)
    again = tmp_path / "again.toml"
    assert main(["calibrate", str(measured), "--device", str(device), "--out", str(again), "--date", made.date]) == 0
    assert read_records(again) == records


def test_a_profile_of_a_processor_is_a_machine_of_one_memory(tmp_path: Path):
    system = System.from_toml(write(host_profile(), tmp_path))
    workload = Workload(llm=QWEN3_0_6B, batch=2, context=128)
    plan = PatternMapping().solve(KernelMappingProblem.build(system, workload)).unwrap()
    assert KernelMappingProblem.build(system, workload).evaluate(plan).latency > 0
    (tier,), (unit,) = system.tiers, system.units
    assert 0.9 * 20e9 < tier.bandwidth <= 20e9 * 1.001  # launches, and rounding to four digits
    assert 0.9 * 1e11 < unit.matrix_peak <= 1e11 * 1.001
    assert not system.links


def test_a_profile_of_a_gpu_is_a_machine_of_two_memories():
    """Every tier has a unit, so that kernels can be mapped; links are those out of pinned memory."""
    made = gpu_profile()
    system = made.system()
    assert system.tier_names == ("GPU memory", "host")
    assert {unit.tier for unit in system.units} == {"GPU memory", "host"}
    assert [(link.source, link.target) for link in system.links] == [("host", "GPU memory"), ("GPU memory", "host")]
    problem = KernelMappingProblem.build(system, Workload(llm=QWEN3_0_6B, batch=2, context=128))
    assert TableMapping().solve(problem).unwrap().splits
    assert made.profiled().family == "Ampere"
    assert made.profiled().link == "PCIe 4.0 x16"  # 25 GB/s are more than PCIe 3.0 has
    assert {*zip(made.measured()["kernel"], made.measured()["variant"], strict=True)} == {
        ("gemm", "bf16"),
        ("stream", ""),
        ("decode_attention", "vllm"),
        *(("host_link", f"{way}_{kind}") for way in ("h2d", "d2h") for kind in ("pinned", "pageable")),
    }


@given(st.floats(1e-6, 1e6))
def test_rates_are_rounded_up_to_four_digits(value: float):
    """Not below the measured rate, which would make it beat the sheet, and not more than a digit above."""
    found = quantity(machine._upwards(value * GB, GB, "GB/s"), "bandwidth")
    assert value * GB * (1 - 1e-15) <= found <= value * GB * 1.0011


def test_missing_parts_are_said_and_stood_for(tmp_path: Path):
    """Without products, attention's rate stands for the peak; without either, or a memory, there is no data sheet but all rates."""
    made = host_profile()

    def without(*kinds: str) -> MachineProfile:
        return dataclasses.replace(made, rates=tuple(rate for rate in made.rates if rate.cell.kind not in kinds))

    stands = write_profile(without("host_gemm"), tmp_path / "a.toml")
    assert any("host_gemm: the peak of host_attention stands" in sentence for sentence in stands.missing)
    assert "host_gemm: the peak of host_attention stands" in (tmp_path / "a.toml").read_text()
    assert System.from_toml(tmp_path / "a.toml").units[0].matrix_peak == pytest.approx(made.best("cpu", "host_attention"), rel=1e-3)
    nothing = write_profile(without("host_gemm", "host_attention"), tmp_path / "b.toml")
    assert [path.name for path in nothing.paths] == ["b_rates.csv", "b_measured.csv"]
    assert any(sentence.startswith("data sheet and records: no product") for sentence in nothing.missing)
    assert not write_profile(dataclasses.replace(made, rates=()), tmp_path / "c.toml").paths
    warm = dataclasses.replace(made, rates=tuple(r._replace(cell=dataclasses.replace(r.cell, cold=False)) for r in made.rates))
    assert any("the cache may hold" in sentence for sentence in warm.remarks())


def two_of_each() -> MachineProfile:
    """Too few rows of each kind for a record."""
    made, kept = host_profile(), []
    for rate in made.rates:
        if sum(rate.cell.kind == other.cell.kind for other in kept) < 2:
            kept.append(rate)
    return dataclasses.replace(made, rates=tuple(kept))


def test_a_record_that_cannot_be_fitted_is_named(tmp_path: Path):
    written = write_profile(two_of_each(), tmp_path / "m.toml")
    assert any(sentence.startswith("record of stream: ") for sentence in written.missing)
    assert not (tmp_path / "m_records.toml").exists()
    assert (tmp_path / "m.toml").exists()


@pytest.mark.parametrize("ending", [".toml", "_device.toml", "_records.toml", "_measured.csv", "_rates.csv"])
def test_a_file_that_is_not_ours_is_not_written_over(ending: str, tmp_path: Path):
    foreign = tmp_path / f"m{ending}"
    foreign.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is there and was not written by memsplit profile"):
        write_profile(host_profile(), tmp_path / "m.toml")
    assert [path.name for path in tmp_path.iterdir()] == [foreign.name]
    assert foreign.read_text() == "a,b\n1,2\n"


def test_a_second_profile_takes_the_place_of_the_first(tmp_path: Path):
    """So do records that were fitted again; those that a new profile does not have are said to be old."""
    out = write(host_profile(), tmp_path)
    before = out.read_text()
    measured, device = str(tmp_path / "my_machine_measured.csv"), str(tmp_path / "my_machine_device.toml")
    assert main(["calibrate", measured, "--device", device, "--out", str(tmp_path / "my_machine_records.toml")]) == 0
    write(host_profile(), tmp_path)
    assert out.read_text() == before
    assert "my_machine_records.toml: what is there is of an earlier profile" in write_profile(two_of_each(), out).missing


def test_the_data_sheet_ends_in_toml(tmp_path: Path):
    with pytest.raises(ValueError, match=r"ends in \.toml"):
        profile_paths(tmp_path / "machine.csv")


def test_odd_names_are_written_as_toml(tmp_path: Path):
    odd = dataclasses.replace(HOST, cpu='Intel(R) "Xeon" \\ 2.5 GHz é')
    made = dataclasses.replace(host_profile(), machine=odd)
    assert System.from_toml(write(made, tmp_path)).units[0].name == odd.cpu


@pytest.fixture(scope="module")
def this_machine() -> MachineProfile:
    """A short profile with buffers of 16 MiB, in at most three seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_machine_kernels, "SIZES", (16 * MiB, MiB))
        patch.setattr(_machine_kernels, "QUICK_SIZES", (16 * MiB, MiB))
        patch.setattr(HostKernels, "_cold", lambda self, touched: touched >= 16 * MiB)
        return profile_machine(device="cpu", seconds=4.0, quick=True, threads=1, progress=False)


def test_this_machine_has_rates_of_every_kind(this_machine: MachineProfile):
    assert {rate.cell.kind for rate in this_machine.rates} >= {"read", "copy", "host_gemm", "host_attention"}
    for rate in this_machine.rates:
        assert 0 < rate.seconds < math.inf
        assert 0 <= rate.spread < math.inf
        assert LEAST <= rate.runs <= MOST


def test_a_profile_of_this_machine_estimates_a_step(this_machine: MachineProfile, tmp_path: Path):
    out = write(this_machine, tmp_path)
    system = System.from_toml(out)
    assert check_same_machine(system) is None
    estimate = StepModel.build(QWEN3_0_6B).estimate(StepMachines.build([system]), batch=1, context=128)
    assert (np.asarray(estimate.latency) > 0).all()
    assert main(["plan", "--system", str(out), "--llm", "qwen3-0.6b", "--batch", "1", "--context", "128"]) == 0


def test_another_machine_is_told_from_this_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "measured on another machine, 'Example CPU, 4 cores'" in str(check_same_machine(host_profile().system()))
    assert "'Example GPU beside Example CPU, 4 cores'" in str(check_same_machine(gpu_profile().system()))
    assert check_same_machine(SYSTEMS["h2m2"]) is None


def test_a_gpu_is_profiled(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch can use")
    found = profile_machine(device="cuda", quick=True, progress=False)
    assert {"read", "gemm", "decode_attention", "launch", "host_link"} <= {rate.cell.kind for rate in found.rates}
    system = System.from_toml(write(found, tmp_path))
    assert check_same_machine(system) is None
    assert len(system.tiers) == len(system.links) == 2


def test_pytorch_is_imported_only_to_profile_a_gpu():
    code = "import sys; import memsplit.dse.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_gpu_needs_pytorch_and_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'memsplit\[runtime\]'"):
        profile_machine(device="cuda")
    without = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", without)
    with pytest.raises(ValueError, match="no CUDA device"):
        profile_machine(device="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 121}, "at most 120"),
        ({"seconds": 0}, "above 0"),
        ({"threads": 10**6}, "cores that this process may use"),
        ({"threads": 0}, "at least 1"),
        ({"device": "tpu"}, "must be 'cpu' or 'cuda'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        profile_machine(**arguments)  # type: ignore[arg-type]


def run_command(monkeypatch: pytest.MonkeyPatch, made: MachineProfile, out: Path) -> int:
    def profiled(**_: object) -> MachineProfile:
        return made

    monkeypatch.setattr(machine, "profile_machine", profiled)
    parser = argparse.ArgumentParser()
    profile_arguments(parser)
    return profile_command(parser.parse_args(["--out", str(out), "--quick"]))


def test_the_command_writes_and_says_what_it_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "m.toml"
    assert run_command(monkeypatch, host_profile(), out) == 0
    printed = capsys.readouterr().out
    assert all(f"Written: {path}" in printed for path in profile_paths(out))
    stopped = dataclasses.replace(host_profile(), interrupted=True, missing=("cpu copy, 1 of 6 shapes: Ctrl-C ended the profile",))
    assert run_command(monkeypatch, stopped, out) == 130
    assert "Left out: cpu copy, 1 of 6 shapes: Ctrl-C ended the profile." in capsys.readouterr().out
    assert "Ctrl-C ended the profile" in out.read_text()
    few = dataclasses.replace(host_profile(), rates=host_profile().rates[:1])
    assert run_command(monkeypatch, few, tmp_path / "few.toml") == 1


def test_the_command_does_not_measure_for_a_file_that_it_may_not_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    out = tmp_path / "m.toml"
    out.write_text('name = "mine"\n')
    with pytest.raises(ValueError, match="choose another --out"):
        run_command(monkeypatch, host_profile(), out)
