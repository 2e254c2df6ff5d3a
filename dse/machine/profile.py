"""Profile this machine: what its memory, processor, GPU and host link reach, as a data sheet that every command reads, and as records.

Each kernel runs at each shape five times or more after a warm-up; its time is the median, its spread the interquartile range over that.
Bandwidths and matrix peaks are the best rates that were measured: ceilings that were reached, and not those of a data sheet. So is the
vector peak of a device, which no row of its records may beat; that of a system, by which plans are priced, is ``attention_rate``'s.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from ... import __version__
from ...models.calibration import Calibration
from ...models.calibration_records import records_text
from ...models.checks import check_number, shown, whole
from ...models.device import Device, links
from ...models.hardware import ComputeUnit, Link, MemoryTier, System
from ...models.kernel_models import kernel_model
from ...models.units import GB, GFLOPS, MiB, us
from .._resources import usable_cores
from ..measurements import calibrate, read_measurements
from ..study import INTERRUPTED, positive, show
from ..table import check_writable
from ._files import MARK, ours, prediction, staged, stale
from ._host import BESIDE, Machine, host_machine, plain
from ._kernels import CALM, Cell, HostKernels, Rate, Suite, sentences, timed_rates
from ._sheet import Attention, attention_rate, bandwidth_entry, peak_entries, quoted, si, upwards
from ._torch import TorchKernels, cuda_machine, cuda_torch

LONGEST = 120.0
"""Seconds that a profile may take."""

FOR_FITS = 0.2
"""Share of these that is kept for fitting records."""

PREFIX = "measured: "
"""Of the names of machines that were profiled."""

FAMILIES: Mapping[tuple[int, int], str] = {
    (7, 0): "Volta",
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 6): "Ampere GDDR",
    (8, 9): "Ada",
    (9, 0): "Hopper",
}
"""Families of devices by CUDA's compute capability, as the catalogue names them."""

SHAPES = ("bytes", "m", "n", "k", "batch", "seq", "heads", "kv_heads", "head_dim", "weight_bytes", "state_bytes", "n_gpu")
"""Columns of all shapes."""

