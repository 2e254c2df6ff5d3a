"""Tables on disk: a CSV or Parquet file, and beside it a JSON from which every row can be computed again without the code that made it.

The table's column ``design`` is a key of the JSON, which holds the public classes of memsplit field by field:
``{"type": "MemoryTier", "name": "HBM", ...}``. Reading it runs these classes' own checks and nothing else. A swept table has no such
column: its own columns say each design, and the JSON's settings hold the score, whose ``design(row)`` builds it again.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import __version__
from ..models.checks import shown


class Shared(dict[Any, Any]):
    """A dict for ``DataFrame.attrs``, which pandas copies deeply on many operations: copies of this one are itself."""

    def __copy__(self) -> Shared:
        return self

    def __deepcopy__(self, memo: object) -> Shared:
        return self


def write_csv(path: str | Path, frame: pd.DataFrame, *, provenance: Mapping[str, Any] | None = None) -> Path:
    """Write ``frame`` to ``path``, whole or not at all, and return the path: as CSV, unless the path ends in ``.parquet``.

    Floats have the fewest digits that read back as the same number; lines end in ``\\n``; missing values are empty.
    If ``frame.attrs["designs"]`` holds the designs by trial (see ``explore``), or there are settings to record (``provenance``;
    None: ``frame.attrs["settings"]``), they go to the same path with suffix ``.json`` (see ``read_designs``), and designs also
    as their keys to a column ``design``. A design that this file cannot hold is a ValueError, but the CSV is written first.
    """
    return _write(path, frame, provenance)


def write_parquet(path: str | Path, frame: pd.DataFrame, *, provenance: Mapping[str, Any] | None = None) -> Path:
    """Write ``frame`` as a Parquet file, otherwise as ``write_csv`` does: for tables of millions of rows, and numbers read back typed.

    Needs pyarrow (``pip install "memsplit[io]"``). The path ends in ``.parquet``, by which ``read_table`` knows the format.
    """
    if Path(path).suffix != ".parquet" and Path(path) != Path():  # an empty name has a sentence of its own
        raise ValueError(f"cannot write {path}: a Parquet file ends in .parquet; choose another --out, as in {Path(path).stem}.parquet")
    return _write(path, frame, provenance)


def read_table(path: str | Path) -> pd.DataFrame:
    """The table at ``path``, Parquet if it ends in ``.parquet``, else CSV; column names, with their units, as they were written.

    Numbers are read back as written, to the last bit. In a CSV an empty cell is NaN, in columns of texts as well. ValueError, in one
    sentence, for a file that is none.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            pyarrow_parquet = _parquet(path)
            table = pyarrow_parquet.ParquetFile(path).read()
            names, frame = table.column_names, table.to_pandas(ignore_metadata=True)
        else:
            with path.open(encoding="utf-8", newline="") as file, warnings.catch_warnings():
                names = next(csv.reader(file), [])
                file.seek(0)
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row of more cells than the first would be cut
                warnings.simplefilter("ignore", DeprecationWarning)  # pandas 3.1 reads exactly without float_precision, 2 only with it
                # A key of twelve digits is a text all the same, and "NA" in a column of texts is no missing value.
                frame = pd.read_csv(
                    file,
                    dtype={"design": str},
                    float_precision="round_trip",
                    index_col=False,
                    keep_default_na=False,
                    na_values=[""],
                    low_memory=False,
                )
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; name a table written by write_csv or write_parquet") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"cannot read {path}: {_one_line(error)}; name a table written by write_csv or write_parquet") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cannot read {path}: it has the column {twice[0]!r} twice; rename one of them")
    return frame


