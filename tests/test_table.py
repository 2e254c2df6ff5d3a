"""Tables on disk: whole or not at all, numbers that read back as written, designs that outlive the code that made them."""

import csv
import dataclasses
import errno
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memsplit.dse
from memsplit import __version__
from memsplit.dse import Constraint, Objective, check_writable, explore, from_json, read_designs, to_json, write_csv
from memsplit.dse.table import _one_line, _types, read_table, table_writer, write_parquet
from memsplit.models import ComputeUnit, Link, MemoryTier, System
from memsplit.solvers import Status

HBM = MemoryTier(name="HBM", capacity=80e9, bandwidth=3.35e12, energy=3.9e-12 * 8, cost=None)
LPDDR = MemoryTier(name="LPDDR", capacity=512e9, bandwidth=math.inf, page=4096)
SYSTEM = System(
    name="two memories",
    tiers=(HBM, LPDDR),
    units=(ComputeUnit(name="GPU", tier="HBM", matrix_peak=1e15, vector_peak=6.7e13),),
    links=(Link(source="LPDDR", target="HBM", bandwidth=64e9, efficiency=0.85),),
)

sizes = st.floats(1e-3, 1e15)
systems = st.builds(
    lambda tiers, peak, name: System(
        name=name, tiers=tiers, units=(ComputeUnit(name="unit", tier=tiers[0].name, matrix_peak=peak, vector_peak=peak),)
    ),
    st.lists(
        st.builds(
            MemoryTier,
            name=st.text(min_size=1).filter(str.strip),
            capacity=sizes,
            bandwidth=sizes | st.just(math.inf),
            page=st.integers(1, 2**40),
            energy=st.none() | st.floats(1e-15, 1e-6),
            cost_source=st.text(),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda tier: tier.name,
    ).map(tuple),
    sizes,
    st.text(min_size=1).filter(str.strip),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(Status) | systems,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text().filter(lambda key: key != "type"), inner, max_size=3),
    max_leaves=5,
)


def design(trial) -> System:
    return SYSTEM.with_tier("HBM", capacity=trial.suggest_int("hbm_GB", 24, 192, step=8) * 1e9)


def score(system: System) -> dict[str, float]:
    capacity = system.tier("HBM").capacity
    return {"latency_s": 1e9 / capacity / 3, "memory_usd": capacity / 1e8}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The table as texts; numbers are then read by ``float``, which is exact, as readers of tables need not be."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def explored(**settings) -> pd.DataFrame:
    return explore(design, score, [Objective("latency_s"), Objective("memory_usd")], trials=10, **settings)


@given(plain)
def test_what_is_written_is_read_back(value):
    """Through real JSON text, without the tokens for infinity that JSON does not have."""
    text = json.dumps(to_json(value), allow_nan=False)
    back = from_json(json.loads(text))
    assert back == value
    assert repr(back) == repr(value), "1, 1.0 and True are equal but not the same"


@pytest.mark.parametrize("value", [np.float64(0.1), np.int64(3), np.float64(math.inf), np.bool_(True), np.str_("HBM")])
def test_numpy_scalars_are_written_as_what_they_are(value):
    back = from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))
    assert (back, type(back)) == (value.item(), type(value.item()))


def test_nan_and_lists_are_read_back_as_nan_and_tuples():
    assert math.isnan(from_json(to_json(math.nan)))
    assert from_json(to_json([1, [2]])) == (1, (2,))


