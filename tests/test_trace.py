"""Traces: what is drawn has the lengths and arrivals that it says, and a CSV is read or refused with its line."""

import csv
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsplit.models.trace import COLUMNS, LENGTHS, Lengths, Request, Trace, fixed_trace, h2m2_trace, poisson_trace, uniform_trace

HEADER = "arrived_at,prompt_tokens,output_tokens\n"


def written(folder, text: str, name: str = "trace.csv"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_a_trace_is_a_value_with_its_columns():
    trace = Trace.from_arrays("three", [0, 0.5, 0.5], [3, 5, 7], [1, 2, 4])
    assert trace.requests[1] == Request(arrived_at=0.5, prompt_tokens=5, output_tokens=2)
    assert trace.state_tokens.tolist() == [3, 6, 10]
    assert pickle.loads(pickle.dumps(trace)) == trace
    assert hash(trace) == hash(Trace(name="three", requests=trace.requests))
    with pytest.raises(ValueError, match="read-only"):
        trace.prompt_tokens[0] = 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"requests": ()}, "no request"),
        ({"name": " "}, "name"),
        ({"requests": ((0.0, 1, 1),)}, "class Request"),
        (
            {
                "requests": (
                    Request(arrived_at=2, prompt_tokens=1, output_tokens=1),
                    Request(arrived_at=1, prompt_tokens=1, output_tokens=1),
                )
            },
            "sort",
        ),
    ],
)
def test_a_trace_that_is_none_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named) as refusal:
        Trace(**({"name": "t", "requests": fixed_trace(1, prompt_tokens=1, output_tokens=1).requests} | wrong))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"arrived_at": -1.0},
        {"arrived_at": math.nan},
        {"arrived_at": math.inf},
        {"prompt_tokens": 0},
        {"output_tokens": 1.5},
        {"output_tokens": 2**40},
    ],
)
def test_a_request_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Request(**({"arrived_at": 0.0, "prompt_tokens": 1, "output_tokens": 1} | wrong))


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: poisson_trace("chat", 50, rate=2.0, seed=seed),
        lambda seed: uniform_trace(50, prompt_tokens=(1, 900), output_tokens=(1, 900), rate=1.0, seed=seed),
        lambda seed: h2m2_trace(seed),
    ],
)
def test_a_seed_says_it_all(draw):
    assert draw(1) == draw(1)
    assert draw(1).requests != draw(2).requests


def test_equal_requests_at_an_interval():
    trace = fixed_trace(3, prompt_tokens=7, output_tokens=2, interval=0.25)
    assert [(r.arrived_at, r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(0, 7, 2), (0.25, 7, 2), (0.5, 7, 2)]


def test_uniform_lengths_reach_both_ends_and_no_further():
    trace = uniform_trace(2000, prompt_tokens=(3, 6), output_tokens=(1, 1))
    assert sorted(set(trace.prompt_tokens.tolist())) == [3, 4, 5, 6]
    assert set(trace.output_tokens.tolist()) == {1}
    assert set(trace.arrived_at.tolist()) == {0.0}


@pytest.mark.parametrize("kind", LENGTHS)
def test_log_normal_lengths_have_their_medians(kind):
    """The median of n draws strays by sigma sqrt(pi / 2 n) of itself, 0.9 % at n = 20,000: five times that is 5 %, and rounding of 13
    tokens is 4 % more. Cuts at the longest leave medians alone."""
    lengths = LENGTHS[kind]
    trace = poisson_trace(kind, 20_000, rate=5.0, seed=3)
    assert np.median(trace.prompt_tokens) == pytest.approx(lengths.prompt_median, rel=0.09)
    assert np.median(trace.output_tokens) == pytest.approx(lengths.output_median, rel=0.09)
    assert trace.prompt_tokens.max() <= lengths.longest_prompt
    assert trace.output_tokens.max() <= lengths.longest_output
    assert "arXiv" in lengths.source or "assumption" in lengths.source


def test_poisson_arrivals_have_their_rate_and_spread():
    """Gaps of an exponential distribution have a mean and a standard deviation of 1 / rate; of 20,000, within 5 %."""
    gaps = np.diff(poisson_trace("code", 20_000, rate=5.0, seed=3).arrived_at)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)


def test_ones_own_lengths():
    lengths = Lengths(
        name="constant",
        prompt_median=9,
        prompt_sigma=0,
        output_median=0.2,
        output_sigma=0,
        longest_prompt=5,
        longest_output=5,
        source="test",
    )
    trace = poisson_trace(lengths, 3)
    assert trace.prompt_tokens.tolist() == [5, 5, 5]
    assert trace.output_tokens.tolist() == [1, 1, 1]


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.floats(1, 60))
def test_the_places_of_h2m2s_batch_are_full_in_every_iteration(seed, batch, iterations, shortest, mean_output):
    """Requests taken in order by the place that is free first fill batch x iterations exactly, within the longest context."""
    trace = h2m2_trace(seed, batch=batch, iterations=iterations, shortest=shortest, longest=shortest + 20, mean_output=mean_output)
    free_at = [0] * batch
    for request in trace.requests:
        free_at[free_at.index(min(free_at))] += request.output_tokens
        assert shortest <= request.prompt_tokens <= request.state_tokens <= shortest + 20
    assert free_at == [iterations] * batch