PRODUCTS = (("cuda", "gemm"), ("cpu", "host_gemm"))
"""Devices and the kernel that the matrix peak is of."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MachineProfile:
    """What was measured on a ``machine``: ``rates``, and ``missing``: sentences about what was not.

    ``device``: "cpu" or "cuda", whose records can be fitted. ``interrupted``: Ctrl-C ended it.
    """

    machine: Machine
    device: str
    threads: int
    rates: tuple[Rate, ...]
    missing: tuple[str, ...] = ()
    interrupted: bool = False
    date: str = field(default_factory=lambda: str(date.today()))

    @property
    def source(self) -> str:
        """What the files say of themselves."""
        return f"measured by memsplit profile {__version__}, {self.date}, host threads: {self.threads}; {self.machine.software}"

    def best(self, device: str, *kinds: str, rate: str = "compute", cold: bool = False) -> float:
        """The best rate of these kinds (of all, without any), a ``bandwidth`` [B/s] or ``compute`` [FLOP/s]; 0 where none was measured.

        ``cold``: of kernels that no cache can serve; where there is none, of those of the most bytes.
        """
        found = [one for one in self.rates if one.cell.device == device and (one.cell.kind in kinds or not kinds)]
        if cold:
            most = max((one.cell.nbytes for one in found), default=0.0)
            found = [one for one in found if one.cell.cold] or [one for one in found if one.cell.nbytes == most]
        return max((float(getattr(one, rate)) for one in found), default=0.0)

    def frame(self) -> pd.DataFrame:
        """All that was measured, a row for each kernel and shape."""
        columns = [name for name in SHAPES if any(name in one.cell.shape for one in self.rates)]
        rows = [
            {"device": one.cell.device, "kernel": one.cell.kind, "variant": one.cell.variant, "threads": one.cell.threads}
            | {name: one.cell.shape.get(name) for name in columns}
            | {"GBps": one.bandwidth / GB, "GFLOPps": one.compute / GFLOPS}
            | {"measured_s": one.seconds, "spread": one.spread, "runs": one.runs}
            for one in self.rates
        ]
        return pd.DataFrame(rows).astype(dict.fromkeys(columns, "Int64")).assign(version=__version__, date=self.date)

    def measured(self) -> pd.DataFrame:
        """The rows of the profiled device that a kernel model exists for, as ``memsplit calibrate`` reads them."""
        frame = self.frame()
        ours = [one.cell.device == self.device and _modelled(one.cell) for one in self.rates]
        rows = frame.loc[ours].drop(columns=["device", "GBps", "GFLOPps"], errors="ignore")
        return rows.dropna(axis="columns", how="all").reset_index(drop=True)

    def system(self) -> System:
        """The machine with what it reached; ValueError if its memory or products could not be measured."""
        sheet = self._sheet()
        return System(
            name=PREFIX + self.machine.title,
            tiers=tuple(MemoryTier(**si(tier)) for tier in sheet["tier"]),
            units=tuple(ComputeUnit(**si(unit)) for unit in sheet["unit"]),
            links=tuple(Link(**si(link)) for link in sheet["link"]),
        )

    def profiled(self) -> Device:
        """The processor or GPU that was profiled, as a device of its own; ValueError as of ``system``."""
        sheet, machine = self._sheet(best=True), self.machine
        tier, unit = si(sheet["tier"][0]), si(sheet["unit"][0])
        gpu = self.device == "cuda"
        return Device(
            name=unit["name"],
            family=FAMILIES.get(machine.capability, "CUDA {}.{}".format(*machine.capability)) if gpu else "CPU",
            memory=tier["name"],
            capacity=tier["capacity"],
            bandwidth=tier["bandwidth"],
            peaks={"bf16" if gpu else "fp32": unit["matrix_peak"]},
            vector_peak=unit["vector_peak"],
            multiprocessors=machine.multiprocessors if gpu else self.threads,
            l2=machine.gpu_cache if gpu else machine.cache,
            link=self._link_name(),
            source=f"{self.source}; peaks are the best rates reached, not those of a data sheet",
        )

    def _sheet(self, *, best: bool = False) -> dict[str, list[dict[str, str]]]:
        """Entries of the data sheet, quantities as texts with units; ``best``: with the best rates of attention."""
        gpu_peaks, host_peaks = ((self.best(*kinds), self.attention(kinds[0], best=best).rate) for kinds in PRODUCTS)
        host = {"name": "host" if self.device == "cuda" else "memory", "capacity": f"{self.machine.memory // MiB:.0f} MiB"}
        host_bandwidth = self._memory_bandwidth("cpu")
        host_unit = {"name": self.machine.cpu, "tier": host["name"]}
        if self.device != "cuda":
            tier, unit = host | bandwidth_entry(host_bandwidth, host["name"]), host_unit | peak_entries(*host_peaks)
            return {"tier": [tier], "unit": [unit], "link": []}
        gpu = {"name": "GPU memory", "capacity": f"{(self.machine.gpu_memory or 0) // MiB:.0f} MiB"}
        gpu_unit = {"name": self.machine.gpu, "tier": gpu["name"]}
        tiers = [gpu | bandwidth_entry(self._memory_bandwidth("cuda"), gpu["name"])]
        units = [gpu_unit | peak_entries(*gpu_peaks)]
        if host_bandwidth and max(host_peaks):  # without them the GPU alone is a machine, too
            tiers.append(host | bandwidth_entry(host_bandwidth, host["name"]))
            units.append(host_unit | peak_entries(*host_peaks))
        ways = (("h2d", "host", "GPU memory"), ("d2h", "GPU memory", "host")) if len(tiers) == 2 else ()
        return {"tier": tiers, "unit": units, "link": [link for way, *ends in ways if (link := self._link(way, *ends))]}

    def _memory_bandwidth(self, device: str) -> float:
        """B/s out of memory: the best of all kernels whose bytes come from there."""
        kinds = ("read", "copy", "stream", "gemm", "decode_attention") if device == "cuda" else ()
        return self.best(device, *kinds, rate="bandwidth", cold=True)

    def attention(self, device: str, *, best: bool = False) -> Attention:
        """The rate that stands for attention on "cpu" or "cuda", and what it is; ``best``: the best one."""
        kinds = ("decode_attention", "host_attention")
        rates = [one for one in self.rates if one.cell.device == device and one.cell.kind in kinds]
        return Attention(self.best(device, *kinds)) if best else attention_rate(rates, self._memory_bandwidth(device))

    def remarks(self) -> tuple[str, ...]:
        """Sentences about numbers of the data sheet that others stand for."""
        found = []
        for device, product, attention in (("cpu", "host_gemm", "host_attention"), ("cuda", "gemm", "decode_attention")):
            there = [one.cell for one in self.rates if one.cell.device == device]
            kinds = {cell.kind for cell in there}
            if (product in kinds) != (attention in kinds):
                missing, stands = (attention, product) if product in kinds else (product, attention)
                found.append(f"{device} {missing}: the peak of {stands} stands for its peak")
            if there and not any(cell.cold for cell in there):
                found.append(f"{device} memory: its bandwidth is that of sizes which the cache may hold, so it is slower than this")
        return tuple(found)

    def _link(self, way: str, source: str, target: str) -> dict[str, str]:
        """The link in one direction, out of pinned memory or else pageable; empty if it was not measured."""
        for kind in ("pinned", "pageable"):
            copies = [one for one in self.rates if one.cell.kind == "host_link" and one.cell.variant == f"{way}_{kind}"]
            if copies:
                latency = min(copies, key=lambda one: one.cell.nbytes).seconds
                best = max(one.bandwidth for one in copies)
                return {"source": source, "target": target, "bandwidth": upwards(best, GB, "GB/s"), "latency": f"{latency / us:.4g} us"}
        return {}

    def _link_name(self) -> str:
        """The slowest link of the catalogue that is as fast as the copies: which one it is cannot be measured. "" without copies."""
        fastest = max((one.bandwidth for one in self.rates if one.cell.kind == "host_link"), default=0.0)
        known = {name: bandwidth for name, bandwidth in links().items() if bandwidth >= fastest > 0}
        return min(known, key=lambda name: known[name], default="")

    def system_text(self) -> str:
        """The data sheet that ``System.from_toml`` reads."""
        lines = [
            f"{MARK} on {self.date}: {self.machine.software}.",
            "# A bandwidth or matrix_peak is the best rate that was measured.",
        ]
        sources = [self.source]
        for device, name in (("cuda", self.machine.gpu), ("cpu", self.machine.cpu)):
            sources += [f"vector_peak of {name}: {said}"] if (said := self.attention(device).said) else []
        launch = [f"{one.cell.variant} {one.seconds / us:.3g} us" for one in self.rates if one.cell.kind == "launch"]
        lines += [f"# A launch: {', '.join(launch)}."] if launch else []
        lines += [f"# Left out: {plain(sentence)}." for sentence in (*self.missing, *self.remarks())]
        lines += [f"name = {quoted(PREFIX + self.machine.title)}", f"source = {quoted('; '.join(sources))}"]
        for kind, entries in self._sheet().items():
            for entry in entries:
                lines += ["", f"[[{kind}]]", *(f"{key} = {quoted(text)}" for key, text in entry.items())]
        return "\n".join(lines) + "\n"

    def device_text(self) -> str:
        """The same as a device that ``read_devices`` reads, for calibration."""
        device = self.profiled()
        (precision,) = device.peaks
        unit, tier = (self._sheet(best=True)[kind][0] for kind in ("unit", "tier"))
        lines = [f"{MARK} on {self.date}; peaks are the best rates that were measured.", "[[device]]"]
        lines += [f"{key} = {quoted(getattr(device, key))}" for key in ("name", "family", "memory")]
        lines += [f"{key} = {quoted(tier[key])}" for key in ("capacity", "bandwidth")]
        lines += [f"peaks = {{ {precision} = {quoted(unit['matrix_peak'])} }}", f"vector_peak = {quoted(unit['vector_peak'])}"]
        lines += [f"multiprocessors = {device.multiprocessors}"] if device.multiprocessors else []
        lines += [f"l2 = {quoted(f'{device.l2:.0f} B')}"] if device.l2 else []
        lines += [f"link = {quoted(device.link)}"] if device.link else []
        return "\n".join([*lines, f"source = {quoted(device.source)}"]) + "\n"


def _modelled(cell: Cell) -> bool:
    """Whether there is a kernel model for it."""
    try:
        return set(kernel_model(cell.kind, cell.variant).columns) <= set(cell.shape)
    except ValueError:
        return False


def profile_machine(
    *,
    device: Literal["cpu", "cuda"] | None = None,
    seconds: float | None = None,
    quick: bool = False,
    threads: int | None = None,
    progress: bool | None = None,
) -> MachineProfile:
    """Measure this machine for ``seconds`` at most (60, or 10 if ``quick``, whose grids are smaller; 120 are the most).

    ``device`` None: the GPU if PyTorch finds one, else the processor. ``threads`` of the host: all cores that this process may use.
    ``progress``: a bar on stderr; None: on a terminal. Ctrl-C keeps what was measured. ValueError for "cuda" without PyTorch or a GPU.
    """
    seconds = (10.0 if quick else 60.0) if seconds is None else seconds
    check_number("profile", "seconds", seconds, "s", infinite=False)
    if seconds > LONGEST:
        raise ValueError(f"profile: seconds must be at most {LONGEST:g}, not {shown(seconds)}; a profile is repeated rather than prolonged")
    cores = usable_cores()
    threads = cores if threads is None else whole("profile", "threads", threads, "threads")
    if threads > cores:
        raise ValueError(f"profile: threads must be at most {cores}, the cores that this process may use, not {threads}; leave it out")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"profile: device must be 'cpu' or 'cuda', not {shown(device)}; leave it out for the GPU if there is one")
    suites: list[Suite] = [HostKernels(threads=threads, quick=quick)]
    broken: tuple[str, ...] = ()
    if device != "cpu":
        try:
            torch = cuda_torch()
        except ValueError as error:
            if device == "cuda":
                raise
            broken = (f"cuda: {error}",) if error.__cause__ else ()  # without PyTorch or a GPU nothing is left out
        else:
            machine = cuda_machine(torch)
            suites = [TorchKernels(torch=torch, machine=machine, quick=quick), HostKernels(threads=threads, alone=False, machine=machine)]
    found = profile_suites(suites, seconds=seconds, threads=threads, progress=progress)
    return replace(found, missing=(*broken, *found.missing))


def profile_suites(
    suites: Sequence[Suite],
    *,
    seconds: float,
    threads: int = 1,
    progress: bool | None = False,
    clock: Callable[[], float] = time.perf_counter,
) -> MachineProfile:
    """The same for kernels of one's own; the first of ``suites`` says machine and device. KeyboardInterrupt before the first rate."""
    deadline = clock() + (1 - FOR_FITS) * seconds
    with ExitStack() as stack:
        for suite in suites:
            stack.callback(suite.close)
        cells = _dealt(cell for suite in suites for cell in suite.cells())
        bar = stack.enter_context(tqdm(total=len(cells), unit="shape", disable=None if progress is None else not progress))

        def begin(cell: Cell) -> None:
            bar.set_description(f"{cell.device} {cell.kind}", refresh=False)
            bar.update()

        rates, left, interrupted = timed_rates(cells, clock, deadline, begin)
        missing = (*sentences(cells, left), *(remark for suite in suites for remark in suite.remarks()))
        machine, device = suites[0].machine, "cuda" if any(cell.device == "cuda" for cell in cells) else "cpu"
    return MachineProfile(machine=machine, device=device, threads=threads, rates=rates, missing=missing, interrupted=interrupted)