@contextmanager
def table_writer(path: str | Path, provenance: Mapping[str, Any]) -> Iterator[Callable[[pd.DataFrame], None]]:
    """A function that writes frames of the same columns one below the other, to a table too large to be held.

    Parquet if the path ends in ``.parquet``, else CSV. The table takes its place, and the settings ``provenance`` go to the JSON beside
    it, if the block ends well; if not, nothing is left and an older table stays.
    """
    path = check_writable(path)
    document = {"memsplit": __version__, "settings": to_json(dict(provenance)), "designs": {}}
    temporary = _part(path)
    writer: Any = None
    if path.suffix == ".parquet":
        _parquet(path)

    def write(frame: pd.DataFrame) -> None:
        nonlocal writer
        with _one_sentence(path):
            if path.suffix == ".parquet":
                table = _arrow(path, frame)
                writer = writer or _parquet(path).ParquetWriter(temporary, table.schema)
                writer.write_table(table)
            else:
                with temporary.open("a", encoding="utf-8", newline="") as file:
                    frame.to_csv(file, index=False, header=writer is None, lineterminator="\n")
                writer = writer or file

    try:
        yield write
        with _one_sentence(path):
            if writer is not None:
                writer.close()
            with replacing(path.with_suffix(".json")) as beside:
                _dump(beside, document)
            _sync(temporary)
            temporary.replace(os.path.realpath(path))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> Path:
    """The path, if a table and the JSON beside it can be written there; ValueError otherwise. To be called before long work."""
    path = Path(path)
    if path == Path():  # also that of the empty text
        raise ValueError("cannot write to an empty name or to the folder '.' itself; name a file with --out, as in results.csv")
    if path.suffix == ".json":
        raise ValueError(
            f"cannot write {path}: its designs are written to that name; choose another --out, as in {path.with_suffix('.csv')}"
        )
    with _one_sentence(path):
        _check_beside(path)
        if path.exists() and not path.is_file():
            raise ValueError(f"cannot write {path}: it is there and is no file; choose another --out")
        _part(path).touch()
        _part(path).unlink()
    return path


def _check_beside(path: Path) -> None:
    beside = path.with_suffix(".json")
    if not beside.exists():
        return
    try:
        ours = "memsplit" in _load(beside)
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"cannot write {path}: {beside} is there and is no file of memsplit; choose another --out")


def read_designs(path: str | Path) -> dict[str, Any]:
    """What ``write_csv`` wrote beside the CSV ``path``: ``{"memsplit": version, "settings": {...}, "designs": {key: design}}``.

    Settings and designs are objects again, equal to those written (lists have become tuples). ValueError, in one sentence,
    if the file is missing, damaged or changed since: the key of a design is a hash of it.
    """
    beside = Path(path).with_suffix(".json")
    data = _load(beside)
    for part in ("settings", "designs"):
        if not isinstance(data.get(part), dict):
            raise ValueError(f"{beside} is damaged: it has no {part!r}; write the table again")
    try:
        for key, design in data["designs"].items():
            if key != _key(design):
                raise ValueError(f"design {key!r} was changed after it was written; write the table again")
        return {part: from_json(data.get(part)) for part in ("memsplit", "settings", "designs")}
    except ValueError as error:
        raise ValueError(f"{beside} cannot be read: {error}") from None


def to_json(value: object) -> Any:
    """``value`` as data for ``json``: numbers, texts, None, tuples, dicts with texts as keys, and the public classes of memsplit.

    An object of a class becomes ``{"type": its name, field: value, ...}``, infinity and NaN ``{"type": "float", "value": "inf"}``.
    Anything else is a ValueError.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum) and _types().get(type(value).__name__) is type(value):
        return {"type": type(value).__name__, "value": to_json(value.value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "float", "value": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (tuple, list):
        return [to_json(item) for item in value]  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) or key == "type" for key in value):
            raise ValueError(f'a dict to be written needs texts other than "type" as keys, not {list(value)!r}')
        return {key: to_json(item) for key, item in value.items()}
    if _types().get(type(value).__name__) is type(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]  # type: ignore[arg-type]
        return {"type": type(value).__name__} | {name: to_json(getattr(value, name)) for name in fields}
    raise ValueError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be written as JSON; "
        "use classes of memsplit.models and memsplit.solvers, and tuples and dicts of them"
    )


def from_json(data: Any) -> Any:
    """The value that ``to_json`` turned into ``data``; lists become tuples. ValueError names an unknown type or field."""
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    fields = {name: from_json(value) for name, value in data.items() if name != "type"}
    if "type" not in data:
        return fields
    name = data["type"]
    if name == "float" and fields.get("value") in ("inf", "-inf", "nan"):
        return float(fields["value"])
    cls = _types().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"{name!r} is no type of memsplit {__version__}; types are {sorted(_types())}")
    if issubclass(cls, Enum):
        return cls(fields.get("value"))
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    unknown = sorted(fields.keys() - known)
    missing = [
        field.name
        for field in known.values()
        if field.name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        what = f"has no field {unknown[0]!r}" if unknown else f"needs a field {missing[0]!r}"
        raise ValueError(f"{name} {what} in memsplit {__version__}; fields are {list(known)}")
    try:
        return cls(**fields)
    except (TypeError, AttributeError, OverflowError) as error:  # a text where the class compares numbers, a number beyond all bounds
        raise ValueError(f"{name} has a field of the wrong type: {error}") from None


@contextmanager
def replacing(path: Path, *, otherwise: str = "choose another --out") -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends well, and is removed if not.

    An OSError becomes a ValueError of one sentence, which ends with the way out, ``otherwise``.
    """
    temporary = _part(path)
    with _one_sentence(path, otherwise):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(os.path.realpath(path))  # a link stays one
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _part(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _one_sentence(path: Path, otherwise: str = "choose another --out") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {_one_line(error.strerror or error)}; {otherwise}") from error
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.end]
        raise ValueError(f"cannot write {path}: a text holds {bad!r}, a lone surrogate, which UTF-8 cannot; replace it") from error


