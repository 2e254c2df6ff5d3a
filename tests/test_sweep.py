"""Sweeps in one process: every design once, in any chunks the same table, exactly the front, and errors that name rows."""

import json
import math
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse import Constraint, Objective, pareto, read_designs, write_csv
from memsplit.dse._chunks import Job, Table, load, save
from memsplit.dse.sweep import Grid, Sobol, sweep

LATENCY, PRICE = Objective("latency_s"), Objective("price_USD")
GRID = Grid({"bandwidth_TBps": [1, 2, 3.5, 8], "capacity_GB": np.linspace(10, 200, 7), "batch": range(1, 6)})


def score(columns):
    """A machine of one memory that holds 20 GB a request."""
    held = 20.0 * columns["batch"]
    feasible = columns["capacity_GB"] >= held
    return {
        "latency_s": np.where(feasible, held / columns["bandwidth_TBps"] / 3, np.nan),
        "price_USD": columns["capacity_GB"] * 10 + columns["bandwidth_TBps"] * 100,
        "feasible": feasible,
        "reason": np.where(feasible, "", "the cache is larger than the memory"),
    }


@dataclass
class Counting:
    """A score that notes which designs it was asked for."""

    calls: list = field(default_factory=list)

    def settings(self):
        return {}

    def __call__(self, columns):
        self.calls.append(columns["n"].tolist())
        return {"square": columns["n"] ** 2}


def numbers(count: int) -> pd.DataFrame:
    return pd.DataFrame({"n": np.arange(count)})


def scored(**columns):
    return lambda given: columns


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """To the last bit, types and index included."""
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert one.attrs == other.attrs


def rows_of(designs, start=0, stop=None):
    columns = designs.columns(start, len(designs) if stop is None else stop)
    return list(zip(*(column.tolist() for column in columns.values()), strict=True))


@pytest.mark.parametrize("keep", [None, [LATENCY, PRICE]])
@pytest.mark.parametrize("chunk", [1, 3, 64, 140, 10**6])
def test_chunks_do_not_change_the_table(chunk, keep):
    """Batch = loop of singles."""
    same(sweep(GRID, score, chunk=np.int64(chunk), keep=keep), sweep(GRID, score, keep=keep))


def test_without_keep_all_rows_come_back_in_order_infeasible_ones_included():
    frame = sweep(GRID, score, chunk=10)
    assert list(frame.columns) == ["bandwidth_TBps", "capacity_GB", "batch", "latency_s", "price_USD", "feasible", "reason"]
    assert list(frame[list(GRID.axes)].itertuples(index=False, name=None)) == rows_of(GRID)
    assert frame["feasible"].dtype == bool
    assert set(frame.loc[~frame["feasible"], "reason"]) == {"the cache is larger than the memory"}
    assert (frame.attrs["finished"], frame.attrs["infeasible"], frame.attrs["violating"]) == (140, int((~frame["feasible"]).sum()), 0)
    assert frame.attrs["infeasible"] > 0


def test_a_frame_a_grid_and_an_arrow_table_give_the_same_rows():
    frame = pd.DataFrame(GRID.columns(0, len(GRID)))
    same(sweep(frame, score, chunk=9), sweep(frame.set_axis(range(3, 143)), score))
    pd.testing.assert_frame_equal(sweep(frame, score, chunk=9), sweep(GRID, score), check_exact=True)
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra io, is not installed")
    same(sweep(pyarrow.Table.from_pandas(frame), score), sweep(frame, score))


coarse = st.integers(0, 4)  # many ties


