"""Program: a mixed-integer linear program whose code reads as its page of mathematics. Solved by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import optimize


class Infeasible(ValueError):
    """No solution: the message names the constraint that fails."""


class OutOfTime(ValueError):
    """No solution was found within the time limit; there may be one."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear expression: sum of coefficient x variable, plus a constant."""

    terms: Mapping[int, float] = field(default_factory=dict)
    constant: float = 0.0

    def __add__(self, other: Linear | float) -> Linear:
        if not isinstance(other, Linear):
            return Linear(self.terms, self.constant + other)
        terms = dict(self.terms)
        for variable, coefficient in other.terms.items():
            terms[variable] = terms.get(variable, 0.0) + coefficient
        return Linear(terms, self.constant + other.constant)

    def __mul__(self, factor: float) -> Linear:
        return Linear({variable: factor * c for variable, c in self.terms.items()}, factor * self.constant)

    def __neg__(self) -> Linear:
        return self * -1.0

    def __sub__(self, other: Linear | float) -> Linear:
        return self + -other

    def __rsub__(self, other: float) -> Linear:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __ge__(self, other: Linear | float) -> Constraint:
        return Constraint(self - other, 0.0, math.inf)

    def __le__(self, other: Linear | float) -> Constraint:
        return Constraint(self - other, -math.inf, 0.0)

    def equals(self, other: Linear | float) -> Constraint:
        return Constraint(self - other, 0.0, 0.0)


@dataclass(frozen=True)
class Constraint:
    """lower <= expression <= upper."""

    expression: Linear
    lower: float
    upper: float


def total(expressions: Iterable[Linear | float]) -> Linear:
    terms: dict[int, float] = {}
    constant = 0.0
    for expression in expressions:
        if isinstance(expression, Linear):
            for variable, coefficient in expression.terms.items():
                terms[variable] = terms.get(variable, 0.0) + coefficient
            constant += expression.constant
        else:
            constant += expression
    return Linear(terms, constant)


@dataclass(frozen=True)
class Solution:
    """`gap` is relative: how much lower the objective might still be; 0: proven."""

    values: np.ndarray[tuple[int], np.dtype[np.float64]]
    objective: float
    gap: float

    def __call__(self, expression: Linear) -> float:
        return float(sum(c * self.values[v] for v, c in expression.terms.items()) + expression.constant)

    def chosen(self, variable: Linear) -> bool:
        return self(variable) > 0.5


class Program:
    """Variables, then constraints under their number in the text, then `minimize`."""

    def __init__(self) -> None:
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._constraints: list[tuple[str, Constraint]] = []

    def real(self, lower: float = 0.0, upper: float = math.inf) -> Linear:
        return self._variable(lower, upper, False)

    def binary(self) -> Linear:
        return self._variable(0.0, 1.0, True)

    def subject_to(self, label: str, constraint: Constraint) -> None:
        self._constraints.append((label, constraint))

    def minimize(self, objective: Linear, time_limit_s: float = math.inf, gap: float = 1e-6) -> Solution:
        """The best solution found.

        Raises:
            Infeasible: there is none.
            OutOfTime: none was found in time.
        """
        found = self._solve(objective, self._constraints, time_limit_s, gap)
        if found.status == 2:
            raise Infeasible(self._diagnosis())
        if found.x is None:
            raise OutOfTime(f"no solution was found in {time_limit_s:g} s")
        bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
        gap = max(found.fun - bound, 0.0) / max(abs(found.fun), 1e-12)
        return Solution(found.x, float(found.fun) + objective.constant, float(gap))

    def _variable(self, lower: float, upper: float, integer: bool) -> Linear:
        self._lower.append(lower)
        self._upper.append(upper)
        self._integer.append(integer)
        return Linear({len(self._lower) - 1: 1.0})

    def _solve(
        self, objective: Linear, constraints: list[tuple[str, Constraint]], time_limit_s: float, gap: float
    ) -> optimize.OptimizeResult:
        from scipy import optimize, sparse  # here: what times and predicts plans on a GPU has no solver

        rows, columns, data = [], [], []
        for row, (_, constraint) in enumerate(constraints):
            for variable, coefficient in constraint.expression.terms.items():
                rows.append(row)
                columns.append(variable)
                data.append(coefficient)
        matrix = sparse.csr_array((data, (rows, columns)), shape=(len(constraints), len(self._lower)))
        constants = np.array([c.expression.constant for _, c in constraints])
        lower = np.array([c.lower for _, c in constraints]) - constants
        upper = np.array([c.upper for _, c in constraints]) - constants
        costs = np.zeros(len(self._lower))
        for variable, coefficient in objective.terms.items():
            costs[variable] = coefficient
        # HiGHS 1.8 of scipy 1.16 presolves optima away: 206 us for 167, problem 25 of search_optimality.json.
        options = {"mip_rel_gap": gap, "presolve": False}
        if time_limit_s < math.inf:
            options["time_limit"] = time_limit_s
        return optimize.milp(
            costs,
            integrality=np.array(self._integer, dtype=int),
            bounds=optimize.Bounds(np.array(self._lower), np.array(self._upper)),
            constraints=optimize.LinearConstraint(matrix, lower, upper) if constraints else (),
            options=options,
        )

    def _diagnosis(self) -> str:
        """The first constraint, in the order of the text, with which those before it leave no solution."""
        labels = list(dict.fromkeys(label for label, _ in self._constraints))

        def feasible(count: int) -> bool:
            kept = set(labels[:count])
            found = self._solve(Linear(), [c for c in self._constraints if c[0] in kept], math.inf, 1.0)
            return bool(found.status != 2)

        low, high = 0, len(labels)  # the first `low` have a solution, the first `high` have none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if feasible(middle) else (low, middle)
        return f"infeasible: {labels[high - 1]} cannot hold with the constraints before it"