def _dealt(cells: Iterable[Cell]) -> list[Cell]:
    """One cell of each kind, then the second of each: whenever the time ends, there is something of all."""
    kinds: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        kinds.setdefault((cell.device, cell.kind, cell.variant), []).append(cell)
    return [cell for turn in zip_longest(*kinds.values()) for cell in turn if cell is not None]


class WrittenProfile(NamedTuple):
    """Files that were written, the records in them, sentences about what was not, and whether Ctrl-C ended the profile or its fits."""

    paths: tuple[Path, ...]
    records: tuple[Calibration, ...]
    missing: tuple[str, ...]
    interrupted: bool = False


def profile_paths(out: str | Path) -> tuple[Path, ...]:
    """Data sheet, device, records, rows for ``memsplit calibrate``, and all rates: the files of a profile named ``out``.

    ValueError, before any work, if one of them cannot be written, or is there and was not written by a profile.
    """
    out = Path(out)
    if out.suffix != ".toml":
        raise ValueError(f"cannot write {out}: the data sheet of a machine ends in .toml; choose another --out, as in my_machine.toml")
    endings = ("_device.toml", "_records.toml", "_measured.csv", "_rates.csv")
    paths = (out, *(out.with_name(out.stem + ending) for ending in endings))
    for path in paths:
        if path.is_file() and not ours(path):
            raise ValueError(f"cannot write {path}: it is there and was not written by memsplit profile; choose another --out, or move it")
        check_writable(path)
    return paths


