"""What every method does with what goes wrong: the outcomes, alone, among good tasks, compiled."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from hyperfunc.transforms._methods import METHODS
from tests.cells import each_cell, thinned

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
GOOD = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.9, 0.1], [0.0, 0.1, 1.1]], dtype=F64)
H = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
MAXITER, STEP, RHO, DAMPING = 60, 0.5, 0.01, 0.4

# The inner solution is w = A^{-1} h and the outer loss ||w||^2: the hypergradient is A^{-1} (2 w).


def fixed_point(w: Tensor, h: Tensor, A: Tensor, start: Tensor) -> Tensor:
    return w - STEP * (A @ w - h)


def inner_loss(w: Tensor, h: Tensor, A: Tensor, start: Tensor) -> Tensor:
    return 0.5 * w @ (A @ w) - h @ w


def outer_loss(w: Tensor, h: Tensor, A: Tensor, start: Tensor) -> Tensor:
    return (w**2).sum()


def steps(h: Tensor, A: Tensor, start: Tensor) -> Tensor:
    w = start
    for _ in range(30):
        w = fixed_point(w, h, A, start)
    return w


SOLVER = hf.iterate(fixed_point, 30, init=lambda h, A, start: start)

# Methods ------------------------------------------------------------------------------------------

Oracle = Callable[[Tensor, Tensor], Tensor]


def exact(A: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(A, b)


def shifted(shift: float) -> Oracle:
    return lambda A, b: torch.linalg.solve(A + shift * torch.eye(3, dtype=b.dtype), b)


def series(A: Tensor, b: Tensor) -> Tensor:
    u = torch.zeros_like(b)
    for _ in range(MAXITER):
        u = u - STEP * (A @ u - b)
    return u


@dataclasses.dataclass(frozen=True)
class Row:
    """A method made from the bounds on its iteration, and the adjoint that it stands for.

    `bounded` tells whether it takes them; an iterative method has no adjoint.
    """

    make: Callable[..., Any]
    adjoint: Oracle | None = exact
    bounded: bool = True


TABLE: dict[str, Row] = {
    "cg": Row(hf.CG),
    "normal_cg": Row(hf.NormalCG),
    "fixed_point": Row(lambda **bounds: hf.FixedPoint(**bounds, step_size=STEP)),
    "neumann": Row(lambda **bounds: hf.Neumann(**bounds, step_size=STEP)),
    "dense": Row(lambda **_: hf.Dense(), bounded=False),
    "one_step": Row(lambda **_: hf.OneStep(STEP), lambda A, b: STEP * b, bounded=False),
    "gmres": Row(hf.GMRES),
    "bicgstab": Row(hf.BiCGStab),
    "nystrom": Row(lambda **_: hf.Nystrom(rho=RHO), shifted(RHO), bounded=False),
    "stoch_aid": Row(
        lambda maxiter, **_: hf.StochasticAID(maxiter, hf.optim.sgd(STEP)), series, bounded=False
    ),
    "auto": Row(hf.Auto),
    "least_squares": Row(hf.LeastSquares, lambda A, b: torch.linalg.pinv(A) @ b),
    "reverse_unroll": Row(lambda **_: hf.ReverseUnroll(), None, bounded=False),
    "reverse": Row(lambda **_: hf.Reverse("sqrt"), None, bounded=False),
    "forward": Row(lambda **_: hf.ForwardMode(), None, bounded=False),
    "first_order": Row(lambda **_: hf.FirstOrder(init=lambda h, *_: h), None, bounded=False),
    "anderson": Row(lambda **bounds: hf.AndersonFixedPoint(**bounds, step_size=STEP)),
    "pipelined_cg": Row(hf.PipelinedCG),
    "jacobi": Row(lambda **bounds: hf.CG(**bounds, preconditioner=hf.JacobiPreconditioner())),
    "nystrom_cg": Row(
        lambda **bounds: hf.CG(**bounds, preconditioner=hf.NystromPreconditioner(rank=2))
    ),
    "damped": Row(lambda **bounds: hf.Damped(hf.CG(**bounds), DAMPING), shifted(DAMPING)),
    "fallback": Row(lambda **bounds: hf.Fallback(hf.CG(**bounds), hf.GMRES(**bounds))),
    "blockwise": Row(lambda **bounds: hf.Blockwise(hf.CG(**bounds), "leaves")),
}


def test_every_method_has_a_row() -> None:
    assert set(METHODS) <= set(TABLE)


def make(name: str, throw: bool = True, **bounds: Any) -> Any:
    method = TABLE[name].make(**({"maxiter": MAXITER} | bounds))
    return hf.hypergrad_and_solution(
        SOLVER, outer_loss, inner_loss=inner_loss, method=method, throw=throw
    )


def compile_anew(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls this one, by torch.compile."""
    torch.compiler.reset()
    return torch.compile(lambda *args, **keywords: fn(*args, **keywords), backend="eager")