def test_h2m2s_outputs_have_their_mean_where_nothing_cuts_them():
    """Geometric with mean 20: the mean of some 16,000 strays by 20 / sqrt(16,000) = 0.16; five times that is 0.8."""
    outputs = h2m2_trace(1, iterations=10_000, mean_output=20.0, longest=10**6).output_tokens
    assert outputs.mean() == pytest.approx(20.0, abs=0.8)


def test_bad_settings_of_generators_are_named():
    for make, named in (
        (lambda: poisson_trace("chats", 3), "chats"),
        (lambda: poisson_trace("chat", 3, rate=0), "rate"),
        (lambda: poisson_trace("chat", 0), "number"),
        (lambda: uniform_trace(3, prompt_tokens=(5, 4), output_tokens=(1, 1)), "swap"),
        (lambda: fixed_trace(3, prompt_tokens=1, output_tokens=1, interval=-1), "interval"),
        (lambda: h2m2_trace(shortest=9, longest=8), "shortest"),
        (lambda: h2m2_trace(mean_output=0.5), "mean_output"),
    ):
        with pytest.raises(ValueError, match=named):
            make()


def test_a_csv_gives_back_its_trace(tmp_path):
    trace = poisson_trace("chat", 40, rate=3.0, seed=1)
    lines = [f"{r.arrived_at!r},{r.prompt_tokens},{r.output_tokens}" for r in trace.requests]
    assert Trace.from_csv(written(tmp_path, HEADER + "\n".join(lines)), name="chat") == trace


@pytest.mark.parametrize(
    "text",
    [
        "arrived_at,prompt_tokens,output_tokens\n0,10,2\n1.5,20,3\n",
        "output_tokens,extra,arrived_at,prompt_tokens\n2,x,0,10\n3,y,1.5,20\n",
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,2\n1.5,20,3\n",  # Vidur
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,10,2\n2023-11-16 18:17:05.4799600,20,3\n",  # Azure 2023
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59+00:00,10,2\n2024-05-11 00:00:00.500000+00:00,20,3\n",  # Azure 2024
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n0,ChatGPT,10,2,12,API\n1.5,GPT-4,20,3,23,API\n",  # BurstGPT
        "\ufeffarrived_at,prompt_tokens,output_tokens\r\n0,10,2\r\n\r\n1.5,20.0,3\r\n",
    ],
)
def test_the_columns_of_public_traces_are_known(tmp_path, text):
    """Dates count from the first request; microseconds of a date near 2024 are floats to 0.3 us."""
    trace = Trace.from_csv(written(tmp_path, text))
    assert trace.name == "trace"
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(10, 2), (20, 3)]
    assert trace.arrived_at.tolist() == pytest.approx([0, 1.5], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("", 1, "arrived_at"),
        ("arrived_at,prompt_tokens\n0,1\n", 1, "output_tokens"),
        ("arrived_at,timestamp,prompt_tokens,output_tokens\n0,0,1,1\n", 1, "several"),
        (HEADER, 1, "no request"),
        (HEADER + "0,1\n", 2, "2 columns"),
        (HEADER + "soon,1,1\n", 2, "soon"),
        (HEADER + "0,1,1\n0,1,0\n", 3, "output_tokens"),
        (HEADER + "0,1,1\n0,1.5,1\n", 3, "prompt_tokens"),
        (HEADER + "0,1,1\n0,nan,1\n", 3, "prompt_tokens"),
        (HEADER + "0,1,1\n0,1,inf\n", 3, "output_tokens"),
        (HEADER + "-1,1,1\n", 2, "arrived_at must be a number at least 0"),
        ("arrived_at,prompt_tokens,arrived_at,output_tokens\n0,1,0,1\n", 1, "several columns .*keep one"),
        ("text," + HEADER + '"a\nb\nc",0,1,1\nx,0,soon,1\n', 5, "soon"),  # physical lines, as an editor counts them
        (HEADER + "1e17,1,1\n", 2, "subtract the first arrival"),
        (HEADER + "0\0,1,1\n", 2, "arrived_at"),
        (HEADER + "nan,1,1\n", 2, "arrived_at"),
        (HEADER + "5,1,1\n\n4,1,1\n", 4, "sort"),
        (HEADER + "0,1,1\n2024-01-01,1,1\n", 3, "all lines"),
    ],
)
def test_a_csv_that_is_no_trace_is_refused_with_its_line(tmp_path, text, line, named):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=named) as refusal:
        Trace.from_csv(path)
    assert str(refusal.value).startswith(f"{path}, line {line}: ")
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("none.csv", "binary.csv"):
        with pytest.raises(ValueError, match=name):
            Trace.from_csv(tmp_path / name)