@settings(max_examples=60)
@given(
    st.lists(st.tuples(coarse, coarse, coarse, st.booleans()), min_size=1, max_size=60),
    st.integers(1, 20),
    st.none() | coarse,
    st.integers(1, 3),
)
def test_what_is_kept_is_exactly_the_front_of_all_rows(rows, chunk, limit, objectives):
    """Rows with equal objectives included, and each by its own number."""
    designs = pd.DataFrame(rows, columns=["a", "b", "c", "feasible"])
    keep = [Objective("a"), Objective("b", "maximize"), Objective("twice")][:objectives]
    constraints = [] if limit is None else [Constraint("c", at_most=limit)]
    kept = sweep(designs, lambda columns: {"twice": columns["c"] * 2}, chunk=chunk, keep=keep, constraints=constraints)
    everything = designs.assign(twice=designs["c"] * 2)
    feasible = everything[everything["feasible"]]
    within = feasible if limit is None else feasible[feasible["c"] <= limit]
    pd.testing.assert_frame_equal(kept, pareto(within, keep), check_exact=True)
    expected = (len(designs), len(designs) - len(feasible), len(feasible) - len(within))
    assert (kept.attrs["finished"], kept.attrs["infeasible"], kept.attrs["violating"]) == expected


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_front_of_a_large_chunk_is_exact(objectives):
    """Above a thousand rows, most are dropped before the exact comparison: on coarse values with many ties none of the front is."""
    values = np.random.default_rng(objectives).integers(0, 40, (5000, objectives)).astype(float)
    values[::7] -= 1e308
    designs = pd.DataFrame(values, columns=[f"f{i}" for i in range(objectives)])
    keep = [Objective(name) for name in designs]
    kept = sweep(designs, lambda columns: {"one": np.ones(len(columns["f0"]))}, chunk=1700, keep=keep)
    pd.testing.assert_frame_equal(kept.drop(columns="one"), pareto(designs, keep), check_exact=True)


def test_without_a_column_feasible_rows_without_a_value_are_infeasible():
    kept = sweep(numbers(5), lambda columns: {"latency_s": np.where(columns["n"] < 2, np.nan, columns["n"])}, keep=[LATENCY])
    assert (kept.index.tolist(), kept.attrs["infeasible"]) == ([2], 2)


def test_a_front_of_no_rows_has_all_columns():
    kept = sweep(GRID, score, keep=[LATENCY], constraints=[Constraint("price_USD", at_most=1)])
    assert kept.empty
    assert list(kept.columns) == list(sweep(GRID, score).columns)
    assert kept.attrs["violating"] == 140 - kept.attrs["infeasible"]


def test_memory_is_that_of_a_chunk_and_the_front():
    """A table of all rows would hold 40 MB."""
    grid = Grid({"bandwidth_TBps": np.linspace(1, 8, 100), "capacity_GB": np.linspace(10, 200, 100), "batch": range(1, 101)})
    sweep(GRID, score, keep=[LATENCY, PRICE])
    tracemalloc.start()
    kept = sweep(grid, score, keep=[LATENCY, PRICE], chunk=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.attrs["finished"] == 1_000_000
    assert peak < 8e6


@pytest.mark.parametrize(
    ("designs", "sentence"),
    [
        (pd.DataFrame({"a": []}), "a table of 0 rows and 1 columns"),
        (pd.DataFrame(index=[1, 2]), "a table of 2 rows and 0 columns"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "the column 'a' twice"),
        (pd.DataFrame({0: [1]}), "must be a text, not 0"),
        (pd.DataFrame({"a": [1.0, math.nan]}), "column 'a' has no value in row 1"),
        (pd.DataFrame({"a": ["x", None]}), "column 'a' has no value in row 1"),
        (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), "column 'a' has no value in row 1"),
        (pd.DataFrame({"a": [1, "x"]}), "column 'a' must hold numbers or texts, not object"),
        (pd.DataFrame({"a": pd.to_datetime(["2026-01-01"])}), "column 'a' must hold numbers or texts, not datetime"),
        (pd.DataFrame({"a": [1j]}), "must hold numbers or texts, not complex"),
        ([1, 2], "designs must be a DataFrame, an Arrow table, a Grid or a Sobol, not a list"),
    ],
)
def test_bad_designs_are_refused_before_any_work(designs, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweep(designs, scored())


def test_columns_of_other_number_types_and_categories_are_taken():
    designs = pd.DataFrame(
        {
            "whole": pd.array([1, 2], dtype="Int64"),
            "small": np.array([1, 2], dtype=np.float32),
            "kind": pd.Categorical(["x", "y"]),
            "on": [True, False],
        }
    )
    got = {}
    sweep(designs, lambda columns: got.update(columns) or {})
    assert [array.dtype.kind for array in got.values()] == ["i", "f", "O", "b"]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (None, "score\\(\\) must return a dict of arrays, not a NoneType"),
        ({"a": np.zeros(3)}, "must return 4 values as 'a', one a design, not an array of shape \\(3,\\)"),
        ({"a": 1.0}, "not an array of shape \\(\\)"),
        ({"a": np.zeros((4, 1))}, "not an array of shape \\(4, 1\\)"),
        ({"n": np.zeros(4)}, "the column 'n', which the designs have as well"),
        ({3: np.zeros(4)}, "must name its columns with texts"),
        ({"a": np.zeros(4, dtype=complex)}, "numbers or texts as 'a', not complex128"),
        ({"a": np.array([None, 1, "x", 2])}, "numbers or texts as 'a', not objects"),
        ({"feasible": np.ones(4)}, "'feasible' must hold True or False"),
    ],
)
def test_what_a_score_returns_is_checked_and_the_rows_named(result, sentence):
    with pytest.raises(ValueError, match=f"rows 0 to 3 cannot be priced: .*{sentence}") as refusal:
        sweep(numbers(4), lambda columns: result)
    assert "\n" not in str(refusal.value)


