"""`check_hypergrad`: right problems pass, and of wrong ones it names the ingredient that is off."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from problems import PROBLEMS, Problem
from torch import Tensor

import hyperfunc as hf
from hyperfunc._torch.autodiff import Linearization
from hyperfunc.diagnostics._differences import directional_derivative, noise_level
from tests.cells import thinned

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(8, 4, generator=GENERATOR, dtype=F64) / 3
Y = torch.randn(8, generator=GENERATOR, dtype=F64)
J = torch.tensor(
    [[0.1, 0.8, 0.0, 0.0], [-0.8, 0.1, 0.0, 0.0], [0.3, 0.0, 0.5, 0.9], [0, 0, 0, 0.2]]
)
REG = torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=F64)


def loss(w: Tensor, reg: Tensor) -> Tensor:
    return 0.5 * ((X @ w - Y) ** 2).sum() + 0.5 * (reg.exp() * w**2).sum()


def solve(reg: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X + torch.diag(reg.exp().expand(4)), X.T @ Y)


def outer(w: Tensor, reg: Tensor) -> Tensor:
    return ((w - 1) ** 2).sum() + 0.1 * (reg * w).sum()


def rotation(w: Tensor, reg: Tensor) -> Tensor:
    return J.double() @ w + reg.sin()


def rotation_solution(reg: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(4, dtype=F64) - J.double(), reg.sin())


def descent(num_steps: int, fn: Callable[..., Tensor] = loss, lr: float = 0.5) -> Any:
    return hf.minimize(
        fn, hf.optim.sgd(lr=lr), num_steps, init=lambda reg: torch.zeros(4, dtype=F64)
    )


# Right problems pass ------------------------------------------------------------------------------


@pytest.mark.parametrize(("problem", "dtype"), thinned(PROBLEMS, [F64, torch.float32]))
def test_right_problems_pass(problem: Problem, dtype: torch.dtype) -> None:
    hparams, args = problem.tasks(dtype)[0]
    methods = problem.methods(dtype) | {name: name for name in ("auto", "gmres", "bicgstab")}
    for method in methods.values():
        report = hf.check_hypergrad(
            problem.inner_solver,
            problem.outer_loss,
            hparams,
            *args,
            method=method,
            **problem.keywords,
        )
        assert report.passed, f"{method}: {report}"
        assert report.by_unrolling == ()


# Of each family of methods one that is exact, or nearly so, for this problem.
@pytest.mark.parametrize(
    "method",
    [
        hf.AndersonFixedPoint(step_size=0.5),
        hf.Blockwise(hf.CG()),
        hf.Damped(hf.CG(), damping=1e-7),
        hf.Fallback(hf.CG(maxiter=1), hf.GMRES()),
        hf.Nystrom(rank=4, rho=1e-7),
        hf.StochasticAID(num_steps=60, optimizer=hf.optim.sgd(lr=0.5)),
        hf.CG(preconditioner=hf.JacobiPreconditioner()),
        hf.Auto(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_right_solves_by_every_family_pass(method: Any) -> None:
    def tree_loss(w: Any, reg: Tensor) -> Tensor:
        return loss(w["w"], reg)

    report = hf.check_hypergrad(
        lambda reg: {"w": solve(reg)},
        lambda w, reg: outer(w["w"], reg),
        REG,
        inner_loss=tree_loss,
        method=method,
    )
    report.raise_if_failed()


def test_one_step_of_a_map_that_solves_at_once_passes() -> None:
    def newton(w: Tensor, reg: Tensor) -> Tensor:
        A = X.T @ X + torch.diag(reg.exp())
        return w - torch.linalg.inv(A) @ (A @ w - X.T @ Y)

    hf.check_hypergrad(solve, outer, REG, fixed_point=newton, method="one_step").raise_if_failed()


@pytest.mark.parametrize(
    ("method", "dtype"),
    thinned(
        ["reverse_unroll", "reverse", "forward", hf.Reverse("sqrt"), "cg", "normal_cg", "dense"],
        [F64, torch.float32],
        every=4,
    ),
)
def test_right_iterations_pass(method: Any, dtype: torch.dtype) -> None:
    def narrow(w: Tensor, reg: Tensor) -> Tensor:
        x, y = X.to(dtype), Y.to(dtype)
        return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * (reg.exp() * w**2).sum()

    solver = hf.minimize(
        narrow, hf.optim.sgd(lr=0.5), 30, init=lambda reg: torch.zeros(4, dtype=dtype)
    )
    report = hf.check_hypergrad(solver, outer, REG.to(dtype), method=method)
    report.raise_if_failed()
    torch.testing.assert_close(report.by_unrolling, report.by_method, rtol=1e-4, atol=1e-4)


def stopping(reg: Tensor) -> Tensor:
    """A solver that stops by a tolerance."""
    return hf.minimize(
        loss, hf.optim.sgd(lr=0.5), 500, init=lambda reg: torch.zeros(4, dtype=F64), rtol=1e-9
    )(reg)


# name: the outer loss, the point, and the inner solver
CORNERS: dict[str, tuple[Callable[..., Tensor], Tensor, Any]] = {
    "hparams of zero": (outer, torch.zeros(4, dtype=F64), solve),
    "large hparams": (lambda w, reg: outer(w * 100, reg / 100), REG * 0 - 6, solve),
    "a vanishing derivative": (lambda w, reg: ((w - solve(REG)) ** 2).sum(), REG, solve),
    "no derivative at all": (lambda w, reg: torch.ones((), dtype=F64), REG, solve),
    "a large outer loss": (lambda w, reg: 1e12 + 1e6 * outer(w, reg), REG, solve),
    "a small outer loss": (lambda w, reg: 1e-30 * outer(w, reg), REG, solve),
    "a solver that stops by a tolerance": (outer, REG, stopping),
    "a kink close by": (lambda w, reg: (w - solve(REG) - 1e-3).abs().sum(), REG, solve),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners_pass(name: str) -> None:
    outer_loss, reg, solver = CORNERS[name]
    hf.check_hypergrad(solver, outer_loss, reg, inner_loss=loss).raise_if_failed()


# One step of descent is far from the solution, and yet what reverse mode gives is its derivative.
def test_iterative_methods_are_right_for_unsolved_problems() -> None:
    hf.check_hypergrad(descent(1), outer, REG, method="reverse").raise_if_failed()
    assert not hf.check_hypergrad(descent(1), outer, REG, method="cg").passed


# Of wrong problems it names what is off -----------------------------------------------------------


def without_gradients(reg: Tensor) -> Tensor:
    with torch.no_grad():
        return solve(reg)


def indefinite(w: Tensor, reg: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=F64) * w**2).sum() - (reg * w).sum()


composed = hf.proximal(
    hf.composed(lambda w, reg: (X @ w).exp(), lambda out, reg: 0.5 * ((out + Y) ** 2).sum()), 1.0
)


def noisy(reg: Tensor) -> Tensor:
    digits = torch.frac(solve(reg) * 1e6)
    return solve(reg) + 1e-2 * digits


@dataclasses.dataclass(frozen=True)
class Broken:
    """A problem with something wrong: the keywords of the check, and the causes that it finds."""

    name: str
    causes: set[str]
    solver: Callable[..., Any] = solve
    outer_loss: Callable[..., Any] = outer
    keywords: dict[str, Any] = dataclasses.field(default_factory=lambda: {"inner_loss": loss})
    text: str = ""


BROKEN = [
    Broken("five steps of descent", {"solver_not_converged"}, solver=descent(5), text="more steps"),
    Broken(  # the hypergradient by the formula is the same at all params
        "three steps and a linear outer loss",
        {"solver_not_converged"},
        solver=descent(3),
        outer_loss=lambda w, reg: w.sum(),
        text="more steps",
    ),
    Broken("three steps that barely move", {"solver_not_converged"}, solver=descent(3, lr=1e-5)),
    Broken("steps that diverge", {"solver_not_converged"}, solver=descent(10, lr=9.0)),
    Broken(
        "descent on another loss",
        {"condition_mismatch"},
        solver=descent(40),
        keywords={"inner_loss": lambda w, reg: loss(w, 2 * reg)},
        text="another problem",
    ),
    Broken(
        "a black box for another loss",
        {"condition_mismatch", "solver_not_converged"},
        keywords={"inner_loss": lambda w, reg: loss(w, reg + 1)},
        solver=without_gradients,
        text="failed\n- condition mismatch",
    ),
    Broken(
        "a stale copy of hparams in the condition",
        {"dependence_lost"},
        keywords={"inner_loss": lambda w, reg: loss(w, REG + (reg - REG) / 2)},
        text="It concerns hparams",
    ),
    Broken(
        "a stale copy of one entry",
        {"dependence_lost"},
        keywords={"inner_loss": lambda w, reg: loss(w, torch.cat([REG[:1], reg[1:]]))},
        text="It concerns hparams",
    ),
    Broken(
        "two steps of CG",
        {"linear_solve"},
        keywords={"inner_loss": loss, "method": hf.CG(maxiter=1)},
        text="step limit",
    ),
    Broken(
        "a damped system",
        {"damping"},
        keywords={"inner_loss": loss, "method": hf.Damped(hf.CG(), 0.5)},
        text="Lower the damping",
    ),
    Broken(
        "a Gauss-Newton matrix far from the Hessian",
        {"curvature"},
        solver=hf.minimize(composed, hf.optim.sgd(lr=0.1), 200, init=torch.zeros_like),
        keywords={"inner_loss": composed},
        text="takes the Gauss-Newton matrix for the Hessian",
    ),
    Broken(
        "one step for a map that contracts slowly",
        {"linear_solve"},
        solver=rotation_solution,
        keywords={"fixed_point": rotation, "method": "one_step"},
    ),
    Broken(
        "CG for a map without symmetry",
        {"assumption_broken"},
        solver=rotation_solution,
        keywords={"fixed_point": rotation, "method": "cg"},
        text="Asymmetry",
    ),
    Broken(
        "CG at a saddle",
        {"assumption_broken"},
        solver=lambda reg: reg / torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=F64),
        keywords={"inner_loss": indefinite, "method": "cg"},
        text="smallest curvature -1",
    ),
    Broken(
        "a fixed-point iteration that expands",
        {"assumption_broken"},
        keywords={"inner_loss": loss, "method": hf.FixedPoint(step_size=3.0)},
        text="spectral radius",
    ),
    Broken(
        "Neumann's series of a few terms",
        {"linear_solve"},
        keywords={"inner_loss": loss, "method": hf.Neumann(maxiter=2, step_size=0.2)},
    ),
    Broken(
        "hparams left out of the condition",
        {"dependence_lost", "condition_mismatch", "solver_not_converged"},
        keywords={"inner_loss": lambda w, reg: loss(w, torch.zeros_like(REG))},
        text="It concerns hparams",
    ),
    Broken(
        "hparams detached in the condition",
        {"dependence_lost"},
        keywords={"inner_loss": lambda w, reg: loss(w, reg.detach())},
        text="It concerns hparams",
    ),
    Broken(
        "hparams detached in the outer loss",
        {"dependence_lost"},
        outer_loss=lambda w, reg: outer(w, reg.detach()),
        text="It concerns hparams",
    ),
    Broken(
        "params detached in the outer loss",
        {"dependence_lost"},
        outer_loss=lambda w, reg: outer(w, reg) + (w.detach() ** 3).sum(),
        text="It concerns params",
    ),
    Broken(
        "params detached in the inner loss",
        {"dependence_lost"},
        keywords={"optimality": lambda w, reg: X.T @ (X @ w - Y) + reg.exp() * w.detach()},
        text="It concerns params",
    ),
    Broken(
        "a solver that ignores hparams",
        {"dependence_lost"},
        solver=lambda reg: solve(REG),
        text="It concerns hparams",
    ),
    Broken(
        "unrolling without gradients",
        {"dependence_lost"},
        solver=without_gradients,
        keywords={"method": "reverse_unroll"},
    ),
    Broken(
        "reverse mode cut short",
        {"assumption_broken"},
        solver=descent(40),
        keywords={"method": hf.Reverse(last=1)},
    ),
    Broken(
        "a singular inner problem",
        {"assumption_broken"},
        solver=lambda reg: torch.cat([reg[:1], torch.zeros(3, dtype=F64)]),
        keywords={"inner_loss": lambda w, reg: (w[0] - reg[0]) ** 2},
        text="smallest curvature",
    ),
    Broken(
        "params that are not finite",
        {"solver_not_converged"},
        solver=lambda reg: solve(reg) / torch.zeros(4, dtype=F64),
        text="not finite",
    ),
    Broken("a solver with noise", {"inconclusive"}, solver=noisy, text="too noisy"),
]


@pytest.mark.parametrize(("case", "max_dense"), thinned(BROKEN, [500, 0]))
def test_wrong_problems_are_named(case: Broken, max_dense: int) -> None:
    report = hf.check_hypergrad(
        case.solver, case.outer_loss, REG, max_dense=max_dense, **case.keywords
    )
    assert {name for name, flag in report.causes._asdict().items() if flag} == case.causes, report
    assert not report.passed
    assert case.text in str(report)
    with pytest.raises(hf.HypergradError, match=r"^check_hypergrad: failed\n- "):
        report.raise_if_failed()


@dataclasses.dataclass(frozen=True)
class Scaled(hf.linear_solvers.AbstractLinearSolver):
    """The solution times a factor."""

    factor: float

    def solve(self, operator: Any, b: Any, x0: Any = None) -> Any:
        (u,), stats = hf.Dense().solve(operator, b, x0)
        return (self.factor * u,), stats


@pytest.mark.parametrize(
    ("off", "error", "causes"),
    [
        (0.9e-2, 0.0, set()),
        (1.2e-2, 0.0, {"linear_solve"}),
        (8e-2, 0.04, set()),  # within twice the error of the differences
        (1.1e-1, 0.04, {"linear_solve"}),
        (0.0, 0.049, set()),
        (0.0, 0.051, {"inconclusive"}),
    ],
)
def test_how_far_off_is_wrong(
    off: float, error: float, causes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a relative tolerance of 1e-2, and differences with errors of given relative size."""
    settings: dict[str, Any] = {"inner_loss": loss, "rtol": 1e-2, "method": Scaled(1 + off)}
    check = hf.diagnostics._check
    size = float(hf.check_hypergrad(solve, cubic, REG, **settings).by_method.abs().max())

    def differences(*args: Any) -> tuple[float, float]:
        value, own = directional_derivative(*args)
        return value, max(own, error * size)

    monkeypatch.setattr(check, "directional_derivative", differences)
    report = hf.check_hypergrad(solve, cubic, REG, **settings)
    assert {name for name, flag in report.causes._asdict().items() if flag} == causes, report


def cubic(w: Tensor, reg: Tensor) -> Tensor:
    return (w**3).sum()


def test_a_solver_is_told_to_take_more_steps_if_these_halve_the_residual() -> None:
    """Eight steps instead of one, here with a residual 0.45 times as large."""

    def slow(w: Tensor, reg: Tensor) -> Tensor:
        return 0.5 * ((w - reg) ** 2).sum() * (1 - 0.45 ** (1 / 7))

    def start(reg: Tensor) -> Tensor:
        return torch.ones(4, dtype=F64)

    solver = hf.minimize(slow, hf.optim.sgd(lr=1.0), 1, init=start)
    report = hf.check_hypergrad(solver, cubic, REG, method="dense")
    assert bool(report.causes.solver_not_converged)
    assert not bool(report.causes.condition_mismatch)


def test_the_leaf_that_lost_its_dependence_is_named() -> None:
    def tree_loss(w: Tensor, h: Any) -> Tensor:
        return loss(w, h["reg"]) - (h["shift"][0].detach() * w).sum()

    def tree_solve(h: Any) -> Tensor:
        A = X.T @ X + torch.diag(h["reg"].exp())
        return torch.linalg.solve(A, X.T @ Y + h["shift"][0])

    hparams = {"reg": REG, "shift": [torch.tensor(0.5, dtype=F64), torch.ones(1)]}
    report = hf.check_hypergrad(
        tree_solve, lambda w, h: (w**2).sum() + h["shift"][1].sum(), hparams, inner_loss=tree_loss
    )
    assert optree.tree_leaves(report.lost) == [False, True, False]
    assert "It concerns hparams['shift'][0]" in str(report)


# What is the same for all leaves of hparams is evaluated once, not for each leaf.
def test_the_search_for_causes_takes_as_many_derivatives_for_many_leaves_as_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = dict.fromkeys(("outer loss", "product"), 0)
    pull = Linearization.pull

    def counted(self: Linearization, *args: Any) -> Any:
        counts["product"] += 1
        return pull(self, *args)

    monkeypatch.setattr(Linearization, "pull", counted)

    def tree_outer(w: Tensor, h: tuple[Tensor, ...]) -> Tensor:
        counts["outer loss"] += w.requires_grad
        return outer(w, torch.cat(h))

    found = []
    for sizes in ([4], [1, 1, 1, 1]):
        counts.update(dict.fromkeys(counts, 0))
        report = hf.check_hypergrad(
            lambda h: solve(torch.cat(h)),
            tree_outer,
            REG.split(sizes),
            inner_loss=lambda w, h: loss(w, torch.cat(h) + 1),
            max_dense=0,
            unroll=False,
        )
        assert bool(report.causes.condition_mismatch)
        found.append(dict(counts))
    assert found[0] == found[1]


def test_a_check_that_fails_raises_if_asked_to() -> None:
    with pytest.raises(hf.HypergradError, match="solver not converged"):
        hf.check_hypergrad(descent(5), outer, REG, throw=True)
    hf.check_hypergrad(solve, outer, REG, inner_loss=loss, throw=True)


# Differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "derivative"),
    [
        (lambda x: x.sin(), lambda x: x.cos()),
        (lambda x: x.exp() + 1e3, lambda x: x.exp()),
        (lambda x: x**5, lambda x: 5 * x**4),
    ],
)
@pytest.mark.parametrize(("noise", "accuracy"), [(0.0, 1e-9), (1e-8, 1e-4), (1e-4, 0.1)])
def test_differences_know_their_errors(
    fn: Any, derivative: Any, noise: float, accuracy: float
) -> None:
    def noisy_fn(x: tuple[Tensor, ...]) -> float:
        digits = torch.frac(torch.sin(x[0] * 1e8) * 43758.5453).abs()
        return float(fn(x[0]) + noise * (digits - 0.5) * 12**0.5)

    for point in (0.3, 0.8, 1.1):
        x, one = (torch.tensor(point, dtype=F64),), (torch.ones((), dtype=F64),)
        level = noise_level(noisy_fn, x, one)
        assert noise / 8 <= level <= 4 * noise + 1e-12
        value, error = directional_derivative(noisy_fn, x, one, level)
        assert abs(value - float(derivative(x[0]))) <= error
        assert error <= accuracy * (1 + abs(value)) * (1e3 if float(fn(x[0])) > 100 else 1)


# The report ---------------------------------------------------------------------------------------


def test_the_report_is_a_tree_of_numbers_and_a_table() -> None:
    report = hf.check_hypergrad(solve, outer, REG, inner_loss=loss, num_directions=2)
    assert all(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(report))
    assert report.by_method.shape == report.by_dense.shape == report.by_unrolling.shape == (2,)
    torch.testing.assert_close(report.by_method, report.by_unrolling)
    assert str(report).startswith("passed\ndirection")
    left_out = hf.check_hypergrad(
        without_gradients, outer, REG, inner_loss=loss, max_dense=3, unroll=True
    )
    assert left_out.by_dense == left_out.by_unrolling == ()
    assert "left out: dense" in str(left_out)
    assert "left out: unrolled" in str(left_out)


def test_the_check_is_deterministic_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    reports = [hf.check_hypergrad(solve, outer, REG, inner_loss=loss) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(*map(optree.tree_leaves, reports), strict=True):
        assert torch.equal(one, two)
    other = hf.check_hypergrad(
        solve, outer, REG, inner_loss=loss, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(other.by_method, reports[0].by_method)
    assert other.passed


def test_trees_scalars_and_mixed_dtypes() -> None:
    def tree_loss(w: Any, h: Any, c: Tensor) -> Tensor:
        first = 0.5 * (h["a"].double().exp() * (w[0] - c) ** 2).sum()
        return first + 0.5 * (w[1]["b"] - h["b"]).square() * 3 + 0.1 * w[0].sum() * w[1]["b"]

    def tree_solve(h: Any, c: Tensor) -> Any:
        solver = hf.minimize(
            tree_loss,
            hf.optim.sgd(lr=0.3),
            60,
            init=lambda h, c: (torch.zeros(3, dtype=F64), {"b": torch.zeros(())}),
        )
        return solver(h, c)

    def tree_outer(w: Any, h: Any, c: Tensor) -> tuple[Tensor, Tensor]:
        return (w[0] ** 2).sum() + w[1]["b"].exp() + h["b"], c

    hparams = {"a": torch.zeros(3), "b": torch.tensor(0.7)}
    counts = torch.arange(3)
    report = hf.check_hypergrad(
        tree_solve, tree_outer, hparams, counts, inner_loss=tree_loss, has_aux=True
    )
    report.raise_if_failed()


def test_hparams_that_require_grad_stay_untouched() -> None:
    reg = REG.clone().requires_grad_()
    hf.check_hypergrad(solve, outer, reg, inner_loss=loss).raise_if_failed()
    assert reg.grad is None
    assert reg.requires_grad


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"num_directions": 0}, "num_directions is 0; expected an integer >= 1"),
        ({"max_dense": -1}, "max_dense is -1; expected an integer >= 0"),
        ({"rtol": 0.0}, "rtol is 0.0; expected a finite number > 0"),
        ({"inner_loss": None}, "needs to know what the inner solution satisfies"),
    ],
)
def test_bad_settings(keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        hf.check_hypergrad(solve, outer, REG, **({"inner_loss": loss} | keywords))


def test_a_call_inside_of_a_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="Check one task, outside of it"):
        torch.func.vmap(lambda r: hf.check_hypergrad(solve, outer, r, inner_loss=loss).by_method)(
            REG[None]
        )