def _one_line(reason: object) -> str:
    """A message of another library without line breaks and the full stop at its end."""
    return " ".join(str(reason).split()).removesuffix(".")


def _write(path: str | Path, frame: pd.DataFrame, provenance: Mapping[str, Any] | None) -> Path:
    path = check_writable(path)
    if path.suffix == ".parquet":
        _arrow(path, frame)
    settings = dict(frame.attrs.get("settings", {}) if provenance is None else provenance)
    designs = frame.attrs.get("designs", {}) if "trial" in frame else {}
    try:
        written = {trial: to_json(designs[trial]) for trial in frame["trial"] if trial in designs} if designs else {}
        document = {"memsplit": __version__, "settings": to_json(settings), "designs": {_key(data): data for data in written.values()}}
    except ValueError as error:
        _write_table(path, frame)
        raise ValueError(f"{path} is written, but not the designs beside it: {error}") from None
    if written:
        frame = frame.assign(design=frame["trial"].map({trial: _key(data) for trial, data in written.items()}))
    with ExitStack() as both:  # if one cannot be written, the other stays what it was
        if written or settings:
            _dump(both.enter_context(replacing(path.with_suffix(".json"))), document)
        _write_table(path, frame)
    return path


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            _parquet(path).write_table(_arrow(path, table), temporary)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                table.to_csv(file, index=False, lineterminator="\n")


def _parquet(path: Path) -> Any:
    """pyarrow's module for Parquet, which is slow to import and an extra."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f'{path}: Parquet needs pyarrow; run pip install "memsplit[io]", or name a .csv') from None
    return parquet


def _arrow(path: Path, frame: pd.DataFrame) -> Any:
    """The frame's columns as an Arrow table, without index, attributes and what pandas would note of them; NaN is missing."""
    _parquet(path)
    import pyarrow

    if not frame.columns.is_unique or not all(isinstance(name, str) for name in frame.columns):
        raise ValueError(f"cannot write {path}: a Parquet file needs different texts as column names, not {list(frame.columns)}")
    try:
        return pyarrow.Table.from_pandas(pd.DataFrame(dict(frame.items())), preserve_index=False).replace_schema_metadata(None)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
        reason = _one_line("; ".join(str(part) for part in error.args))
        raise ValueError(f"cannot write {path}: {reason}; a column of a Parquet file holds numbers or texts, not both") from None
    except (OverflowError, UnicodeError):
        column, value = _not_for_arrow(frame)
        raise ValueError(
            f"cannot write {path}: column {column!r} holds {shown(value)}; a Parquet file takes whole numbers below 2**63 and texts "
            "without lone surrogates, so make it a float or replace the characters"
        ) from None


def _not_for_arrow(frame: pd.DataFrame) -> tuple[str, object]:
    """The first column and value that Arrow has no number or no characters for."""
    for name, column in frame.items():
        for value in column:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                return str(name), value
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                return str(name), value
    return next((str(name), name) for name in frame.columns if any("\ud800" <= letter <= "\udfff" for letter in str(name)))


def _dump(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")


def _load(beside: Path) -> dict[str, Any]:
    try:
        data = json.loads(beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {beside}: {error.strerror or error}; write_csv writes it beside the CSV of an exploration") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{beside} is damaged, it is no whole JSON file ({error}); write the table again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{beside} is no file of memsplit: it holds a {type(data).__name__}; name a CSV written by write_csv")
    return data


def _key(data: object) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the design's canonical JSON."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@cache
def _types() -> dict[str, type]:
    """The public dataclasses and enumerations of memsplit by name: the only types that are written and read."""
    from .. import dse, models, solvers

    public = [getattr(layer, name) for layer in (models, solvers, dse) for name in vars(layer).get("__all__", ())]
    return {item.__name__: item for item in public if isinstance(item, type) and (dataclasses.is_dataclass(item) or issubclass(item, Enum))}
