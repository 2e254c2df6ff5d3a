"""What the runtime refuses, in one sentence with a way out, and in which state a run that ends early leaves it."""

import re
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from runtime_llms import TINY_LLAMA, TINY_OPT

from memsplit.dse.runtime import CachePlan, FullKV, Runtime, SplitKV, TransferKV
from memsplit.models import CacheRatioPlan, MiniBatchPlan, RecomputeSplitPlan
from memsplit.models.presets import MIXTRAL_8X7B

torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")

PROMPT, REQUESTS = 37, 6


@pytest.fixture(scope="module")
def runtime():
    with Runtime(TINY_OPT) as made:
        yield made


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_without_pytorch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused(r"pip install 'memsplit\[runtime\]'"):
        Runtime(TINY_OPT)


def test_the_library_does_not_import_pytorch():
    """Seconds of start and a gigabyte of package that other commands do without."""
    code = "import sys, memsplit.dse, memsplit.dse.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_way_out_is_named():
    with refused("no CUDA device here; run on a CPU"):
        Runtime(TINY_OPT, device="cuda")


def test_what_does_not_fit_is_said_with_what_does():
    """The number of prompts that the message names fits, and one more does not."""
    with Runtime(TINY_OPT) as free:
        prompts = free.random_prompts(12, 200)
        need = free.generate(prompts, 4, TransferKV())
    with Runtime(TINY_OPT, device_capacity=need.peak_device_bytes * 0.8, host_capacity=1e9) as tight:
        with refused(
            r"the device needs .* GB, of them .* GB to compute, and has .* GB; "
            r"serve \d+ prompts instead of 12, or shorten the prompts to \d+ tokens"
        ) as said:
            tight.generate(prompts, 4, TransferKV())
        fewer, shorter = map(int, re.search(r"serve (\d+) prompts .* to (\d+) tokens", str(said.value)).groups())
        tight.generate(prompts[:fewer], 4, TransferKV())
        tight.generate(prompts[:, :shorter], 4, TransferKV())
        for more in (prompts[: fewer + 1], prompts[:, : shorter + 1]):
            with refused("the device needs"):
                tight.generate(more, 4, TransferKV())
    with Runtime(TINY_OPT, device_capacity=1e9, host_capacity=1e3) as tight, refused("the host needs"):
        tight.generate(prompts, 4, TransferKV())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of float32"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda'"),
        ({"threads": 0}, "threads"),
        ({"seed": -1}, "seed"),
        ({"device_capacity": -1.0}, "device_capacity"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with refused(message):
        Runtime(TINY_OPT, **settings_)


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        (MIXTRAL_8X7B, "has experts, which the runtime does not execute"),
        (replace(TINY_OPT, max_position_embeddings=0), "neither of OPT's architecture"),
        (replace(TINY_LLAMA, head_dim=15), "make it even"),
    ],
)
def test_other_architectures_are_refused(llm, message):
    with refused(message):
        Runtime(llm)


def test_bad_prompts_and_plans_are_refused(runtime):
    prompts = runtime.random_prompts(REQUESTS, PROMPT)
    for bad, message in (
        ([[1, 2], [3]], "of one length"),
        ([1, 2], "requests, tokens"),
        ([[0.5, 1.0]], "whole numbers"),
        ([[TINY_OPT.vocab_size]], "from 0 to 127"),
        ([[-1]], "from 0 to 127"),
    ):
        with refused(message):
            runtime.generate(bad, 2)
    for plan, message in (
        (SplitKV(split=PROMPT + 1), "lower the split"),
        (TransferKV(gpu_batches=4), "cannot be divided into 4 GPU batches"),
        (CachePlan(blocks=CacheRatioPlan(kv_gpu=1), mini_batches=MiniBatchPlan(batches=((0, 1),))), "in exactly one mini-batch"),
    ):
        with refused(message):
            runtime.generate(prompts, 2, plan)
    with refused("has positions for 512 tokens"):
        runtime.generate(prompts, 512)
    with refused("generate with logits=True"):
        _ = runtime.generate(prompts, 1).margin


def test_layers_are_measured_only_of_what_can_be_run(runtime):
    with refused("cannot be divided into 4"):
        runtime.layer_times(REQUESTS, 30, gpu_batches=4)
    with refused("weights must be on 'gpu' or on 'host'"):
        runtime.layer_times(REQUESTS, 30, weights="disk")
    with Runtime(TINY_LLAMA, device_capacity=2e6, host_capacity=1e6) as tight, refused("measure fewer requests or a shorter context"):
        tight.layer_times(100, 1000)


def test_a_closed_runtime_says_so():
    runtime = Runtime(TINY_OPT)
    runtime.close()
    runtime.close()
    with refused("it is closed"):
        runtime.generate([[1, 2]], 2)


