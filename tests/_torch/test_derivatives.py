"""Derivatives against closed forms: problems x methods x transforms x dtypes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.cells import thinned
from tests.problems import PROBLEMS, TASKS, Flat, Problem, ravel, unraveller

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

DTYPES = [torch.float64, torch.float32]
Table = dict[str, tuple[Callable[[Flat], Tensor], Callable[[Problem], Tensor]]]


def backward(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """The Jacobian of a function, row by row by plain autograd."""
    v = v.clone().requires_grad_()
    rows = [torch.autograd.grad(y, v, retain_graph=True)[0] for y in f(v).reshape(-1)]
    return torch.stack(rows)


def gradient_by_backward(f: Flat) -> Tensor:
    v = f.v.clone().requires_grad_()
    f.value(v, *f.a).backward()
    assert v.grad is not None
    return v.grad


def double_backward(f: Flat) -> Tensor:
    def gradient(v: Tensor) -> Tensor:
        return torch.autograd.grad(f.value(v, *f.a), v, create_graph=True)[0]

    return backward(gradient, f.v)


def all_pairs(fn: Callable[..., Any], f: Flat) -> Any:
    """By nested vmap: the hparams of each task with the arguments of each task."""
    nargs = len(f.a)
    return vmap(vmap(fn, (0,) + (None,) * nargs), (None,) + (0,) * nargs)(f.V, *f.A)


def pairs(problem: Problem) -> Tensor:
    return torch.stack(
        [
            torch.stack([problem.reference("gradient", i, j) for i in range(TASKS)])
            for j in range(TASKS)
        ]
    )


def of_first(what: str) -> Callable[[Problem], Tensor]:
    return lambda problem: problem.reference(what)


def of_all(what: str) -> Callable[[Problem], Tensor]:
    return lambda problem: problem.references(what)


def diagonal(J: Tensor) -> Tensor:
    """The blocks of a Jacobian of outputs of all tasks with respect to inputs of all tasks."""
    assert not torch.einsum("tisj,ts->tisj", J, 1 - torch.eye(TASKS).to(J)).any()
    return torch.einsum("titj->tij", J)


FIRST: Table = {
    "hypergrad": (lambda f: f.hypergrad(f.v, *f.a), of_first("gradient")),
    "vmap(hypergrad)": (lambda f: vmap(f.hypergrad)(f.V, *f.A), of_all("gradient")),
    "chunked vmap(hypergrad)": (
        lambda f: vmap(f.hypergrad, chunk_size=2)(f.V, *f.A),
        of_all("gradient"),
    ),
    "vmap(vmap(hypergrad))": (lambda f: all_pairs(f.hypergrad, f), pairs),
    "grad": (lambda f: grad(f.value)(f.v, *f.a), of_first("gradient")),
    "vjp": (
        lambda f: vjp(lambda v: f.value(v, *f.a), f.v)[1](torch.ones_like(f.v[0]))[0],
        of_first("gradient"),
    ),
    "jvp": (
        lambda f: jvp(lambda v: f.solution(v, *f.a), (f.v,), (f.v,))[1],
        lambda p: p.reference("jacobian") @ Flat(p, "dense").v,
    ),
    "vmap(grad)": (lambda f: vmap(grad(f.value))(f.V, *f.A), of_all("gradient")),
    "vmap(vmap(grad))": (lambda f: all_pairs(grad(f.value), f), pairs),
    "grad(vmap)": (
        lambda f: grad(lambda V: vmap(f.value)(V, *f.A).sum())(f.V),
        of_all("gradient"),
    ),
    "jacrev": (lambda f: jacrev(f.solution)(f.v, *f.a), of_first("jacobian")),
    "jacfwd": (lambda f: jacfwd(f.solution)(f.v, *f.a), of_first("jacobian")),
    "vmap(jacrev)": (lambda f: vmap(jacrev(f.solution))(f.V, *f.A), of_all("jacobian")),
    "vmap(jacfwd)": (lambda f: vmap(jacfwd(f.solution))(f.V, *f.A), of_all("jacobian")),
    "backward": (gradient_by_backward, of_first("gradient")),
    "Jacobian by backward": (
        lambda f: backward(lambda v: f.solution(v, *f.a), f.v),
        of_first("jacobian"),
    ),
    "grad for arguments": (
        lambda f: torch.cat([g.reshape(-1) for g in grad(lambda a: f.value(f.v, *a))(tuple(f.a))]),
        of_first("args"),
    ),
}

SECOND: Table = {
    "jacrev(hypergrad)": (lambda f: jacrev(f.hypergrad)(f.v, *f.a), of_first("hessian")),
    "jacfwd(hypergrad)": (lambda f: jacfwd(f.hypergrad)(f.v, *f.a), of_first("hessian")),
    "vjp(hypergrad)": (
        lambda f: torch.stack(
            [vjp(lambda v: f.hypergrad(v, *f.a), f.v)[1](e)[0] for e in torch.eye(len(f.v)).to(f.v)]
        ),
        of_first("hessian"),
    ),
    "vjp(grad)": (
        lambda f: torch.stack(
            [vjp(grad(f.value), f.v, *f.a)[1](e)[0] for e in torch.eye(len(f.v)).to(f.v)]
        ),
        of_first("hessian"),
    ),
    "backward(hypergrad)": (
        lambda f: backward(lambda v: f.hypergrad(v, *f.a), f.v),
        of_first("hessian"),
    ),
    "double backward": (double_backward, of_first("hessian")),
    "jacrev(jacrev)": (lambda f: jacrev(jacrev(f.value))(f.v, *f.a), of_first("hessian")),
    "jacrev(jacfwd)": (lambda f: jacrev(jacfwd(f.value))(f.v, *f.a), of_first("hessian")),
    "jacfwd(jacrev)": (lambda f: hessian(f.value)(f.v, *f.a), of_first("hessian")),
    "jacfwd(jacfwd)": (lambda f: jacfwd(jacfwd(f.value))(f.v, *f.a), of_first("hessian")),
}

BATCHED_SECOND: Table = {
    "jacrev(vmap(hypergrad))": (
        lambda f: diagonal(jacrev(lambda V: vmap(f.hypergrad)(V, *f.A))(f.V)),
        of_all("hessian"),
    ),
    "vmap(jacfwd(hypergrad))": (
        lambda f: vmap(jacfwd(f.hypergrad))(f.V, *f.A),
        of_all("hessian"),
    ),
    "backward(vmap(hypergrad))": (
        lambda f: diagonal(
            backward(lambda V: vmap(f.hypergrad)(V, *f.A), f.V).reshape(*f.V.shape, *f.V.shape)
        ),
        of_all("hessian"),
    ),
    "vmap(jacrev(jacrev))": (lambda f: vmap(jacrev(jacrev(f.value)))(f.V, *f.A), of_all("hessian")),
    "vmap(jacrev(jacfwd))": (lambda f: vmap(jacrev(jacfwd(f.value)))(f.V, *f.A), of_all("hessian")),
    "vmap(jacfwd(jacrev))": (lambda f: vmap(hessian(f.value))(f.V, *f.A), of_all("hessian")),
    "vmap(jacfwd(jacfwd))": (lambda f: vmap(jacfwd(jacfwd(f.value)))(f.V, *f.A), of_all("hessian")),
}


def cases(
    table: Table,
    dtypes: list[torch.dtype],
    select: Callable[[Problem, str, torch.dtype, str], bool],
    often: Callable[[Problem, str, torch.dtype, str], bool] = lambda *_: True,
) -> list[Any]:
    """Problems x methods x dtypes x transforms, of those that are selected; some run often."""
    return [
        pytest.param(
            problem,
            method,
            dtype,
            table[transform],
            id=f"{problem.name}-{method}-{str(dtype)[6:]}-{transform}",
            marks=() if often(problem, method, dtype, transform) else pytest.mark.slow,
        )
        for problem in PROBLEMS
        for dtype in dtypes
        for method in problem.methods(dtype)
        for transform in table
        if select(problem, method, dtype, transform)
    ]


def one_in(count: int, problem: Problem, method: str, transform: str) -> bool:
    """Whether a cell is one of those that run often, so that each pair is in some of them."""
    methods, transforms = list(problem.methods(torch.float64)), [*FIRST, *SECOND, *BATCHED_SECOND]
    place = PROBLEMS.index(problem) + methods.index(method) + transforms.index(transform)
    return place % count == 0


def is_krylov(problem: Problem, method: str) -> bool:
    """One method a problem, for what concerns all methods alike."""
    return method == ("cg" if problem.symmetric else "normal_cg")


def check(
    problem: Problem, method: str, dtype: torch.dtype, row: Any, device: torch.device
) -> None:
    compute, expect = row
    actual = compute(Flat(problem, problem.methods(dtype)[method], dtype, device))
    assert actual.device.type == device.type
    # torch's forward mode makes float64 of a 0-d float32 tensor times a number in a user's function
    assert actual.dtype in {dtype, torch.float64}
    tolerance = 1e-13 if dtype is torch.float64 else 1e-5
    actual = actual.double().cpu()
    torch.testing.assert_close(actual, expect(problem), rtol=tolerance, atol=tolerance)


# Neumann is the iteration of FixedPoint from another start.
SHORT = ["hypergrad", "vmap(hypergrad)", "jacrev", "jacfwd"]


@pytest.mark.parametrize(
    ("problem", "method", "dtype", "row"),
    cases(
        FIRST,
        DTYPES,
        lambda p, m, d, t: m != "neumann" or t in SHORT,
        often=lambda p, m, d, t: (
            (d is torch.float64 and is_krylov(p, m)) or one_in(4 if t in SHORT else 8, p, m, t)
        ),
    ),
)
def test_first_derivatives(
    problem: Problem, method: str, dtype: torch.dtype, row: Any, device: torch.device
) -> None:
    check(problem, method, dtype, row, device)


@pytest.mark.parametrize(
    ("problem", "method", "dtype", "row"),
    cases(
        SECOND,
        DTYPES,
        lambda p, m, d, t: is_krylov(p, m) or (m != "neumann" and d is torch.float64),
        often=lambda p, m, d, t: (
            d is torch.float64 and one_in(3 if is_krylov(p, m) else 6, p, m, t)
        ),
    ),
)
def test_second_derivatives(
    problem: Problem, method: str, dtype: torch.dtype, row: Any, device: torch.device
) -> None:
    check(problem, method, dtype, row, device)


@pytest.mark.parametrize(
    ("problem", "method", "dtype", "row"),
    cases(
        BATCHED_SECOND,
        [torch.float64],
        lambda p, m, d, t: is_krylov(p, m),
        often=lambda p, m, d, t: one_in(2, p, m, t),
    ),
)
def test_batched_second_derivatives(
    problem: Problem, method: str, dtype: torch.dtype, row: Any, device: torch.device
) -> None:
    check(problem, method, dtype, row, device)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_formulas_against_finite_differences(problem: Problem) -> None:
    """The oracle itself, and with it the problem that has no closed form."""
    hparams, args = problem.tasks()[0]
    v, unravel, eps = ravel(hparams), unraveller(hparams), 1e-5

    def differences(fn: Callable[[Tensor], Tensor]) -> Tensor:
        columns = [(fn(v + eps * e) - fn(v - eps * e)) / (2 * eps) for e in torch.eye(len(v)).to(v)]
        return torch.stack(columns, dim=-1)

    for what, fn in {
        "gradient": lambda v: problem.value(unravel(v), *args),
        "jacobian": lambda v: ravel(problem.solution(unravel(v), *args)),
        "hessian": lambda v: Flat(problem, "dense").hypergrad(v, *args),
    }.items():
        torch.testing.assert_close(
            problem.reference(what), differences(fn), rtol=1e-8, atol=1e-8, msg=what
        )


@pytest.mark.parametrize("problem", thinned(PROBLEMS))
def test_gradcheck(problem: Problem) -> None:
    """What torch itself asks of a function: both modes, and second order in both modes."""
    f = Flat(problem, "dense")
    v, fn = f.v.clone().requires_grad_(), lambda v: f.value(v, *f.a)
    assert torch.autograd.gradcheck(fn, v, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, v, check_fwd_over_rev=True)


@pytest.mark.parametrize("problem", thinned(PROBLEMS))
def test_third_derivatives(problem: Problem) -> None:
    """Of the outer value along a direction, in four compositions of modes."""
    f, (hparams, args) = Flat(problem, "dense"), problem.tasks()[0]
    unravel, t = unraveller(hparams), torch.linspace(0.5, 1, len(f.v), dtype=torch.float64)

    def reverse(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: grad(fn)(v) @ t

    def forward(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: jvp(fn, (v,), (t,))[1]

    expected = reverse(reverse(reverse(lambda v: problem.value(unravel(v), *args))))(f.v)
    for first, second, third in [
        (reverse, reverse, reverse),
        (forward, forward, reverse),
        (forward, reverse, forward),
        (forward, forward, forward),
    ]:
        actual = first(second(third(lambda v: f.value(v, *args))))(f.v)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
