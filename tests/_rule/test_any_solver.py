"""Inner solvers that vmap cannot map run task by task; all else stays one batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import hyperfunc as hf

F64 = torch.float64
TASKS, ROWS, SIZE = 4, 12, 3


def loss(w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((x @ w - y) ** 2).mean() + h * (w**2).sum()


def outer(w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (w**3).sum() + h * y.sum()


def closed_form(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    A = x.T @ x / len(x) + h * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(A, x.T @ y / len(x))


def branches(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = torch.zeros(SIZE, dtype=F64)
    while (gradient := grad(loss)(w, h, x, y)).norm() > 1e-10:
        w = w - 0.2 * gradient
    return w


def reads_items(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    A = [[entry.item() for entry in row] for row in x.T @ x / len(x)]
    shifted = torch.tensor(A, dtype=F64) + float(h) * torch.eye(SIZE, dtype=F64)
    return torch.linalg.solve(shifted, x.T @ y / len(x))


def torch_optim(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = torch.zeros(SIZE, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=100,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w, h, x, y)
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()


def autograd(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = torch.zeros(SIZE, dtype=F64)
    for _ in range(150):
        w.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(w, h, x, y), w)
        w = (w - 0.2 * gradient).detach()
    return w


def in_place(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    A = torch.zeros(SIZE, SIZE, dtype=F64)
    A += x.T @ x / len(x)
    A.diagonal().add_(h)
    return torch.linalg.solve(A, x.T @ y / len(x))


def with_numpy(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    X = x.numpy()
    A = X.T @ X / len(X) + h.item() * np.eye(SIZE)
    return torch.from_numpy(np.linalg.solve(A, X.T @ y.numpy() / len(X)))


def with_scipy(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    def value(w: Any) -> float:
        return float(loss(torch.from_numpy(w), h, x, y))

    def slope(w: Any) -> Any:
        return grad(loss)(torch.from_numpy(w), h, x, y).numpy()

    found = scipy.optimize.minimize(value, np.zeros(SIZE), jac=slope, tol=1e-12)
    return torch.from_numpy(found.x)


SOLVERS = [branches, reads_items, torch_optim, autograd, in_place, with_numpy, with_scipy]


def problem() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(TASKS, ROWS, SIZE, dtype=F64)
    y = torch.randn(TASKS, ROWS, dtype=F64)
    return torch.linspace(0.3, 0.9, TASKS, dtype=F64), x, y


def loop(fn: Callable[..., Any], *batched: Tensor) -> Tensor:
    return torch.stack([fn(*row) for row in zip(*batched, strict=True)])


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_code_solves_a_batch_of_tasks(solver: Any) -> None:
    h, x, y = problem()
    expected = loop(hf.hypergrad(closed_form, outer, inner_loss=loss), h, x, y)
    for mapped in (vmap, hf.task_map):
        actual = mapped(hf.hypergrad(solver, outer, inner_loss=loss))(h, x, y)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_every_route_gives_the_numbers_of_one_task_at_a_time() -> None:
    h, x, y = problem()
    reference = hf.hypergrad(closed_form, outer, inner_loss=loss)
    expected = loop(reference, h, x, y)
    fn = hf.hypergrad(with_numpy, outer, inner_loss=loss)
    solve = hf.implicit_diff(with_numpy, inner_loss=loss)

    def value(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return outer(solve(h, x, y), h, x, y)

    def total(h: Tensor) -> Tensor:
        return vmap(value)(h, x, y).sum()

    attached = h.clone().requires_grad_()
    total(attached).backward()
    first = loop(lambda h, x, y: grad(lambda h: reference(h, x, y))(h), h, x, y)
    rows = vmap(vmap(fn, (0, None, None)), (None, 0, 0))(h, x, y)
    routes = {
        "vmap": (vmap(fn)(h, x, y), expected),
        "task_map": (hf.task_map(fn)(h, x, y), expected),
        "chunks": (hf.task_map(fn, chunk_size=3)(h, x, y), expected),
        "nested vmap": (rows.diagonal(), expected),
        "one task of many": (vmap(fn, (None, 0, 0))(h[0], x, y)[0], expected[0]),
        "grad of vmap": (grad(total)(h), expected),
        "vmap of grad": (vmap(grad(value))(h, x, y), expected),
        "backward of vmap": (attached.grad, expected),
        "vmap of jvp": (
            vmap(lambda h, x, y: jvp(lambda h: value(h, x, y), (h,), (torch.ones_like(h),))[1])(
                h, x, y
            ),
            expected,
        ),
        "jacrev of vmap": (jacrev(lambda h: vmap(value)(h, x, y))(h).diagonal(), expected),
        "jacfwd of vmap": (jacfwd(lambda h: vmap(value)(h, x, y))(h).diagonal(), expected),
        "vmap of second": (vmap(grad(lambda h, x, y: fn(h, x, y)))(h, x, y), first),
    }
    for name, (actual, wanted) in routes.items():
        torch.testing.assert_close(
            actual, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_only_the_solver_runs_task_by_task() -> None:
    h, x, y = problem()
    calls = {"solver": 0, "outer": 0, "loss": 0}

    def counted(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return fn(*args)

        return call

    found = {}
    for solver in (closed_form, with_numpy):
        calls.update(dict.fromkeys(calls, 0))
        vmap(
            hf.hypergrad(
                counted("solver", solver), counted("outer", outer), inner_loss=counted("loss", loss)
            )
        )(h, x, y)
        found[solver] = dict(calls)
    assert found[closed_form]["solver"] == 1
    assert found[with_numpy]["solver"] == 1 + TASKS  # the try of all tasks at once
    for name in ("outer", "loss"):
        assert found[with_numpy][name] == found[closed_form][name]


def start_alone(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draws random numbers, and is no code for vmap."""
    return torch.randn(SIZE, dtype=F64) * (1.0 if float(h) > 0 else 2.0)


