"""Pricing designs in this process or in several others: what a search hands out and takes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from types import TracebackType
from typing import Any

from ._arguments import check_function
from ._workers import begin, check_sendable, out_of_reach

Score = Mapping[str, Any] | None

_LOSSES = 3  # pools lost in a row, with nothing priced in between, after which the designs are to blame and not their workers


@dataclass(frozen=True, slots=True)
class Price:
    """The scores of a list of designs, by the user's ``score`` one by one, or by ``batch_score`` at once."""

    score: Callable[[Any], Score] | None
    batch_score: Callable[[list[Any]], Sequence[Score]] | None

    def __post_init__(self) -> None:
        if self.score is None and self.batch_score is None:
            raise ValueError("nothing prices the designs; give score or batch_score")
        for name, function, takes in (("score", self.score, "a design"), ("batch_score", self.batch_score, "a list of designs")):
            if function is not None:
                check_function(name, function, takes)

    def __call__(self, designs: list[Any]) -> list[Score]:
        """One score a design; ValueError if ``batch_score`` returned something else."""
        if self.batch_score is None:
            assert self.score is not None  # __post_init__
            return [self.score(design) for design in designs]
        scores = self.batch_score(designs)
        if not isinstance(scores, Sequence) or len(scores) != len(designs):
            raise ValueError(f"batch_score() must return a list of {len(designs)} scores, one a design, not {short(scores)}")
        return list(scores)


class Pricing:
    """Designs that are being priced: ``start`` adds some, ``finished`` waits for the next scores.

    One worker is this process, which prices when it is asked for scores. More are processes of their own, each share of designs one
    future; a worker that is killed loses its share, which is priced anew. They start by importing the main module, so a script that
    uses them needs ``if __name__ == "__main__":``.
    """

    def __init__(self, price: Price, workers: int) -> None:
        self.price, self.workers = price, workers
        self._queue: deque[tuple[list[Any], list[Any]]] = deque()
        self._futures: dict[Future[list[Score]], tuple[list[Any], list[Any]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._losses = 0
        if workers > 1:
            what, function = ("score", price.score) if price.batch_score is None else ("batch_score", price.batch_score)
            check_sendable(what, price, function)

    def __enter__(self) -> Pricing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=not self._futures, cancel_futures=True)
        if self._futures:  # interrupted: nobody will fetch what is still being priced
            for process in processes:
                process.terminate()

    @property
    def pending(self) -> int:
        """Designs that were started and have no score yet."""
        return sum(len(keys) for keys, _ in (*self._queue, *self._futures.values()))

    def start(self, keys: Sequence[Any], designs: Sequence[Any]) -> None:
        """Have ``designs`` priced; their scores come back with their ``keys``."""
        if not keys:
            return
        if self.workers == 1 and self.price.batch_score is not None:
            pieces = 1
        elif self.workers == 1:
            pieces = len(keys)
        else:  # some more shares than workers where designs are priced one by one: they may take different times
            pieces = min(len(keys), self.workers * (1 if self.price.batch_score is not None else 4))
        bounds = [len(keys) * piece // pieces for piece in range(pieces + 1)]
        for start, end in pairwise(bounds):
            share = (list(keys[start:end]), list(designs[start:end]))
            if self.workers == 1:
                self._queue.append(share)
            else:
                self._submit(share)

    def finished(self) -> list[tuple[Any, Score]]:
        """Some designs' keys and scores, as soon as there are any; none only if nothing is pending."""
        if self._queue:
            keys, designs = self._queue[0]
            scores = self.price(designs)
            self._queue.popleft()
            return list(zip(keys, scores, strict=True))
        while self._futures:
            done, _ = wait(self._futures, return_when=FIRST_COMPLETED)
            scored, lost = [], []
            for future in sorted(done, key=list(self._futures).index):
                keys, designs = self._futures.pop(future)
                try:
                    scored += list(zip(keys, future.result(), strict=True))
                except BrokenProcessPool:
                    lost.append((keys, designs))
            if lost:
                self._losses = 0 if scored else self._losses + 1
                if self._losses >= _LOSSES:
                    raise ValueError(
                        f"worker processes died {_LOSSES} times in a row; if memory ran out, take fewer workers, "
                        "and if the script lacks `if __name__ == '__main__':`, add it"
                    )
                self._restart(lost)
            if scored:
                self._losses = 0
                return scored
        return []

    def _submit(self, share: tuple[list[Any], list[Any]]) -> None:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=begin)
        try:
            with out_of_reach():
                future = self._pool.submit(self.price, share[1])
            self._futures[future] = share
        except BrokenProcessPool:  # killed while idle, or just now
            self._restart([share])

    def _restart(self, lost: list[tuple[list[Any], list[Any]]]) -> None:
        """A new pool for the lost shares, and for those that the broken one still held."""
        assert self._pool is not None
        self._pool.shutdown(wait=True)
        self._pool = None
        for future in [future for future in self._futures if future.exception() is not None]:
            if isinstance(future.exception(), BrokenProcessPool):
                lost.append(self._futures.pop(future))
        for share in lost:
            self._submit(share)


def short(value: object) -> str:
    """What a value is, without the value."""
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, Sized) else "")
