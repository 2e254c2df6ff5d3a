"""How a search proposes designs: Optuna's samplers as values, so that a table can say which one made it."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from ..models.checks import shown

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class Sampler(Protocol):
    """A frozen value that makes one of Optuna's samplers: ``explore(..., sampler=TPE())``.

    ``name``: its key in ``SAMPLERS``; ``population``: designs that it is best asked for at once; ``seed``: None for that of ``explore``.
    """

    name: ClassVar[str]
    population: ClassVar[int]

    @property
    def seed(self) -> int | None:
        """None for the seed of ``explore``."""

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """Optuna's sampler with this seed, in generations of ``population`` designs where it has any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seeded:
    seed: int | None = None
    population: ClassVar[int] = 50

    def __post_init__(self) -> None:
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**32):
            raise ValueError(f"the seed of {type(self).__name__} must be a whole number from 0 to 2**32 - 1, or None, not {self.seed!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NSGA2(_Seeded):
    """NSGA-II (Deb et al. 2002, doi 10.1109/4235.996017): the default. On a single parameter, Optuna's is a random search."""

    name: ClassVar[str] = "nsga2"

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """One generation is one population, of at least two."""
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=seed, population_size=max(2, population))


@dataclass(frozen=True, slots=True, kw_only=True)
class NSGA3(_Seeded):
    """NSGA-III (Deb and Jain 2014, doi 10.1109/TEVC.2013.2281535): for three and more objectives."""

    name: ClassVar[str] = "nsga3"

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """One generation is one population, of at least two."""
        from optuna.samplers import NSGAIIISampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls the sampler experimental
            return NSGAIIISampler(seed=seed, population_size=max(2, population))


@dataclass(frozen=True, slots=True, kw_only=True)
class TPE(_Seeded):
    """The tree-structured Parzen estimator (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022, doi 10.1613/jair.1.13188).

    ``multivariate``: one density for all parameters together, not one for each. Designs asked at once are kept apart by a constant liar.
    """

    multivariate: bool = True
    name: ClassVar[str] = "tpe"
    population: ClassVar[int] = 10

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """The population does not matter to it."""
        from optuna.samplers import TPESampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls the argument experimental
            return TPESampler(seed=seed, multivariate=self.multivariate, warn_independent_sampling=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GP(_Seeded):
    """A Gaussian process and the expected hypervolume improvement; needs PyTorch, and seconds a trial.

    Beside these, what a storage costs is small: in a journal 2 to 8 ms a trial if synchronous, about 45 ms if asynchronous.
    """

    name: ClassVar[str] = "gp"
    population: ClassVar[int] = 10

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """The population does not matter to it. ValueError without PyTorch."""
        from importlib.util import find_spec

        from optuna.samplers import GPSampler

        if find_spec("torch") is None:
            raise ValueError("the sampler 'gp' needs PyTorch, which is not installed; install torch, or take another sampler such as 'tpe'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls the sampler experimental
            return GPSampler(seed=seed, warn_independent_sampling=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class QMC(_Seeded):
    """A scrambled Sobol sequence: spreads evenly, learns nothing."""

    name: ClassVar[str] = "qmc"

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """The population does not matter to it."""
        from optuna.samplers import QMCSampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls the sampler experimental
            return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSearch(_Seeded):
    """Independent uniform draws: what every other sampler has to beat."""

    name: ClassVar[str] = "random"

    def build(self, *, seed: int, population: int) -> BaseSampler:
        """The population does not matter to it."""
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=seed)


SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in (NSGA2(), NSGA3(), TPE(), GP(), QMC(), RandomSearch())}
"""Every sampler by its name, without a seed of its own."""


def sampler_named(name: str) -> Sampler:
    """The sampler called ``name``; ValueError says which there are."""
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}; samplers are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def is_value(sampler: object) -> bool:
    """Whether ``sampler`` is one of the values of this module, or made like them, and not an object of Optuna's."""
    return hasattr(sampler, "build") and hasattr(sampler, "name") and hasattr(sampler, "seed")


def check_sampler(sampler: object) -> None:
    """ValueError unless ``sampler`` is a value of this module, or made like them, or an object of Optuna's."""
    from optuna.samplers import BaseSampler

    if isinstance(sampler, type) or not (is_value(sampler) or isinstance(sampler, BaseSampler)):
        raise ValueError(f"sampler must be a value such as NSGA2() or SAMPLERS['nsga2'], or a sampler of Optuna's, not {shown(sampler)}")


def described(sampler: Sampler | BaseSampler) -> dict[str, Any]:
    """``{"sampler": name, field: value, ...}`` as plain data; of an object of Optuna's only its class is known."""
    if not is_value(sampler):
        return {"sampler": type(sampler).__name__}
    value = cast("Any", sampler)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    return {"sampler": value.name, **fields}