def test_random_numbers_are_those_of_the_vmap() -> None:
    h, x, y = problem()
    solve = hf.implicit_diff(start_alone, inner_loss=loss)
    same = vmap(solve, randomness="same")(h, x, y)
    different = vmap(solve, randomness="different")(h, x, y)
    assert torch.equal(same, same[:1].expand_as(same))
    assert len({tuple(row.tolist()) for row in different}) == TASKS
    torch.manual_seed(3)
    expected = torch.randn(SIZE, dtype=F64)
    following = torch.randn(2)
    torch.manual_seed(3)
    again = vmap(solve, randomness="same")(h, x, y)
    assert torch.equal(again[2], expected)
    assert torch.equal(torch.randn(2), following)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(solve)(h, x, y)


def raises(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    raise KeyError("no such data")


def another_shape(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(SIZE if float(h) < 0.5 else SIZE + 1, dtype=F64)


def another_tree(h: Tensor, x: Tensor, y: Tensor) -> Any:
    w = torch.zeros(SIZE, dtype=F64)
    return {"a": w} if float(h) < 0.5 else {"b": w}


def returns_nothing(h: Tensor, x: Tensor, y: Tensor) -> None:
    float(h)


def writes(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = closed_form(h, x, y) if float(h) > 0 else y
    h.mul_(2)
    return w


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        (raises, KeyError, "no such data"),
        (another_shape, ValueError, r"shapes \[\(3,\)\] for one task and \[\(4,\)\]"),
        (another_tree, ValueError, "another structure for one task"),
        (returns_nothing, TypeError, "the inner solver returned None"),
        (writes, ValueError, "wrote to hparams in place"),
    ],
)
def test_errors_are_those_of_one_task(solver: Any, error: type[Exception], message: str) -> None:
    h, x, y = problem()
    with pytest.raises(error, match=message):
        vmap(hf.hypergrad(solver, outer, inner_loss=loss))(h, x, y)


def test_a_tensor_of_the_vmap_must_be_an_argument() -> None:
    h, x, y = problem()

    def one(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        def solver(h: Tensor) -> Tensor:
            return with_numpy(h, x, y)

        return hf.hypergrad(
            solver, lambda w, h: (w**2).sum(), inner_loss=lambda w, h: loss(w, h, x, y)
        )(h)

    with pytest.raises(ValueError, match=r"Pass that tensor in \*args"):
        vmap(one)(h, x, y)


def test_final_errors_do_not_run_the_solver_again() -> None:
    """Neither task by task nor with the random numbers of another vmap."""
    calls = []

    def failing(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        calls.append(h)
        raise hf.HypergradError("no solution")

    def random(h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        calls.append(h)
        return closed_form(h, x, y) + torch.randn(SIZE, dtype=F64)

    for solver, error in ((failing, hf.HypergradError), (random, RuntimeError)):
        calls.clear()
        with pytest.raises(error, match=r"^no solution$|randomness"):
            vmap(hf.hypergrad(solver, outer, inner_loss=loss))(*problem())
        assert len(calls) == 1
