"""The LLM on its device: what a run needs, whether that fits, and the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...models.checks import check_number, shown, whole
from ...models.llm import LLMConfig
from ...models.offload import WeightsOn, largest
from ...models.units import GB
from .._resources import free_memory, usable_cores
from .plans import CachePlan, ExecutedPlan, FullKV, Placement, SplitKV
from .times import LayerTimes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ._link import Transfers
    from ._states import Memory, State
    from .plans import Run

LARGEST_SEED = 2**32 - 1
"""As of the studies, so that their seeds are taken."""

OUT_OF_MEMORY = ("out of memory", "allocate memory")
"""What PyTorch says when a device, or a host, has no more."""

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedLink:
    """A link of ``bandwidth`` [B/s] each way between two parts of a CPU's memory, kept by threads that copy and wait."""

    bandwidth: float = GB

    def __post_init__(self) -> None:
        check_number("emulated link", "bandwidth", self.bandwidth, "B/s")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generation:
    """What a run gave and took.

    ``tokens`` [requests, generated]; ``step_seconds`` of each decode step, one fewer than tokens, as prefill gives the first one; the
    first step waits for loads that nothing hides. ``peak_device_bytes``: on CUDA PyTorch's peak, on a CPU what weights, state and
    buffers take, without what is computed meanwhile; ``peak_host_bytes``: those of the host. ``link_bytes`` to the device in all decode
    steps; ``link_rate`` [B/s] that an emulated link reached while busy, None if it was not.
    If asked for: ``logits`` [requests, generated, vocabulary], ``keys`` and ``values`` [layers, tokens, requests, KV heads, head_dim]
    as the last step used them.
    """

    tokens: NDArray[np.int64]
    prefill_seconds: float
    step_seconds: tuple[float, ...]
    peak_device_bytes: int
    peak_host_bytes: int
    link_bytes: int
    link_rate: float | None
    logits: NDArray[np.float32] | None = None
    keys: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None

    @property
    def margin(self) -> float:
        """The least distance of the best logit from the second best: below half of it, no difference of logits changes a token."""
        if self.logits is None:
            raise ValueError("the margin needs logits; generate with logits=True")
        best = np.partition(self.logits, -2, axis=-1)[..., -2:]
        return float((best[..., 1] - best[..., 0]).min())


def torch_or_way_out() -> Any:
    """PyTorch; ValueError that says what to install without it."""
    try:
        import torch
    except ImportError:
        raise ValueError("the runtime needs PyTorch: pip install 'memsplit[runtime]'") from None
    except OSError as error:  # a library that it loads is broken or missing
        raise ValueError(f"the runtime needs PyTorch, which cannot be loaded: {error}; install it again") from None
    return torch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    """Bytes: what weights, state and buffers take on ``device`` and ``host``, and what is taken beside.

    ``pinned``: of the blocks from which ``tensors`` [B each] of the host's state are cut.
    """

    device: int
    working: int
    host: int
    host_beside: int
    pinned: int
    tensors: tuple[int, ...]


def _checked_seed(seed: object) -> int:
    found = whole("runtime", "seed", seed, "a seed", least=0)
    if found > LARGEST_SEED:
        raise ValueError(f"runtime: seed must be a whole number from 0 to {LARGEST_SEED}, not {shown(seed)}")
    return found