def test_what_fits_only_with_weights_streamed_and_fewer_prompts_is_said():
    """Neither of the two is enough alone: resident weights fill the device, and so do twelve prompts."""
    llm = replace(TINY_OPT, num_hidden_layers=12)
    with Runtime(llm) as free:
        prompts = free.random_prompts(12, 100)
        _, run = FullKV().run(12, 100, 4)
        weights = free._needs(FullKV(), run).device - free._needs(FullKV(weights="host"), run).device
        least = free._needs(FullKV(weights="host"), replace(run, sizes=(2,)))
    assert weights > 0
    with Runtime(llm, device_capacity=least.device + least.working, host_capacity=1e9) as tight:
        with refused(r"; stream the weights and serve \d+ prompts instead of 12") as said:
            tight.generate(prompts, 4)
        fewer = int(re.search(r"serve (\d+) prompts", str(said.value))[1])
        assert fewer == 2
        tight.generate(prompts[:fewer], 4, FullKV(weights="host"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out, beyond the .* GB planned for"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out, beyond the .* GB planned for"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "illegal memory access"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_run_that_ends_early_says_why_and_leaves_the_runtime_as_it_was(monkeypatch, error, said):
    """In the middle of moving the weights, of which some layers are then here and some there."""
    from memsplit.dse.runtime._link import EmulatedTransfers

    host, calls = EmulatedTransfers.host, iter(range(100))

    def host_ends(self, shape, dtype):
        if next(calls) == 1:
            raise error
        return host(self, shape, dtype)

    with Runtime(TINY_LLAMA) as runtime:
        prompts, threads = runtime.random_prompts(4, 8), torch.get_num_threads()
        full = runtime.generate(prompts, 4)
        for run in (lambda: runtime.generate(prompts, 4, TransferKV(weights="host")), lambda: runtime.layer_times(4, 8, weights="host")):
            with monkeypatch.context() as patch:
                calls = iter(range(100))
                patch.setattr(EmulatedTransfers, "host", host_ends)
                with pytest.raises(ValueError if said and said.startswith("memory") else type(error), match=said):
                    run()
            assert torch.get_num_threads() == threads
            assert not torch.is_inference_mode_enabled()
            for plan in (TransferKV(weights="host"), FullKV()):
                np.testing.assert_array_equal(runtime.generate(prompts, 4, plan).tokens, full.tokens)


def test_one_thread_at_a_time(monkeypatch):
    """A second caller would be given slots that the first one's transfers write to."""
    from memsplit.dse.runtime._execution import Execution

    begun, go_on, generate = threading.Event(), threading.Event(), Execution.generate

    def slowly(self, *args, **kwargs):
        begun.set()
        go_on.wait(10)
        return generate(self, *args, **kwargs)

    with Runtime(TINY_OPT) as runtime:
        prompts = runtime.random_prompts(2, 5)
        full = runtime.generate(prompts, 3)
        monkeypatch.setattr(Execution, "generate", slowly)
        found = []
        first = threading.Thread(target=lambda: found.append(runtime.generate(prompts, 3, TransferKV())))
        first.start()
        begun.wait(10)
        for second in (lambda: runtime.generate(prompts, 3), lambda: runtime.layer_times(2, 5)):
            with refused("running in another thread"):
                second()
        go_on.set()
        first.join()
    np.testing.assert_array_equal(found[0].tokens, full.tokens)


def test_tables_and_logits_are_counted_before_they_are_made():
    """10 G tokens of rotary positions, and logits of all steps, which nobody would want to wait for either."""
    with Runtime(TINY_LLAMA, device_capacity=20e6, host_capacity=8e6) as runtime:
        with refused("the device needs .* GB"):
            runtime.generate([[1, 2]], 10**10)
        with refused("measure fewer requests or a shorter context"):
            runtime.layer_times(1, 10**13)
        prompts = runtime.random_prompts(8, 2)
        runtime.generate(prompts, 900)
        with refused("leave out logits and state, or serve . prompts instead of 8") as said:
            runtime.generate(prompts, 900, logits=True)
        fewer = int(re.search(r"serve (\d+) prompts", str(said.value))[1])
        runtime.generate(prompts[:fewer], 900, logits=True)
        with refused("leave out logits and state"):
            runtime.generate(runtime.random_prompts(200, 2), 30, state=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Runtime("opt-6.7b"), "llm must be an LLMConfig, not 'opt-6.7b'"),
        (lambda: Runtime(TINY_OPT, link=1e9), "link must be an EmulatedLink, not 1000000000.0"),
        (lambda: Runtime(TINY_OPT, weights=5), "weights must be the path of a folder, not 5"),
        (lambda: Runtime(TINY_OPT, threads=10**6), "threads must be at most"),
        (lambda: Runtime(TINY_OPT, seed=2**32), "seed must be a whole number from 0"),
        (lambda: Runtime(TINY_OPT, seed="x"), "seed"),
    ],
)
def test_wrong_kinds_of_values_are_named(call, message):
    with refused(message):
        call()


def test_wrong_kinds_of_plans_and_seeds_are_named(runtime):
    prompts = runtime.random_prompts(REQUESTS, PROMPT)
    for plan in ("full", FullKV, RecomputeSplitPlan(splits=(3,))):
        with refused("the plan must be one of FullKV, TransferKV, SplitKV, CachePlan, Placement"):
            runtime.generate(prompts, 2, plan)
    for seed in (-1, "x", 0.5):
        with refused("seed"):
            runtime.random_prompts(2, 2, seed=seed)
    with refused("ask for fewer"):
        runtime.random_prompts(1, 10**14)
    assert np.array_equal(runtime.random_prompts(2, 2, seed=np.int64(3)), runtime.random_prompts(2, 2, seed=3))
    assert runtime.layer_times(4, 5, gpu_batches=2.0, repeats=1).gpu_batches == 2
