"""Solves that did not converge where nobody sees their statistics."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import hyperfunc as hf
from hyperfunc.fixed_point_solvers import Anderson, Picard
from tests.cells import each_cell

F64 = torch.float64
DIAGONAL = torch.tensor([1.0, 3.0, 10.0], dtype=F64)
H = torch.tensor([1.0, 2.0, 3.0], dtype=F64)


def inner_loss(w: Tensor, h: Tensor) -> Tensor:
    return 0.5 * (DIAGONAL * (w - h) ** 2).sum()


class Contraction(nn.Module):
    """One whose factor is 0.9."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.9 * z + x


class ResidualBlock(nn.Module):
    """The cell of a vision model: convolutions, group norms and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.GroupNorm(4, 8) for _ in range(3)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        first, second = self.convolutions
        y = self.norms[0](torch.relu(first(z)))
        return self.norms[2](torch.relu(z + self.norms[1](x + second(y))))


class Wrapped(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.fn(z, x)


def caught(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", hf.ConvergenceWarning)
        call()
    return found


def test_unseen_solves_warn_with_their_statistics() -> None:
    method = hf.CG(maxiter=2)
    solve = hf.implicit_diff(lambda h: h.clone(), inner_loss=inner_loss, method=method)
    seen = hf.hypergrad_and_solution(
        lambda h: h.clone(), lambda w, h: w.sum(), inner_loss=inner_loss, method=method
    )(H)[1].stats
    assert seen.result == hf.RESULTS.max_steps
    h = H.clone().requires_grad_()
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    few = hf.EquilibriumLayer(Contraction(), method=hf.GMRES(maxiter=1))
    slow = Picard(maxiter=3, batch_dim=0)
    rest = slow.inner_solver(lambda z, h: 0.9 * z + h, init=torch.zeros_like)
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "backward": (lambda: solve(h).sum().backward(), 2),
        "grad": (lambda: grad(lambda h: solve(h).sum())(H), 2),
        "jvp": (lambda: jvp(solve, (H,), (torch.ones_like(H),)), 2),
        "vmap": (lambda: vmap(grad(lambda h: solve(h).sum()))(torch.stack([H, 2 * H])), 2),
        "inner solver": (lambda: rest(x.detach()), 3),
        "layer": (lambda: hf.EquilibriumLayer(Contraction(), slow)(x.detach()), 3),
    }
    with each_cell() as cell:
        for name, (call, steps) in calls.items():
            with cell(name):
                (warning,) = caught(call)
                assert isinstance(warning.message, hf.ConvergenceWarning)
                assert warning.filename == __file__
                assert warning.message.num_steps == steps
                assert f"took {steps} steps" in str(warning.message)
                assert "maxiter" in str(warning.message)
                if name in ("backward", "grad"):
                    assert warning.message.residual_norm == seen.residual_norm.item()
    # what converged, and what was asked for a number of steps, is silent
    assert not caught(lambda: few(x).sum().backward())  # a multiple of the identity takes one step
    exact = hf.implicit_diff(
        lambda h: h.clone(), inner_loss=inner_loss, method=hf.CG(maxiter=2, rtol=0)
    )
    assert not caught(lambda: exact(h).sum().backward())
    # the last residual of Picard from zero is 0.9^3 x
    _, stats = slow(lambda z, h: 0.9 * z + h, torch.zeros_like(x), x.detach())
    (warning,) = caught(lambda: rest(x.detach()))
    assert warning.message.residual_norm == stats.residual_norm.max().item()  # type: ignore[union-attr]
    assert warning.message.residual_norm == pytest.approx(0.9**3 * 3**0.5)  # type: ignore[union-attr]


def test_a_line_of_code_warns_once() -> None:
    solve = hf.implicit_diff(lambda h: h.clone(), inner_loss=inner_loss, method=hf.CG(maxiter=2))
    scale = [1.0, 10.0, 100.0]

    def everywhere() -> None:
        for factor in scale:  # whose residuals differ
            grad(lambda h: factor * solve(h).sum())(H)  # noqa: B023
        grad(lambda h: solve(h).sum())(H)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default", hf.ConvergenceWarning)
        everywhere()
        everywhere()
    assert len(found) == 2
    assert len(caught(everywhere)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.ConvergenceWarning)
        with pytest.raises(hf.ConvergenceWarning, match="did not converge"):
            grad(lambda h: solve(h).sum())(H)


def test_a_layer_has_a_switch_for_each_direction() -> None:
    torch.manual_seed(0)
    cell = ResidualBlock().double()
    x = torch.randn(3, 8, 6, 6, dtype=F64)
    few = Anderson(maxiter=4, batch_dim=0)
    history: list[hf.SolveStats] = []
    layer = hf.EquilibriumLayer(cell, few, hf.GMRES(maxiter=3), on_backward=history.append)
    forward, backward = caught(lambda: layer(x).square().sum().backward())
    assert "fixed-point solve with Anderson" in str(forward.message)
    assert "linear solve with GMRES" in str(backward.message)
    assert [stats.num_steps.item() for stats in history] == [3]
    assert history[0].residual_norm.item() == backward.message.residual_norm  # type: ignore[union-attr]
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())  # type: ignore[union-attr]
    # with its statistics the forward pass has told all
    with torch.no_grad():
        assert not caught(lambda: layer(x, return_stats=True))
        best, stats = layer(x, return_stats=True)
        assert (stats.result == hf.RESULTS.max_steps).all()
        residual = (layer.cell(best, x) - best).flatten(1).norm(dim=1)
        torch.testing.assert_close(stats.residual_norm, residual)
    with pytest.raises(hf.HypergradError, match="the tolerance was not reached"):
        hf.EquilibriumLayer(cell, few, throw=True)(x)
    # a series that diverges is of no use, unless it is asked for
    scaled = nn.Linear(8, 8, bias=False, dtype=F64)
    nn.init.constant_(scaled.weight, -0.2)  # an eigenvalue of -1.6
    scaled.requires_grad_(False)
    plain = lambda z, x: scaled(z) + x  # noqa: E731
    for throw_backward in (None, True, False):
        module = Wrapped(plain)
        layer = hf.EquilibriumLayer(module, method=hf.FixedPoint(), throw_backward=throw_backward)
        rows = torch.ones(2, 8, dtype=F64, requires_grad=True)
        if throw_backward is False:
            (warning,) = caught(lambda: layer(rows).sum().backward())  # noqa: B023
            assert "divergence" in str(warning.message)
        else:
            with pytest.raises(hf.HypergradError, match="the residual grew"):
                layer(rows).sum().backward()
    # that of a map is told of maps, not of inner losses
    scales = torch.tensor([-0.5, 2.0], dtype=F64)  # so that I - J is indefinite
    layer = hf.EquilibriumLayer(Wrapped(lambda z, x: scales * z + x), method="cg")
    rows = torch.ones(1, 2, dtype=F64, requires_grad=True)
    (warning,) = caught(lambda: layer(rows).sum().backward())
    assert "use hf.GMRES() or hf.BiCGStab()" in str(warning.message)
    assert "inner loss" not in str(warning.message)
    # nor are values that are not finite
    nan = hf.EquilibriumLayer(Wrapped(lambda z, x: z * torch.nan))
    with pytest.raises(hf.HypergradError, match="non-finite"):
        nan(x)


def test_the_trace_holds_every_residual() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=F64)
    layer = hf.EquilibriumLayer(Contraction(), Picard(maxiter=5, rtol=0, batch_dim=0))
    z, trace = layer(x, return_trace=True)
    norms = x.norm(dim=1) * 0.9 ** torch.arange(5, dtype=F64)[:, None]
    torch.testing.assert_close(trace, norms)
    z, stats, trace = layer(x, return_stats=True, return_trace=True)
    torch.testing.assert_close(stats.residual_norm, trace[-1])
    torch.testing.assert_close(z, x * (1 - 0.9**5) / 0.1)
    one = Picard(maxiter=5, rtol=0)
    _, _, trace = one(lambda z, h: 0.9 * z + h, torch.zeros_like(x[0]), x[0], return_trace=True)
    torch.testing.assert_close(trace, norms[:, 0])


def test_a_warning_of_text_alone_has_the_fields_of_others() -> None:
    warning = hf.ConvergenceWarning("not converged")
    assert (str(warning), warning.num_steps) == ("not converged", 0)
    assert math.isnan(warning.residual_norm)
