"""Baselines of offloading: orders that must hold between their times, and what they move and hold."""

import math
from dataclasses import replace

import numpy as np
import pytest

from memsplit.models import Workload
from memsplit.models.offload import OffloadMachine, gpu_overhead, offload_layers
from memsplit.models.offload_baselines import OffloadBaseline, generation, offload_baselines, prefill_flops
from memsplit.models.offload_profiles import DATASHEET, FLEXGEN_ON_HYBRIDSERVE, HYBRIDSERVE_PAPER
from memsplit.models.presets import LLAMA2_70B, OPT_6_7B, OPT_30B, SYSTEMS
from memsplit.models.units import GB

RTX = SYSTEMS["rtx4090_pcie4"]
ALL = offload_baselines(HYBRIDSERVE_PAPER, FLEXGEN_ON_HYBRIDSERVE)


def served(llm=OPT_30B, batch: int = 128, context: int = 512) -> Workload:
    return Workload(llm=llm, batch=batch, context=context, weight_bits=16, kv_bits=16, activation_bits=16)


def decode(name: str, workload: Workload) -> float:
    return generation(RTX, workload, ALL[name], generated=16).decode


@pytest.mark.parametrize("name", ALL)
def test_every_baseline_shows_its_calibration_record(name: str):
    profile = ALL[name].profile
    assert profile.name
    assert profile.fitted_on


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("llm", [OPT_6_7B, LLAMA2_70B], ids=lambda llm: llm.name)
def test_no_step_is_shorter_than_reading_the_weights_over_the_link(name: str, llm):
    """All baselines stream the weights."""
    workload = served(llm)
    machine = OffloadMachine.build(RTX, ALL[name].profile)
    streamed = sum(layer.layers * layer.weight_time(machine) for layer in offload_layers(workload))
    assert decode(name, workload) >= 16 * streamed * (1 - 1e-12)  # rounding of sums


def test_overlap_never_costs_time():
    assert decode("kv_only", served()) <= decode("accelerate", served())


def test_a_slower_link_never_helps():
    assert decode("kv_only", served()) < decode("flexgen", served())


def test_fewer_bits_never_take_longer():
    assert decode("kv_int4", served()) < decode("kv_only", served())


def test_activations_of_gqa_are_more_to_move_than_its_keys_and_values():
    """Llama2-70B: r = 4, so that keeping activations only must lose once the link binds."""
    workload = served(LLAMA2_70B, context=4096)
    assert decode("act_only", workload) > decode("kv_only", workload)


def test_resident_state_is_one_group_where_all_fits_and_none_where_nothing_does():
    machine = OffloadMachine.build(RTX, DATASHEET)
    (layer,) = offload_layers(served(batch=8, context=100))
    rule = OffloadBaseline(name="resident", rule="resident_state")
    contexts = np.array([100.0])
    whole = 8 * 100 * layer.kv_bytes
    expected = max(layer.weight_time(machine), float(layer.compute_time(machine, 800)))
    assert rule.layer_time(layer, machine, contexts, whole)[0] == pytest.approx(expected, rel=1e-12)  # the same sums in another order
    assert rule.layer_time(layer, machine, contexts, whole / 2)[0] >= 2 * layer.weight_time(machine)
    assert math.isinf(rule.layer_time(layer, machine, contexts, whole / 8 - 1)[0])


def test_token_ids_cost_a_prefill_each_step():
    machine = OffloadMachine.build(RTX, DATASHEET)
    (layer,) = offload_layers(served())
    rule = OffloadBaseline(name="ids", rule="token_ids")
    assert rule.layer_time(layer, machine, np.array([1e6]), 0.0)[0] == float(prefill_flops(layer, 1e6)) / machine.peak


def test_prefill_reads_a_prompt_of_one_token_as_decode_does():
    """FLOPs of one token without tokens before it but itself."""
    (layer,) = offload_layers(served())
    assert float(prefill_flops(layer, 1)) == layer.linear_flops + layer.batch * layer.attention_flops


def test_the_cache_is_what_weights_and_buffers_leave():
    """By hand, OPT-30B: 0.92 x 24 GB - 1.5 GB, less two layers, embeddings and two buffers of 16 requests' keys and values."""
    h, tokens = 7168, 640
    expected = 0.92 * 24 * GB - 1.5 * GB - 2 * 24 * h * h - 2 * 50272 * h - 2 * 16 * tokens * 4 * h
    machine = OffloadMachine.build(RTX, HYBRIDSERVE_PAPER)
    assert machine.gpu_capacity - gpu_overhead(served(), tokens) == pytest.approx(expected, rel=1e-12)  # sums in another order


def test_a_host_too_small_is_said_to_be():
    small = RTX.with_tier("host", capacity=60 * GB)
    assert generation(RTX, served(), ALL["kv_only"], generated=4).fits
    assert not generation(small, served(), ALL["kv_only"], generated=4).fits


def test_no_new_token_is_refused():
    with pytest.raises(ValueError, match="generated must be a whole number of new tokens"):
        generation(RTX, served(), ALL["kv_only"], generated=0)


def test_a_generation_is_the_sum_of_its_steps():
    two = generation(RTX, served(context=100), ALL["kv_only"], generated=2).decode
    # The staging buffers are those of the longest context, 102 tokens, in both.
    machine = OffloadMachine.build(RTX, HYBRIDSERVE_PAPER)
    (layer,) = offload_layers(served())
    cache = (machine.gpu_capacity - gpu_overhead(served(), 102)) / OPT_30B.num_hidden_layers
    times = ALL["kv_only"].layer_time(layer, machine, np.array([100.0, 101.0]), cache)
    assert two == pytest.approx(OPT_30B.num_hidden_layers * times.sum(), rel=1e-12)  # sums in another order


def test_a_baseline_needs_a_name():
    with pytest.raises(ValueError, match="name"):
        replace(ALL["kv_only"], name="")
