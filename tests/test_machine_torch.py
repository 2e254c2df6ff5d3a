"""How a profile times a GPU: on one that is simulated, and on a CUDA device that is not there."""

import contextlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_machine_kernels import BOTH, SMALL

from memsplit.dse.machine import _torch, profile_machine, profile_suites
from memsplit.dse.machine._kernels import Cell, HostKernels
from memsplit.dse.machine._torch import TorchKernels
from memsplit.models.units import MiB


class Simulated:
    """PyTorch on a GPU with clocks of its own: launches take the host ``launch`` seconds, and kernels the GPU ``kernel``.

    A graph is launched once, and cannot be recorded if ``graphs`` is False; ``slept``: seconds for each million cycles, None without.
    """

    def __init__(self, launch: float, kernel: float, *, graphs: bool = True, slept: float | None = 5e-4) -> None:
        self.host, self.gpu, self.launch, self.kernel, self.graphs, self.recording = 0.0, 0.0, launch, kernel, graphs, None
        self.calls: list[str] = []
        self.cuda = self
        self._C = object()
        if slept is not None:
            self._sleep = lambda cycles: self.run("sleep", slept * cycles / 1e6)

    def run(self, name: str, seconds: float) -> None:
        """In the queue after the host has launched it."""
        self.calls.append(name)
        self.host += self.launch
        self.gpu = max(self.gpu, self.host) + seconds

    def work(self) -> None:
        if self.recording is not None:
            self.recording.nodes += 1
        else:
            self.run("pass", self.kernel)

    def perf_counter(self) -> float:
        return self.host

    def synchronize(self) -> None:
        assert self.recording is None, "nothing may wait while a graph is recorded"
        self.calls.append("synchronize")
        self.host = max(self.host, self.gpu)

    def Event(self, enable_timing: bool) -> types.SimpleNamespace:
        event = types.SimpleNamespace(at=None)

        def record() -> None:
            self.calls.append("event")
            event.at = self.gpu = max(self.gpu, self.host)

        def wait() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, wait
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def Stream(self) -> str:
        return "side"

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.calls.append(stream)
        yield
        self.calls.append("back")

    def CUDAGraph(self) -> types.SimpleNamespace:
        graph = types.SimpleNamespace(nodes=0)
        graph.replay = lambda: self.run(f"replay {graph.nodes}", graph.nodes * self.kernel)
        return graph

    @contextlib.contextmanager
    def graph(self, graph: types.SimpleNamespace, stream: str) -> Iterator[None]:
        if not self.graphs:
            raise RuntimeError("operation not permitted when stream is capturing. Search for it.")
        self.calls.append("record")
        self.recording = graph
        yield
        self.recording = None
        self.calls.append("recorded")


def timed_on(gpu: Simulated, monkeypatch: pytest.MonkeyPatch) -> TorchKernels:
    monkeypatch.setattr(_torch, "time", gpu)
    return TorchKernels(torch=gpu, machine=BOTH, size=MiB)


@pytest.mark.parametrize("launch", [5e-6, 5e-5])
@pytest.mark.parametrize("kernel", [2e-6, 1e-3])
@pytest.mark.parametrize("graphs", [True, False])
def test_kernels_are_timed_without_their_launches(launch: float, kernel: float, graphs: bool, monkeypatch: pytest.MonkeyPatch):
    """Whether the host launches slower than the GPU computes or not. A clock counts on from what came before: 1e-9 is its rounding."""
    gpu = Simulated(launch, kernel, graphs=graphs)
    suite = timed_on(gpu, monkeypatch)
    passes = suite._timed("gemm", gpu.work, turn=6)
    for count in (1, 1, 40, 1000):
        assert passes(count) == pytest.approx(count * kernel, rel=1e-9)
    reason = "cuda gemm recorded as graphs: operation not permitted when stream is capturing; launched one by one"
    assert suite.remarks() == (() if graphs else (reason,))
    assert suite._queued("host_link h2d_pinned", gpu.work)(1000) == pytest.approx(1000 * kernel, rel=1e-9)
    assert suite._launched(gpu.work)(100) == pytest.approx(100 * max(launch, kernel), rel=0.02)  # and a launch before the first


def test_a_graph_is_recorded_after_a_warm_up_and_replayed_behind_a_busy_gpu(monkeypatch: pytest.MonkeyPatch):
    """A graph holds whole turns, is recorded once for a number of passes, and is all that is launched between the events."""
    gpu = Simulated(5e-6, 2e-6)
    passes = timed_on(gpu, monkeypatch)._timed("gemm", gpu.work, turn=6)
    passes(4)
    recording = ["synchronize", "side", "pass", "back", "synchronize", "side", "record", "recorded", "back"]
    replay = ["synchronize", "event", "sleep", "event", "replay 6", "event"]
    assert gpu.calls == [*recording, *replay]
    gpu.calls.clear()
    passes(4)
    assert gpu.calls == replay


def test_a_host_that_is_late_keeps_the_gpu_busy_for_longer(monkeypatch: pytest.MonkeyPatch):
    """250 launches of 50 us are 12.5 ms: 1, 4 and 16 ms are tried once, and 16 ms from then on."""
    gpu = Simulated(5e-5, 2e-6)
    passes = timed_on(gpu, monkeypatch)._queued("host_link h2d_pinned", gpu.work)
    passes(1000)
    assert gpu.calls.count("sleep") == 3
    passes(1000)
    assert gpu.calls.count("sleep") == 4


