"""The two loops of a search: whole generations in order, however they are priced; or single designs, shared by processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..models.checks import shown
from ._pricing import Pricing, Score, short
from ._storage import SCORE, TRIAL, WORKER, Presence, Record, plain_score, public, reaching
from .pareto import Objective

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    from .explore import Constraint

OWN_COLUMNS = ("trial", "within_limits", "on_front", "seed", "design")
_POLL = 0.2  # s between two looks at what other processes still price


@dataclass(frozen=True, slots=True)
class Finished:
    """A trial that becomes a row, or that is only counted because nothing fits (score None)."""

    number: int
    parameters: dict[str, Any]
    design: Any
    score: dict[str, Any] | None
    within_limits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched: the user's ``design``, what its scores are held against, how many trials, how many at once, until when."""

    design: Callable[[Any], Any]
    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]
    trials: int
    population: int
    deadline: float

    @property
    def names(self) -> list[str]:
        """The columns that every score must have."""
        return [objective.name for objective in self.objectives] + [constraint.name for constraint in self.constraints]

    def over(self, study: Study) -> bool:
        """Whether time is up or a sampler of a finite grid has tried everything."""
        return time.monotonic() >= self.deadline or "exhausted" in study.user_attrs

    def build(self, trials: Sequence[Trial]) -> list[Any]:
        """The designs of trials just asked."""
        designs = [self.design(trial) for trial in trials]
        if not all(trial.params for trial in trials):
            raise ValueError("design() suggested no parameter, so there is nothing to search; call trial.suggest_float() or its like in it")
        return designs

    def checked(self, parameters: Mapping[str, Any], score: Score) -> dict[str, Any] | None:
        """The score as a dict; ValueError if it has not what it must have."""
        if score is None:
            return None
        if not isinstance(score, Mapping):
            raise ValueError(
                f"score() must return a dict of columns, or None if nothing fits, not {short(score)}, for parameters {parameters}"
            )
        taken = [name for name in (*score, *parameters) if name in OWN_COLUMNS or (name in score and name in parameters)]
        if taken:
            raise ValueError(f"the column {taken[0]!r} would be there twice; rename it in the score or among the parameters")
        for name in self.names:
            if name not in score:
                raise ValueError(f"score() returned no {name!r} for parameters {parameters}; it returned {list(score)}")
            if not _is_finite(score[name]):
                raise ValueError(f"score() must return a finite number as {name!r}, not {shown(score[name])}, for parameters {parameters}")
        return dict(score)

    def values(self, score: Mapping[str, Any]) -> list[float]:
        """The objectives of a score, as Optuna is told them."""
        return [float(score[objective.name]) for objective in self.objectives]

    def violations(self, score: Mapping[str, Any]) -> dict[str, float]:
        """By how much each constraint is violated (0 or less: it holds), by its number."""
        return {str(number): float(limit.violation(score[limit.name])) for number, limit in enumerate(self.constraints)}

    def tell(self, study: Study, trial: Trial, score: dict[str, Any] | None) -> None:
        """Tell the study a checked score; a trial where nothing fits is told as failed."""
        from optuna.trial import TrialState

        if score is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        for name, violation in self.violations(score).items():
            trial.set_constraint(name, violation)
        study.tell(trial, self.values(score))

    def row(self, number: int, parameters: dict[str, Any], design: Any, score: dict[str, Any] | None) -> Finished:
        """What becomes of a checked score."""
        within = score is not None and all(violation <= 0 for violation in self.violations(score).values())
        return Finished(number, parameters, design, score, within)


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def in_generations(search: Search, study: Study, pricing: Pricing, record: Record | None) -> Iterator[Finished]:
    """Ask ``study``, which is in memory, for one population after the other, have it priced, and tell it in order.

    What ``record`` knows is not priced again but told as it was then: a sampler with a seed, told the same, asks the same. So a search
    that goes on is the search that never stopped, wherever it stopped. A score is recorded when it arrives, and told when those of all
    trials before it are.
    """
    count = 0
    while count < search.trials:
        asked = [study.ask() for _ in range(min(search.population, search.trials - count))]
        designs = search.build(asked)
        scores: dict[int, dict[str, Any] | None] = {}
        for i, trial in enumerate(asked):
            known, score = record.score_of(trial) if record is not None else (False, None)
            if known:
                scores[i] = search.checked(trial.params, score)
        unknown = [i for i in range(len(asked)) if i not in scores]
        pricing.start(unknown, [designs[i] for i in unknown])
        told = 0
        try:
            while told < len(asked):
                while told in scores:
                    search.tell(study, asked[told], scores[told])
                    yield search.row(asked[told].number, asked[told].params, designs[told], scores[told])
                    told += 1
                    if search.over(study):
                        return
                for i, priced in pricing.finished():
                    scores[i] = _recorded(search, record, asked[i], search.checked(asked[i].params, priced))
        except KeyboardInterrupt:  # what other workers had finished behind an unfinished trial is kept as well
            for i in sorted(set(scores) - set(range(told))):
                yield search.row(asked[i].number, asked[i].params, designs[i], scores[i])
            raise
        count += len(asked)


def _recorded(search: Search, record: Record | None, trial: Trial, score: dict[str, Any] | None) -> dict[str, Any] | None:
    """The score as the record gives it back, so that a row does not depend on whether its search was stopped."""
    if record is None:
        return score
    if score is None:
        record.add(trial, None, None, {})
        return None
    score = plain_score(score)
    record.add(trial, score, search.values(score), search.violations(score))
    return score


