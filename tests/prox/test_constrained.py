"""Constrained and non-smooth inner problems: hypergradients against closed forms.

The closed forms hold on the active set: with the zeros, the signs and the active bounds of the
solution held fixed, each problem is a linear system.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc import prox
from tests.cells import slow_but, thinned

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

N = 6
generator = torch.Generator().manual_seed(3)
X, X_val = torch.randn(2, 20, N, dtype=torch.float64, generator=generator)
TRUE = torch.tensor([1.5, -1.0, 0.1, 0.0, 0.7, -0.05], dtype=torch.float64)
y, y_val = (
    A @ TRUE + 0.1 * torch.randn(20, dtype=torch.float64, generator=generator) for A in (X, X_val)
)
H, c = X.T @ X / 20, X.T @ y / 20
STEP = 1.0 / torch.linalg.matrix_norm(H, 2).item()


def loss(w, h, *args):
    return 0.5 * ((X @ w.reshape(-1) - y) ** 2).mean()


def outer_loss(w, h, *args):
    return ((X_val @ w.reshape(-1) - y_val) ** 2).mean() + (w**4).sum()


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator, hparams, and the solution as a function of them near a solution w.

    ``None`` for the solution: there is no formula, and only the other two oracles are used.
    """

    operator: Callable[..., Any]
    hparams: Any
    on_active_set: Callable[[Tensor, Any], Tensor] | None
    loss: Callable[..., Tensor] = loss
    shape: tuple[int, ...] = (N,)

    @functools.cached_property
    def solver(self):
        start = torch.zeros(self.shape, dtype=torch.float64)
        phi = hf.proximal_gradient_map(self.loss, self.operator, STEP)
        return hf.iterate(phi, 400, init=lambda h: start)

    @functools.cached_property
    def solution(self) -> Tensor:
        return self.solver(self.hparams)

    def closed_form(self, h: Any) -> Tensor:
        assert self.on_active_set is not None
        return self.on_active_set(self.solution, h)


def solve_on(free: Tensor, rhs: Tensor, A: Tensor = H) -> Tensor:
    """The solution of ``A w = rhs`` on the free entries, with zeros elsewhere."""
    index = free.nonzero()[:, 0]
    part = torch.linalg.inv(A[index][:, index]) @ rhs[index]
    return torch.zeros(N, dtype=torch.float64).index_put((index,), part)


def with_sum(w: Tensor, sign: Tensor, total: Tensor) -> Tensor:
    """Least squares on the entries that sign names, with their signed sum given."""
    free, rest = solve_on(sign != 0, c), solve_on(sign != 0, sign)
    return free - rest * (sign @ free - total) / (sign @ rest)


def at_bounds(w: Tensor, h: Any) -> Tensor:
    low, high = w <= h["lower"].detach(), w >= h["upper"].detach()
    fixed = torch.where(low, h["lower"], torch.where(high, h["upper"], 0.0))
    return fixed + solve_on(~(low | high), c - H @ fixed)


def ridge(w, h):
    return loss(w, h) + 0.5 * h.exp() * (w**2).sum()


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


eye = torch.eye(N, dtype=torch.float64)
CASES = {
    "lasso": Case(
        prox.l1(lambda h: h.exp()),
        number(-2.0),
        lambda w, h: solve_on(w != 0, c - h.exp() * w.sign()),
    ),
    "weighted lasso": Case(
        prox.l1(lambda h: h.exp()),
        torch.linspace(-4.0, -1.0, N, dtype=torch.float64),
        lambda w, h: solve_on(w != 0, c - h.exp() * w.sign()),
    ),
    "elastic net": Case(
        prox.elastic_net(l1=lambda h: h[0].exp(), l2=lambda h: h[1].exp()),
        torch.tensor([-2.0, -1.0], dtype=torch.float64),
        lambda w, h: solve_on(w != 0, c - h[0].exp() * w.sign(), H + h[1].exp() * eye),
    ),
    "non-negative least squares": Case(
        prox.non_negative(),
        number(-1.0),
        lambda w, h: solve_on(w > 0, c, H + h.exp() * eye),
        loss=ridge,
    ),
    "box": Case(
        prox.box(lower=lambda h: h["lower"], upper=lambda h: h["upper"]),
        {"lower": number(-0.4), "upper": torch.linspace(0.5, 1.0, N, dtype=torch.float64)},
        at_bounds,
    ),
    "simplex": Case(
        prox.simplex(lambda h: h),
        number(1.2),
        lambda w, h: with_sum(w, (w > 0).double(), h),
    ),
    "l1 ball": Case(
        prox.l1_ball(lambda h: h),
        number(2.0),
        lambda w, h: with_sum(w, w.sign(), h),
    ),
    "l2 ball": Case(prox.l2_ball(lambda h: h), number(1.0), None),
    "group lasso": Case(
        prox.group_lasso(lambda h: h.exp(), dim=1), number(-1.0), None, shape=(3, 2)
    ),
    "box section": Case(
        prox.box_section(-0.5, lambda h: h[0], torch.arange(1.0, N + 1).double(), lambda h: h[1]),
        torch.tensor([0.8, 1.1], dtype=torch.float64),
        None,
    ),
    "sparse group lasso": Case(
        prox.chain(prox.l1(lambda h: h[0].exp()), prox.group_lasso(lambda h: h[1].exp(), dim=1)),
        torch.tensor([-2.0, -2.5], dtype=torch.float64),
        None,
        shape=(3, 2),
    ),
    "nuclear norm": Case(prox.nuclear_norm(lambda h: h.exp()), number(-1.5), None, shape=(3, 2)),
}
METHODS = {
    "fixed_point": hf.FixedPoint(maxiter=1000, rtol=1e-13),
    "gmres": hf.GMRES(rtol=1e-13),
    "normal_cg": hf.NormalCG(rtol=1e-14),
    "bicgstab": hf.BiCGStab(rtol=1e-13),
    "dense": hf.Dense(),
    "reverse": hf.Reverse(),
    "forward": hf.ForwardMode(),
}
WITH_FORMULA = {name: case for name, case in CASES.items() if case.on_active_set}
with_formula = pytest.mark.parametrize("case", WITH_FORMULA.values(), ids=WITH_FORMULA)


def close(got: Any, expected: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@with_formula
def test_solutions_are_those_on_the_active_set(case):
    close(case.solution, case.closed_form(case.hparams), 1e-12)
    assert not torch.allclose(case.solution, torch.linalg.solve(H, c), atol=1e-2)


@pytest.mark.parametrize(("name", "method"), thinned(WITH_FORMULA, METHODS, every=3))
def test_hypergradients_agree_with_the_closed_form(name, method):
    case, method = CASES[name], METHODS[method]
    expected = grad(lambda h: outer_loss(case.closed_form(h), h))(case.hparams)
    close(hf.hypergrad(case.solver, outer_loss, method=method)(case.hparams), expected)


KEPT = ("box", "weighted lasso", "group lasso", "l2 ball", "nuclear norm")


@pytest.mark.parametrize("name", slow_but(*KEPT, of=CASES))
def test_hypergradients_agree_with_unrolling_and_differences(name):
    case = CASES[name]
    h = case.hparams
    got = hf.hypergrad(case.solver, outer_loss, method=METHODS["gmres"])(h)
    close(got, hf.hypergrad(case.solver, outer_loss, method="reverse_unroll")(h))
    leaves, spec = torch.utils._pytree.tree_flatten(h)
    direction = [torch.randn_like(leaf) for leaf in leaves]

    def value(t):
        moved = [x + t * d for x, d in zip(leaves, direction, strict=True)]
        h = torch.utils._pytree.tree_unflatten(moved, spec)
        return outer_loss(case.solver(h), h)

    slope = sum(
        (g * d).sum() for g, d in zip(torch.utils._pytree.tree_leaves(got), direction, strict=True)
    )
    close(slope, (value(1e-6) - value(-1e-6)) / 2e-6, 1e-7)


@pytest.mark.parametrize("name", slow_but("simplex", "elastic net", of=WITH_FORMULA))
def test_derivatives_of_the_solution_in_every_mode_and_order(name):
    case = CASES[name]
    solve = hf.implicit_diff(case.solver, method=METHODS["gmres"])
    h = case.hparams
    expected = jacrev(case.closed_form)(h)
    for transform in (jacrev, jacfwd):
        close(transform(solve)(h), expected)
    batch = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x]), h)
    close(
        vmap(jacrev(solve))(batch),
        torch.utils._pytree.tree_map(lambda x: torch.stack([x, x]), expected),
    )
    expected = jacrev(jacrev(lambda h: outer_loss(case.closed_form(h), h)))(h)
    close(hessian(lambda h: outer_loss(solve(h), h))(h), expected, 1e-7)
    tracked = torch.utils._pytree.tree_map(lambda x: x.clone().requires_grad_(), h)
    outer_loss(solve(tracked), None).backward()
    expected = grad(lambda h: outer_loss(case.closed_form(h), h))(h)
    close(torch.utils._pytree.tree_map(lambda x: x.grad, tracked), expected)


def test_a_path_is_one_batch():
    case = CASES["lasso"]
    path = torch.linspace(-4.0, 1.0, 5, dtype=torch.float64)
    fn = hf.hypergrad_and_solution(case.solver, outer_loss, method=METHODS["gmres"])
    got, solution = vmap(fn)(path)
    for h, g, w in zip(path, got, solution.params, strict=True):
        formula = dataclasses.replace(case, hparams=h).closed_form
        close(g, grad(lambda h, f=formula: outer_loss(f(h), h))(h))
        close(w, formula(h))
    assert got[-1] == 0  # nothing is selected there
    sizes = (solution.params != 0).sum(1)
    assert sizes[0] == N
    assert sizes[-1] == 0


def test_the_step_size_has_no_hypergradient_and_may_be_tuned():
    def solve(h):
        phi = hf.proximal_gradient_map(loss, prox.l1(lambda h: h["reg"].exp()), lambda h: h["lr"])
        return hf.iterate(phi, 400, init=lambda h: torch.zeros(N, dtype=torch.float64)), phi

    h = {"reg": number(-2.0), "lr": number(0.8 * STEP)}
    solver, phi = solve(h)
    got = hf.hypergrad(solver, outer_loss, method=METHODS["gmres"])(h)
    close(got["lr"], number(0.0))  # the solution is the same for all step sizes
    expected = hf.hypergrad(CASES["lasso"].solver, outer_loss, method="dense")(number(-2.0))
    close(got["reg"], expected)
    few = hf.iterate(phi, 3, init=lambda h: torch.zeros(N, dtype=torch.float64))
    slope = hf.hypergrad(few, outer_loss, method="reverse")(h)["lr"]
    plus, minus = (outer_loss(few({**h, "lr": h["lr"] + e}), h) for e in (1e-6, -1e-6))
    close(slope, (plus - minus) / 2e-6, 1e-6)
    assert slope.abs() > 1e-3


def test_settings_that_require_grad_are_refused_unless_passed_in_hparams():
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    phi = hf.proximal_gradient_map(loss, prox.l1(weight), STEP)
    solver = hf.iterate(phi, 10, init=lambda h: torch.zeros(N, dtype=torch.float64))
    with pytest.raises(ValueError, match="closes over a tensor that requires grad"):
        hf.hypergrad(solver, outer_loss, method="gmres")(number(0.0))


def test_params_of_several_leaves():
    """The lasso with an intercept, which is not penalised: the same as centred data."""

    def affine_loss(p, h):
        return 0.5 * ((X @ p["w"] + p["b"] - y) ** 2).mean()

    def centred_loss(w, h):
        return 0.5 * (((X - X.mean(0)) @ w - (y - y.mean())) ** 2).mean()

    shrink = prox.l1(lambda h: {"b": 0.0, "w": h.exp()})
    start = {"b": number(0.0), "w": torch.zeros(N, dtype=torch.float64)}
    affine = hf.iterate(
        hf.proximal_gradient_map(affine_loss, shrink, 0.5 * STEP), 1500, init=lambda h: start
    )
    centred = hf.iterate(
        hf.proximal_gradient_map(centred_loss, prox.l1(lambda h: h.exp()), STEP),
        800,
        init=lambda h: start["w"],
    )
    got = hf.hypergrad(affine, lambda p, h: outer_loss(p["w"], h), method=METHODS["gmres"])
    expected = hf.hypergrad(centred, outer_loss, method=METHODS["gmres"])
    close(got(number(-2.0)), expected(number(-2.0)))


# Equality-constrained least squares: minimise the ridge loss subject to C w = d.

C = torch.randn(2, N, dtype=torch.float64, generator=generator)


def kkt(solution, h):
    w, multipliers = solution
    return grad(ridge)(w, h["log_reg"]) + C.T @ multipliers, C @ w - h["d"]


def constrained_solution(h):
    """By the linear system of the conditions of Karush, Kuhn and Tucker."""
    K = torch.cat(
        [
            torch.cat([H + h["log_reg"].exp() * eye, C.T], 1),
            torch.cat([C, torch.zeros(2, 2, dtype=torch.float64)], 1),
        ]
    )
    solution = torch.linalg.inv(K) @ torch.cat([c, h["d"]])
    return solution[:N], solution[N:]


CONSTRAINED = {"log_reg": number(-1.0), "d": torch.tensor([0.3, -0.5], dtype=torch.float64)}


def outer_of_both(solution, h):
    return outer_loss(solution[0], h) + (solution[1] ** 2).sum()


@pytest.mark.parametrize("method", [hf.GMRES(rtol=1e-13), hf.NormalCG(rtol=1e-14), "dense"])
def test_equality_constraints(method):
    expected = grad(lambda h: outer_of_both(constrained_solution(h), h))(CONSTRAINED)
    fn = hf.hypergrad(constrained_solution, outer_of_both, optimality=kkt, method=method)
    close(fn(CONSTRAINED), expected)
    solve = hf.implicit_diff(constrained_solution, optimality=kkt, method=method)
    for transform in (jacrev, jacfwd):
        close(transform(solve)(CONSTRAINED), jacrev(constrained_solution)(CONSTRAINED))
    close(
        hessian(lambda h: outer_of_both(solve(h), h))(CONSTRAINED),
        jacrev(jacrev(lambda h: outer_of_both(constrained_solution(h), h)))(CONSTRAINED),
    )


def test_methods_for_definite_systems_notice_one_that_is_not():
    fn = hf.hypergrad(constrained_solution, outer_of_both, optimality=kkt, method="cg")
    with pytest.raises(hf.HypergradError, match="the recurrence broke down"):
        fn(CONSTRAINED)
    solve = hf.implicit_diff(constrained_solution, optimality=kkt, method="bicgstab")
    with pytest.raises(hf.HypergradError, match="the recurrence broke down"):
        grad(lambda h: solve(h)[1].sum())(CONSTRAINED)  # there the diagonal of the system is zero


def slackness(solution, h):
    """Non-negative least squares: the multipliers of w >= 0 vanish where w does not."""
    w, multipliers = solution
    return grad(ridge)(w, h) - multipliers, multipliers * w


def test_inequality_constraints_through_their_multipliers():
    case = CASES["non-negative least squares"]
    w = case.solution
    solution = w, grad(ridge)(w, case.hparams)
    expected = grad(lambda h: outer_loss(case.closed_form(h), h))(case.hparams)
    for method in (hf.GMRES(rtol=1e-13), hf.NormalCG(rtol=1e-15), "dense"):
        fn = hf.hypergrad(
            lambda h: solution,
            lambda solution, h: outer_loss(solution[0], h),
            optimality=slackness,
            method=method,
        )
        close(fn(case.hparams), expected)


def test_a_constraint_that_is_just_active_is_a_kink_and_raises():
    def objective(w, h):
        return 0.5 * (w - h) ** 2

    def conditions(solution, h):
        w, multiplier = solution
        return grad(objective)(w, h) - multiplier, multiplier * w

    at_kink = number(0.0), number(0.0)  # the solution is max(h, 0)
    for method in ("gmres", "dense", "normal_cg"):
        fn = hf.hypergrad(
            lambda h: at_kink,
            lambda solution, h: solution[0],
            optimality=conditions,
            method=method,
        )
        with pytest.raises(hf.HypergradError, match="failed"):
            fn(number(0.0))