def oracle(name: str, h: Tensor, A: Tensor, start: Tensor) -> Tensor:
    """The hypergradient, by formulas that have nothing of the library in them."""
    adjoint = TABLE[name].adjoint
    if name == "first_order":
        return 2 * steps(h, A, start)
    if adjoint is None:
        return torch.func.grad(lambda h: (steps(h, A, start) ** 2).sum())(h)
    return adjoint(A, 2 * steps(h, A, start))


def code_of(solution: hf.Solution) -> Any:
    """The result codes; an iterative method has none."""
    return solution.stats.result.tolist() if solution.stats else None


# Bad tasks ----------------------------------------------------------------------------------------

Task = tuple[Tensor, Tensor, Tensor]


def solved(A: Tensor, h: Tensor = H) -> Task:
    """A task that starts at its solution, and stays there."""
    return h, A, torch.linalg.pinv(A) @ h


TASKS: dict[str, Task] = {
    "NaN in data": (H, GOOD * NAN, torch.zeros_like(H)),
    "Inf in hparams": (H * INF, GOOD, torch.zeros_like(H)),
    "overflow in the inner loop": (H, 1e12 * GOOD, H),
    "singular A": solved(torch.diag(torch.tensor([1.0, 0.8, 0.0], dtype=F64))),
    "indefinite A": solved(torch.diag(torch.tensor([1.0, 0.8, -0.3], dtype=F64))),
    # without rounding, which 30 steps would multiply by 10 to the 10th
    "non-contraction": (5 * GOOD @ H, 5 * GOOD, H),
    "zero rhs": (0 * H, GOOD, 0 * H),
}
TASKS["singular A"][2][2] = 1.0  # so that the adjoint has a part that no A^T u makes

# "params": the inner solution is not finite; "right": as by the formula; "failure": one of the
# codes that raise, which of them depends on rounding; else the name of the result code.
OUTCOMES: dict[str, dict[str, str]] = {
    "NaN in data": dict.fromkeys(TABLE, "params"),
    "Inf in hparams": dict.fromkeys(TABLE, "params"),
    "overflow in the inner loop": dict.fromkeys(TABLE, "params"),
    "singular A": dict.fromkeys(TABLE, "failure")
    | dict.fromkeys(("one_step", "stoch_aid", "nystrom", "damped", "least_squares"), "right")
    | dict.fromkeys(("reverse_unroll", "reverse", "forward", "first_order"), "right")
    | dict.fromkeys(("fixed_point", "neumann", "anderson"), "max_steps"),
    "indefinite A": dict.fromkeys(TABLE, "right")
    | dict.fromkeys(("cg", "pipelined_cg", "jacobi", "nystrom_cg", "blockwise"), "breakdown")
    | dict.fromkeys(("fixed_point", "neumann", "stoch_aid"), "divergence"),
    "non-contraction": dict.fromkeys(TABLE, "right")
    | dict.fromkeys(("fixed_point", "neumann", "stoch_aid"), "divergence"),
    "zero rhs": dict.fromkeys(TABLE, "right"),
}

ERRORS = {
    "params": "the inner solver returned non-finite values (NaN or Inf) in params{tasks}. Lower",
    "failure": "the linear solve with ... failed{tasks}: ",
    **{
        code.name: "the linear solve with ... failed{tasks}: " + code.message
        for code in hf.RESULTS
        if code.failed
    },
}


