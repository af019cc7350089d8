"""A hypergradient through a hypergradient: three levels, in closed form in float64.

w(v, h) = argmin_w  w (A + diag(exp h)) w / 2 - w v          so  w = M v,  M = (A + diag(exp h))^-1
v(h)    = argmin_v  |w(v, h) - t|^2 / 2 + m |v|^2 / 2        so  v = (M M + m I)^-1 M t
top     minimises   |v(h) - s|^2 / 2 + sum w(v(h), h)^4 / 10 + |h|^2 / 20  over h
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import hyperfunc as hf
from tests.cells import slow_but

N, M = 3, 0.25
EYE = torch.eye(N, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


R = 0.1 * randn(N, N)
A, S, TARGETS, H = EYE + R @ R.T, randn(N), randn(2, N), 0.1 * randn(N)


def low_loss(w: Tensor, outer: Any, t: Tensor) -> Tensor:
    v, h = outer
    return 0.5 * w @ A @ w + 0.5 * (h.exp() * w**2).sum() - w @ v


def low_solution(outer: Any, t: Tensor) -> Tensor:
    v, h = outer
    return torch.linalg.solve(A + torch.diag(h.exp()), v)


def middle_value(w: Tensor, outer: Any, t: Tensor) -> Tensor:
    return 0.5 * ((w - t) ** 2).sum() + 0.5 * M * (outer[0] ** 2).sum()


def middle_solution(h: Tensor, t: Tensor) -> Tensor:
    inverse = torch.linalg.inv(A + torch.diag(h.exp()))
    return torch.linalg.solve(inverse @ inverse + M * EYE, inverse @ t)


def top_value(w: Tensor, v: Tensor, h: Tensor) -> Tensor:
    return 0.5 * ((v - S) ** 2).sum() + 0.1 * (w**4).sum() + 0.05 * (h**2).sum()


def closed_form(h: Tensor, t: Tensor) -> Tensor:
    def value(h: Tensor) -> Tensor:
        v = middle_solution(h, t)
        return top_value(low_solution((v, h), t), v, h)

    return grad(value)(h)


# Solvers that are opaque: what they return has no derivative but by the rule.
def opaque_low(outer: Any, t: Tensor) -> Tensor:
    return low_solution(outer, t).detach()


def opaque_middle(h: Tensor, t: Tensor) -> Tensor:
    return middle_solution(h, t).detach()


EXACT = hf.CG(rtol=1e-12, atol=0)
LOW: dict[str, Callable[..., Any]] = {
    "implicit_diff": hf.implicit_diff(opaque_low, inner_loss=low_loss, method=EXACT),
    "minimize": hf.minimize(
        low_loss, hf.optim.sgd(lr=0.5), 9, init=lambda outer, t: torch.zeros_like(outer[0])
    ),
}


def three_levels(low: str, middle: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The hypergradient of the top, for a kind of the lowest level and one of the middle."""

    def middle_loss(v: Tensor, h: Tensor, t: Tensor) -> Tensor:
        return middle_value(LOW[low]((v, h), t), (v, h), t)

    def top(v: Tensor, h: Tensor, t: Tensor) -> Tensor:
        return top_value(LOW[low]((v, h), t), v, h)

    if middle == "cg":
        return hf.hypergrad(opaque_middle, top, inner_loss=middle_loss, method=EXACT)
    if middle == "implicit_diff":
        solve = hf.implicit_diff(opaque_middle, inner_loss=middle_loss, method="dense")
        return grad(lambda h, t: top(solve(h, t), h, t))
    by_params = hf.hypergrad(opaque_low, middle_value, inner_loss=low_loss, method=EXACT)

    def optimality(v: Tensor, h: Tensor, t: Tensor) -> Tensor:
        return by_params((v, h), t)[0]

    if middle == "hypergrad":
        method = hf.GMRES(rtol=1e-12, atol=0)
        return hf.hypergrad(opaque_middle, top, optimality=optimality, method=method)
    if middle == "descent by hypergrad":

        def descend(h: Tensor, t: Tensor) -> Tensor:
            v = torch.zeros_like(h)
            for _ in range(9):
                v = v - 2.0 * optimality(v, h, t)
            return v

        return hf.hypergrad(descend, top, method="reverse_unroll")
    steps = hf.minimize(middle_loss, hf.optim.sgd(lr=2.0), 9, init=lambda h, t: torch.zeros_like(h))
    return hf.hypergrad(steps, top, method=middle)


CASES = [
    (low, middle)
    for low in LOW
    for middle in (
        "cg",
        "implicit_diff",
        "hypergrad",
        "descent by hypergrad",
        "reverse_unroll",
        "reverse",
        "forward",
    )
]
QUICK = (("implicit_diff", "cg"), ("minimize", "reverse_unroll"), ("implicit_diff", "hypergrad"))


@pytest.mark.parametrize(("low", "middle"), slow_but(*QUICK, of=CASES))
def test_a_hypergradient_through_a_hypergradient(low: str, middle: str) -> None:
    """For all tasks at once, and for one alone."""
    fn = three_levels(low, middle)
    expected = vmap(closed_form, in_dims=(None, 0))(H, TARGETS)
    solved = low == "implicit_diff" and middle in ("cg", "implicit_diff", "hypergrad")
    tol = 1e-9 if solved else 1e-6  # nine steps
    for found, right in (
        (vmap(fn, in_dims=(None, 0))(H, TARGETS), expected),
        (fn(H, TARGETS[0]), expected[0]),
    ):
        torch.testing.assert_close(found, right, rtol=tol, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_its_jacobian(jacobian: Callable[..., Any]) -> None:
    fn = three_levels("implicit_diff", "cg")
    expected = jacobian(closed_form)(H, TARGETS[0])
    torch.testing.assert_close(jacobian(fn)(H, TARGETS[0]), expected, rtol=1e-8, atol=1e-12)