def test_an_exception_in_a_chunk_names_its_rows():
    def divides(columns):
        if 5 in columns["n"]:
            raise ZeroDivisionError("no bandwidth")
        return {}

    with pytest.raises(ValueError, match=r"^rows 4 to 7 cannot be priced: ZeroDivisionError: no bandwidth$"):
        sweep(numbers(9), divides, chunk=4)


def test_a_score_cannot_change_the_designs():
    def writes(columns):
        columns["n"][0] = 7
        return {}

    with pytest.raises(ValueError, match="read-only"):
        sweep(numbers(4), writes)


def test_what_a_score_does_to_its_dict_does_not_change_the_designs():
    def changes(columns):
        doubled = columns.pop("n") * 2
        columns["m"] = doubled
        return {"double": doubled}

    frame = sweep(numbers(4), changes, chunk=3)
    assert frame.to_dict("list") == {"n": [0, 1, 2, 3], "double": [0, 2, 4, 6]}


def test_a_score_that_counts_rows_is_understood_to_count_its_own():
    """In the text of the error a row is one of the whole table; a number that is no row of the chunk stays as it is."""

    def counts(columns):
        if (wrong := np.flatnonzero(columns["n"] == 6)).size:
            raise ValueError(f"no bandwidth\nas in row {wrong[0]} beside row 99")
        return {}

    with pytest.raises(ValueError, match=r"^rows 4 to 7 cannot be priced: no bandwidth as in row 6 beside row 99$"):
        sweep(numbers(9), counts, chunk=4)


@dataclass
class Checking:
    """A score that checks before it prices, and notes what it was given to do each."""

    checked: list = field(default_factory=list)
    priced: int = 0

    def check(self, columns):
        self.checked += columns["n"].tolist()
        if (wrong := np.flatnonzero(columns["n"] < 0)).size:
            raise ValueError(f"column 'n' must be at least 0, not {columns['n'][wrong[0]]:g} as in row {wrong[0]}")

    def __call__(self, columns):
        self.priced += 1
        return {"square": columns["n"] ** 2}