def expect_error(outcome: str, call: Callable[[], Any], tasks: str = "") -> None:
    text = ERRORS[outcome].format(tasks=tasks)
    pattern = ".*".join(map(re.escape, text.split("...")))
    with pytest.raises(hf.HypergradError, match=f"^{pattern}"):
        call()


@pytest.mark.parametrize("name", TABLE)
def test_alone(name: str) -> None:
    with each_cell() as cell:
        for case in TASKS:
            with cell(case):
                check_alone(case, name)


def check_alone(case: str, name: str) -> None:
    task, outcome = TASKS[case], OUTCOMES[case][name]
    if outcome in ERRORS:
        expect_error(outcome, lambda: make(name)(*task))
    else:
        grads, solution = make(name)(*task)
        if outcome == "right":
            torch.testing.assert_close(grads, oracle(name, *task), rtol=1e-7, atol=1e-9)
    grads, solution = make(name, throw=False)(*task)
    if outcome == "params":
        assert torch.isnan(grads).all()
    if code_of(solution) is not None:
        code = hf.RESULTS(code_of(solution))
        if outcome == "failure":
            assert code.failed
        else:
            # the solution of nystrom is that of a system with rho added
            right = "max_steps" if name == "nystrom" and case != "zero rhs" else "success"
            assert code.name == {"params": "nonfinite", "right": right}.get(outcome, outcome)


