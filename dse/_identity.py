"""What tells one score, design function or table of designs from another, so that no rows of two are mixed."""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import inspect
import json
import os
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

_MEMSPLIT = __name__.partition(".")[0]


def identity(value: object) -> Any:
    """What tells ``value`` from others, as data for ``json``. ValueError if nothing does.

    Of an array a hash. Of a function its source, its default arguments, what it encloses, and whatever of this it reaches by a global name:
    constants, other functions and classes, and the source of modules. Of an object its fields, if it is a dataclass, or its
    ``settings()``, and its class as of functions. Of memsplit, of Python and of other installed packages only names are taken, and what a
    module imports is not followed.
    """
    kind = value if isinstance(value, FunctionType | type) else type(value)
    return _Walk(own=kind.__module__.partition(".")[0]).identity(value)


def digest(value: object) -> str:
    """A hash of ``identity(value)``."""
    return hashlib.sha256(json.dumps(identity(value)).encode()).hexdigest()


def digest_or_name(value: object) -> str:
    """``digest``, or the name of the type of a value that nothing tells from others."""
    try:
        return digest(value)
    except ValueError:
        return f"{type(value).__module__}.{type(value).__qualname__}"


@dataclass(frozen=True, slots=True)
class _Walk:
    """One walk from a value to all it reaches; ``own``: the package it is from, which is followed even if it is installed."""

    own: str
    seen: set[int] = field(default_factory=set)

    def identity(self, value: object) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return repr(value)
        if isinstance(value, np.ndarray):
            data = "\0".join(map(str, value.tolist())).encode() if value.dtype.kind in "OUT" else np.ascontiguousarray(value).tobytes()
            return [value.dtype.str, list(value.shape), hashlib.sha256(data).hexdigest()]
        if isinstance(value, Mapping):
            return [[self.identity(key), self.identity(item)] for key, item in value.items()]
        if isinstance(value, tuple | list):
            return [self.identity(item) for item in value]
        if isinstance(value, set | frozenset):
            return sorted(json.dumps(self.identity(item)) for item in value)
        if isinstance(value, os.PathLike):
            return ["path", str(value)]
        if isinstance(value, partial):
            return ["partial", *(self.identity(part) for part in (value.func, value.args, value.keywords))]
        if inspect.ismethod(value):
            return ["method", self.identity(value.__self__), value.__name__]
        if isinstance(value, FunctionType):
            return self.function(value)
        if isinstance(value, type):
            return self.kind(value)
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, Enum):
            return [name, value.name]
        settings = getattr(value, "settings", None)
        if dataclasses.is_dataclass(value):
            return [name, [[item.name, self.identity(getattr(value, item.name))] for item in fields(value)], self.kind(type(value))]
        if callable(settings):
            return [name, self.identity(settings()), self.kind(type(value))]
        raise ValueError(
            f"nothing tells one {name} from another, so its checkpoint could be mistaken; make it a dataclass or a function in a module, "
            "or give it settings() -> dict"
        )

    def function(self, function: FunctionType) -> Any:
        """Name, source, default arguments, what it encloses, what it reaches."""
        name, code = [function.__module__, function.__qualname__], function.__code__
        if id(function) in self.seen or not self.follows(function.__module__):
            return name
        self.seen.add(id(function))
        source = _source(code)
        told = source if source and code.co_name != "<lambda>" else [source, _instructions(code)]  # lambdas may share a line
        enclosed = []
        for cell_name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
            enclosed.append([cell_name, self.identity(content)])
        return [*name, told, self.identity(function.__defaults__), self.identity(function.__kwdefaults__), enclosed, self.reached(function)]

    def kind(self, kind: type) -> Any:
        """The source of a class and of those it is made from, and what their functions reach."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        if id(kind) in self.seen or not self.follows(kind.__module__):
            return name
        self.seen.add(id(kind))
        source, members = _source(kind), []
        for member_name, member in sorted(vars(kind).items()):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, FunctionType):
                members.append([member_name, self.reached(function) if source else self.known(function)])
            elif not member_name.startswith("_"):
                members.append([member_name, self.known(member)])
        return [name, source, members, [self.kind(base) for base in kind.__bases__]]

    def reached(self, function: FunctionType) -> list[Any]:
        """What a function reaches by global names."""
        names = sorted(set(_global_names(function.__code__)) & function.__globals__.keys())
        return [[name, self.known(function.__globals__[name])] for name in names]

    def known(self, value: Any) -> Any:
        """The identity of something that is reached; of what has none its type: most often it is a tool, such as a logger."""
        if hasattr(value, "__wrapped__") and not isinstance(value, FunctionType | type | ModuleType):  # of functools.cache
            value = value.__wrapped__
        try:
            if isinstance(value, ModuleType):
                return [value.__name__, _source(value) if self.follows(value.__name__) else ""]
            return self.identity(value)
        except (ValueError, RecursionError):
            return f"{type(value).__module__}.{type(value).__qualname__}"

    def follows(self, module: str) -> bool:
        """Whether ``module`` is the user's, and may change between two calls without a new version."""
        package = module.partition(".")[0]
        if package == _MEMSPLIT or package in sys.stdlib_module_names:
            return False
        file = getattr(sys.modules.get(module), "__file__", None)
        return package == self.own or file is None or not any(place in Path(file).resolve().parents for place in _installed())


def _source(thing: CodeType | type | ModuleType) -> str:
    """ "" if it cannot be found, as of what was typed into a session."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def _instructions(code: CodeType) -> list[Any]:
    constants: list[Any] = []
    for item in code.co_consts:
        text = sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item)
        constants.append(_instructions(item) if isinstance(item, CodeType) else text)
    return [code.co_code.hex(), constants, list(code.co_names)]


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


@cache
def _installed() -> tuple[Path, ...]:
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(Path(place).resolve() for place in {*places, *site.getsitepackages(), site.getusersitepackages()})
