"""Every study runs from the command line, quickly, and repeats itself."""

import ast
import csv
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).resolve().parents[1] / "studies"
MEMSPLIT = Path(sys.executable).parent / "memsplit"
NEEDS_TORCH = ("run_recompute_split", "run_cache_ratio")
SETTINGS = ("device", "llm", "layers", "dtype", "batch", "context", "template", "weights", "split", "act_share", "tokens_equal", "seed")
LIMIT = 60  # s; a quick study is meant to take 10 s, and machines differ


def has_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


NAMES = sorted(path.stem for path in STUDIES.glob("[!_]*.py") if has_main(path))


def rows(name: str, out: Path) -> list[dict[str, str]]:
    run = subprocess.run([MEMSPLIT, "study", name, "--quick", "--seed", "0", "--out", out], capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stderr
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_public_file_is_a_study():
    """A file that is no study is private: its name begins with an underscore."""
    assert NAMES
    assert sorted(path.stem for path in STUDIES.glob("[!_]*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_study_writes_rows_and_repeats_them(name: str, tmp_path: Path):
    """The same seed gives the same table, except for what a clock says.

    Of studies that run plans only the sweep and its settings: times, the choice made from them, and its row are measured.
    """
    if name in NEEDS_TORCH:
        pytest.importorskip("torch", reason="needs memsplit[runtime]")
    first, second = (rows(name, tmp_path / f"{run}.csv") for run in ("first", "second"))
    assert len(first) >= 1
    assert None not in first[0], "a row has more cells than the header has names"
    if name in NEEDS_TORCH:
        first, second = ([{one: row.get(one) for one in SETTINGS} for row in table if row["swept"] == "True"] for table in (first, second))
    for row in (*first, *second):
        for column in [column for column in row if column.endswith(("runtime_s", "decide_s", "_date"))]:
            del row[column]
    assert first == second


def test_the_list_names_every_study():
    listed = subprocess.run([MEMSPLIT, "study", "--list"], capture_output=True, text=True, check=True, timeout=LIMIT).stdout
    assert [name for name in NAMES if name not in listed] == []
