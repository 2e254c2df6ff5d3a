"""Fitting a kernel model's parameters to measured times.

Variables   theta_j: parameters, each between its bounds; on a logarithmic scale where their lower bound is not 0
Objective   min  sum_i huber(log(seconds_i(theta) / measured_i)) + sum_j huber(prior (theta_j - start_j))
            relative errors, of which few far off do not decide; what the rows do not determine stays where the model starts it

by SciPy's trust-region least squares (soft_l1) from several starts. Intervals are those of a linear model around the optimum, at 90 %: with
residuals that differ in size and go together within a shape (the sandwich of Huber and White, by cluster), or those of equal and
independent ones if they are wider. What a fit is worth is measured on shapes that
it did not see: rows are dealt to folds by their shape, and each fold is predicted by a fit on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..models.calibration import QUANTILES, Calibration, Estimate, KernelModel, Shapes, check_shapes, error_of, groups_of
from ..models.checks import shown, whole
from ..models.device import Device
from ..models.roofline import Array

CORNER = 0.1
"""Relative error from which rows count linearly and not by the square: an error that simple models make."""

STARTS = 6
"""Starts of the search: the model's own, and points drawn between the bounds."""

FOLD_STARTS = 3
"""The same for each fold of the cross validation."""

PRIOR = 0.1
"""Weight of a parameter's distance from its start: a factor of e counts as one row that is 10 % off. Rows outvote it where they say
anything; without it, parameters that a fold says nothing about drift to random values, and rows held out are predicted by these."""

CONFIDENCE = 1.6449
"""Standard deviations on either side that hold 90 % of a normal distribution."""

TIED = 0.98
"""Correlation from which two parameters cannot be told apart."""

FEWEST_ROWS = 3
"""Rows that a fit needs at least."""


def fit(
    model: KernelModel,
    device: Device,
    shapes: Mapping[str, ArrayLike],
    measured: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
    source: str = "",
    date: str = "",
    version: str = "",
) -> Calibration:
    """The record of ``model`` on ``device`` for rows of ``shapes`` [N] that took ``measured`` [N] seconds.

    Rows that beat the data sheet's bound are left out and counted as ``flagged``: no device does that. ``folds`` of the cross validation
    by shape; less than two, or fewer shapes than that: no error on unseen rows. ValueError for fewer than ``FEWEST_ROWS`` rows, times that
    are no seconds, and columns that are missing.
    """
    found, seconds = _checked(model, shapes, measured)
    bound = model.bound(device, found)
    sound = seconds >= bound
    if int(sound.sum()) < FEWEST_ROWS:
        raise ValueError(
            f"{model.name} on {device.name}: a fit needs {FEWEST_ROWS} rows that do not beat the data sheet, not {int(sound.sum())} of "
            f"{len(seconds)}; measure more shapes, or correct units and data sheet"
        )
    found, seconds = {name: column[sound] for name, column in found.items()}, seconds[sound]
    problem = _Fit(model, device)
    theta, jacobian, residual = problem.best(found, seconds, seed, STARTS)
    groups = groups_of(found, model.group)
    unseen, ratios, used = None, (1.0,) * len(QUANTILES), 0
    wanted = min(whole("fit", "folds", folds, "folds", least=0), int(groups.max()) + 1)
    if wanted >= 2 and len(seconds) > len(model.parameters):
        held_out = _held_out(problem, found, seconds, groups, wanted, seed)
        unseen, used = error_of(held_out, seconds), wanted
        ratios = tuple(np.quantile(seconds / held_out, QUANTILES).tolist())
    values = problem.values(theta)
    low, high, warnings = _intervals(problem, theta, jacobian, residual, groups)
    warnings += _about_data(model, len(seconds), int(groups.max()) + 1, int((~sound).sum()))
    return Calibration(
        device=device.name,
        family=device.family,
        kernel=model.name,
        variant=model.variant,
        estimates={name: Estimate(value, low[name], high[name]) for name, value in values.items()},
        fitted=error_of(model.seconds(device, found, values), seconds),
        unseen=unseen,
        folds=used,
        ratios=ratios,
        flagged=int((~sound).sum()),
        warnings=tuple(warnings),
        source=source,
        date=date,
        version=version,
    )


