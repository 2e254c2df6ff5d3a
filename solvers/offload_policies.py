"""Online policies of offloading: in which form to write each token's state, knowing what runs now (``models.offload_serving``).

A policy is a frozen value with ``most_tokens(service)``, the tokens that it lets run together, counted at each request's end, so that
whatever it decides fits; and ``decide(state) -> OffloadDecision``. Those that mix forms make room for the larger one unless said. None
looks at when the running requests end; ``AdaptiveRatio`` knows how long the longest request of the trace is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.cache_ratio import CacheRatioProblem
from ..models.checks import check_number, whole
from ..models.offload_serving import OffloadDecision, OffloadService, OffloadState
from ..models.roofline import Array
from .cache_ratio import HybridServeRatio
from .result import Solver


class OffloadPolicy(Protocol):
    """A frozen dataclass of settings with two methods."""

    def most_tokens(self, service: OffloadService, /) -> int:
        """Tokens that the running requests may hold together at their ends."""
        ...

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """What is written in which form in this iteration, and what is recomputed."""
        ...


def _larger(service: OffloadService) -> int:
    """Room for every token in the larger form."""
    return service.most_tokens(max(service.token_bytes))


def _none(state: OffloadState) -> NDArray[np.bool_]:
    return np.zeros(state.batch, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class KvOnly:
    """All keys and values: nothing is ever recomputed."""

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as fit as KV."""
        return service.most_tokens(service.token_bytes.kv)

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """KV for all."""
        return OffloadDecision(prompt_act=np.zeros_like(state.prompts), new_act=_none(state))


@dataclass(frozen=True, slots=True)
class ActOnly:
    """All activations: everything is recomputed in every iteration (the baseline of HybridServe, arXiv 2501.01792)."""

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as fit as ACT."""
        return service.most_tokens(service.token_bytes.act)

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """ACT for all."""
        return OffloadDecision(prompt_act=state.prompts, new_act=~_none(state))


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRatio:
    """The share ``act_share`` of each request's tokens as ACT, rounded to the smaller form: of n tokens ceil(share n) if ACT is smaller,
    else floor(share n), so that the bytes never exceed the share's."""

    act_share: float = 0.5

    def __post_init__(self) -> None:
        check_number("FixedRatio", "act_share", self.act_share, "share", zero=True)
        if self.act_share > 1:
            raise ValueError(f"FixedRatio: act_share must be at most 1, not {self.act_share!r}")

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as fit at this share."""
        kv, act = service.token_bytes
        return service.most_tokens((1 - self.act_share) * kv + self.act_share * act)

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """Each request as near its share as whole tokens let it be."""
        rounded = np.ceil if state.service.token_bytes.act_pays else np.floor
        prompt_act = rounded(self.act_share * state.prompts).astype(np.int64)
        new = rounded(self.act_share * (state.serving.context + 1)) > np.concatenate([state.act[: _old(state)], prompt_act])
        return OffloadDecision(prompt_act=prompt_act, new_act=new)


def _old(state: OffloadState) -> int:
    """Requests that ran before."""
    return state.batch - state.joined


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRatio:
    """When requests join, the cache ratio of the whole batch by ``solver``; those that join follow its share of ACT until their end.

    With ``HybridServeRatio`` it is HybridServe's allocation (arXiv 2501.01792, a reconstruction); with ``LpRatio`` the exact ratio of
    the iteration in which they join. Requests that ran before keep theirs, as their tokens cannot change form.
    """

    solver: Solver = field(default_factory=HybridServeRatio)

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as fit in the larger form."""
        return _larger(service)

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """The share of the batch for new prompts; a new token is ACT if its request would else fall below the share of its prompt."""
        share = self.share(state) if state.joined else 0.0
        prompt_act = np.ceil(share * state.prompts).astype(np.int64)
        before = np.concatenate([state.prompt_act[: _old(state)], prompt_act])
        held = np.concatenate([state.act[: _old(state)], prompt_act])
        prompts = state.serving.trace.prompt_tokens[state.serving.running]
        return OffloadDecision(prompt_act=prompt_act, new_act=before * (state.serving.context + 1) > held * prompts)

    def share(self, state: OffloadState) -> float:
        """Share of ACT that the solver wants for the batch; all of the smaller form if whole blocks do not fit."""
        service = state.service
        problem = CacheRatioProblem.build(
            service.system,
            service.workload(state.batch),
            profile=service.profile,
            contexts=state.serving.context.tolist(),
            weights=service.weights,
            buffered_requests=service.buffered_requests,
        )
        plan = self.solver.solve(problem).plan
        share: float = float(service.token_bytes.act_pays) if plan is None else plan.act_share
        return share


