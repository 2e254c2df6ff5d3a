"""Search the hardware: Optuna proposes, the user's functions build and price, every finished design becomes a row."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import __version__
from ..models.checks import check_name, check_number, shown, whole
from ._arguments import check_function, check_settings, constraints_of, objectives_of
from ._identity import digest_or_name
from ._pricing import Price, Pricing, Score
from ._search import Finished, Search, all_finished, in_generations, one_by_one
from ._storage import Alone, Record, open_storage, open_study, settings_key
from .confidence import Errors, check_errors, check_free, ends_of, error_bars, told_apart
from .pareto import Objective, minimised, non_dominated
from .samplers import NSGA2, Sampler, check_sampler, described, is_value
from .table import Shared

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

Design = TypeVar("Design")


@dataclass(frozen=True, slots=True)
class Constraint:
    """Limits on a column of the score, its unit in its name: ``Constraint("power_W", at_most=500)``."""

    name: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"a constraint needs the name of a column, not {shown(self.name)}")
        limits = [limit for limit in (self.at_least, self.at_most) if limit is not None]
        if not limits or not all(map(_is_limit, limits)):
            raise ValueError(
                f"constraint {self.name!r} needs finite limits, at_most or at_least, not {shown(self.at_most)} and {shown(self.at_least)}"
            )
        if limits != sorted(limits):
            raise ValueError(f"constraint {self.name!r}: at_least {self.at_least!r} is above at_most {self.at_most!r}; exchange them")

    def violation(self, value: float) -> float:
        """By how much of itself a limit is exceeded (of 1, if the limit is 0); 0 or less if all limits hold.

        Relative, because samplers add up the violations of constraints in different units.
        """
        excess = [(limit, sign * (value - limit)) for limit, sign in ((self.at_most, 1), (self.at_least, -1)) if limit is not None]
        return max(over / (abs(limit) or 1.0) for limit, over in excess)


def _is_limit(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def explore(
    design: Callable[[Trial], Design],
    score: Callable[[Design], Score] | None,
    objectives: Sequence[Objective],
    *,
    trials: int,
    constraints: Sequence[Constraint] = (),
    seed: int = 0,
    sampler: Sampler | BaseSampler | None = None,
    batch_score: Callable[[list[Design]], Sequence[Score]] | None = None,
    population: int | None = None,
    settings: Mapping[str, Any] | None = None,
    dominated: bool = False,
    progress: bool | None = None,
    timeout: float | None = None,
    storage: str | Path | BaseStorage | None = None,
    name: str | None = None,
    workers: int = 1,
    synchronous: bool = True,
    patience: float = 60.0,
    errors: Errors | None = None,
) -> pd.DataFrame:
    """The Pareto front of ``objectives`` among ``trials`` designs proposed by Optuna.

    ``design(trial)`` asks Optuna's own trial for parameters and returns a design, such as a System. ``score(design)`` returns
    a dict of columns, named with their units, among them every objective; or None if nothing fits. ``batch_score(designs)``,
    if given, prices in its place all designs that are asked at once: ``population`` of them (None: as many as suit the sampler).

    ``sampler`` is a value of ``samplers`` (None: ``NSGA2()``) with its own seed or else ``seed``, and the same seed gives the same frame.
    Any sampler object of Optuna's will do, too; it has its own seed, so the column stays empty. Those that learn from every single trial
    want ``population=1``, and those of a finite grid may end the search before ``trials``.
    ``constraints`` reach the sampler as constraints, not as penalties; a row that violates one is never on the front.

    ``storage`` keeps the trials under ``name``: the path of a journal file, a database (``postgresql://``, ``mysql://``, ``sqlite:///``),
    ``grpc://host:port`` of Optuna's proxy, or a storage of Optuna's. The same call goes on where it was stopped or killed; ``trials``
    is the total, and may have grown. A name belongs to its version of memsplit, objectives, constraints, settings, score, design function,
    sampler, seed and population. A function is another when its source, a default argument, or a constant, function or class that it
    reaches by name has changed; an object is told by its fields, if it is a dataclass, or by its ``settings()``, else by its class only.

    ``synchronous``: each population is asked, priced and told as a whole and in order. With ``workers`` above 1 its pricing is spread
    over so many processes, for which the score has to be importable and the script to have ``if __name__ == "__main__":``. The frame is
    the same for any number of workers and wherever the search was stopped, given a sampler with a seed and a score that prices a design
    the same in any company: what the storage knows is told to a fresh sampler again, which costs its time, and is not priced again. One
    process at a time, since two would both do all the work: a second on the same machine is refused, one on another machine is warned.
    In a journal a trial costs 2 to 8 ms, its sampler included; GP and TPE take their own time beside.

    ``synchronous=False``: any number of processes and machines run the same call with one ``storage`` and ``name``, and each asks whenever
    a worker is free, which in a journal costs about 45 ms a trial. **Which designs are tried then depends on timing**, not on the seed
    alone. Exactly ``trials`` designs are finished at the end; each process waits for that and returns all of them. Those of a process
    without a sign of life for ``patience`` seconds are replaced.

    The frame has one row a design on the front (once, however often it was proposed) or, with ``dominated``, one a trial that
    was not infeasible. Columns: trial, the parameters, the score's, within_limits, on_front, seed. The front comes first,
    best first in the first objective. ``attrs``: "finished" trials, of them "infeasible" (score None), and of the others "violating"
    constraints; "interrupted", whether Ctrl-C ended the search; "designs" by trial, and "settings", what else the rows depend on, both for
    ``write_csv``; "sampler", its fields.

    ``errors``: calibration records behind objectives, by their names. The frame has the ends of these columns (``error_bars``), and
    ``told_apart``: whether no other row could stand in for this one, within the model's error. A parameter or a column of the score of
    one of these names is a ValueError.

    Ctrl-C and ``timeout`` [s] keep what is finished; if nothing is, KeyboardInterrupt goes on. ``progress``: a bar on stderr;
    None: if stderr is a terminal.
    """
    chosen: Sampler | BaseSampler = NSGA2() if sampler is None else sampler
    check_sampler(chosen)
    value = cast("Sampler", chosen) if is_value(chosen) else None
    if population is None:
        population = 50 if value is None else value.population
    check_function("design", design, "Optuna's trial")
    price = Price(score, batch_score)
    objectives, constraints = objectives_of("objectives", objectives), constraints_of(constraints)
    trials, population = whole("explore", "trials", trials, "designs"), whole("explore", "population", population, "designs")
    workers = whole("explore", "workers", workers, "processes")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"explore: seed must be a whole number from 0 to 2**32 - 1, not {shown(seed)}")
    seed = int(seed)
    if timeout is not None:
        check_number("explore", "timeout", timeout, "s; None sets no limit")
    check_number("explore", "patience", patience, "s")
    check_settings(settings)
    check_errors({} if errors is None else errors, [objective.name for objective in objectives])
    added = (*ends_of(errors), "told_apart") if errors else ()
    if (storage is None) != (name is None):
        raise ValueError("storage and name belong together: a storage holds studies by name; give both or none")
    if name is not None:
        check_name("study", name)
    search = Search(
        design=design,
        objectives=objectives,
        constraints=constraints,
        trials=trials,
        population=population,
        deadline=math.inf if timeout is None else time.monotonic() + timeout,
    )
    used = None if value is None else seed if value.seed is None else value.seed
    about: dict[str, Any] = {
        "mode": "synchronous" if synchronous else "asynchronous",
        "memsplit": __version__,
        "constraints": [[item.name, item.at_most, item.at_least] for item in constraints],
        "settings": settings_key(settings or {}) if storage is not None else "",
        "score": digest_or_name(score if batch_score is None else batch_score) if storage is not None else "",
        "design": digest_or_name(design) if storage is not None else "",
        "sampler": described(chosen) | ({} if used is None else {"seed": used}),
        "population": population,
    }
    with _quiet_optuna(), Pricing(price, workers) as pricing:
        bar = tqdm(total=trials, unit="design", disable=None if progress is None else not progress)
        with bar:
            if synchronous:
                built = chosen if value is None else value.build(seed=used or 0, population=max(2, min(population, trials)))
                finished, interrupted = _in_order(search, pricing, cast("BaseSampler", built), storage, name, about, bar, added)
            else:
                finished, interrupted = _shared(search, pricing, chosen, used, storage, name, about, patience, bar)
    if interrupted:
        if not finished:
            raise KeyboardInterrupt
        print(f"explore: interrupted after {len(finished)} of {trials} trials; they are kept", file=sys.stderr)
    frame = _frame(finished, search, used if synchronous else None)
    check_free(frame.columns, added)
    if not dominated:
        parameters = [name for name in frame.columns if any(name in done.parameters for done in finished)]
        frame = frame[frame["on_front"]].drop_duplicates(parameters, ignore_index=True)
    if errors:
        frame = error_bars(frame, errors).assign(told_apart=told_apart(frame, objectives, errors))
    kept = set(frame["trial"])
    frame.attrs |= {
        "finished": len(finished),
        "infeasible": sum(done.score is None for done in finished),
        "violating": sum(done.score is not None and not done.within_limits for done in finished),
        "interrupted": interrupted,
        "designs": Shared({done.number: done.design for done in finished if done.number in kept}),
        "settings": Shared(settings or {}),
        "sampler": Shared(about["sampler"]),
    }
    return frame


def _in_order(
    search: Search,
    pricing: Pricing,
    sampler: BaseSampler,
    storage: str | Path | BaseStorage | None,
    name: str | None,
    about: Mapping[str, Any],
    bar: Any,
    added: Sequence[str],
) -> tuple[list[Finished], bool]:
    """A search in generations: Optuna's study is in memory, and the storage, if any, keeps what is finished. ValueError as soon as a trial
    has one of the columns that are to be ``added`` at the end."""
    import optuna

    record: Record | None = None
    alone: AbstractContextManager[object] = nullcontext()
    if storage is not None:
        opened, where = open_storage(storage)
        kept = open_study(opened, where, name or "", search.objectives, about)
        alone = Alone(kept, where)
        record = Record.of(kept, where)
    study = optuna.create_study(directions=[objective.direction for objective in search.objectives], sampler=sampler)
    _let_it_stop(study)
    finished: list[Finished] = []
    try:
        with alone:
            for done in in_generations(search, study, pricing, record):
                check_free((*done.parameters, *(done.score or ())), added)
                finished.append(done)
                bar.update()
    except KeyboardInterrupt:
        return finished, True
    return finished, False


def _shared(
    search: Search,
    pricing: Pricing,
    chosen: Sampler | BaseSampler,
    seed: int | None,
    storage: str | Path | BaseStorage | None,
    name: str | None,
    about: Mapping[str, Any],
    patience: float,
    bar: Any,
) -> tuple[list[Finished], bool]:
    """A search of several processes, whose study is the storage's."""
    from optuna.storages import InMemoryStorage

    opened, where = (InMemoryStorage(), "memory") if storage is None else open_storage(storage)
    study = open_study(opened, where, name or "memory", search.objectives, about)
    if seed is not None:  # each process draws others, and others after each start, or all would try the same designs
        drawn = np.random.SeedSequence([seed, len(study.get_trials(deepcopy=False)), *np.random.SeedSequence().generate_state(4).tolist()])
        built = cast("Sampler", chosen).build(
            seed=int(drawn.generate_state(1)[0]), population=max(2, min(search.population, search.trials))
        )
        study.sampler = built
    else:
        study.sampler = cast("BaseSampler", chosen)
    _let_it_stop(study)
    interrupted = False
    try:
        with closing(one_by_one(search, study, pricing, where, patience)) as steps:
            for count in steps:
                bar.update(count - bar.n)
    except KeyboardInterrupt:
        interrupted = True
    return all_finished(search, study, where), interrupted


def _frame(finished: list[Finished], search: Search, seed: int | None) -> pd.DataFrame:
    """All finished trials that have a score, the front first."""
    rows = [done for done in finished if done.score is not None]
    required = [] if rows else search.names
    names = [name for done in finished for name in done.parameters] + [name for done in rows for name in done.score or ()] + required
    frame = pd.DataFrame(
        [{"trial": done.number, **done.parameters, **(done.score or {}), "within_limits": done.within_limits} for done in rows],
        columns=list(dict.fromkeys(["trial", *names, "within_limits"])),
    ).astype({"trial": int, "within_limits": bool})
    values = minimised(frame, search.objectives)
    within = frame["within_limits"].to_numpy()
    on_front = within.copy()
    on_front[within] = non_dominated(values[within])
    frame = frame.assign(on_front=on_front, seed=seed)
    return frame.iloc[np.lexsort((frame["trial"], *values.T[::-1], ~within, ~on_front))].reset_index(drop=True)


def _let_it_stop(study: Study) -> None:
    """Samplers of a finite grid stop the study when all of it is tried; Optuna's method raises outside of Optuna's own loop."""
    study.stop = partial(study.set_user_attr, "exhausted", True)  # type: ignore[method-assign]


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without Optuna's line per study; the verbosity that the user set comes back."""
    from optuna import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