def test_launches_that_cannot_be_left_out_are_named(monkeypatch: pytest.MonkeyPatch):
    gpu = Simulated(5e-6, 2e-6, graphs=False, slept=None)
    suite = timed_on(gpu, monkeypatch)
    assert suite._timed("gemm", gpu.work)(100) > 100 * 4e-6
    assert suite.remarks()[1:] == ("cuda gemm without launches: the GPU could not be kept busy until all was queued",)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA device that is not there, and a small grid."""
    torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
    if torch.cuda.is_available():
        pytest.skip("there is a real CUDA device")
    from fake_cuda import FakeCuda  # changes PyTorch when it is imported

    monkeypatch.setattr(_torch, "QUICK", SMALL)
    with FakeCuda(memory=2**24) as cuda:
        yield cuda


def fake_suite() -> TorchKernels:
    import torch

    return TorchKernels(torch=torch, machine=BOTH, quick=True)


def test_what_is_recorded_waits_for_nothing_and_races_with_nothing(fake_gpu: Any):
    found = profile_suites([fake_suite()], seconds=60.0)
    assert {rate.cell.kind for rate in found.rates} == {"read", "copy", "gemm", "decode_attention", "launch", "host_link"}
    assert not any("recorded" in sentence for sentence in found.missing)
    recorded = [rate for rate in found.rates if rate.cell.kind in ("read", "copy", "gemm", "decode_attention")]
    assert len(fake_gpu.graphs) >= len(recorded)
    assert all(graph.replays for graph in fake_gpu.graphs)
    assert sum(graph.replays for graph in fake_gpu.graphs) >= sum(rate.runs for rate in recorded)
    assert fake_gpu.allocated() == 0
    assert not fake_gpu.races


def test_a_kernel_that_waits_is_launched_and_not_recorded(fake_gpu: Any):
    """A scalar of the GPU, for which the host has to wait, cannot be in a graph."""
    import torch

    suite = fake_suite()
    one = torch.ones(1, device="cuda")
    assert suite._timed("gemm", one.item)(3) > 0
    assert not fake_gpu.graphs
    remark, *_ = suite.remarks()
    assert remark.startswith("cuda gemm recorded as graphs: operation not permitted when stream is capturing")
    assert remark.endswith("; launched one by one")


@pytest.mark.parametrize("ordered", [True, False])
def test_a_replay_races_with_what_does_not_wait_for_it(fake_gpu: Any, ordered: bool):
    """Of the fake device itself: a graph adds on one stream, and another one writes the same memory, after an event or not."""
    import torch

    shared, (side, other) = torch.zeros(4, device="cuda"), (torch.cuda.Stream() for _ in range(2))
    torch.cuda.synchronize()
    graph, event = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.graph(graph, stream=side):
        shared.add_(1)
    assert not fake_gpu.races  # what is recorded does not run
    graph.replay()
    event.record()
    with torch.cuda.stream(other):
        if ordered:
            other.wait_event(event)
        shared.zero_()
    assert bool(fake_gpu.races) is not ordered
    torch.cuda.synchronize()
    fake_gpu.races.clear()
    del shared
    graph.replay()
    assert any(race.startswith("freed before a replay uses it") for race in fake_gpu.races)


def test_a_profile_that_is_ended_leaves_no_memory_taken(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch):
    """As does one whose kernels fail."""
    suite, taken = fake_suite(), []

    def interrupt(passes: int) -> float:
        taken.append(fake_gpu.allocated())
        raise KeyboardInterrupt

    first = next(one for one in suite.cells() if one.kind == "read")
    cells = (first, Cell(device="cuda", kind="copy", shape={}, prepare=lambda: interrupt))
    monkeypatch.setattr(TorchKernels, "cells", lambda self: cells)
    assert profile_suites([suite], seconds=60.0).interrupted
    assert taken[0] >= suite.size
    assert fake_gpu.allocated() == 0


def test_launches_are_in_times_of_launches_and_of_copies_that_wait(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch):
    """Kernel models know none, as engines record their steps; a pageable copy returns when it is done, so that it waits for its launch."""
    found = {}
    for name in ("_timed", "_queued", "_launched", "_waited"):
        monkeypatch.setattr(TorchKernels, name, lambda self, *given, name=name: name)
    suite = fake_suite()
    for one in suite.cells():
        with contextlib.suppress(MemoryError):  # steps of 1 GiB
            found[one.kind, one.variant] = one.prepare()
    suite.close()
    recorded = {("read", ""), ("copy", ""), ("gemm", "bf16"), ("decode_attention", "vllm")}
    assert found == dict.fromkeys(recorded, "_timed") | {
        ("launch", "queued"): "_launched",
        ("launch", "synchronised"): "_waited",
        **{("host_link", f"{way}_pinned"): "_queued" for way in ("h2d", "d2h")},
        **{("host_link", f"{way}_pageable"): "_waited" for way in ("h2d", "d2h")},
    }


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
    ("error", "reason"),
    [
        (OSError("libtorch_cpu.so: cannot open shared object file:\nNo such file or directory."), "libtorch_cpu.so: cannot open"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "libcudart.so.12: cannot open"),
        (OSError(), "OSError"),
    ],
)
def test_a_broken_pytorch_is_one_sentence_and_leaves_the_processor(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A package whose import raises what a broken library raises; the processor is profiled, and the sentence says why no GPU is."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(f"raise {error!r}\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(HostKernels, "cells", lambda self: ())
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        profile_machine(device="cuda")
    said = str(refused.value)
    assert reason in said
    assert "\n" not in said
    assert said.endswith("install it again, or profile --device cpu")
    assert profile_machine(progress=False).missing == (f"cuda: {said}",)
    assert profile_machine(device="cpu", progress=False).missing == ()