def test_public_classes_are_the_types_and_none_has_a_field_called_type():
    """ "type" names the class in the file."""
    types = _types()
    assert {System, MemoryTier, Status} <= set(types.values())
    assert all("type" not in [field.name for field in dataclasses.fields(cls)] for cls in types.values() if dataclasses.is_dataclass(cls))
    assert "float" not in types


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A class that memsplit does not know."""


@pytest.mark.parametrize(
    "value", [Foreign(), object(), {1: 2}, {"type": "System"}, {3}, b"HBM", 1j, np.zeros(2), System, (1, (Foreign(),))]
)
def test_other_values_are_not_written(value):
    with pytest.raises(ValueError, match=r"to be written|cannot be written as JSON") as refusal:
        to_json(value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"type": "Popen", "args": ["true"]}, "'Popen' is no type of memsplit"),
        ({"type": "Path", "value": "x"}, "'Path' is no type of memsplit"),
        ({"type": ["System"]}, "is no type of memsplit"),
        ({"type": "float", "value": "0.5"}, "'float' is no type of memsplit"),
        (to_json(HBM) | {"colour": "red"}, "MemoryTier has no field 'colour'"),
        ({"type": "MemoryTier", "name": "HBM", "bandwidth": 1.0}, "MemoryTier needs a field 'capacity'"),
        (to_json(HBM) | {"capacity": -1.0}, "tier 'HBM': capacity must be"),
        (to_json(SYSTEM.links[0]) | {"efficiency": "most"}, "Link has a field of the wrong type"),
        ({"type": "Status", "value": "great"}, "'great' is not a valid Status"),
    ],
)
def test_damaged_or_foreign_data_is_refused_in_one_sentence(data, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        from_json(data)
    assert "\n" not in str(refusal.value)


@given(st.lists(st.floats(), min_size=1), st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00")))
def test_numbers_and_texts_of_a_table_read_back_as_written(tmp_path_factory, values, text):
    """Infinities and signed zeros included, and quotes, commas and other alphabets in the texts."""
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_csv(path, pd.DataFrame({"latency_s": values, "note": text}))
    back = read_rows(path)
    assert [repr(float(row["latency_s"] or "nan")) for row in back] == [repr(value) for value in values]
    assert [row["note"] for row in back] == [text] * len(values)


def test_lines_end_in_newlines_and_missing_values_are_empty(tmp_path: Path):
    write_csv(tmp_path / "t.csv", pd.DataFrame({"a_s": [0.1, None], "b": ["x", None], "c": [True, False]}))
    assert (tmp_path / "t.csv").read_bytes() == b"a_s,b,c\n0.1,x,True\n,,False\n"
    assert os.listdir(tmp_path) == ["t.csv"], "nothing to rerun, so no JSON"


def test_designs_and_settings_are_written_beside_the_table_by_key(tmp_path: Path):
    frame = explored(settings={"system": SYSTEM, "limits": (1, None, math.inf)})
    table = pd.read_csv(write_csv(tmp_path / "t.csv", frame))
    data = read_designs(tmp_path / "t.csv")
    assert data["settings"] == {"system": SYSTEM, "limits": (1, None, math.inf)}
    assert [data["designs"][key] for key in table["design"]] == [frame.attrs["designs"][trial] for trial in frame["trial"]]
    assert "design" not in frame.columns, "the caller's frame is left alone"
    assert table["design"].str.fullmatch("[0-9a-f]{12}").all()
    assert read_designs(tmp_path / "t.json") == data


def test_a_row_can_be_computed_again_from_the_files_alone(tmp_path: Path):
    rows = read_rows(write_csv(tmp_path / "t.csv", explored()))
    designs = read_designs(tmp_path / "t.csv")["designs"]
    assert rows
    assert all(score(designs[row["design"]])["latency_s"] == float(row["latency_s"]) for row in rows)


def test_only_designs_that_are_still_in_the_table_are_written(tmp_path: Path):
    frame = explored(dominated=True)
    table = pd.read_csv(write_csv(tmp_path / "t.csv", frame.head(1)))
    assert list(read_designs(tmp_path / "t.csv")["designs"]) == table["design"].tolist()
    assert "design" not in pd.read_csv(write_csv(tmp_path / "u.csv", frame.drop(columns="trial"))).columns


def test_equal_explorations_write_equal_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv", explored(), provenance={"system": SYSTEM})
    for suffix in ("csv", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_designs_that_cannot_be_kept_do_not_cost_the_table(tmp_path: Path):
    frame = explore(
        lambda trial: (trial.suggest_int("n", 1, 3), Foreign()), lambda it: {"latency_s": 1.0}, [Objective("latency_s")], trials=3
    )
    with pytest.raises(ValueError, match=r"t\.csv is written, but not the designs beside it: a .*Foreign cannot be written"):
        write_csv(tmp_path / "t.csv", frame)
    assert len(pd.read_csv(tmp_path / "t.csv")) == len(frame)
    assert os.listdir(tmp_path) == ["t.csv"]


class Unwritable:
    """A cell that fails half way through the file."""

    def __str__(self) -> str:
        raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_the_old_table(tmp_path: Path):
    path = write_csv(tmp_path / "t.csv", pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match=r"cannot write .*t\.csv: No space left on device; choose another --out"):
        write_csv(path, pd.DataFrame({"a": [2, Unwritable()]}))
    assert path.read_text() == "a\n1\n"
    assert os.listdir(tmp_path) == ["t.csv"]


def test_a_link_stays_a_link_and_permissions_are_the_usual_ones(tmp_path: Path):
    """A temporary file made for one's own eyes would take its place with mode 0600."""
    (tmp_path / "ordinary").touch()
    (tmp_path / "link.csv").symlink_to(tmp_path / "t.csv")
    write_csv(tmp_path / "link.csv", pd.DataFrame({"a": [1]}))
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "t.csv").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "config.json").write_text('{"hidden_size": 8192}')
    (tmp_path / "notes.json").write_text("not JSON")
    refusals = {
        "nowhere/t.csv": "No such file or directory",
        "folder.csv": "it is there and is no file",
        "t.json": "its designs are written to that name",
        "config.csv": r"config\.json is there and is no file of memsplit",
        "notes.csv": r"notes\.json is there and is no file of memsplit",
    }
    for name, reason in refusals.items():
        with pytest.raises(ValueError, match=rf"cannot write .*{reason}.*choose another --out"):
            check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "folder.csv", "notes.json"]


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path: Path):
    path = write_csv(tmp_path / "t.csv", explored())
    before = path.read_bytes()
    assert check_writable(str(path)) == path
    assert path.read_bytes() == before
    assert check_writable(tmp_path / "new.csv") == tmp_path / "new.csv"
    assert sorted(os.listdir(tmp_path)) == ["t.csv", "t.json"]


