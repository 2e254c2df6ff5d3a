"""A profile's files, its command, and a short profile of this very machine."""

import argparse
import dataclasses
import errno
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_machine_kernels import BOTH, HOST

from memsplit.dse.cli import main
from memsplit.dse.machine import (
    MachineProfile,
    _files,
    _host,
    _kernels,
    check_same_machine,
    profile_arguments,
    profile_command,
    profile_machine,
    profile_paths,
    write_profile,
)
from memsplit.dse.machine import profile as machine
from memsplit.dse.machine._kernels import LEAST, MOST, Cell, HostKernels, Rate
from memsplit.dse.machine._torch import TorchKernels
from memsplit.dse.measurements import Measurements, read_measurements
from memsplit.models import KernelMappingProblem, KernelTime, StepMachines, StepModel, System, Workload
from memsplit.models.calibration_records import read_records
from memsplit.models.device import device_named, read_devices
from memsplit.models.presets import QWEN3_0_6B, SYSTEMS
from memsplit.models.units import MiB
from memsplit.solvers import PatternMapping, TableMapping


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


def failing(monkeypatch: pytest.MonkeyPatch, ending: str, where: str) -> None:
    """A disk that is full when a file of that name is written, or a folder that is lost when it takes its place."""
    whole = _files.os.fsync
    full = OSError(errno.ENOSPC, "No space left on device")

    def fsync(number: int) -> None:
        if ending in os.readlink(f"/proc/self/fd/{number}"):
            raise full
        whole(number)

    def replace(self: Path, target: str) -> Path:
        if str(target).endswith(ending):
            raise full
        return Path(os.rename(self, target) or target)

    if where == "written":
        monkeypatch.setattr(_files.os, "fsync", fsync)
    else:
        monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("ending", ["m.toml", "m_device.toml", "m_records.toml", "m_measured.csv", "m_rates.csv"])
def test_a_full_disk_leaves_all_files_as_they_were(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A data sheet without its device, or with that of an earlier profile, is worse than none."""
    before = {f"m{name}": f"{machine.MARK}, earlier\n" for name in (".toml", "_device.toml")}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with monkeypatch.context() as patch:
        failing(patch, f".{ending}.", "written")
        with pytest.raises(ValueError, match=rf"cannot write .*/{ending}: No space left on device.*; no file of this profile was written$"):
            write_profile(host_profile(), tmp_path / "m.toml")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_files_that_are_there_are_named_if_another_one_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        failing(patch, "m_device.toml", "replaced")
        with pytest.raises(ValueError, match=r"m_device\.toml: No space left.*; of this profile there are only .*m_records\.toml$"):
            write_profile(host_profile(), tmp_path / "m.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["m_records.toml"]


def test_ctrl_c_while_fitting_writes_what_is_there_and_exits_as_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The second fit is ended: its record and the third are left out and named, the first is written."""
    fitted = machine.calibrate
    kinds: list[str] = []

    def interrupted(measurements: tuple[Measurements, ...], *given: object, **more: object) -> object:
        kinds.append(measurements[0].model.name)
        if len(kinds) == 2:
            raise KeyboardInterrupt
        return fitted(measurements, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(machine, "calibrate", interrupted)
    out = tmp_path / "m.toml"
    assert run_command(monkeypatch, host_profile(), out) == 130
    printed = capsys.readouterr()
    assert [record.kernel for record in read_records(tmp_path / "m_records.toml")] == kinds[:1]
    assert printed.out.count("Ctrl-C ended the fits.") == 2
    names = "m_rates.csv, m_measured.csv, m.toml, m_device.toml, m_records.toml"
    assert printed.err == f"memsplit: interrupted; what was finished is written: {names}\n"


def test_ctrl_c_before_there_is_enough_for_a_data_sheet_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """More time would not have helped, so the message must not ask for it; an earlier profile stays."""
    out = write(two_of_each(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    few = dataclasses.replace(host_profile(), rates=host_profile().rates[:1], interrupted=True)
    assert run_command(monkeypatch, few, out) == 130
    printed = capsys.readouterr()
    assert printed.err == "memsplit: interrupted; too little was measured for a data sheet, and nothing was written\n"
    assert "Ctrl-C came before enough was measured for a data sheet." in printed.out
    assert "more time" not in printed.out + printed.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_records_say_how_to_predict_with_them(written: tuple[MachineProfile, Path], monkeypatch: pytest.MonkeyPatch):
    """The line is Python that runs in the folder of the files."""
    _, folder = written
    monkeypatch.chdir(folder)
    (line,) = [line for line in Path("my_machine_records.toml").read_text().splitlines() if line.startswith("# To predict: ")]
    predicted = eval(line.removeprefix("# To predict: "), {"KernelTime": KernelTime, "read_records": read_records})
    assert predicted.profile == "calibrated"
    shapes = {name: 1024 for name in predicted.model.columns}
    assert predicted.predict(**shapes).seconds > 0


@pytest.mark.parametrize(("name", "what"), [("my_machine.toml", "data sheet of a system"), ("my_machine_records.toml", "records")])
def test_a_file_beside_the_device_names_it(written: tuple[MachineProfile, Path], name: str, what: str):
    made, folder = written
    with pytest.raises(ValueError, match=f"{what}; name .*/my_machine_device.toml, which lies beside it"):
        device_named(folder / name)
    with pytest.raises(ValueError, match=r"that of a profiled machine ends in _device\.toml"):
        KernelTime.calibrated("host_gemm", made.profiled().name, records=read_records(folder / "my_machine_records.toml"))


@pytest.mark.parametrize("command", [["study", "recompute_split", "--quick"], ["explain", "--problem", "recompute_split"]], ids=" ".join)
def test_a_machine_of_one_memory_has_nothing_to_offload_to(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = write(two_of_each(), tmp_path)
    assert main([*command, "--system", str(out), "--out", str(tmp_path / "out.csv")]) == 2
    said = capsys.readouterr().err
    assert "'measured: Example CPU, 4 cores' has one tier; offloading needs a GPU's memory and a host's" in said
    assert said.count("\n") == 1


def test_odd_names_are_written_as_toml(tmp_path: Path):
    odd = dataclasses.replace(HOST, cpu='Intel(R) "Xeon" \\ 2.5 GHz é')
    made = dataclasses.replace(two_of_each(), machine=odd)
    assert System.from_toml(write(made, tmp_path)).units[0].name == odd.cpu


@pytest.fixture(scope="module")
def this_machine() -> MachineProfile:
    """A short profile with buffers of 16 MiB, in at most three seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernels, "SIZES", (16 * MiB, MiB))
        patch.setattr(_kernels, "QUICK_SIZES", (16 * MiB, MiB))
        patch.setattr(_host, "_last_caches", lambda cpus: 4.0 * MiB)
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
    before = torch.cuda.memory_allocated()
    found = profile_machine(device="cuda", quick=True, progress=False)
    assert torch.cuda.memory_allocated() == before
    assert not any("launches" in sentence or "graphs" in sentence for sentence in found.missing)
    assert {"read", "gemm", "decode_attention", "launch", "host_link"} <= {rate.cell.kind for rate in found.rates}
    system = System.from_toml(write(found, tmp_path))
    assert check_same_machine(system) is None
    assert len(system.tiers) == len(system.links) == 2


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