@dataclass(frozen=True, slots=True)
class StepSplit:
    """KVPR (arXiv 2411.17089): the host keeps the KV of all tokens and, of prompts, X as well; each iteration recomputes as many tokens of
    prompts as is best, exactly.

    X is kept only where it is smaller than KV. Requests make room for both forms of all their tokens. KVPR's own schedule has a barrier
    between the arrival of X and recomputation; here all policies overlap alike.
    """

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as the host holds in both forms."""
        kv, act = service.token_bytes
        return service.most_tokens(kv + act, both=True) if act < kv else service.most_tokens(kv)

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """Both forms of prompts, and the best number of their tokens."""
        pays = state.service.token_bytes.act_pays
        both = state.prompts if pays else np.zeros_like(state.prompts)
        most = int(state.both.sum() + both.sum())
        best = int(state.step.best(0, most)[0][0]) if most else 0
        return OffloadDecision(prompt_act=np.zeros_like(both), prompt_both=both, new_act=_none(state), recomputed=best)


@dataclass(frozen=True, slots=True)
class RequestForms:
    """Each request wholly KV or wholly ACT, chosen when it joins: of all subsets of those that join, the one whose ACT makes this
    iteration shortest. Exact: all sums of prompts that subsets reach, as the bits of a number; the smallest of several sums."""

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as fit in the larger form."""
        return _larger(service)

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """ACT for the tokens of ACT requests."""
        old, prompts = _old(state), state.prompts.tolist()
        held = int(state.act.sum())
        reached = [1]  # bit s: some of the first prompts have s tokens together
        for prompt in prompts:
            reached.append(reached[-1] | reached[-1] << prompt)
        total, sums = sum(prompts), reached[-1]
        wanted = int(state.step.best(held, held + total)[0][0]) - held
        below = (sums & ((1 << (wanted + 1)) - 1)).bit_length() - 1
        more = sums >> wanted
        above = wanted + (more & -more).bit_length() - 1
        near = np.array([[below], [above]])
        left = int(near[int(state.step.seconds(held + near)[:, 0].argmin()), 0])
        chosen = np.zeros(len(prompts), dtype=np.bool_)
        for place in range(len(prompts) - 1, -1, -1):
            if not reached[place] >> left & 1:
                chosen[place], left = True, left - prompts[place]
        as_act = np.concatenate([state.act[:old] > 0, chosen])
        return OffloadDecision(prompt_act=np.where(chosen, state.prompts, 0), new_act=as_act)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveRatio:
    """Each prompt and each new token takes the form that brings this and the next iterations nearest to their best number of ACT tokens.

    With A_j^ the best of the j-th iteration from now on, if nobody ends and nobody joins, and B new tokens in each of which none to all
    are ACT, it aims at

        min over A  sum_(j < iterations) T_j(A_j^ clipped to A .. A + j B)

    for this iteration with the new prompts, which share it as their lengths are, and for the next one with the new tokens, which go
    to the requests with the least share of ACT: all hold about the share of the batch, as nobody knows who ends first. Of several best
    numbers, as where the weights take longest in any case, it takes the one whose share would be best for a full batch of requests as
    long as these, and of several of those the middle one.

    ``act_room``: the share of tokens for which room is made as ACT when requests are admitted; then no more tokens are KV at any time than
    leave room for the others. 0 makes room for KV, so that fewer requests run where memory is short; 1 for ACT alone. None: of 33 shares
    the one that generates most tokens a second with as many requests of the longest length as fit, the smallest of several.
    """

    iterations: int = 16
    act_room: float | None = None
    _kept: dict[int, tuple[OffloadService, int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "iterations", whole("AdaptiveRatio", "iterations", self.iterations, "iterations"))
        if self.act_room is not None:
            check_number("AdaptiveRatio", "act_room", self.act_room, "share", zero=True)
            if self.act_room > 1:
                raise ValueError(f"AdaptiveRatio: act_room must be at most 1, not {self.act_room!r}")

    def most_tokens(self, service: OffloadService, /) -> int:
        """As many as fit at ``act_room``; where ACT is no smaller it uses none, and makes room for KV."""
        return self.limits(service)[0]

    def limits(self, service: OffloadService, /) -> tuple[int, int]:
        """Tokens that may run together at their ends, and tokens that may be KV at any time."""
        found = self._kept.get(id(service))
        if found is None:
            self._kept.clear()  # one service at a time, which is kept so that its id stays its own
            found = self._kept[id(service)] = (service, *self._limits(service))
        return found[1:]

    def _limits(self, service: OffloadService) -> tuple[int, int]:
        kv, act = service.token_bytes
        if act >= kv:
            most = service.most_tokens(kv)
            return most, most
        listed = list[tuple[float, int, int]]()
        for share in np.linspace(0, 1, 33) if self.act_room is None else [self.act_room]:
            most = service.most_tokens((1 - share) * kv + share * act)
            as_kv = min(int((service.cache + service.host_room - act * most) / (kv - act)), most)
            batch = min(most // service.longest, service.batch)
            seconds = np.inf
            if batch:
                tokens = batch * service.longest
                seconds = float(service.steps([batch], [tokens]).best(max(tokens - as_kv, 0))[1][0])
            listed.append((-batch / seconds if seconds > 0 else -np.inf, most, as_kv))
        _, most, as_kv = min(listed, key=lambda one: one[0])
        return most, as_kv

    def decide(self, state: OffloadState, /) -> OffloadDecision:
        """The forms that aim there."""
        if not state.service.token_bytes.act_pays:
            return KvOnly().decide(state)
        held, prompts, prompt_act = int(state.act.sum()), state.prompts, np.zeros_like(state.prompts)
        least = state.tokens - self.limits(state.service)[1]
        if state.joined:
            total = int(prompts.sum())
            extra = self._aim(state, 0, max(held, least), held + total) - held
            # Rounded down, and the largest remainders up.
            exact = extra * (prompts / total)
            prompt_act = np.minimum(np.floor(exact), prompts).astype(np.int64)
            order = np.argsort(prompt_act - exact, kind="stable")
            while (missing := extra - int(prompt_act.sum())) > 0:
                some = order[prompt_act[order] < prompts[order]][:missing]
                prompt_act[some] += 1
            held += extra
        aimed = self._aim(state, 1, max(held, least + state.batch), held + state.batch) - held
        act = np.concatenate([state.act[: _old(state)], prompt_act])
        new_act = _none(state)
        new_act[np.argsort(act / (state.serving.context + 1), kind="stable")[:aimed]] = True
        return OffloadDecision(prompt_act=prompt_act, new_act=new_act)

    def _aim(self, state: OffloadState, first: int, low: int, high: int) -> int:
        """The number of ACT tokens between ``low`` and ``high`` that is best in the iteration ``first`` from now on."""
        if low == high:
            return low
        service, batch, reach = state.service, state.batch, state.batch * np.arange(self.iterations)
        grown = service.batch / batch
        full = min(round((state.tokens + batch * first) * grown), service.batch * service.longest)
        tokens = np.concatenate([state.tokens + batch * first + reach, [full]])
        steps = service.steps(np.array([batch] * self.iterations + [service.batch]), tokens)
        now = steps.only(slice(0, self.iterations))
        best, corners = now.best()[0], np.floor(now.corners())
        corners = np.concatenate([corners, corners + 1])
        places = np.unique(np.clip(np.concatenate([corners, corners - reach]).ravel(), low, high))[:, None]
        chosen = _lowest(places, now.seconds(np.minimum(np.clip(best, places, places + reach), now.tokens)).sum(axis=1))
        if len(chosen) > 1 and grown > 1:
            last = steps.only(slice(self.iterations, None))
            corners = np.clip(np.floor(last.corners() / grown), chosen[0], chosen[-1])
            places = np.unique(np.concatenate([chosen, corners.ravel()]))[:, None]
            chosen = _lowest(places, last.seconds(np.minimum(places * grown, full))[:, 0])
        return int(chosen[0] + chosen[-1]) // 2


def _lowest(places: Array, heights: Array) -> Array:
    """The places [P, 1] in order at which a function is lowest, but for some roundings."""
    lowest: Array = places[heights <= heights.min() * (1 + 1e-14), 0]
    return lowest