def test_damage_to_the_designs_is_found_and_said_in_one_sentence(tmp_path: Path):
    path = write_csv(tmp_path / "t.csv", explored())
    beside, good = tmp_path / "t.json", (tmp_path / "t.json").read_text()
    damages = {
        good[: len(good) // 2]: "is damaged, it is no whole JSON file",
        "": "is damaged, it is no whole JSON file",
        "[1]": "is no file of memsplit: it holds a list",
        '{"memsplit": "0.1.0", "settings": {}}': "is damaged: it has no 'designs'",
        good.replace("3350000000000.0", "3350000000001.0", 1): "was changed after it was written",
        good.replace("3350000000000.0", "NaN", 1): "cannot be read",
        good.replace('"settings": {}', '"settings": {"solver": {"type": "Magic"}}'): "'Magic' is no type of memsplit",
    }
    for text, sentence in damages.items():
        assert text != good
        beside.write_text(text)
        with pytest.raises(ValueError, match=sentence) as refusal:
            read_designs(path)
        assert "\n" not in str(refusal.value)
    beside.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is damaged"):
        read_designs(path)
    with pytest.raises(ValueError, match=r"cannot read .*u\.json: No such file or directory"):
        read_designs(tmp_path / "u.csv")


def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra io, is not installed")


@settings(max_examples=20)
@given(st.lists(st.floats(), min_size=1), st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00")))
def test_both_kinds_of_tables_are_read_back_to_the_last_bit(tmp_path_factory, values, text):
    """Except that a CSV cannot tell an empty text from a missing one."""
    parquet()
    frame = pd.DataFrame({"latency_s": values, "batch": range(len(values)), "fits": [True] * len(values), "note": text or "empty"})
    for write, name in ((write_csv, "t.csv"), (write_parquet, "t.parquet")):
        back = read_table(write(tmp_path_factory.mktemp("table") / name, frame))
        assert back["latency_s"].astype(float).map(repr).tolist() == [repr(value) for value in values], "all infinite or missing included"
        assert [back[column].dtype.kind for column in ("batch", "fits")] == ["i", "b"]
        assert back["note"].astype(str).tolist() == [text or "empty"] * len(values) or name == "t.csv"
        assert list(back.columns) == list(frame.columns)


def test_a_parquet_file_has_the_same_json_beside_it(tmp_path: Path):
    parquet()
    frame = explored(settings={"system": SYSTEM})
    write_csv(tmp_path / "t.csv", frame)
    write_parquet(tmp_path / "u.parquet", frame)
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "u.json").read_bytes()
    one, other = read_table(tmp_path / "t.csv"), read_table(tmp_path / "u.parquet")
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert set(other["design"]) == set(read_designs(tmp_path / "u.parquet")["designs"])
    before = (tmp_path / "u.parquet").read_bytes()
    assert write_parquet(tmp_path / "u.parquet", frame).read_bytes() == before
    assert b"pandas" not in before, "no index and no attributes of the frame"


def test_keys_and_texts_stay_texts_when_they_look_like_numbers(tmp_path: Path):
    """Of the keys, one in three hundred has digits only, and more look like 12e5; they are texts, as is NA."""
    write_csv(tmp_path / "t.csv", pd.DataFrame({"design": ["012345678901", "1234567890e1"], "note": ["NA", None]}))
    back = read_table(tmp_path / "t.csv")
    assert back["design"].tolist() == ["012345678901", "1234567890e1"]
    assert back["note"].isna().tolist() == [False, True]


def test_tables_that_cannot_be_read_are_named_in_one_sentence(tmp_path: Path):
    parquet()
    texts = {
        "twice.csv": "a_s,a_s\n1,2\n",
        "empty.csv": "",
        "ragged.csv": "a_s,b\n1,2\n1,2,3\n",
        "wide.csv": "a_s\n1,2\n3,4\n",
        "text.parquet": "a_s\n1\n",
        "empty.parquet": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.csv").write_bytes(b"a\n\xff\n")
    (tmp_path / "folder.csv").mkdir()
    for name in (*texts, "bytes.csv", "folder.csv", "nowhere.csv", "nowhere.parquet"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}: ") as refusal:
            read_table(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_what_no_parquet_file_holds_is_refused_and_nothing_is_left(tmp_path: Path):
    parquet()
    refusals = {
        "a Parquet file ends in .parquet": ("t.csv", pd.DataFrame({"a": [1]})),
        "different texts as column names": ("t.parquet", pd.DataFrame([[1, 2]], columns=["a", "a"])),
        "holds numbers or texts, not both": ("t.parquet", pd.DataFrame({"a": [1, "x"]})),
    }
    for sentence, (name, frame) in refusals.items():
        with pytest.raises(ValueError, match=sentence):
            write_parquet(tmp_path / name, frame)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_without_pyarrow_parquet_is_refused_and_csv_is_not(tmp_path: Path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    frame = pd.DataFrame({"a": [1]})
    if name == "t.csv":
        assert read_table(write_csv(tmp_path / name, frame))["a"].tolist() == [1]
        return
    for fails in (lambda: write_parquet(tmp_path / name, frame), lambda: read_table(tmp_path / name)):
        with pytest.raises(ValueError, match=r'Parquet needs pyarrow; run pip install "memsplit\[io\]", or name a \.csv'):
            fails()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_written_in_pieces_is_whole_or_not_there(tmp_path: Path, name):
    if name == "t.parquet":
        parquet()
    frame = pd.DataFrame({"a_s": [0.1, 1 / 3, math.nan], "note": ["x", "y", "z"]})
    with table_writer(tmp_path / name, {"system": SYSTEM}) as write:
        write(frame.iloc[:2])
        write(frame.iloc[2:])
        assert not (tmp_path / name).exists()
    pd.testing.assert_frame_equal(read_table(tmp_path / name), frame, check_exact=True)
    assert read_designs(tmp_path / name) == {"memsplit": __version__, "settings": {"system": SYSTEM}, "designs": {}}
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="invalid literal"), table_writer(tmp_path / name, {}) as write:
        write(frame) or write(frame.iloc[: int("no number")])
    assert (tmp_path / name).read_bytes() == before
    assert set(os.listdir(tmp_path)) == {name, "t.json"}


def test_public_classes_of_dse_are_written_field_by_field():
    """A swept table's JSON holds its score, objectives and constraints."""
    for value in (Objective("latency_s", "maximize"), Constraint("power_W", at_most=500)):
        assert from_json(json.loads(json.dumps(to_json((value,))))) == (value,)
    public = {cls.__name__ for cls in map(memsplit.dse.__dict__.get, memsplit.dse.__all__) if dataclasses.is_dataclass(cls)}
    assert {"Objective", "Constraint", "MappingScore"} <= public <= set(_types())


@pytest.mark.parametrize("name", ["", Path(), "."])
def test_an_empty_name_is_said_to_be_one(tmp_path: Path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"a": [1]})
    for fails in (lambda: write_csv(name, frame), lambda: write_parquet(name, frame), lambda: check_writable(name)):
        with pytest.raises(ValueError, match=r"an empty name .*; name a file with --out, as in results\.csv"):
            fails()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", ["ab\ud800c", 2**70], ids=["lone surrogate", "2**70"])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_what_a_file_cannot_hold_is_one_sentence(tmp_path: Path, name, value):
    """A CSV holds numbers of any length."""
    frame = pd.DataFrame({"a": [1, 2], "b": pd.Series([type(value)(0), value], dtype=object)})
    if name == "t.parquet":
        parquet()
    elif value == 2**70:
        assert read_rows(write_csv(tmp_path / name, frame))[1]["b"] == str(2**70)
        return
    with pytest.raises(ValueError, match="surrogate") as refusal:
        write_csv(tmp_path / name, frame)
    assert "\n" not in str(refusal.value)
    assert ("column 'b' holds" in str(refusal.value)) == (name == "t.parquet")
    str(refusal.value).encode()  # a message that cannot be printed is none
    assert os.listdir(tmp_path) == []


def test_messages_of_other_libraries_become_one_line():
    assert _one_line("first\n  second line.\n") == "first second line"


def test_a_table_that_cannot_be_written_leaves_the_settings_beside_it(tmp_path, monkeypatch):
    """New settings beside an older table would describe it wrongly."""
    path = tmp_path / "a.csv"
    write_csv(path, pd.DataFrame({"x": [1]}), provenance={"settings": 1})
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(ValueError, match="No space left on device; choose another --out"):
        write_csv(path, pd.DataFrame({"x": [2]}), provenance={"settings": 2})
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(ValueError, match="File name too long; choose another --out"):
        check_writable(tmp_path / ("a" * 300 + ".csv"))
