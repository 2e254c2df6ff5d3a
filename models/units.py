"""SI constants, and quantities with a unit written by a person ("96 GB", "3 TB/s", "3.9 pJ/bit").

Inside memsplit every number is SI: bytes, seconds, bytes/s, FLOP/s, J, W, m2, USD. GB is 1e9 and GiB is 2**30; a multiply-add is 2 FLOP.
"""

from __future__ import annotations

import math
import re

kB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40
ms, us, ns = 1e-3, 1e-6, 1e-9
GFLOPS, TFLOPS, PFLOPS = 1e9, 1e12, 1e15
pJ = 1e-12
kWh = 3.6e6
mm2 = 1e-6
YEAR = 365.25 * 24 * 3600

_BYTES = {"B": 1.0, "kB": kB, "MB": MB, "GB": GB, "TB": TB, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}
_FLOPS = {"FLOP/s": 1.0, "GFLOP/s": GFLOPS, "TFLOP/s": TFLOPS, "PFLOP/s": PFLOPS}

UNITS: dict[str, dict[str, float]] = {
    "capacity": _BYTES,
    "bandwidth": {f"{unit}/s": factor for unit, factor in _BYTES.items()},
    "time": {"s": 1.0, "ms": ms, "us": us, "ns": ns},
    "compute rate": _FLOPS,
    "energy": {"J/B": 1.0, "pJ/B": pJ, "pJ/bit": 8 * pJ},
    "compute energy": {"J/FLOP": 1.0, "pJ/FLOP": pJ},
    "power": {"W": 1.0, "mW": 1e-3, "kW": 1e3},
    "area": {"m2": 1.0, "mm2": mm2},
    "price": {"USD/B": 1.0, "USD/GB": 1 / GB, "USD/GiB": 1 / GiB},
    "price of a part": {"USD": 1.0},
    "price of silicon": {"USD/m2": 1.0, "USD/mm2": 1 / mm2},
}

_QUANTITY = re.compile(r"\s*+([-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?|inf)\s*+(\S*+)\s*+")


def quantity(text: object, dimension: str) -> float:
    """The SI value of a quantity written with its unit: ``quantity("3 TB/s", "bandwidth")`` is ``3e12``.

    ``dimension`` is a key of ``UNITS``. Raises ValueError, in one sentence with an example, for a bare number, an unknown
    unit or a unit of another dimension.
    """
    units = UNITS[dimension]
    example = f'write it with a unit, as in "1 {list(units)[min(3, len(units) - 1)]}" (units: {", ".join(units)})'
    if not isinstance(text, str):
        raise ValueError(f"{text!r} has no unit; {example}")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit; {example}")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text!r} has no unit; {example}")
    if unit not in units:
        raise ValueError(f"{text!r} has the unit {unit!r}, which is no unit of {dimension}; {example}")
    value = float(number) * units[unit]
    if math.isinf(value) and number != "inf":
        raise ValueError(f"{text!r} is too large for a number; {example}")
    return value