@pytest.mark.parametrize(("name", "case"), thinned(TABLE, TASKS, every=4))
def test_among_good_tasks(name: str, case: str) -> None:
    """The good ones get what they get alone, and the bad one is named."""
    good = [solved(GOOD), (2 * H, GOOD @ GOOD, torch.ones_like(H))]
    tasks = [good[0], TASKS[case], good[1]]
    stacked = [torch.stack(leaves) for leaves in zip(*tasks, strict=True)]
    outcome = OUTCOMES[case][name]
    if outcome in ERRORS:
        expect_error(
            outcome, lambda: vmap(make(name))(*stacked), tasks=" for 1 of 3 tasks (index 1)"
        )
    fn = make(name, throw=False)
    grads, solution = vmap(fn)(*stacked)
    for index, task in enumerate(tasks):
        alone, alone_solution = fn(*task)
        if code_of(solution) is not None:
            codes = hf.RESULTS(code_of(solution)[index]), hf.RESULTS(code_of(alone_solution))
            assert codes[0] == codes[1] or (outcome == "failure" and all(c.failed for c in codes))
        if index != 1 or outcome in ("params", "right"):
            torch.testing.assert_close(grads[index], alone, rtol=1e-9, atol=1e-9, equal_nan=True)
    for index in (0, 2):
        torch.testing.assert_close(grads[index], oracle(name, *tasks[index]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", thinned(TABLE, every=4))
def test_compiled(name: str) -> None:
    """Inside torch.compile, where the graph is broken around the call, all is the same."""
    fns = {throw: make(name, throw) for throw in (True, False)}
    compiled = {throw: compile_anew(fn) for throw, fn in fns.items()}
    with each_cell() as cell:
        for case, task in TASKS.items():
            with cell(case):
                outcome = OUTCOMES[case][name]
                if outcome in ERRORS:
                    expect_error(outcome, lambda task=task: compiled[True](*task))
                (grads, solution), (expected, expected_solution) = (
                    fn(*task) for fn in (compiled[False], fns[False])
                )
                torch.testing.assert_close(grads, expected, rtol=0, atol=0, equal_nan=True)
                assert code_of(solution) == code_of(expected_solution)


# Settings -----------------------------------------------------------------------------------------

BOUNDED = [name for name, row in TABLE.items() if row.bounded]
IMPLICIT = [name for name, row in TABLE.items() if row.adjoint is not None]
ITERATIVE = [name for name, row in TABLE.items() if row.adjoint is None]


def check_each(
    name: str, tasks: list[Task], check: Callable[[Any, Any, Task], None], **settings: Any
) -> None:
    """Check each result, alone and in a batch, and one in compiled code."""
    fn = make(name, **settings)
    check(*compile_anew(fn)(*tasks[0]), tasks[0])
    stacked = [torch.stack(leaves) for leaves in zip(*tasks, strict=True)]
    together = vmap(fn)(*stacked)
    for index, task in enumerate(tasks):
        check(*fn(*task), task)
        check(*torch.utils._pytree.tree_map(lambda leaf, i=index: leaf[i], together), task)


@pytest.mark.parametrize("name", thinned(IMPLICIT))
def test_a_start_that_is_the_solution(name: str) -> None:
    tasks = [solved(GOOD), solved(GOOD @ GOOD)]
    fn = make(name)
    starts = [oracle("cg" if name == "nystrom" else name, *task) for task in tasks]
    stacked = [torch.stack(leaves) for leaves in zip(*tasks, strict=True)]
    together, solutions = vmap(lambda u, *task: fn(*task, adjoint_init=u))(
        torch.stack(starts), *stacked
    )
    for index, (task, start) in enumerate(zip(tasks, starts, strict=True)):
        alone, solution = fn(*task, adjoint_init=start)
        for grads in (alone, together[index]):
            torch.testing.assert_close(grads, start, rtol=1e-6, atol=1e-9)
        if name in BOUNDED:
            assert solution.stats.num_steps <= 1
            assert solutions.stats.num_steps[index] <= 1
    compiled, _ = compile_anew(fn)(*tasks[0], adjoint_init=starts[0])
    torch.testing.assert_close(compiled, starts[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_start_without_a_meaning_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^adjoint_init has no meaning for .*Leave it out, or us"):
        make(name)(*solved(GOOD), adjoint_init=H)


@pytest.mark.parametrize(("name", "rtol"), thinned(BOUNDED, [None, 0.0, 1e-300], every=6))
def test_solved_before_maxiter_and_below_the_precision(name: str, rtol: float | None) -> None:
    """All steps that are left over change nothing, were it a division of 0 by 0."""

    def check(grads: Tensor, solution: hf.Solution, task: Task) -> None:
        torch.testing.assert_close(grads, oracle(name, *task), rtol=1e-7, atol=1e-9)
        assert code_of(solution) == hf.RESULTS.success
        assert solution.stats.num_steps <= 200

    tasks = [solved(torch.eye(3, dtype=F64)), solved(2 * torch.eye(3, dtype=F64)), solved(GOOD)]
    check_each(name, tasks, check, rtol=rtol, maxiter=200)


@pytest.mark.parametrize("name", thinned(BOUNDED))
def test_maxiter_zero(name: str) -> None:
    """No step is the start: zero, or for the series its first term."""

    def check(grads: Tensor, solution: hf.Solution, task: Task) -> None:
        first = STEP * 2 * steps(*task) if name == "neumann" else torch.zeros_like(H)
        torch.testing.assert_close(grads, first, rtol=1e-12, atol=0)
        assert code_of(solution) == hf.RESULTS.max_steps
        assert solution.stats.num_steps == 0

    check_each(name, [solved(GOOD), solved(GOOD @ GOOD)], check, maxiter=0)


@pytest.mark.parametrize("name", TABLE)
def test_overflow_in_float16(name: str) -> None:
    """The outer gradient is beyond 65504, where the inner solution is not."""
    small, large = ((scale * H).half() for scale in (1.0, 2e4))
    eye = torch.eye(3).half()
    grads, _ = make(name)(small, eye, small)
    expected = oracle(name, *(t.double() for t in (small, eye, small)))
    torch.testing.assert_close(grads.double(), expected, rtol=1e-2, atol=1e-3)
    compiled = [compile_anew(make(name))] if name in ("cg", "reverse") else []
    for call in (make(name), *compiled):
        with pytest.raises(hf.HypergradError, match=r"non-finite values|is not finite"):
            call(large, eye, large)
    batch = torch.stack([small, large, small])
    with pytest.raises(hf.HypergradError, match=r"for 1 of 3 tasks \(index 1\)"):
        vmap(make(name), (0, None, 0))(batch, eye, batch)
    together, solution = vmap(make(name, throw=False), (0, None, 0))(batch, eye, batch)
    assert not torch.isfinite(together[1]).all()
    for index in (0, 2):
        torch.testing.assert_close(together[index], grads, rtol=1e-2, atol=1e-3)
    if code_of(solution) is not None:
        assert code_of(solution)[1] == hf.RESULTS.nonfinite
