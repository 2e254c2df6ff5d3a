"""The structure of the tree: imports point left, vendors stay behind their adapters, and `ls` shows what there is."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("models", "solvers", "dse", "studies")
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "dse", "models", "solvers", "studies", "tests"),
    *("Makefile", ".ci", "docs", "benchmarks", "LICENSE", "CHANGELOG.md", ".gitignore", "requirements.lock"),
}
VENDORS = {
    "pulp": ("solvers/_pulp.py",),
    "ortools": ("solvers/_cpsat.py",),
    "optuna": ("dse/explore.py", "dse/_search.py", "dse/_storage.py", "dse/record.py", "dse/samplers.py"),
    "matplotlib": ("dse/plots.py",),
    "numba": ("solvers/_table_compiled.py",),
    "sklearn": ("studies/fidelity.py",),
    "torch": (
        "dse/runtime/runtime.py",
        "dse/runtime/_decoder.py",
        "dse/runtime/_link.py",
        "dse/runtime/_placed.py",
        "dse/runtime/_weights.py",
        "dse/runtime/_execution.py",
        "dse/runtime/_states.py",
        "dse/machine/_torch.py",
    ),
    "safetensors": ("dse/runtime/_weights.py",),
}
LAZY_VENDORS = ("pulp", "ortools", "optuna")
MAX_LINES = 500

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
relative = [str(path.relative_to(ROOT)) for path in PACKAGE_FILES]
each_file = pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)


class Import(NamedTuple):
    """One imported name: ``module`` as if absolute, ``level`` (dots written), ``line``, ``lazy`` (in a function or for types only)."""

    module: str
    level: int
    line: int
    lazy: bool


def package_of(path: Path) -> str:
    """The package a file belongs to: ``dse/_root`` is memsplit itself."""
    folder = path.relative_to(ROOT).parent
    return "memsplit" if folder == Path("dse/_root") else ".".join(("memsplit", *folder.parts))


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(syntax(path), package_of(path), lazy=False))


def _imports(node: ast.AST, package: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        match child:
            case ast.Import():
                yield from (Import(alias.name, 0, child.lineno, lazy) for alias in child.names)
            case ast.ImportFrom():
                module = resolve_name("." * child.level + (child.module or ""), package) if child.level else child.module or ""
                yield from (Import(f"{module}.{alias.name}", child.level, child.lineno, lazy) for alias in child.names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                module = resolve_name(name, package)
                yield Import(module, len(name) - len(name.lstrip(".")), child.lineno, lazy)
        yield from _imports(child, package, lazy or types_only or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def layer_of(module: str) -> str | None:
    """The layer an absolute module name lies in; None for the rest of the world and for memsplit itself."""
    first, _, rest = module.partition(".")
    second = rest.partition(".")[0]
    return second if first == "memsplit" and second in LAYERS else None


def found(path: Path, lines: list[str]) -> str:
    return "".join(f"\n{path.relative_to(ROOT)}:{line}" for line in lines)


@each_file
def test_imports_point_left(path: Path):
    """models <- solvers <- dse <- studies: a layer never imports one to its right, and memsplit itself imports none but for its command."""
    layer = layer_of(package_of(path))
    allowed = LAYERS[: LAYERS.index(layer) + 1] if layer else ("dse",) if path.name == "__main__.py" else ()
    wrong = [f"{i.line} imports {i.module}" for i in imports(path) if layer_of(i.module) and layer_of(i.module) not in allowed]
    assert not wrong, found(path, wrong)


@each_file
def test_library_layers_import_each_other_by_relative_names_and_studies_by_absolute_ones(path: Path):
    """Relative names hold on disk and in the wheel alike; a study is written as a user writes it."""
    absolute = layer_of(package_of(path)) == "studies"
    inside = [i for i in imports(path) if i.level or i.module.partition(".")[0] == "memsplit"]
    wrong = [f"{i.line} imports {i.module}" for i in inside if (i.level == 0) != absolute]
    assert not wrong, found(path, wrong)


@pytest.mark.parametrize("path", PACKAGE_FILES + TEST_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_bare_layer_name_is_imported(path: Path):
    """``import models`` would make a second copy of every class."""
    wrong = [f"{i.line} imports {i.module}" for i in imports(path) if not i.level and i.module.partition(".")[0] in LAYERS]
    assert not wrong, found(path, wrong)


def test_studies_use_public_names_only():
    """What a study needs from another layer, a user may need, too."""
    wrong = [
        f"{path.relative_to(ROOT)}:{i.line} imports {i.module}"
        for path in PACKAGE_FILES
        if layer_of(package_of(path)) == "studies"
        for i in imports(path)
        if layer_of(i.module) not in (None, "studies") and re.search(r"\._(?!_)", i.module)
    ]
    assert not wrong, "\n".join(wrong)


@each_file
def test_vendors_stay_behind_their_adapters(path: Path):
    """One file knows each vendor; what is slow to import is imported where it is used."""
    name = str(path.relative_to(ROOT))
    wrong = []
    for i in imports(path):
        vendor = i.module.partition(".")[0]
        if vendor in VENDORS and name not in VENDORS[vendor]:
            wrong.append(f"{i.line} imports {i.module}; only {', '.join(VENDORS[vendor])} may")
        elif vendor in LAZY_VENDORS and not i.lazy:
            wrong.append(f"{i.line} imports {i.module} at the top; import it inside the function that uses it")
    assert not wrong, found(path, wrong)


@each_file
def test_third_party_imports_are_declared(path: Path):
    """A missing dependency is seen only on a machine that does not happen to have it."""
    known = module_names(PROJECT["project"]["dependencies"]) | set(sys.stdlib_module_names) | {"memsplit"}
    extras = {
        name for extra, listed in PROJECT["project"]["optional-dependencies"].items() if extra != "dev" for name in module_names(listed)
    }
    adapter = any(str(path.relative_to(ROOT)) in VENDORS.get(extra, ()) for extra in extras)
    wrong = []
    for i in imports(path):
        module = i.module.partition(".")[0].lower()
        if not i.level and module not in known and not (module in extras and (i.lazy or adapter)):
            wrong.append(f"{i.line} imports {i.module}")
    assert not wrong, found(path, wrong)


def module_names(requirements: list[str]) -> set[str]:
    """What requirements such as "dask[distributed]>=2025.1" are imported as."""
    names = {name.lower().replace("-", "_") for one in requirements for name in re.findall(r"[A-Za-z][\w-]*", re.split(r"[<>=~!]", one)[0])}
    return {{"psycopg2_binary": "psycopg2", "grpcio": "grpc", "scikit_learn": "sklearn"}.get(name, name) for name in names}


@each_file
def test_nothing_runs_data_as_code(path: Path):
    """No pickles, no eval or exec, no shell: data sheets and tables from strangers are only read."""
    wrong = [f"{i.line} imports {i.module}" for i in imports(path) if i.module.partition(".")[0] in ("pickle", "marshal", "shelve", "dill")]
    for node in ast.walk(syntax(path)):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                wrong.append(f"{node.lineno} calls {name}")
            case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name):
                wrong.append(f"{node.lineno} uses os.{name}")
            case ast.Attribute(attr="read_pickle" | "to_pickle" as name):
                wrong.append(f"{node.lineno} uses {name}")
            case ast.keyword(arg="shell", value=value) if not (isinstance(value, ast.Constant) and value.value is False):
                wrong.append(f"{value.lineno} opens a shell")
    assert not wrong, found(path, wrong)


def test_files_are_short_enough_to_read():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in PACKAGE_FILES + TEST_FILES
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"split what is above {MAX_LINES} lines: {long}"


def test_packages_in_pyproject_are_the_folders_with_modules():
    """setuptools ships only the folders it is told of, and says nothing of the others."""
    configured = PROJECT["tool"]["setuptools"]
    folders = {package_of(path): str(path.relative_to(ROOT).parent) for path in PACKAGE_FILES}
    assert sorted(folders) == sorted(configured["packages"])
    assert folders == configured["package-dir"]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_bare_layer_import_is_refused_with_a_hint(layer: str):
    """In the tree's root, Python finds ``models``; the refusal names the import that works."""
    run = subprocess.run([sys.executable, "-c", f"import {layer}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"ImportError: import memsplit.{layer}, not {layer}")


@functools.cache
def tracked_files() -> tuple[Path, ...]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def test_the_top_level_holds_only_what_it_should():
    """A stranger's first `ls` is the map."""
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files()} <= TOP_LEVEL


def test_no_file_names_a_registry_host():
    """Where packages come from is the user's setting; a lock file holds hashes, not addresses."""
    hosts = re.compile(
        "|".join((r"pypi\.org", r"python" r"hosted\.org", r"anaconda\.org", r"index[-_]url", r"find[-_]links")), re.IGNORECASE
    )
    wrong = []
    for path in tracked_files():
        text = path.read_text(errors="replace")
        if path != Path(__file__).resolve() and hosts.search(text):
            wrong.append(str(path.relative_to(ROOT)))
        if path.suffix == ".lock" and "http" in text:
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong
