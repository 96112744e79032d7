"""A mixed-integer linear program is written here like its page of mathematics, and HiGHS solves it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import optimize


class Infeasible(ValueError):
    """The program has no solution: the message names the first constraint that fails."""


class OutOfTime(ValueError):
    """The solver found no solution within the time limit; there may be one."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear expression: the sum of coefficient x variable over `terms`, plus a constant."""

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
        """Return the constraint that both sides are equal."""
        return Constraint(self - other, 0.0, 0.0)


@dataclass(frozen=True)
class Constraint:
    """The constraint lower <= expression <= upper."""

    expression: Linear
    lower: float
    upper: float


def lin_sum(expressions: Iterable[Linear | float]) -> Linear:
    """Return the sum of expressions and numbers."""
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
    """The best solution that was found.

    `gap` says by which share the objective might still be lower; 0 means that the solution is proven optimal.
    """

    values: np.ndarray[tuple[int], np.dtype[np.float64]]
    objective: float
    gap: float

    def __call__(self, expression: Linear) -> float:
        """Return the value of an expression."""
        return float(sum(c * self.values[v] for v, c in expression.terms.items()) + expression.constant)

    def chosen(self, variable: Linear) -> bool:
        """Return whether a binary variable is 1."""
        return self(variable) > 0.5


class Milp:
    """A program: declare variables, then constraints under their numbers in docs/search.md, then `minimize`."""

    def __init__(self) -> None:
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._constraints: list[tuple[str, Constraint]] = []

    def real(self, lower: float = 0.0, upper: float = math.inf) -> Linear:
        """Return a new variable in lower .. upper."""
        return self._variable(lower, upper, False)

    def binary(self) -> Linear:
        """Return a new variable that is 0 or 1."""
        return self._variable(0.0, 1.0, True)

    def subject_to(self, label: str, constraint: Constraint) -> None:
        """Add a constraint; an infeasible program names it by `label`."""
        self._constraints.append((label, constraint))

    def minimize(self, objective: Linear, time_limit_s: float = math.inf, gap: float = 1e-6) -> Solution:
        """Return the best solution that was found, up to a relative `gap` from the optimum.

        Raises:
            Infeasible: there is no solution.
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
        from scipy import optimize, sparse  # imported here: where plans are timed or predicted there may be no solver

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
        """Find, by bisection, the first label whose constraints leave no solution together with those before it."""
        labels = list(dict.fromkeys(label for label, _ in self._constraints))

        def feasible(count: int) -> bool:
            kept = set(labels[:count])
            found = self._solve(Linear(), [c for c in self._constraints if c[0] in kept], math.inf, 1.0)
            return bool(found.status != 2)

        low, high = 0, len(labels)  # the first `low` labels have a solution, the first `high` have none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if feasible(middle) else (low, middle)
        return f"infeasible: {labels[high - 1]} cannot hold with the constraints before it"