@contextmanager
def _memory_said(torch: Any, planned: float, way_out: str) -> Iterator[None]:
    """Memory that runs out is one sentence; every other error is what it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error).lower() for text in OUT_OF_MEMORY):
            raise ValueError(f"runtime: memory ran out, beyond the {planned / GB:.3g} GB planned for; {way_out}") from None
        raise


class Runtime:
    """An LLM with weights on one device; leave the ``with`` block, or ``close``, to end the link's threads and free the weights.

    ``weights``: a local folder of *.safetensors with its config.json; without one they are random, by ``seed``. ``link``: on a CPU the
    link to emulate, None for the speed at which memory copies; on CUDA the link is the real one. ``threads``: of a CPU's arithmetic while
    a plan runs; the emulated link has threads of its own. ``device_capacity`` and ``host_capacity`` [B]: what a plan may take; None for
    what is free when the runtime is made. PyTorch's setting for TF32 is left as it is.
    """

    def __init__(
        self,
        llm: LLMConfig,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        dtype: str = "float32",
        seed: int = 0,
        weights: str | Path | None = None,
        link: EmulatedLink | None = None,
        threads: int = 1,
        device_capacity: float | None = None,
        host_capacity: float | None = None,
    ) -> None:
        if not isinstance(llm, LLMConfig):
            raise ValueError(f"runtime: llm must be an LLMConfig, not {shown(llm)}; take one of LLMS, or LLMConfig.from_hf(config.json)")
        if dtype not in DTYPES:
            raise ValueError(f"runtime: dtype must be one of {', '.join(DTYPES)}, not {shown(dtype)}")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"runtime: device must be 'cpu' or 'cuda', not {shown(device)}")
        if link is not None and not isinstance(link, EmulatedLink):
            raise ValueError(f"runtime: link must be an EmulatedLink, not {shown(link)}; write EmulatedLink(bandwidth=...) [B/s]")
        if weights is not None and not isinstance(weights, str | Path):
            raise ValueError(f"runtime: weights must be the path of a folder, not {shown(weights)}")
        self.llm, self.threads = llm, whole("runtime", "threads", threads, "threads")
        if self.threads > usable_cores():
            raise ValueError(f"runtime: threads must be at most {usable_cores()}, the cores this process may use, not {self.threads}")
        seed = _checked_seed(seed)
        for field, given in (("device_capacity", device_capacity), ("host_capacity", host_capacity)):
            if given is not None:
                check_number("runtime", field, given, "B")
        torch = torch_or_way_out()
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("runtime: PyTorch finds no CUDA device here; run on a CPU, where the link can be emulated")
        if device == "cuda" and link is not None:
            raise ValueError("runtime: a CUDA device has a link of its own; leave link out")
        from ._decoder import Decoder
        from ._execution import LayerWeights
        from ._link import CudaTransfers, EmulatedTransfers
        from ._weights import FolderWeights, RandomWeights

        self._on_cuda, self._running_now = device == "cuda", Lock()
        place = torch.device("cuda", torch.cuda.current_device()) if self._on_cuda else torch.device("cpu")
        free = free_memory()
        near = torch.cuda.mem_get_info(place)[0] if self._on_cuda else free
        self._capacity = (near if device_capacity is None else device_capacity, free if host_capacity is None else host_capacity)
        self._shared = not self._on_cuda and device_capacity is None and host_capacity is None
        source = RandomWeights(llm, seed) if weights is None else FolderWeights(llm, Path(weights))
        kind = getattr(torch, dtype)
        self._outside_bytes = self._held_outside(kind.itemsize)
        alone = self._outside_bytes + llm.num_hidden_layers * source.layout.total * kind.itemsize
        self._refuse(alone, "the weights alone")
        with _memory_said(torch, alone, "take a smaller LLM or a dtype of fewer bytes"):
            self._decoder = Decoder(llm, source.architecture, kind, place, source.outside(kind, place))
        self._weights = LayerWeights(source, self._decoder)
        self._link: Transfers | None = (
            CudaTransfers(place) if self._on_cuda else EmulatedTransfers(float("inf") if link is None else link.bandwidth)
        )

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the link's threads and free the weights; a second time does nothing. Waits for a run in another thread."""
        with self._running_now:
            if self._link is None:
                return
            self._link.close()
            self._link = None
            self._weights.forget()
            self._decoder.outside = {}
            if self._on_cuda:  # else PyTorch keeps what was freed, and the next LLM is refused
                from ._link import free_cached

                free_cached()

    def random_prompts(self, batch: int, tokens: int, *, seed: int = 0) -> NDArray[np.int64]:
        """Prompts [batch, tokens] of random tokens."""
        shape = (whole("runtime", "batch", batch, "prompts"), whole("runtime", "tokens", tokens, "tokens"))
        seed = _checked_seed(seed)
        try:
            return np.random.default_rng(seed).integers(0, self.llm.vocab_size, shape)
        except (MemoryError, ValueError) as error:  # ValueError: more than an array can have
            raise ValueError(f"runtime: {shape[0]} prompts of {shape[1]} tokens do not fit this machine's memory; ask for fewer") from error

    def generate(
        self, prompts: ArrayLike, generated: int, plan: ExecutedPlan | None = None, *, logits: bool = False, state: bool = False
    ) -> Generation:
        """Greedy decoding of ``generated`` tokens after ``prompts`` [requests, tokens], all of one length.

        ``plan``: FullKV unless given. ``logits``, ``state``: whether to give those back, too; ``state`` slows the last step. ValueError if
        the memory does not suffice, with what fits.
        """
        torch = torch_or_way_out()
        self._opened()
        plan = FullKV() if plan is None else plan
        if not isinstance(plan, ExecutedPlan):
            names = ", ".join(kind.__name__ for kind in get_args(ExecutedPlan))
            raise ValueError(f"runtime: the plan must be one of {names}, not {shown(plan)}; the library's own plans have from_plan")
        given = self._prompts(prompts)
        generated = whole("runtime", "generated", generated, "tokens")
        order, run = plan.run(len(given), given.shape[1], generated)
        self._decoder.check_reach(run.rows)
        needs = self._check(plan, run, kept=logits, looked_at=state)
        from ._execution import Execution
        from ._states import Memory

        cut = self._cut(plan)
        with self._running(torch, needs.device, "serve fewer prompts") as link:
            self._make_room(link, cut, needs)
            self._decoder.reach(run.rows)
            self._weights.place(cut, link)
            if self._on_cuda:  # after what moved the weights
                torch.cuda.reset_peak_memory_stats(self._decoder.device)
            memory = Memory(self._decoder.dtype, link)
            execution = Execution(self._decoder, self._weights, link, self._state(plan, memory, run), run)
            tokens = torch.from_numpy(given[order]).to(self._decoder.device)
            found = execution.generate(tokens, logits=logits, state=state)
            prefill, steps = link.elapsed(found.prefill), link.elapsed(found.steps)
            back = np.argsort(np.asarray(order))
            peak = torch.cuda.max_memory_allocated(self._decoder.device) if self._on_cuda else needs.device
            return Generation(
                tokens=found.tokens.cpu().numpy()[back],
                prefill_seconds=prefill[0],
                step_seconds=tuple(steps),
                peak_device_bytes=int(peak),
                peak_host_bytes=needs.host,
                link_bytes=link.sent("to_device") - found.sent,
                link_rate=link.rate("to_device"),
                logits=torch.stack(found.logits, dim=1).cpu().numpy()[back] if logits else None,
                keys=self._by_layer(found.keys, run, back) if state and found.keys else None,
                values=self._by_layer(found.values, run, back) if state and found.values else None,
            )

    def layer_times(self, batch: int, context: int, *, gpu_batches: int = 1, weights: WeightsOn = "gpu", repeats: int = 7) -> LayerTimes:
        """Measured seconds of the parts of one layer for ``context`` tokens of state of ``batch`` requests in ``gpu_batches`` GPU batches.

        Each is the median of ``repeats`` runs with nothing beside it, over the layers in turn. ``weights``: where those of all layers are
        meanwhile; the times are the same, the memory is not.
        """
        if weights not in ("gpu", "host"):
            raise ValueError(f"runtime: weights must be on 'gpu' or on 'host', not {shown(weights)}")
        torch = torch_or_way_out()
        self._opened()
        decoder = self._decoder
        batch, context, repeats = (
            whole("runtime", name, value, name) for name, value in (("batch", batch), ("context", context), ("repeats", repeats))
        )
        gpu_batches = whole("runtime", "gpu_batches", gpu_batches, "GPU batches")
        size = batch // gpu_batches
        if size * gpu_batches != batch:
            raise ValueError(f"runtime: {batch} requests cannot be divided into {gpu_batches} GPU batches; give a multiple")
        decoder.check_reach(context + 1)
        from ._execution import LayerBuffers, measure_layer
        from ._states import Memory

        counted = LayerBuffers(Memory(decoder.dtype, None), decoder, size, context).memory
        cut = decoder.layout.cut(float(weights == "host"))
        needs = self._totals(counted, cut, self._working([size] * gpu_batches, 1, context + 1))
        if short := self._lacking(needs):
            raise ValueError(f"runtime: {short}; measure fewer requests or a shorter context")
        with self._running(torch, needs.device, "measure fewer requests or a shorter context") as link:
            self._make_room(link, cut, needs)
            decoder.reach(context + 1)
            self._weights.place(cut, link)
            buffers = LayerBuffers(Memory(decoder.dtype, link), decoder, size, context)
            return measure_layer(decoder, self._weights, link, buffers, gpu_batches, repeats)

    def _opened(self) -> Transfers:
        if self._link is None:
            raise ValueError("runtime: it is closed; make another one")
        return self._link

    def _make_room(self, link: Transfers, cut: int, needs: _Needs) -> None:
        """Keep of earlier runs' pinned memory what fits beside what this one needs: to pin it again takes seconds."""
        room = self._capacity[1]
        spare = float("inf") if room is None or not self._on_cuda else room - needs.host - needs.host_beside
        old = self._weights.held if cut != self._weights.cut else 0
        if old > spare:
            self._weights.forget()
            link.trim()
            old = 0
        link.restart(needs.tensors, needs.pinned + spare - old)

    def _prompts(self, prompts: ArrayLike) -> NDArray[np.int64]:
        try:
            given = np.asarray(prompts)
        except ValueError:
            given = np.zeros(0)
        if given.ndim != 2 or not given.size or given.dtype.kind not in "iu":
            raise ValueError(
                f"runtime: prompts must be whole numbers [requests, tokens], all of one length, not {shown(prompts)}; cut them"
            )
        if given.min() < 0 or given.max() >= self.llm.vocab_size:
            raise ValueError(f"runtime: tokens of prompts must be from 0 to {self.llm.vocab_size - 1}, the vocabulary of {self.llm.name!r}")
        return given.astype(np.int64)

    @contextmanager
    def _running(self, torch: Any, planned: float, way_out: str) -> Iterator[Transfers]:
        """The link, with this runtime's threads, which are PyTorch's and the process's, and are put back; for one caller at a time."""
        if not self._running_now.acquire(blocking=False):
            raise ValueError("runtime: it is running in another thread; make a runtime for each thread, or wait")
        before = torch.get_num_threads()
        try:
            link = self._opened()  # another thread may have closed it meanwhile
            torch.set_num_threads(before if self._on_cuda else self.threads)
            with torch.inference_mode(), _memory_said(torch, planned, way_out):
                yield link
        finally:
            torch.set_num_threads(before)
            self._running_now.release()

    def _cut(self, plan: ExecutedPlan) -> int:
        return self._decoder.layout.cut(plan.streamed)

    def _state(self, plan: ExecutedPlan, memory: Memory, run: Run) -> State:
        from ._states import CacheState, DeviceState, HostState

        if isinstance(plan, FullKV):
            return DeviceState(memory, self._decoder, run)
        if isinstance(plan, CachePlan):
            import torch

            forms = [torch.from_numpy(one) for one in plan.forms(sum(run.sizes), run.rows)]
            return CacheState(memory, self._decoder, run, forms)
        if isinstance(plan, Placement):
            from ._placed import PlacedState

            return PlacedState(memory, self._decoder, run, cache=plan.cache, hidden=plan.hidden, attention=plan.attention)
        if isinstance(plan, SplitKV):
            return HostState(
                memory, self._decoder, run, split=plan.split, chunks=max(plan.chunks, 1), fluid=plan.template == "fluid" or not plan.split
            )
        return HostState(memory, self._decoder, run, fluid=True)

    def _held_outside(self, size: int) -> int:
        from ._weights import outside_shapes

        return size * sum(int(np.prod(shape)) for shape in outside_shapes(self.llm).values())

    def _needs(self, plan: ExecutedPlan, run: Run, *, kept: bool = False, looked_at: bool = False) -> _Needs:
        """What a plan takes; ``kept``: with all logits, ``looked_at``: with the state that is given back."""
        from ._states import Memory

        counted = Memory(self._decoder.dtype, None)
        self._state(plan, counted, run)
        requests, width, size = sum(run.sizes), self._decoder.key_width, self._decoder.dtype.itemsize
        working = self._working(run.sizes, run.prompt, run.rows) + kept * 2 * requests * run.generated * self.llm.vocab_size * 4
        # Kept, put together, and made single precision.
        copies = looked_at * self.llm.num_hidden_layers * run.rows * requests * 2 * width * (2 * size + 4)
        if isinstance(plan, Placement) and plan.attention == "host":
            copies += run.rows * max(run.sizes) * 2 * width * 4  # the host attends in single precision
        return self._totals(counted, self._cut(plan), working, copies)

    def _working(self, sizes: Sequence[int], prompt: int, rows: int) -> int:
        """Bytes of the device for what is computed, an estimate from above: of prefill or of a decode step, whichever takes more."""
        llm, size, most = self.llm, self._decoder.dtype.itemsize, max(sizes)
        hidden, queries, keys = llm.hidden_size, llm.num_attention_heads * llm.head_dim, self._decoder.key_width
        # RMSNorm holds three copies in single precision.
        norm = 0 if llm.norm_bias else 12 * hidden
        # Inputs and outputs of a layer and of its norms, queries, what they see, and the FFN.
        token = norm + size * (6 * hidden + 4 * queries + (1 + llm.gated_ffn) * llm.intermediate_size)
        prefill = prompt * (most * token + (sum(sizes) - most) * hidden * size)
        scores = llm.num_attention_heads * (8 + 2 * size)
        recomputed = norm + size * (2 * hidden + 3 * keys)
        decode = most * (token + rows * (scores + recomputed)) + sum(sizes) * hidden * size
        return max(prefill, decode) + sum(sizes) * llm.vocab_size * (size + 4) + self._decoder.table_bytes(rows)

    def _totals(self, counted: Memory, cut: int, working: int, copies: int = 0) -> _Needs:
        from ._link import blocks_of

        near, far = self._weights.bytes(cut)
        layers, size = self.llm.num_hidden_layers, self._decoder.dtype.itemsize
        pinned = blocks_of(counted.host_sizes).held if self._on_cuda else 0
        blocks = pinned + blocks_of([cut * size] * layers).held if self._on_cuda else 0
        host = far + counted.host_bytes
        return _Needs(
            device=self._outside_bytes + near + counted.device_bytes,
            working=working,
            host=host,
            host_beside=max(blocks - host, 0) + copies,
            pinned=pinned,
            tensors=tuple(counted.host_sizes),
        )

    def _fits(self, plan: ExecutedPlan, batch: int, prompt: int, generated: int, **asked: bool) -> bool:
        try:
            _, run = plan.run(batch, prompt, generated)
        except ValueError:
            return False
        return not self._lacking(self._needs(plan, run, **asked))

    def _lacking(self, needs: _Needs) -> str:
        """What there is too little of; nothing if all fits."""
        return self._short(needs.device + needs.working, needs.host + needs.host_beside, needs.working)

    def _short(self, device: float, host: float, working: float = 0.0) -> str:
        near, far = self._capacity
        compute = f", of them {working / GB:.3g} GB to compute," if working else ""
        if self._shared:
            asked = [("this machine's memory", device + host, near, compute)]
        else:
            asked = [("the device", device, near, compute), ("the host", host, far, "")]
        return " and ".join(
            f"{name} needs {need / GB:.4g} GB{note} and has {room / GB:.4g} GB"
            for name, need, room, note in asked
            if room is not None and need > room
        )

    def _refuse(self, device: float, what: str) -> None:
        if self._shared and (short := self._short(device, 0.0)):
            raise ValueError(f"runtime: {what}: {short}; take a smaller LLM or a dtype of fewer bytes")

    def _check(self, plan: ExecutedPlan, run: Run, *, kept: bool, looked_at: bool) -> _Needs:
        """What the plan needs; ValueError if there is less, with what fits."""
        asked = {"kept": kept, "looked_at": looked_at}
        needs = self._needs(plan, run, **asked)
        short = self._lacking(needs)
        if not short:
            return needs
        batch, parts = sum(run.sizes), plan.parts
        fewer = parts * largest(lambda n: self._fits(plan, n * parts, run.prompt, run.generated, **asked), batch // parts - 1)
        shorter = largest(lambda n: self._fits(plan, batch, n, run.generated, **asked), run.prompt - 1)
        ways = ["leave out logits and state"] if any(asked.values()) and not self._lacking(self._needs(plan, run)) else []
        ways += [f"serve {fewer} prompts instead of {batch}"] if fewer else []
        ways += [f"shorten the prompts to {shorter} tokens"] if shorter else []
        streamed = replace(plan, weights=0.0) if isinstance(plan, Placement) else replace(plan, weights="host")
        ways += ["stream the weights"] if self._fits(streamed, batch, run.prompt, run.generated, **asked) else []
        if not ways and (
            fewer := parts * largest(lambda n: self._fits(streamed, n * parts, run.prompt, run.generated, **asked), batch // parts)
        ):
            ways = [f"stream the weights and serve {fewer} prompts instead of {batch}"]
        raise ValueError(f"runtime: {short}; {', or '.join(ways) or 'take a smaller LLM, or more memory'}")

    def _by_layer(self, parts: Sequence[torch.Tensor], run: Run, back: NDArray[np.int64]) -> NDArray[np.float32]:
        """[layers, tokens, requests, KV heads, head_dim] from the units in order."""
        import torch

        batches = len(run.sizes)
        layers = [torch.cat(list(parts[at : at + batches]), dim=1) for at in range(0, len(parts), batches)]
        together: NDArray[np.float32] = torch.stack(layers).float().numpy()
        shape = (*together.shape[:3], self.llm.num_key_value_heads, self.llm.head_dim)
        return together[:, :, back].reshape(shape)