@pytest.mark.parametrize(
    ("designs", "row"),
    [
        (pd.DataFrame({"n": [*range(90), -5]}), 90),
        (Grid({"x": [1, 2, 3], "n": [0, 1, -5, 2], "m": [1, 2]}), 4),
        (Sobol({"n": [-5, 1], "m": (0, 1)}, number=64, seed=1), None),
    ],
    ids=["table", "grid", "sobol"],
)
def test_a_score_checks_designs_before_the_first_chunk(designs, row):
    score = Checking()
    with pytest.raises(ValueError, match=r"^designs cannot be priced: column 'n' must be at least 0, not -5 as in row (\d+)$") as refusal:
        sweep(designs, score, chunk=10)
    assert score.priced == 0
    named = int(str(refusal.value).rpartition(" ")[2])
    values = designs["n"].to_numpy() if isinstance(designs, pd.DataFrame) else designs.columns(0, len(designs))["n"]
    assert values[named] == -5
    assert row is None or named == row
    fine = Checking()
    sweep(Grid({"x": range(300), "n": range(200)}), fine)
    assert set(fine.checked) == set(range(200))
    assert len(fine.checked) == 499, "each value of each column once beside the first row"


def test_every_chunk_must_have_the_columns_of_the_first():
    with pytest.raises(ValueError, match="rows 2 to 3 have other columns than those before: 'b' is <f8, not missing"):
        sweep(numbers(4), lambda columns: {"b": np.zeros(2)} if 3 in columns["n"] else {}, chunk=2)
    with pytest.raises(ValueError, match="'b' is text, not <f8"):
        sweep(numbers(4), lambda columns: {"b": np.array(["x", "y"]) if 3 in columns["n"] else np.zeros(2)}, chunk=2)


def test_a_feasible_row_has_its_objectives():
    with pytest.raises(ValueError, match="row 1 is feasible but has nan as 'latency_s'"):
        sweep(numbers(2), scored(latency_s=np.array([1, np.nan]), feasible=np.array([True, True])), keep=[LATENCY])


def test_an_infinite_objective_is_a_number():
    """The throughput of a machine without limits."""
    throughput = scored(tok_per_s=np.array([1.0, np.inf, 3.0]), feasible=np.array([True, True, False]))
    kept = sweep(numbers(3), throughput, keep=[Objective("tok_per_s", "maximize")])
    assert (kept.index.tolist(), kept["tok_per_s"].tolist()) == ([1], [np.inf])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *(({"chunk": bad}, "chunk must be a whole number of designs, at least 1 .*, not") for bad in (0, True, 1.5, "3")),
        *(({"workers": bad}, "workers must be a whole number of processes, at least 1 .*, not") for bad in (0, 1.5)),
        ({"keep": "latency_s"}, r"keep must be a list of Objective, as in .*, not 'latency_s'"),
        ({"keep": LATENCY}, "keep must be a list of Objective, as in"),
        ({"keep": [3]}, "keep must hold Objective only, .*, not 3"),
        ({"keep": [LATENCY], "constraints": Constraint("price_USD", at_most=1)}, "constraints must be a list of Constraint"),
        ({"client": 3}, "client must be a distributed.Client of Dask, not 3"),
        ({"out": 3}, "out must be a path that is not empty, not 3"),
        ({"out": ""}, "out must be a path that is not empty, not ''"),
        ({"checkpoint": 3}, "checkpoint must be a path that is not empty, not 3"),
        ({"settings": 3}, "settings must be a dict with texts as keys"),
        ({"workers": 2, "score": lambda columns: {}}, "score cannot be sent to worker processes .*; define it at the top of a module"),
        ({"score": 3}, "score must be a function of a dict of arrays, not 3"),
        ({"designs": Grid}, "designs must be a DataFrame, an Arrow table, a Grid or a Sobol, not the class Grid"),
        ({"keep": []}, "there is no objective"),
        ({"keep": [Objective("power_W")]}, "there is no column 'power_W' to keep rows by"),
        ({"keep": [Objective("reason")]}, "the column 'reason' holds texts"),
        ({"constraints": [Constraint("latency_s", at_most=1)]}, "constraints choose among the rows that are kept"),
        ({"client": object(), "workers": 2}, "a client has its own workers"),
        ({"out": "nowhere/t.csv"}, "cannot write"),
        ({"out": "t.csv", "settings": {"x": object()}}, "cannot be written as JSON"),
    ],
)
def test_arguments_that_make_no_sweep_are_refused(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence) as refusal:
        sweep(**({"designs": GRID, "score": score} | arguments))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_the_same_call_goes_on_from_its_checkpoint(tmp_path: Path):
    """What was finished is not priced again, and a damaged file is."""
    first, again = Counting(), Counting()
    expected = sweep(numbers(10), first, chunk=4, checkpoint=tmp_path / "c")
    assert first.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    (tmp_path / "c" / "rows000000000004.npz").unlink()
    damaged = tmp_path / "c" / "rows000000000008.npz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    same(sweep(numbers(10), again, chunk=4, checkpoint=tmp_path / "c"), expected)
    assert again.calls == [[4, 5, 6, 7], [8, 9]]
    same(sweep(numbers(10), Counting(), chunk=4), expected)