def _checked(model: KernelModel, shapes: Mapping[str, ArrayLike], measured: ArrayLike) -> tuple[dict[str, NDArray[Any]], Array]:
    """The columns and seconds of all rows, once each is known to be of use."""
    found = check_shapes(model, shapes)
    seconds = np.atleast_1d(np.asarray(measured, dtype=np.float64))
    rows = len(next(iter(found.values())))
    if seconds.shape != (rows,):
        raise ValueError(f"{model.name}: there are {len(seconds)} measured times for {rows} rows; give one for each")
    wrong = np.flatnonzero(~(np.isfinite(seconds) & (seconds > 0)))
    if len(wrong):
        value = shown(seconds[wrong[0]])
        raise ValueError(f"{model.name}: the time of row {wrong[0]} must be above 0 s and finite, not {value}; measure it again")
    return found, seconds


class _Fit:
    """The program in the variables of the search: logarithms, but for parameters that may be 0."""

    def __init__(self, model: KernelModel, device: Device) -> None:
        self.model, self.device = model, device
        self.logarithmic = np.array([parameter.low > 0 for parameter in model.parameters])
        # A linear parameter is counted in its start, so that all variables are near 1.
        self.unit = np.array([1.0 if one.low > 0 else one.start or one.high for one in model.parameters])
        self.low, self.high = (self.inside([getattr(one, end) for one in model.parameters]) for end in ("low", "high"))

    def inside(self, values: ArrayLike) -> Array:
        """Variables of ``values`` in their own units."""
        plain = np.asarray(values, dtype=np.float64)
        return np.where(self.logarithmic, np.log(np.maximum(plain, 1e-300)), plain / self.unit)

    def outside(self, theta: Array) -> Array:
        """Values of variables."""
        return np.where(self.logarithmic, np.exp(np.where(self.logarithmic, theta, 0.0)), theta * self.unit)

    def values(self, theta: Array) -> dict[str, float]:
        """Values by name."""
        return dict(zip((one.name for one in self.model.parameters), self.outside(theta).tolist(), strict=True))

    def residual(self, theta: Array, shapes: Shapes, logarithms: Array) -> Array:
        """log(predicted / measured) [N]."""
        residual: Array = np.log(self.model.seconds(self.device, shapes, self.values(theta))) - logarithms
        return residual

    def best(self, shapes: Shapes, seconds: Array, seed: int, starts: int) -> tuple[Array, Array, Array]:
        """The best variables [P] found, and the Jacobian [N, P] and the residuals [N] there."""
        from scipy.optimize import least_squares

        random = np.random.default_rng(seed)
        logarithms = np.log(seconds)
        begin = self.inside([one.start for one in self.model.parameters])

        def all_residuals(theta: Array) -> Array:
            return np.concatenate([self.residual(theta, shapes, logarithms), PRIOR * (theta - begin)])

        points = [begin, *(self.low + (self.high - self.low) * random.random(len(begin)) for _ in range(starts - 1))]
        found: Any = None
        for point in points:
            # A variable that begins on its bound cannot be moved by the method.
            inner = np.clip(point, self.low + 1e-6 * (self.high - self.low), self.high - 1e-6 * (self.high - self.low))
            answer = least_squares(all_residuals, inner, bounds=(self.low, self.high), loss="soft_l1", f_scale=CORNER, x_scale="jac")
            if found is None or answer.cost < found.cost * (1 - 1e-9):
                found = answer
        theta = found.x
        return theta, self.jacobian(theta, shapes, logarithms), self.residual(theta, shapes, logarithms)

    def jacobian(self, theta: Array, shapes: Shapes, logarithms: Array) -> Array:
        """Central differences: the soft loss has scaled those of the solver."""
        columns = []
        for j in range(len(theta)):
            step = 1e-4 * max(abs(theta[j]), 1.0)
            up, down = theta.copy(), theta.copy()
            up[j], down[j] = min(theta[j] + step, self.high[j]), max(theta[j] - step, self.low[j])
            change = self.residual(up, shapes, logarithms) - self.residual(down, shapes, logarithms)
            columns.append(change / (up[j] - down[j]))
        return np.stack(columns, axis=1)


