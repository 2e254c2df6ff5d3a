"""A small search whose functions worker processes can import: two memories, in a space where one has a parameter more."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import optuna
import pandas as pd

from memsplit.dse import Constraint, Objective, explore

OBJECTIVES = [Objective("latency_s"), Objective("memory_usd")]
LIMITS = [Constraint("memory_usd", at_most=40)]


def design(trial: optuna.Trial) -> tuple[float, str]:
    """A bandwidth and one of two memories; HBM has a third parameter."""
    memory = trial.suggest_categorical("memory", ["hbm", "lpddr"])
    stacks = trial.suggest_int("stacks", 1, 6) if memory == "hbm" else 1
    return trial.suggest_float("bandwidth_GBps", 1, 16) * stacks, memory


def score(machine: tuple[float, str]) -> dict[str, float | str | None] | None:
    """A tenth of the LPDDR is not made; columns of several types."""
    bandwidth, memory = machine
    if memory == "lpddr" and bandwidth > 14:
        return None
    return {"latency_s": 1 / bandwidth, "memory_usd": bandwidth * (3 if memory == "hbm" else 1), "kind": memory.upper(), "gap": None}


def batch_score(machines: list[tuple[float, str]]) -> list[dict[str, float | str | None] | None]:
    return [score(machine) for machine in machines]


class LoggedScore:
    """The score, with a line in a file for each design begun, and ``seconds`` each; once, from line ``fatal`` on, it kills its process."""

    def __init__(self, log: Path, seconds: float = 0.0, fatal: int | None = None) -> None:
        self.log, self.seconds, self.fatal = log, seconds, fatal

    def __call__(self, machine: tuple[float, str]) -> dict[str, float | str | None] | None:
        with self.log.open("a") as file:
            file.write("begun\n")
        time.sleep(self.seconds)
        if self.fatal is not None and begun(self.log) >= self.fatal:
            with suppress(FileExistsError), self.log.with_suffix(".fatal").open("x"):
                os.kill(os.getpid(), signal.SIGKILL)
        return score(machine)


def begun(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def run(storage: object = None, trials: int = 40, **settings) -> pd.DataFrame:
    name = None if storage is None else "memories"
    arguments = {"design": design, "score": score, "objectives": OBJECTIVES, "constraints": LIMITS, "population": 12, "dominated": True}
    return explore(**(arguments | {"trials": trials, "storage": storage, "name": name} | settings))


def kill(machine: tuple[float, str]) -> None:
    """A score that no process survives."""
    os.kill(os.getpid(), signal.SIGKILL)