def write_profile(profile: MachineProfile, out: str | Path, *, progress: Callable[[str], object] | None = None) -> WrittenProfile:
    """Write the files of ``profile_paths``; records are fitted by the rows as they stand in the file.

    What was not measured, as a data sheet without a bandwidth, is left out and named. Ctrl-C while fitting leaves out further records; if
    it came before enough was measured for a data sheet, there are no files. ValueError if a file cannot be written: then none is, or the
    message names those that are.
    """
    sheet, device_sheet, records_sheet, measured, rates = profile_paths(out)
    rows = profile.measured()
    missing = [*profile.missing, *profile.remarks()]
    texts = {
        path: frame.to_csv(index=False, lineterminator="\n") for path, frame in ((rates, profile.frame()), (measured, rows)) if len(frame)
    }
    try:
        texts |= {sheet: profile.system_text(), device_sheet: profile.device_text()}
    except ValueError as error:
        if profile.interrupted:
            return WrittenProfile((), (), (*missing, "all files: Ctrl-C came before enough was measured for a data sheet"), True)
        missing += [f"data sheet and records: {error}", *stale(sheet, device_sheet, records_sheet)]
    written: list[Path] = []
    records: tuple[Calibration, ...] = ()
    without: tuple[str, ...] = ()
    interrupted = False
    try:
        with ExitStack() as stack:
            beside = {path: staged(stack, path, text, written) for path, text in texts.items()}
            if sheet in beside and measured in beside:
                records, without, interrupted = _fitted(beside[measured], measured.name, profile, progress)
            elif sheet in beside:
                without = ("records: there is no kernel model for what was measured",)
            if records:
                staged(stack, records_sheet, _records_text(records, profile, device_sheet, records_sheet), written)
    except ValueError as error:
        there = f"of this profile there are only {', '.join(map(str, written))}" if written else "no file of this profile was written"
        raise ValueError(f"{error}; {there}") from error
    if sheet in texts and not records:
        without += stale(records_sheet)
    paths = tuple(path for path in (*texts, records_sheet) if path in written)
    return WrittenProfile(paths, records, (*missing, *without), profile.interrupted or interrupted)