def _held_out(problem: _Fit, shapes: Shapes, seconds: Array, groups: NDArray[np.int64], folds: int, seed: int) -> Array:
    """Predictions [N] of each row by a fit on the folds that do not have its shape."""
    number = int(groups.max()) + 1
    fold = np.random.default_rng(seed).permutation(number) % folds
    predicted = np.empty(len(seconds))
    for each in range(folds):
        out = fold[groups] == each
        kept = {name: column[~out] for name, column in shapes.items()}
        found, _, _ = problem.best(kept, seconds[~out], seed, FOLD_STARTS)
        rows = {name: column[out] for name, column in shapes.items()}
        predicted[out] = problem.model.seconds(problem.device, rows, problem.values(found))
    return predicted


def _intervals(
    problem: _Fit, theta: Array, jacobian: Array, residual: Array, groups: NDArray[np.int64]
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Lower and upper ends of the parameters, and what cannot be told by these rows."""
    names = [one.name for one in problem.model.parameters]
    weight = 1 / np.sqrt(1 + (residual / CORNER) ** 2)  # of soft_l1
    curvature = jacobian.T @ (weight[:, None] * jacobian)
    # The prior keeps directions that the rows do not determine finite, and wide.
    bread = np.linalg.inv(curvature + PRIOR**2 * np.eye(len(theta)))
    scores = np.zeros((int(groups.max()) + 1, len(theta)))
    np.add.at(scores, groups, (weight * residual)[:, None] * jacobian)
    clusters, freedom = len(scores), max(len(residual) - len(theta), 1)
    sandwich = np.diag(bread @ (scores.T @ scores) @ bread) * clusters / max(clusters - 1, 1)
    plain = np.diag(bread) * float((weight * residual**2).sum()) / freedom
    deviation = np.sqrt(np.maximum(sandwich, plain))
    unseen = np.diag(curvature) <= 1e-12 * max(float(np.diag(curvature).max()), 1e-300)
    ends = [problem.outside(np.clip(theta + sign * CONFIDENCE * deviation, problem.low, problem.high)) for sign in (-1, 1)]
    low, high = (dict(zip(names, end.tolist(), strict=True)) for end in ends)
    warnings = []
    width = np.where(problem.high > problem.low, problem.high - problem.low, 1.0)
    for j, name in enumerate(names):
        parameter = problem.model.parameters[j]
        if unseen[j]:
            warnings.append(f"{name} does not change any of these rows: its value is the start of the search, not a finding")
            low[name], high[name] = parameter.low, parameter.high
        elif min(theta[j] - problem.low[j], problem.high[j] - theta[j]) < 1e-3 * width[j] and not (parameter.low == 0 and theta[j] < 1e-3):
            warnings.append(f"{name} is at the end of its range, {problem.values(theta)[name]:.4g} {parameter.unit}".rstrip())
    alone = np.linalg.pinv(curvature, rcond=1e-10, hermitian=True)
    scale = np.sqrt(np.maximum(np.diag(alone), 1e-300))
    correlation = alone / scale[:, None] / scale
    for j in range(len(names)):
        for k in range(j + 1, len(names)):
            if not (unseen[j] or unseen[k]) and abs(correlation[j, k]) > TIED:
                warnings.append(f"{names[j]} and {names[k]} cannot be told apart by these rows (correlation {correlation[j, k]:.3f})")
    return low, high, warnings


def _about_data(model: KernelModel, rows: int, shapes: int, flagged: int) -> list[str]:
    """Warnings about the rows themselves."""
    warnings = []
    if shapes == 1:
        warnings.append("all rows have one shape: nothing is known about others")
    if rows <= 2 * len(model.parameters):
        warnings.append(f"{rows} rows for {len(model.parameters)} parameters: the error on other rows is likely larger than on these")
    if flagged:
        warnings.append(f"{flagged} rows beat the data sheet and were left out: check units, precision and data sheet")
    return warnings