def one_by_one(search: Search, study: Study, pricing: Pricing, where: str, patience: float) -> Generator[int, None, None]:
    """Ask the shared ``study`` whenever a worker is free, and tell it whatever is finished: yields how many trials of all are.

    Each trial has a seat: those that are finished or being priced, by number, the first ``search.trials``. Who finds its trial behind the
    last seat withdraws it, and a process that is silent for ``patience`` seconds loses its unfinished ones; so exactly ``search.trials``
    are finished at the end, in which each process waits for the others.
    """
    asked: dict[int, Trial] = {}
    at_once = search.population if pricing.price.batch_score is not None else 1 if pricing.workers == 1 else 2 * pricing.workers
    with ExitStack() as stack:
        with reaching(where):
            presence = stack.enter_context(Presence(study, patience))
        stack.callback(_give_up, study, asked)
        while True:
            with reaching(where):
                seats = _seats(search, study, presence)
            finished = sum(_counts(trial) for trial in seats)
            yield finished
            if search.over(study) or finished >= search.trials:
                return
            with reaching(where):
                trials = _seated(search, study, presence, min(at_once - pricing.pending, search.trials - len(seats)))
            asked |= {trial.number: trial for trial in trials}
            with reaching(where, files=False):
                designs = _built(search, trials)
            pricing.start(list(designs), list(designs.values()))
            if not pricing.pending:
                time.sleep(_POLL)
            for number, score in pricing.finished():
                with reaching(where):
                    _share(search, study, asked.pop(number), score)


def all_finished(search: Search, study: Study, where: str) -> list[Finished]:
    """The first ``search.trials`` finished trials of a shared study, by number, their designs built anew from their parameters."""
    from optuna.trial import FixedTrial

    with reaching(where):
        trials = [trial for trial in _distinct(study) if _counts(trial)]
    rows = []
    for trial in trials[: search.trials]:
        try:
            design = search.design(FixedTrial(dict(trial.params), number=trial.number))
        except ValueError as error:
            raise ValueError(
                f"trial {trial.number} of study {study.study_name!r} in {public(where)} has the parameters {list(trial.params)}, "
                f"of which design() makes nothing ({error}); choose another name"
            ) from None
        rows.append(search.row(trial.number, dict(trial.params), design, search.checked(trial.params, trial.user_attrs[SCORE])))
    return rows


def _distinct(study: Study) -> list[FrozenTrial]:
    """The trials by number; of those that two synchronous searches at once recorded twice, the first."""
    distinct: dict[Any, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        distinct.setdefault((TRIAL in trial.user_attrs, trial.user_attrs.get(TRIAL, trial.number)), trial)
    return list(distinct.values())


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is finished with a score, or with the finding that nothing fits."""
    if SCORE not in trial.user_attrs:
        return False
    return trial.state.name == "COMPLETE" or (trial.state.name == "FAIL" and trial.user_attrs[SCORE] is None)


def _seats(search: Search, study: Study, presence: Presence) -> list[FrozenTrial]:
    """Trials that are finished or being priced, by number; those of dead processes are ended, and counted if they have a score."""
    seats = [trial for trial in _distinct(study) if _counts(trial) or trial.state.name == "RUNNING"]
    running = {trial.number: trial.user_attrs.get(WORKER, f"of trial {trial.number}") for trial in seats if trial.state.name == "RUNNING"}
    dead = presence.dead(running.values())
    lost = [trial for trial in seats if running.get(trial.number) in dead]
    for trial in lost:
        _bury(search, study, trial)
    return _seats(search, study, presence) if lost else seats


def _bury(search: Search, study: Study, trial: FrozenTrial) -> None:
    """End a trial whose process is dead: with its score, if it was killed between keeping the score and telling it."""
    score = trial.user_attrs.get(SCORE)
    if score is None:
        _withdraw(study, trial.number)
        return
    for name, violation in search.violations(score).items():
        study._storage.set_trial_system_attr(trial._trial_id, f"constraints:{name}", violation)
    study.tell(trial.number, search.values(score), skip_if_finished=True)


def _seated(search: Search, study: Study, presence: Presence, number: int) -> list[Trial]:
    """Up to ``number`` new trials that have a seat."""
    from optuna.exceptions import UpdateFinishedTrialError

    trials = []
    for _ in range(number):
        trial = study.ask()
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(WORKER, presence.name)
            trials.append(trial)
    if not trials:
        return []
    seats = {seat.number for seat in _seats(search, study, presence)[: search.trials]}
    for trial in trials:
        if trial.number not in seats:
            _withdraw(study, trial.number)
    return [trial for trial in trials if trial.number in seats]


def _built(search: Search, trials: Sequence[Trial]) -> dict[int, Any]:
    """Designs by trial; without those that others, who took this process for dead, have ended meanwhile."""
    from optuna.exceptions import UpdateFinishedTrialError

    designs = {}
    for trial in trials:
        with suppress(UpdateFinishedTrialError):
            designs[trial.number] = search.build([trial])[0]
    return designs


def _share(search: Search, study: Study, trial: Trial, score: Score) -> None:
    """Keep a score and tell it; if others took this process for dead, the trial is over, and the score is dropped."""
    from optuna.exceptions import UpdateFinishedTrialError

    checked = search.checked(trial.params, score)
    with suppress(UpdateFinishedTrialError):
        trial.set_user_attr(SCORE, None if checked is None else plain_score(checked))
        try:
            search.tell(study, trial, checked)
        except ValueError:
            if not study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                raise


def _withdraw(study: Study, number: int) -> None:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with suppress(UpdateFinishedTrialError):
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _give_up(study: Study, asked: Mapping[int, Trial]) -> None:
    """Withdraw what is not finished, so that others need not wait for it."""
    with suppress(Exception):  # a storage that is gone has said so already
        for number in asked:
            _withdraw(study, number)