def _records_text(records: Sequence[Calibration], profile: MachineProfile, device_sheet: Path, records_sheet: Path) -> str:
    parameters = {(one.kernel, one.variant): kernel_model(one.kernel, one.variant).parameters for one in records}
    units = {key: {each.name: each.unit for each in found} for key, found in parameters.items()}
    way = prediction(records[0], device_sheet.name, records_sheet.name)
    return f"{MARK} on {profile.date}.\n# To predict: {way}\n{records_text(records, units)}"


def _fitted(
    path: Path, name: str, profile: MachineProfile, progress: Callable[[str], object] | None
) -> tuple[tuple[Calibration, ...], tuple[str, ...], bool]:
    """A record for each kind that enough shapes were measured of, sentences about the others, and whether Ctrl-C ended the fits.

    ``name``: of the file of measurements, which lies at ``path`` meanwhile.
    """
    device = profile.profiled()
    records: list[Calibration] = []
    missing: list[str] = []
    found = read_measurements(path)
    kinds = [f"{each.model.name} {each.model.variant}".rstrip() for each in found]
    for place, each in enumerate(found):
        try:
            records += calibrate((each,), device, source=name, date=profile.date, progress=progress)
        except ValueError as error:
            missing.append(f"record of {kinds[place]}: {error}")
        except KeyboardInterrupt:
            missing += [f"record of {kind}: Ctrl-C ended the fits" for kind in kinds[place:]]
            return tuple(records), tuple(missing), True
    return tuple(records), tuple(missing), False