def test_chunks_in_each_others_place_are_priced_again(tmp_path: Path):
    folder, again = tmp_path / "c", Counting()
    expected = sweep(numbers(12), Counting(), chunk=4, checkpoint=folder)
    first, second = folder / "rows000000000000.npz", folder / "rows000000000004.npz"
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    same(sweep(numbers(12), again, chunk=4, checkpoint=folder), expected)
    assert again.calls == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_chunk_is_found_damaged_wherever_it_is_damaged(tmp_path: Path):
    """Bytes of the whole archive, overwritten; NumPy and zipfile raise about anything for such files."""
    path, job = tmp_path / "rows.npz", Job(score=Counting(), keep=None, constraints=(), whole=True)
    priced = job.price(Table.of(numbers(3)), 0, 3)
    save(path, "key", priced)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for byte in (0x00, 0xFF, whole[place] ^ 0x01):
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            found = load(path, "key", 0, 3, job)
            assert found is None or {name: array.tolist() for name, array in found.columns.items()} == {"n": [0, 1, 2], "square": [0, 1, 4]}


def test_a_front_in_place_of_a_table_is_damage(tmp_path: Path):
    """As if a file's front had been lost; what it holds by then are all rows."""
    folder, keep = tmp_path / "c", [LATENCY, PRICE]
    expected = sweep(GRID, score, chunk=70, checkpoint=folder, keep=keep, out=tmp_path / "t.csv")
    path = folder / "rows000000000000.npz"
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays if name != "front"}
    np.savez(path, **kept)
    same(sweep(GRID, score, chunk=70, checkpoint=folder, keep=keep, out=tmp_path / "t.csv"), expected)


@pytest.mark.parametrize("keep", [None, [LATENCY, PRICE]])
def test_a_table_from_checkpoints_is_the_same_to_the_last_bit(tmp_path: Path, keep):
    frames = [sweep(GRID, score, chunk=9, keep=keep, checkpoint=tmp_path / "c") for _ in range(2)]
    same(*frames)
    same(frames[0], sweep(GRID, score, keep=keep))
    assert not [path for path in (tmp_path / "c").iterdir() if path.suffix not in (".npz", ".json")], "no pickles, nothing left over"


def other_score(columns):
    return score(columns)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"designs": Grid({**GRID.axes, "batch": [1]})}, "designs"),
        ({"score": other_score}, "score"),
        ({"score": lambda columns, k=1: score(columns)}, "score"),
        ({"chunk": 10}, "chunk"),
        ({"keep": [LATENCY]}, "keep and rows kept"),
        ({"settings": {"llm": "another"}}, "settings"),
    ],
)
def test_a_checkpoint_of_another_sweep_is_refused(tmp_path: Path, change, part):
    call = {"designs": GRID, "score": score, "chunk": 9, "checkpoint": tmp_path / "c"}
    sweep(**call)
    with pytest.raises(ValueError, match=f"belongs to another sweep: its {part} differ; choose another folder") as refusal:
        sweep(**call | change)
    assert "\n" not in str(refusal.value)


