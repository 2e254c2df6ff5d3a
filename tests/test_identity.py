"""What tells one score from another: whatever its rows may depend on, and nothing else."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from memsplit.dse._identity import digest, digest_or_name, identity
from memsplit.dse.mapping_sweep import MappingSweep
from memsplit.models import Workload
from memsplit.models.presets import H2M2_SYSTEM, LLAMA2_70B

SCORE = """
import numpy as np
from dataclasses import dataclass
from functools import cache
import constants
TRIALS = 100
OFFSET = 1
PRICES = {"HBM": 15}
def helper(n):
    return n + OFFSET
@cache
def cached(n):
    return n * 2
def score(columns, scale=3):
    inner = [PRICES["HBM"] for _ in range(2)]
    return {"a": helper(columns["n"]) * scale + cached(1) + constants.SPEED + inner[0]}
@dataclass
class Score:
    factor: float = 1.0
    def __call__(self, columns):
        return score(columns)
class Base:
    def settings(self):
        return {"base": 1}
class Derived(Base):
    def __call__(self, columns):
        return {"b": columns["n"]}
def made(k):
    return lambda columns: {"a": columns["n"] + k}
def bound():
    return [lambda columns, k=k: {"a": columns["n"] + k} for k in range(2)]
def two():
    return (lambda columns: {"a": 1}, lambda columns: {"a": 2})
"""


def load(folder: Path, text: str = SCORE, constants: str = "SPEED = 1\n"):
    """The text as a module, as a new process would see it."""
    for name, content in (("constants", constants), ("scores", text)):
        (folder / f"{name}.py").write_text(content)
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    import linecache

    linecache.checkcache()
    return sys.modules["scores"]


@pytest.fixture(autouse=True)
def _forget_modules():
    yield
    for name in ("constants", "scores"):
        sys.modules.pop(name, None)


CHANGES = {
    "a constant": ("OFFSET = 1", "OFFSET = 2"),
    "a dict of constants": ('"HBM": 15', '"HBM": 16'),
    "a helper": ("return n + OFFSET", "return n - OFFSET"),
    "a helper behind a cache": ("return n * 2", "return n * 4"),
    "a default argument": ("scale=3", "scale=4"),
    "its source": ("for _ in range(2)", "for _ in range(3)"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["score", "Score"])
def test_whatever_a_score_reaches_makes_it_another(tmp_path: Path, change, name):
    def made(module):
        return module.score if name == "score" else module.Score()

    before = digest(made(load(tmp_path)))
    assert before == digest(made(load(tmp_path)))
    assert before != digest(made(load(tmp_path, SCORE.replace(*CHANGES[change]))))


@pytest.mark.parametrize("name", ["score", "Score"])
def test_a_module_of_the_users_is_followed_and_what_a_score_does_not_reach_is_not(tmp_path: Path, name):
    before = digest(getattr(load(tmp_path), name))
    assert before != digest(getattr(load(tmp_path, constants="SPEED = 2\n"), name))
    assert before == digest(getattr(load(tmp_path, SCORE.replace("TRIALS = 100", "TRIALS = 200")), name)), "no score uses it"


def test_constants_that_were_set_after_the_import_count(tmp_path: Path):
    module = load(tmp_path)
    before = digest(module.score)
    module.OFFSET = 7
    assert digest(module.score) != before


def test_classes_bases_fields_defaults_cells_and_lambdas_of_one_line_differ(tmp_path: Path):
    module = load(tmp_path)
    assert digest(module.Score()) != digest(module.Score(factor=2.0))
    assert digest(module.made(1)) == digest(module.made(1)) != digest(module.made(2))
    assert digest(module.made(np.ones(2))) != digest(module.made(np.zeros(2)))
    assert len({digest(function) for function in (*module.bound(), *module.two(), partial(module.score, scale=1))}) == 5
    assert digest(module.Derived().__call__) != digest(module.Score().__call__)
    before = digest(module.Derived())
    assert before != digest(load(tmp_path, SCORE.replace('"b": columns["n"]', '"b": -columns["n"]')).Derived())
    assert before != digest(load(tmp_path, SCORE.replace('{"base": 1}', '{"base": 2}')).Derived())


def test_what_was_typed_into_a_session_is_told_by_its_instructions():
    def typed(text):
        names = {"__name__": "nowhere"}
        exec(text, names)
        return digest(names["score"])

    text = "K = 1\ndef score(columns):\n    return {'a': K if columns['n'] in {'x', 'y'} else 2}"
    assert typed(text) == typed(text)
    assert len({typed(text), typed(text.replace("K = 1", "K = 3")), typed(text.replace("2}", "4}"))}) == 3


def test_of_memsplit_and_of_packages_only_names_and_fields_are_taken():
    workload = Workload(llm=LLAMA2_70B, batch=8, context=4096)
    text = str(identity(MappingSweep(system=H2M2_SYSTEM, workload=workload)))
    assert "def " not in text
    assert digest(MappingSweep(system=H2M2_SYSTEM, workload=workload)) == digest(MappingSweep(system=H2M2_SYSTEM, workload=workload))


def test_what_nothing_tells_from_others_is_refused_or_named():
    with pytest.raises(ValueError, match=r"nothing tells one builtins\.object from another") as refusal:
        digest(object())
    assert "\n" not in str(refusal.value)
    assert digest_or_name(object()) == "builtins.object"