def this_machine(device: str = "cpu") -> Machine:
    """Names, cores, memory and software of this machine's processor, or of its GPU ("cuda"); ValueError without one or without PyTorch."""
    return cuda_machine(cuda_torch()) if device == "cuda" else host_machine()


def check_same_machine(system: System) -> str | None:
    """A sentence if ``system`` was profiled on another machine than this one; None if not, or if it comes from no profile."""
    if not system.name.startswith(PREFIX):
        return None
    there = system.name.removeprefix(PREFIX)
    machine = host_machine()
    if BESIDE in there:
        with suppress(ValueError):  # without a GPU, this machine is its processor
            machine = cuda_machine(cuda_torch())
    if there == machine.title:
        return None
    return f"the data sheet was measured on another machine, {there!r}, and this one is {machine.title!r}: profile this one"


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``memsplit profile``."""
    parser.add_argument("--out", type=Path, default=Path("my_machine.toml"), help="data sheet to write (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what is profiled (default: the GPU if there is one)")
    parser.add_argument("--threads", type=positive, help="threads of the host (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="smaller grids, ten seconds instead of sixty")


def profile_command(parsed: argparse.Namespace) -> int:
    """``memsplit profile``: exit code 0, 1 if too little was measured for a data sheet, 130 after Ctrl-C, with what there is written.

    Ctrl-C before enough was measured for a data sheet writes nothing.
    """
    _, device_sheet, records_sheet, *_ = profile_paths(parsed.out)
    profile = profile_machine(device=parsed.device, quick=parsed.quick, threads=parsed.threads)
    show(profile.frame().drop(columns=["version", "date"]).dropna(axis="columns", how="all"), title=profile.machine.title, rows=200)
    print("\nspread: the range of the middle half of the runs over their median.")
    if profile.rates:
        typical = float(np.median([one.spread for one in profile.rates]))
        print(
            f"Half of the shapes have a spread above {100 * typical:.2g} %" + (": the machine was busy." if typical > CALM else "."),
            flush=True,
        )
    written = write_profile(profile, parsed.out)
    for record in written.records:
        print(f"Record of {record.kernel} {record.variant}".rstrip() + f": fitted within {record.fitted.mape_pct:.2g} % in the mean.")
    for sentence in written.missing:
        print(f"Left out: {sentence}.")
    for path in written.paths:
        print(f"Written: {path}")
    if written.records:
        print(f"To predict: {prediction(written.records[0], str(device_sheet), str(records_sheet))}")
    if written.interrupted:
        print(f"memsplit: interrupted; {_kept(written)}", file=sys.stderr)
        return INTERRUPTED
    return 0 if Path(parsed.out) in written.paths else 1


def _kept(written: WrittenProfile) -> str:
    """What there is after Ctrl-C."""
    if not written.paths:
        return "too little was measured for a data sheet, and nothing was written"
    return f"what was finished is written: {', '.join(path.name for path in written.paths)}"