def test_tables_that_differ_in_one_number_have_different_checkpoints(tmp_path: Path):
    sweep(numbers(4), Counting(), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="its designs differ"):
        sweep(numbers(4).replace(3, 5), Counting(), checkpoint=tmp_path / "c")


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "sweep.json").write_text("{")
    for name, sentence in {"file": "File exists", "full": "holds 'thesis.txt'", "damaged": "sweep.json is damaged"}.items():
        with pytest.raises(ValueError, match=sentence):
            sweep(GRID, score, checkpoint=tmp_path / name)
    sweep(GRID, score, checkpoint=tmp_path / "one")
    sweep(GRID, score, checkpoint=tmp_path / "two", chunk=9)
    path = "rows000000000000.npz"
    (tmp_path / "two" / path).replace(tmp_path / "one" / path)
    with pytest.raises(ValueError, match="npz belongs to another sweep"):
        sweep(GRID, score, checkpoint=tmp_path / "one")


def test_a_score_that_nothing_tells_from_others_has_no_checkpoint(tmp_path: Path):
    hidden = iter([1])
    with pytest.raises(ValueError, match="its checkpoint could be mistaken"):
        sweep(GRID, lambda columns: {"a": columns["batch"] + next(hidden)}, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_out_has_all_rows_as_if_they_had_been_held(tmp_path: Path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow, of the extra io, is not installed")
    from memsplit.dse.table import read_table

    whole = sweep(GRID, score)
    none = sweep(GRID, score, out=tmp_path / name, chunk=9)
    assert none.empty
    assert list(none.columns) == list(whole.columns)
    pd.testing.assert_frame_equal(read_table(tmp_path / name).fillna({"reason": ""}), whole, check_exact=True)
    front = sweep(GRID, score, out=tmp_path / name, chunk=9, keep=[LATENCY, PRICE])
    same(front, sweep(GRID, score, keep=[LATENCY, PRICE]))
    assert len(read_table(tmp_path / name)) == len(GRID)
    assert read_designs(tmp_path / name)["settings"]["objectives"] == (LATENCY, PRICE)
    if name.endswith("csv"):
        before = (tmp_path / name).read_bytes()
        assert write_csv(tmp_path / "u.csv", whole).read_bytes() == before


def test_out_that_fails_leaves_what_was_there(tmp_path: Path):
    (tmp_path / "t.csv").write_text("old\n")
    with pytest.raises(ValueError, match="rows 2 to 3"):
        sweep(numbers(4), lambda columns: {"a": np.zeros(2 if 0 in columns["n"] else 1)}, chunk=2, out=tmp_path / "t.csv")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("t.csv", "old\n")]


def test_what_the_rows_depend_on_is_written_beside_them(tmp_path: Path):
    """A score that is not of memsplit by its name only."""
    frame = sweep(GRID, score, keep=[LATENCY], settings={"note": "tables"})
    write_csv(tmp_path / "t.csv", frame)
    found = read_designs(tmp_path / "t.csv")["settings"]
    assert (found["score"], found["objectives"], found["note"]) == ("score", (LATENCY,), "tables")
    assert json.loads((tmp_path / "t.json").read_text())["designs"] == {}


@pytest.mark.parametrize("designs", [GRID, pd.DataFrame(GRID.columns(0, 9)), Sobol(GRID.axes, number=8)], ids=["grid", "table", "sobol"])
def test_the_names_of_the_design_columns_are_recorded(designs):
    assert sweep(designs, score).attrs["settings"]["columns"] == ["bandwidth_TBps", "capacity_GB", "batch"]


def test_the_bar_is_on_stderr_if_asked_for(capsys):
    sweep(GRID, score, progress=True)
    shown = capsys.readouterr()
    assert "140/140" in shown.err
    assert shown.out == ""
    sweep(GRID, score)
    assert capsys.readouterr().err == "", "stderr is no terminal here"
