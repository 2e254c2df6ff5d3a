"""Files of a profile: whose they are, and how all of them, or none, take the place of those that are there."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...models.calibration import Calibration
from ...models.calibration_records import read_records
from ..table import replacing
from ._sheet import quoted

MARK = "# Measured by memsplit profile"
"""How its files begin."""


def ours(path: Path) -> bool:
    """Whether a profile wrote the file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
        if path.suffix == ".csv":
            return {"kernel", "measured_s", "spread", "runs"} <= set(next(csv.reader([first]), []))
        return first.startswith(MARK) or bool(path.stem.endswith("_records") and read_records(path))
    except (OSError, ValueError):
        return False


def staged(stack: ExitStack, path: Path, text: str, written: list[Path]) -> Path:
    """A temporary file with ``text`` that takes the place of ``path`` when the stack ends well, which ``written`` then holds."""

    @contextmanager
    def replaced() -> Iterator[Path]:
        with replacing(path) as temporary:
            yield temporary
        written.append(path)

    temporary = stack.enter_context(replaced())
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a full disk says so now, before any file is replaced
    return temporary


def stale(*paths: Path) -> tuple[str, ...]:
    """Sentences about files that are there although the profile did not write them."""
    return tuple(f"{path.name}: what is there is of an earlier profile" for path in paths if path.exists())


def prediction(record: Calibration, device_sheet: str, records_sheet: str) -> str:
    """Python that predicts with a record."""
    variant = f" variant={quoted(record.variant)}," if record.variant else ""
    return f"KernelTime.calibrated({quoted(record.kernel)}, {quoted(device_sheet)},{variant} records=read_records({quoted(records_sheet)}))"