def test_no_name_means_two_columns():
    names = [name for several in COLUMNS.values() for name in several]
    assert len(names) == len(set(names))
    assert all(name == name.lower() for name in names)


def test_mooncake_counts_in_milliseconds_and_others_do_not(tmp_path):
    """Its three names together mean its file; a timestamp beside other names is in seconds."""
    rows = "\n0,6758,500\n27482,7322,490\n"
    assert Trace.from_csv(written(tmp_path, "timestamp,input_length,output_length" + rows)).arrived_at.tolist() == [0, 27.482]
    assert Trace.from_csv(written(tmp_path, "timestamp,prompt_tokens,output_length" + rows)).arrived_at.tolist() == [0, 27482]
    dated = "timestamp,input_length,output_length\n2024-01-01 00:00:00,1,1\n2024-01-01 00:00:01,1,1\n"
    assert Trace.from_csv(written(tmp_path, dated)).arrived_at.tolist() == [0, 1]


def test_microseconds_of_dates_are_exact(tmp_path):
    """Floats of this size are 0.2 us apart, so that their difference is another number."""
    text = HEADER + "2024-05-10 00:00:00.000001+00:00,1,1\n2024-05-10 02:00:00.100002+02:00,1,1\n"
    assert Trace.from_csv(written(tmp_path, text)).arrived_at.tolist() == [0, 0.100001]


def test_requests_without_an_output_are_counted_and_may_be_left_out(tmp_path):
    path = written(tmp_path, HEADER + "0,1,0\n1,2,3\n2,3,0\n")
    with pytest.raises(ValueError, match=r"line 2: .*lines with 0 in the file: 2.*skip_empty=True"):
        Trace.from_csv(path)
    assert Trace.from_csv(path, skip_empty=True) == Trace.from_arrays("trace", [1], [2], [3])
    with pytest.raises(ValueError, match="no request"):
        Trace.from_csv(written(tmp_path, HEADER + "0,1,0\n"), skip_empty=True)


def test_what_is_no_path_and_texts_too_long_are_said(tmp_path):
    for path in (None, 3, "", "a\0b"):
        with pytest.raises(ValueError, match="name a file"):
            Trace.from_csv(path)
    long = written(tmp_path, "text," + HEADER + "x" * (csv.field_size_limit() + 1) + ",0,1,1\n")
    with pytest.raises(ValueError, match=f"more than {csv.field_size_limit()} characters; drop that column"):
        Trace.from_csv(long)


def test_a_clock_can_advance_when_a_request_arrives():
    """A time of a Unix clock in seconds can be told from one a microsecond later, one in milliseconds cannot."""
    Request(arrived_at=1.7e9, prompt_tokens=1, output_tokens=1)
    for late in (1.7e12, 1e17, 2.0**33):
        with pytest.raises(ValueError, match="subtract the first arrival"):
            Request(arrived_at=late, prompt_tokens=1, output_tokens=1)


@pytest.mark.parametrize("seed", [-1, None, "a", 1.5, True, 2**32])
def test_a_seed_is_a_whole_number(seed):
    makes = (
        lambda: poisson_trace("chat", 3, seed=seed),
        lambda: uniform_trace(3, prompt_tokens=(1, 2), output_tokens=(1, 2), seed=seed),
        lambda: h2m2_trace(seed),
    )
    for make in makes:
        with pytest.raises(ValueError, match="seed must be a whole number from 0 to"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trace.from_arrays("x", [0, 1], [1], [1, 1]), "one length, not 2, 1 and 2"),
        (lambda: Trace.from_arrays("x", None, [1], [1]), "arrived_at must be a list"),
        (lambda: Trace(name="x", requests=None), "requests must be several"),
        (lambda: uniform_trace(3, prompt_tokens=(1, 2, 3), output_tokens=(1, 2)), "prompt_tokens must be the shortest and the longest"),
        (lambda: uniform_trace(3, prompt_tokens=5, output_tokens=(1, 2)), "prompt_tokens must be several"),
        (lambda: poisson_trace(None, 3), "lengths must be one of"),
        (lambda: poisson_trace("chat", 3, rate=1e-320), "raise it"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_arguments_of_traces_are_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("error")
def test_lengths_of_any_spread_are_cut():
    wide = replace(LENGTHS["chat"], prompt_sigma=1e308)
    assert set(poisson_trace(wide, 50).prompt_tokens.tolist()) == {1, 4096}
