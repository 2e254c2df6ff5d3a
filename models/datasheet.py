"""Read a machine from a TOML data sheet that a person can fill in; every quantity is written with its unit.

name = "my machine"
[[tier]]                                     # one for each memory, the fastest first
name = "HBM"
capacity = "96 GB"
bandwidth = "3 TB/s"
latency = "32 ns"                            # optional, as is all below
page = "2 MiB"
energy = "3.9 pJ/bit"
energy_source = "assumption: as HBM2"        # a source that begins with "assumption" is called so in every output
cost = "15 USD/GB"
cost_source = "assumption"
static_power = "10 W"                        # of the whole tier while it is on; with static_power_source
[[unit]]                                     # one for each processor
name = "HBM chip"
tier = "HBM"                                 # the memory it sits on
matrix_peak = "131 TFLOP/s"
vector_peak = "33 TFLOP/s"
tile = 128                                   # only for weight-stationary arrays
energy = "0.7 pJ/FLOP"                       # optional, as is all below, each with a ..._source
static_power = "55 W"
area = "400 mm2"
silicon_cost = "0.13 USD/mm2"                # the price is area x silicon_cost, or cost = "900 USD" a device
[[link]]                                     # one for each direction
source = "HBM"
target = "LPDDR"
bandwidth = "960 GB/s"
energy = "1.3 pJ/bit"                        # optional, as is the cost, each with a ..._source
cost = "0 USD"
"""

from __future__ import annotations

import reprlib
import tomllib
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .units import quantity

Bytes = Annotated[float, BeforeValidator(partial(quantity, dimension="capacity"))]
BytesPerSecond = Annotated[float, BeforeValidator(partial(quantity, dimension="bandwidth"))]
Seconds = Annotated[float, BeforeValidator(partial(quantity, dimension="time"))]
FlopPerSecond = Annotated[float, BeforeValidator(partial(quantity, dimension="compute rate"))]
JoulePerByte = Annotated[float, BeforeValidator(partial(quantity, dimension="energy"))]
UsdPerByte = Annotated[float, BeforeValidator(partial(quantity, dimension="price"))]
JoulePerFlop = Annotated[float, BeforeValidator(partial(quantity, dimension="compute energy"))]
Watts = Annotated[float, BeforeValidator(partial(quantity, dimension="power"))]
SquareMetres = Annotated[float, BeforeValidator(partial(quantity, dimension="area"))]
Usd = Annotated[float, BeforeValidator(partial(quantity, dimension="price of a part"))]
UsdPerSquareMetre = Annotated[float, BeforeValidator(partial(quantity, dimension="price of silicon"))]


class _Sheet(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Tier(_Sheet):
    name: str
    capacity: Bytes
    bandwidth: BytesPerSecond
    latency: Seconds = 0.0
    page: Bytes = 1.0
    energy: JoulePerByte | None = None
    energy_source: str = ""
    cost: UsdPerByte | None = None
    cost_source: str = ""
    static_power: Watts | None = None
    static_power_source: str = ""


class _Unit(_Sheet):
    name: str
    tier: str
    matrix_peak: FlopPerSecond
    vector_peak: FlopPerSecond
    tile: int | None = None
    energy: JoulePerFlop | None = None
    energy_source: str = ""
    static_power: Watts | None = None
    static_power_source: str = ""
    area: SquareMetres | None = None
    area_source: str = ""
    cost: Usd | None = None
    cost_source: str = ""
    silicon_cost: UsdPerSquareMetre | None = None
    silicon_cost_source: str = ""


class _Link(_Sheet):
    source: str
    target: str
    bandwidth: BytesPerSecond
    latency: Seconds = 0.0
    efficiency: float = 1.0
    energy: JoulePerByte | None = None
    energy_source: str = ""
    cost: Usd | None = None
    cost_source: str = ""


class _Machine(_Sheet):
    name: str
    source: str = ""
    tier: list[_Tier]
    unit: list[_Unit]
    link: list[_Link] = []


_ENTRIES: dict[str, type[_Sheet]] = {"tier": _Tier, "unit": _Unit, "link": _Link}


def read_sheet(path: Path) -> dict[str, Any]:
    """The entries of the data sheet at ``path`` in SI units: ``{"name": ..., "tier": [{...}], "unit": [...], "link": [...]}``.

    ValueError in one sentence: file, entry, rule, value and way out.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the data sheet {path}: {error.strerror}; name a TOML file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML file: {error}; mend that place, or start from a data sheet that memsplit ships") from None
    try:
        return _Machine.model_validate(data).model_dump()
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_error(error, data)}") from None


def _first_error(error: ValidationError, data: dict[str, Any]) -> str:
    errors = error.errors(include_url=False, include_context=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    where, key = _place(first["loc"], data)
    keys = list((_ENTRIES.get(str(first["loc"][0]), _Machine) if len(first["loc"]) > 1 else _Machine).model_fields)
    match first["type"]:
        case "extra_forbidden":
            return f"{where} has the unknown key {key!r}; keys are {keys}"
        case "missing":
            return f"{where} lacks the key {key!r}; add it"
        case "value_error":
            return f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}"
        case _:
            return f"{where}: {key}: {first['msg']}, not {reprlib.repr(first['input'])}; correct it"


def _place(location: tuple[int | str, ...], data: dict[str, Any]) -> tuple[str, str]:
    """("tier 'HBM'", "bandwidth") for ("tier", 0, "bandwidth")."""
    if len(location) < 3:
        return "the data sheet", str(location[0])
    entry, index, key = str(location[0]), int(location[1]), str(location[2])
    given = data[entry][index]
    name = " -> ".join(str(given.get(end)) for end in ("source", "target")) if entry == "link" else given.get("name")
    return f"{entry} {name!r}" if name else f"{entry} number {index + 1}", key
