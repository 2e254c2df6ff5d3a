"""What every study's command line has in common: ``--out --seed --quick``, a table on the terminal, errors in one sentence."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd

from ..models.hardware import System
from ..models.presets import LLMS, SYSTEMS, llm_named, system_named
from ..models.workload import Workload
from .table import check_writable

Row = TypeVar("Row")

LARGEST_SEED = 2**32 - 1
"""Samplers and random generators of NumPy's older kind take no more."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal."""


def study_arguments(
    doc: str, argv: Sequence[str] | None, *, default_out: str, extra: Callable[[argparse.ArgumentParser], object] | None = None
) -> argparse.Namespace:
    """The arguments of a study whose docstring is ``doc``: ``out`` (a Path that can be written), ``seed``, ``quick``, what
    ``extra(parser)`` adds, and ``command``, which runs it again. ValueError if ``out`` cannot be written; wrong arguments exit with
    code 2."""
    module = sys._getframe(1).f_globals.get("__name__", "")  # who calls: a study of memsplit is started as a command of it
    prog = f"memsplit study {module.rpartition('.')[2]}" if module.startswith("memsplit.studies.") else None
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(default_out), help="CSV to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small version, below ten seconds")
    if extra is not None:
        extra(parser)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.seed <= LARGEST_SEED:
        parser.error(f"--seed must be at least 0 and at most {LARGEST_SEED}, not {arguments.seed}")
    check_writable(arguments.out)
    arguments.command = f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
    return arguments


def beside(out: Path, *endings: str) -> tuple[Path, ...]:
    """The paths of a study's other files, named after ``out``: "_all" is one more table, ".png" a picture.

    ValueError, before any work, if one of them cannot be written or two of a study's files have one name.
    """
    paths = [out.with_name(f"{out.stem}{ending}{'' if '.' in ending else out.suffix}") for ending in endings]
    tables = [out, *(path for path, ending in zip(paths, endings, strict=True) if "." not in ending)]
    names = [out, *paths, *(table.with_suffix(".json") for table in tables)]
    twice = next((path for index, path in enumerate(names) if path in names[:index]), None)
    if twice is not None:
        raise ValueError(f"cannot write {out}: the study's file {twice} would be written twice; choose another --out, as in {out.stem}.csv")
    return tuple(check_writable(path) for path in paths)


def finished_rows(rows: Iterable[Row]) -> tuple[list[Row], bool]:
    """The rows of an iterator, and whether Ctrl-C ended it: those finished before are kept, which stderr says.

    Ctrl-C before the first row is raised again, as there is nothing to keep. A study then writes its table, leaves out what it means,
    and returns ``INTERRUPTED``.
    """
    kept: list[Row] = []
    try:
        for row in rows:
            kept.append(row)
    except KeyboardInterrupt:
        if not kept:
            raise
        print(f"interrupted: {len(kept)} finished parts are kept", file=sys.stderr)
        return kept, True
    return kept, False


def serving_arguments(parser: argparse.ArgumentParser, *, batch: int) -> None:
    """Add what is served and on what: --system --llm --batch (``batch`` requests unless said) --context --weight-bits --kv-bits."""
    parser.add_argument("--system", default="h2m2", help=f"data sheet (.toml) or one of {', '.join(SYSTEMS)} (default: %(default)s)")
    parser.add_argument("--llm", default="llama2-70b", help=f"Hugging Face config.json or one of {', '.join(LLMS)} (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=batch, help="requests (default: %(default)s)")
    parser.add_argument("--context", type=positive, default=4096, help="tokens a request (default: %(default)s)")
    parser.add_argument("--weight-bits", type=float, default=8, help="bits of a weight (default: %(default)s)")
    parser.add_argument("--kv-bits", type=float, default=8, help="bits of a key or value (default: %(default)s)")


def served(arguments: argparse.Namespace) -> tuple[System, Workload]:
    """The machine and the workload that ``serving_arguments`` name; ValueError for a file or a number that is none."""
    system, llm = system_named(arguments.system), llm_named(arguments.llm)
    bits = {"weight_bits": arguments.weight_bits, "kv_bits": arguments.kv_bits}
    return system, Workload(llm=llm, batch=arguments.batch, context=arguments.context, **bits)


def positive(text: str) -> int:
    """A whole number above 0, for ``type=`` of an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


positive.__name__ = "whole number"


def show(frame: pd.DataFrame, *, title: str = "", rows: int = 40) -> None:
    """Print a table: at most ``rows`` lines, numbers with five digits."""
    if title:
        print(f"\n{title}")
    text = frame.head(rows).to_string(index=False, float_format=lambda value: f"{value:.5g}", na_rep="-", justify="right")
    print(text + (f"\n... {len(frame) - rows} more rows" if len(frame) > rows else ""), flush=True)
