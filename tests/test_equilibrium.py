"""Equilibrium layers: gradients, modules' customs, precision, samples, and errors."""

import copy
import dataclasses
import datetime
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import hyperfunc as hf
from hyperfunc.fixed_point_solvers import Anderson, Broyden, Newton, Picard
from tests.cells import each_cell, slow_but

N, BATCH = 5, 6
SOLVERS: dict[str, Any] = {
    "picard": Picard(batch_dim=0, rtol=1e-13),
    "anderson": Anderson(batch_dim=0, rtol=1e-13),
    "broyden": Broyden(batch_dim=0, rtol=1e-13),
    "newton": Newton(batch_dim=0, rtol=1e-13),
}
METHODS: dict[str, Any] = {
    "gmres": hf.GMRES(rtol=1e-13),
    "gmres, by sample": hf.Blockwise(hf.GMRES(rtol=1e-13), blocks="batch"),
    "normal_cg": hf.NormalCG(rtol=1e-13),
    "fixed_point": hf.FixedPoint(rtol=1e-13),
    "anderson": hf.AndersonFixedPoint(rtol=1e-13),
    "dense": "dense",
    "last steps": hf.Reverse(last=120),
}


class Cell(nn.Module):
    def __init__(self, scale: float = 0.8, n: int = N) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(n, n), nn.Linear(n, n)
        with torch.no_grad():
            self.state.weight.mul_(scale / torch.linalg.matrix_norm(self.state.weight, 2))
        self.double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + self.input(x))


class Pair(nn.Module):
    """A state that is a tree, and inputs that are no tensors or no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(3, N), nn.Linear(N, N)
        self.double()

    def forward(self, z: dict[str, Tensor], x: Tensor, index: Tensor, scale: float) -> Any:
        a = torch.tanh(scale * self.linear(z["b"]) + x)
        return {"a": a, "b": torch.sin(scale * z["a"] + self.embedding(index))}


def inputs(batch: int = BATCH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 0.5, batch, dtype=torch.float64)[:, None]
    return size * torch.randn(batch, N, generator=generator, dtype=torch.float64)


def objective(z: Tensor) -> Tensor:
    return (torch.cos(torch.arange(z.numel(), device=z.device).reshape(z.shape)) * z).sin().sum()


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(objective(layer(x)), [x, *layer.parameters()]))


def unrolled(cell: nn.Module, x: Tensor, steps: int = 200) -> list[Tensor]:
    x = x.clone().requires_grad_()
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell(z, x)
    return list(torch.autograd.grad(objective(z), [x, *cell.parameters()]))


def check_close(a: Any, b: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_those_of_unrolling_to_convergence(solver: str, device: torch.device) -> None:
    cell, x = Cell().to(device), inputs().to(device)
    expected = unrolled(cell, x)
    methods = dict(METHODS) if solver == "newton" else METHODS | {"unrolled": "reverse_unroll"}
    with each_cell() as case:
        for name, method in methods.items():
            with case(name):
                layer = hf.EquilibriumLayer(cell, SOLVERS[solver], method)
                check_close(gradients(layer, x), expected)


class Masked(nn.Module):
    """A cell whose state holds a mask and a counter, or which finds the mask for itself."""

    def __init__(self, cell: Cell, in_state: bool) -> None:
        super().__init__()
        self.cell, self.in_state = cell, in_state

    def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        if not self.in_state:
            return {"z": self.cell(z["z"], x) * (x > 0)}
        count = z["count"] + 1
        return {"z": self.cell(z["z"], x) * z["mask"], "mask": ~z["mask"], "count": count}

    def init(self, x: Tensor) -> dict[str, Tensor]:
        count = torch.full((len(x),), 7, device=x.device)
        others = {"mask": x > 0, "count": count} if self.in_state else {}
        return {"z": torch.zeros_like(x), **others}


MASKED: dict[str, dict[str, Any]] = {
    **{name: {"solver": solver} for name, solver in SOLVERS.items()},
    **{f"by {name}": {"method": method} for name, method in METHODS.items()},
    "unrolled": {"solver": SOLVERS["picard"], "method": "reverse_unroll"},
    "compiled": {"compile": True},
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", slow_but(*MASKED.keys() - {"compiled"}, of=MASKED))
def test_integers_and_bools_in_the_state_are_constants(name: str, device: torch.device) -> None:
    """All numbers are those of a cell that has them from elsewhere."""
    settings, cell, x = MASKED[name], Cell().to(device), inputs().to(device)
    found = []
    for in_state in (True, False):
        masked = Masked(cell, in_state)
        layer = hf.EquilibriumLayer(masked, init=masked.init, **settings)
        z, stats, [start, *_] = layer(x, return_stats=True, at_steps=(0, 2))
        if in_state:
            assert torch.equal(z["mask"], x > 0)
            assert z["count"].tolist() == start["count"].tolist() == [7] * BATCH
            assert not z["count"].requires_grad
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(
            objective(layer(leaf)["z"]), [leaf, *layer.parameters()], create_graph=True
        )
        second = torch.autograd.grad(objective(torch.cat([g.flatten() for g in first])), leaf)
        numbers = [z["z"], start["z"], stats.num_steps, *first, *second]
        numbers.append(vmap(lambda x, layer=layer: layer(x[None])["z"])(x))
        numbers.append(vmap(grad(lambda x, layer=layer: objective(layer(x[None])["z"])))(x))
        found.append(numbers)
    check_close(*found)
    expected = x.clone().requires_grad_()
    z = torch.zeros_like(x)
    for _ in range(200):
        z = cell(z, expected) * (x > 0)
    check_close(found[0][0], z)
    check_close(found[0][3], torch.autograd.grad(objective(z), expected)[0], 1e-6)


def test_a_cell_may_not_change_the_integers_of_a_state() -> None:
    class Widens(Masked):
        def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
            return super().forward(z, x) | {"count": z["count"].float()}

    cell = Widens(Cell(), True)
    with pytest.raises(ValueError, match=r"leaf for params\['count'\] has dtype torch.float32"):
        hf.EquilibriumLayer(cell, init=cell.init)(inputs())


def test_a_mask_in_the_state_under_autocast_and_in_the_regulariser() -> None:
    cell = Masked(Cell(), True).float()
    x = inputs().float()
    layer = hf.EquilibriumLayer(cell, init=cell.init)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z["z"].dtype is torch.float32
    torch.testing.assert_close(z, expected, rtol=0, atol=0.05)
    z["z"].sum().backward()
    norms = [
        hf.jacobian_frobenius_squared(
            layer.cell, state, x, num_probes=3, generator=torch.Generator().manual_seed(0)
        )
        for state in (expected, {"z": expected["z"]})
        if setattr(layer.cell, "in_state", "mask" in state) is None
    ]
    check_close(*norms)


def test_truncated_gradients_are_their_formulas(device: torch.device) -> None:
    cell, x = Cell().to(device), inputs().to(device)
    z = hf.EquilibriumLayer(cell, SOLVERS["anderson"])(x).detach()
    for method, steps in (
        ("one_step", 1),
        (hf.Reverse(last=3), 3),
        (hf.Reverse("sqrt", last=4), 4),
    ):
        w, leaf = z, x.clone().requires_grad_()
        for _ in range(steps):
            w = cell(w, leaf)
        expected = torch.autograd.grad(objective(w), [leaf, *cell.parameters()])
        actual = gradients(hf.EquilibriumLayer(cell, SOLVERS["anderson"], method), x)
        check_close(actual, list(expected))


def as_function(layer: nn.Module) -> tuple[Callable[..., Any], list[Tensor]]:
    names, values = zip(*layer.named_parameters(), strict=True)
    return (
        lambda x, *ps: functional_call(layer, dict(zip(names, ps, strict=True)), (x,)),
        list(values),
    )


@pytest.mark.parametrize("parametrised", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradcheck_and_gradgradcheck(parametrised: bool) -> None:
    cell = Cell(n=3)
    if parametrised:
        spectral_norm(cell.state)
        weight_norm(cell.input)
    layer = hf.EquilibriumLayer(Halved(cell) if parametrised else cell, SOLVERS["anderson"])
    function, parameters = as_function(layer.eval())
    x = inputs(2)[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters), atol=1e-4)


def test_it_composes_with_the_transforms(device: torch.device) -> None:
    layer = hf.EquilibriumLayer(Cell().to(device), SOLVERS["anderson"], METHODS["gmres"])
    x = inputs(2).to(device)
    function, parameters = as_function(layer)
    parameters = [p.detach() for p in parameters]
    f = lambda x: objective(layer(x))  # noqa: E731
    check_close(grad(f)(x), gradients(layer, x)[0])
    J = torch.autograd.functional.jacobian(layer, x)
    check_close(jacrev(layer)(x), J)
    check_close(jacfwd(layer)(x), J)
    check_close(hessian(f)(x), torch.autograd.functional.hessian(f, x))
    X = torch.stack([x, -x, 0.5 * x])
    check_close(vmap(layer)(X), torch.stack([layer(x) for x in X]))
    check_close(vmap(jacrev(layer))(X), torch.stack([jacrev(layer)(x) for x in X]))
    stacked = [torch.stack([p, 0.9 * p]) for p in parameters]
    expected = [function(x, *(p[i] for p in stacked)) for i in range(2)]
    check_close(vmap(function, (None, *[0] * len(stacked)))(x, *stacked), torch.stack(expected))


def test_a_state_that_is_a_tree_and_inputs_of_all_kinds(device: torch.device) -> None:
    cell, index = Pair().to(device), torch.tensor([0, 2], device=device)
    layer = hf.EquilibriumLayer(
        cell, SOLVERS["anderson"], init=lambda x, *_: {"a": 0 * x, "b": torch.ones_like(x)}
    )
    x = inputs(2).to(device).requires_grad_()
    z, stats = layer(x, index, 0.4, return_stats=True)
    check_close(cell(z, x, index, 0.4), z)
    assert stats.num_steps.shape == (2,)
    actual = torch.autograd.grad(objective(z["a"] + z["b"]), [x, *layer.parameters()])
    w: Any = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
    for _ in range(200):
        w = cell(w, x, index, 0.4)
    expected = torch.autograd.grad(objective(w["a"] + w["b"]), [x, *layer.parameters()])
    check_close(actual, expected)


# Statistics and failures --------------------------------------------------------------------------


def test_statistics_of_samples_on_request_and_warm_start() -> None:
    cell = Cell()
    layer, x = hf.EquilibriumLayer(cell), inputs()
    before = {**vars(layer)}
    z, stats = layer(x, return_stats=True)
    assert {**vars(layer)} == before
    assert isinstance(stats, hf.SolveStats)
    assert len(stats.num_steps.unique()) > 1
    check_close(stats.residual_norm, (cell(z, x) - z).norm(dim=1).detach())
    for i in range(BATCH):
        alone = Anderson()(lambda z, x: cell(z, x), torch.zeros(N).double(), x[i])[1]
        assert stats.num_steps[i] == alone.num_steps
    warm, stats = layer(x, init=z.detach(), return_stats=True)
    assert torch.equal(warm, z)
    assert not stats.num_steps.any()
    together = hf.EquilibriumLayer(cell, Anderson())(x, return_stats=True)[1]
    assert together.num_steps.shape == ()


@pytest.mark.parametrize("solver", [Picard(60, batch_dim=0), Anderson(60, batch_dim=0)])
def test_a_cell_that_is_no_contraction_is_never_silent(solver: Any) -> None:
    cell, x = Cell(scale=20.0), inputs()
    with pytest.warns(hf.ConvergenceWarning, match=r"did not converge for \d of 6 samples"):
        hf.EquilibriumLayer(cell, solver)(x)
    layer = hf.EquilibriumLayer(cell, solver, throw=True)
    with pytest.raises(
        hf.HypergradError, match=r"failed for \d of 6 samples \(index .*throw=False"
    ):
        layer(x)
    z, stats = hf.EquilibriumLayer(cell, solver, throw=False)(x, return_stats=True)
    open_ = stats.result != hf.RESULTS.success
    assert open_.any()
    check_close(stats.residual_norm, (cell(z, x) - z).norm(dim=1).detach())
    assert (stats.residual_norm[open_] > 1e-3).all()
    # Newton needs no contraction, and neither does GMRES
    exact = hf.EquilibriumLayer(cell, dataclasses.replace(SOLVERS["newton"], maxiter=500))
    z, stats = exact(inputs(1), return_stats=True)
    check_close(cell(z, inputs(1)), z)


def test_non_finite_inputs_name_the_number_of_samples() -> None:
    x = inputs()
    x[[1, 3]] = torch.nan
    with pytest.raises(
        hf.HypergradError, match=r"for 2 of 6 samples \(index 1, 3\): non-finite values"
    ):
        hf.EquilibriumLayer(Cell())(x)
    _, stats = hf.EquilibriumLayer(Cell(), throw=False)(x, return_stats=True)
    assert stats.result.tolist() == [0, 3, 0, 3, 0, 0]


def test_the_step_limit_is_not_silent_either() -> None:
    layer = hf.EquilibriumLayer(Cell(), Picard(3, batch_dim=0))
    with pytest.warns(hf.ConvergenceWarning, match="took 3 steps .* the tolerance was not reached"):
        layer(inputs())
    layer.throw = True
    with pytest.raises(
        hf.HypergradError, match=r"for 6 of 6 samples .*: the tolerance was not rea"
    ):
        layer(inputs())
    layer.throw = False
    assert layer(inputs(), return_stats=True)[1].result.tolist() == [hf.RESULTS.max_steps] * BATCH


def test_exactly_k_steps_wait_for_no_values() -> None:
    layer = hf.EquilibriumLayer(
        Cell(), Picard(3, rtol=0), hf.GMRES(3, rtol=0), throw=False, throw_backward=False
    )
    z = layer.to("meta")(inputs().to("meta"))
    z.sum().backward()
    assert layer.state.weight.grad.is_meta


def test_exactly_k_steps_need_no_tolerance() -> None:
    cell, x = Cell(scale=20.0), inputs()
    layer = hf.EquilibriumLayer(cell, Picard(4, rtol=0, batch_dim=0), "one_step")
    z = torch.zeros_like(x)
    for _ in range(4):
        z = cell(z, x)
    assert torch.equal(layer(x), z)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("method", ["gmres", "fixed_point", "one_step", hf.Reverse(last=3)])
def test_batches_of_zero_and_one(size: int, method: Any) -> None:
    for solver in (*SOLVERS.values(), Anderson()):
        layer = hf.EquilibriumLayer(Cell(), solver, method)
        x = inputs(size).requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (size, N)
        assert all(p.grad.isfinite().all() and p.grad.any() == size for p in layer.parameters())


# A module like any other --------------------------------------------------------------------------


def test_states_at_chosen_steps_have_the_derivatives_of_the_method_there() -> None:
    cell, x = Cell(), inputs()
    weights = [*cell.parameters()]
    states = [torch.zeros_like(x)]
    for _ in range(4):
        states.append(cell(states[-1], x))
    for method, kept in (
        ("one_step", [cell(states[k].detach(), x) for k in (3, 0)]),
        (hf.ReverseUnroll(), [states[3], None]),
    ):
        layer = hf.EquilibriumLayer(cell, Picard(4, rtol=0, batch_dim=0), method)
        z, stats, (third, start) = layer(x, return_stats=True, at_steps=(3, 0))
        assert stats.num_steps.tolist() == [4] * BATCH
        check_close((third, start, z), (states[3], states[0], states[4]))
        for state, by_hand in zip((third, start), kept, strict=True):
            if by_hand is None:
                assert not state.requires_grad
                continue
            actual = torch.autograd.grad(objective(state), weights, retain_graph=True)
            scale = torch.autograd.grad(objective(y := state.detach().requires_grad_()), y)
            expected = torch.autograd.grad(by_hand, weights, scale, retain_graph=True)
            check_close(list(actual), list(expected))
    # a sample that has stopped stays where it is, and a late step is the solution
    layer = hf.EquilibriumLayer(cell, Picard(batch_dim=0, rtol=1e-8))
    z, stats, (early, late) = layer(x, return_stats=True, at_steps=(fewest(layer, x), 10**6))
    first = stats.num_steps == stats.num_steps.min()
    check_close(early[first], z[first])
    check_close(late, z)
    with pytest.raises(ValueError, match="at_steps holds is -1"):
        layer(x, at_steps=(-1,))
    with pytest.raises(
        TypeError, match=r"at_steps is of type int; .* Write at_steps=\(4,\) for one"
    ):
        layer(x, at_steps=4)


def fewest(layer: Any, x: Tensor) -> int:
    return int(layer(x, return_stats=True)[1].num_steps.min())


class Dropped(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(F.dropout(self.state(z), 0.5, self.training) / 2 + self.input(x))


@pytest.mark.parametrize("method", ["gmres", hf.Reverse(last=60), hf.ReverseUnroll()])
def test_dropout_in_the_cell_has_one_mask_a_call(method: Any) -> None:
    cell, x = Dropped(), inputs()
    layer = hf.EquilibriumLayer(cell, Picard(batch_dim=0, rtol=1e-13), method)
    torch.manual_seed(5)
    z, stats = layer(x, return_stats=True)
    after = torch.rand(1)
    assert (stats.result == hf.RESULTS.success).all()
    grads = torch.autograd.grad(objective(z), [*cell.parameters()])
    w = torch.zeros_like(x)
    for _ in range(100):
        torch.manual_seed(5)
        w = cell(w, x)
    assert after == torch.rand(1)  # the stream goes on as after one evaluation
    check_close(z, w)
    check_close(list(grads), list(torch.autograd.grad(objective(w), [*cell.parameters()])))
    assert float((layer(x) - z).detach().abs().max()) > 1e-3


@pytest.mark.slow
def test_export_of_a_fixed_number_of_steps() -> None:
    x, batch = inputs(), torch.export.Dim("batch", min=2)
    for solver in (Picard, Anderson, Broyden):
        solver = solver(4, rtol=0, batch_dim=0)
        layer = hf.EquilibriumLayer(Cell(), solver)
        with torch.no_grad():
            shapes = {"inputs": ({0: batch},)}
            program = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=False)
            check_close(program.module()(inputs(9)), layer(inputs(9)), 1e-12)
    layer.solver = Anderson(batch_dim=0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no loop that stops by a residual"):
        torch.export.export(layer, (x,), strict=False)


def test_state_dictionaries() -> None:
    cell, x = Cell(), inputs()
    layer = hf.EquilibriumLayer(cell)
    names = [f"cell.{name}" for name in cell.state_dict()]
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == names
    model = nn.Sequential(nn.Linear(N, N).double(), layer)
    assert list(model.state_dict())[2:] == [f"1.{name}" for name in names]
    z = layer(x)
    assert torch.equal(functional_call(layer, layer.state_dict(), (x,)), z)
    halved = {name: 0.5 * value for name, value in model.state_dict().items()}
    y = functional_call(model, halved, (x,))
    model.load_state_dict(halved)
    assert torch.equal(model(x), y)
    assert not torch.equal(layer(x), z)
    with pytest.raises(RuntimeError, match=r"Missing key.*cell\.state\.weight"):
        layer.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        layer.load_state_dict({**layer.state_dict(), "other": x})
    assert layer.load_state_dict({"cell.state.weight": x[:N]}, strict=False).missing_keys


class Ambiguous(nn.Module):
    """Whose tensors have the same name with "cell." in front of them and without it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cell = nn.Parameter(torch.rand(N, N).double() / N), Direct()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.cell(0.5 * z @ self.weight, x)


@pytest.mark.parametrize("make", ["Cell", "Direct", "Halved", "Ambiguous", "Normalised", "Around"])
def test_state_of_a_cell_and_of_layers_before_they_had_a_submodule(make: str) -> None:
    def new() -> nn.Module:
        if make == "Halved":
            return Halved(Cell())
        return Around(hf.EquilibriumLayer(Cell())) if make == "Around" else globals()[make]()

    cell, twin, x = new(), hf.EquilibriumLayer(new()).eval(), inputs()
    state = cell.state_dict()  # as layers saved it
    z = hf.EquilibriumLayer(cell).eval()(x)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), z)
    assert list(state) == list(cell.state_dict())
    twin = hf.EquilibriumLayer(new()).eval()
    nn.Sequential(nn.Identity(), twin).load_state_dict({f"1.{k}": v for k, v in state.items()})
    assert torch.equal(twin(x), z)
    other = hf.EquilibriumLayer(new()).eval()
    other.load_state_dict(dict(twin.state_dict()))
    assert torch.equal(other(x), z)


def test_settings_are_attributes_and_so_are_the_submodules_of_the_cell() -> None:
    cell, x = Cell(), inputs()
    layer = hf.EquilibriumLayer(cell)
    assert (layer.cell, layer.throw, layer.init) == (cell, None, None)
    layer.solver, layer.method = SOLVERS["newton"], "one_step"
    assert layer(x, return_stats=True)[1].num_steps.max() < 8
    assert layer.method == hf.OneStep()
    assert repr(layer).startswith("EquilibriumLayer(\n  solver=Newton(")
    with pytest.raises(TypeError, match="solver is 3; expected a fixed-point solver"):
        layer.solver = 3
    with pytest.raises(TypeError, match=r"cell is None; expected a torch.nn.Module"):
        layer.cell = None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing
    assert layer.state is cell.state
    layer.state = other = nn.Linear(N, N).double()
    assert cell.state is other
    assert len(list(layer.parameters())) == 4
    assert hf.EquilibriumLayer(Halved(cell)).cell.cell is cell
    named = nn.Linear(N, N).double()
    layer.init = named  # no part of the layer
    assert not any(p is named.weight for p in layer.parameters())
    assert torch.equal(layer(x), layer(x, init=named(x)))


def test_another_cell() -> None:
    x, cell = inputs(), Direct()
    layer = hf.EquilibriumLayer(Cell())
    layer.cell = cell
    assert torch.equal(layer(x), hf.EquilibriumLayer(cell)(x))
    assert [p is cell.weight for p in layer.parameters()] == [True]
    assert list(layer.state_dict()) == ["cell.weight"]
    assert not hasattr(layer, "state")
    before, optimizer = cell.weight.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, cell.weight)
    assert torch.equal(layer(x), hf.EquilibriumLayer(cell)(x))


class Around(nn.Module):
    """A cell with a layer in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.cell = layer

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.cell(0.3 * z + x)


class Direct(nn.Module):
    """A cell with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(N, N).double() / N)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.7 * z @ self.weight + x)


def test_parametrisations_belong_on_the_cell() -> None:
    layer, x = hf.EquilibriumLayer(Direct(), SOLVERS["anderson"], METHODS["gmres"]), inputs()
    z = layer(x)
    for parametrise in (spectral_norm, weight_norm):
        with pytest.raises(
            ValueError, match=r"EquilibriumLayer\((.|\n)*\(cell\): Direct(.|\n)*'weight'"
        ):
            parametrise(layer, "weight")
    with pytest.raises(
        AttributeError, match=r"'weight' is a tensor of the cell; write layer\.cell"
    ):
        prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(AttributeError, match=r"write layer\.cell\.weight"):
        layer.weight = nn.Parameter(x)
    assert list(layer.state_dict()) == ["cell.weight"]
    assert torch.equal(layer(x), z)
    spectral_norm(layer.cell, "weight")
    layer.eval()
    check_close(gradients(layer, x), unrolled(layer.cell, x))
    assert not parametrize.is_parametrized(layer)
    outer = hf.EquilibriumLayer(Around(layer), SOLVERS["anderson"])
    check_close(outer(x), outer.cell(outer(x), x))
    twin = hf.EquilibriumLayer(prune.l1_unstructured(Direct(), "weight", 0.5))
    check_close(twin(x), twin.cell(twin(x), x), 1e-4)


def test_hooks() -> None:
    layer, x, calls = hf.EquilibriumLayer(Cell()), inputs().requires_grad_(), []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda module, args, output: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer(x).sum().backward()
    assert calls == ["before", "after", "backward"]
    layer.cell.register_forward_hook(lambda module, args, output: 0.0 * output)
    assert not layer(x).any()


def test_a_layer_and_its_graph_are_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        layer, x = hf.EquilibriumLayer(Cell()), inputs()
        z = layer(x)
        z.sum().backward()
        kept = [weakref.ref(value) for value in (layer, layer.cell, layer.cell.state.weight, z)]
        del layer, z
        assert [ref() for ref in kept] == [None] * 4
    finally:
        gc.enable()


def test_copies_are_whole() -> None:
    layer, x = hf.EquilibriumLayer(Cell()), inputs()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.state.weight.zero_()
        assert not twin.cell.state.weight.any()
        assert layer.state.weight.all()


def test_moves_modes_and_training() -> None:
    torch.manual_seed(0)
    cell = Cell()
    layer = hf.EquilibriumLayer(cell).float()
    assert cell.state.weight.dtype is torch.float32
    assert layer(inputs().float()).dtype is torch.float32
    assert not layer.eval().cell.training
    assert layer.train().cell.training
    assert layer.to("meta").cell.state.weight.is_meta
    model = nn.Sequential(hf.EquilibriumLayer(Cell()), nn.Linear(N, 1).double())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, losses = inputs(20), []
    for _ in range(30):
        loss = (model(x)[:, 0] - x.sum(1).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        check_close(model(x), model(x).clone())


class Halved(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.cell(0.5 * z, x)


def test_parametrised_weights_are_computed_once_a_call() -> None:
    cell = Cell(scale=5.0)
    spectral_norm(cell.state)
    weight_norm(cell.input)
    whole, x = Halved(cell), inputs()
    layer = hf.EquilibriumLayer(whole, SOLVERS["picard"])
    vector = cell.state.parametrizations.weight[0]._u
    calls = []
    cell.state.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    before = vector.clone()
    z = layer(x)
    assert len(calls) == 1
    assert not torch.equal(before, vector)  # in training mode its power iteration goes on
    objective(z).backward()
    assert cell.state.parametrizations.weight.original.grad.any()
    layer.eval()
    before = vector.clone()
    check_close(gradients(layer, x), unrolled(whole, x))
    assert torch.equal(before, vector)
    assert torch.linalg.matrix_norm(cell.state.weight, 2) < 1.5
    assert "cell.cell.state.parametrizations.weight.0._u" in layer.state_dict()


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(N, N), nn.BatchNorm1d(N)
        self.register_buffer("shift", torch.ones(N))
        self.double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.norm(self.linear(z) + x) + self.shift)


def test_running_statistics_are_updated_once_at_the_solution() -> None:
    layer, x = hf.EquilibriumLayer(Normalised(), SOLVERS["anderson"]), inputs()
    twin = copy.deepcopy(layer.cell)
    z = layer(x)
    assert layer.norm.num_batches_tracked == 1
    check_close(twin(z, x), z)
    check_close(layer.norm.running_var, twin.norm.running_var)
    check_close(gradients(layer, x), unrolled(twin, x))
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    z = layer(x)
    check_close(layer.cell(z, x), z)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


def test_shared_weights_stay_shared() -> None:
    cell = Cell()
    cell.input.weight = cell.state.weight
    layer = hf.EquilibriumLayer(cell, SOLVERS["anderson"])
    assert len(list(layer.parameters())) == 3
    check_close(gradients(layer, inputs()), unrolled(cell, inputs()))
    cell.state.bias.requires_grad_(False)
    layer(inputs()).sum().backward()
    assert cell.state.bias.grad is None


# Precision, compilation, processes ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gmres", "fixed_point", "normal_cg", "one_step"])
def test_autocast_and_half_precision(dtype: torch.dtype, method: str, device: torch.device) -> None:
    cell, x = Cell(0.6).to(device, torch.float32), inputs().to(device, torch.float32)
    layer = hf.EquilibriumLayer(cell, method=method)
    expected, truth = layer(x), gradients(layer, x)
    eps = torch.finfo(dtype).eps ** 0.75
    dtypes = []
    cell.state.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast(device.type, dtype):
        z = layer(x)
    assert z.dtype is torch.float32
    assert set(dtypes) == {dtype}
    torch.testing.assert_close(z, expected, rtol=0, atol=4 * eps)
    objective(z).backward()  # outside of autocast
    assert set(dtypes) == {dtype}
    for parameter, gradient in zip(layer.parameters(), truth[1:], strict=True):
        assert (parameter.grad - gradient).norm() < 4 * eps * (1 + gradient.norm())
    half = layer.to(dtype)
    z = half(x.to(dtype))
    assert z.dtype is dtype
    torch.testing.assert_close(z.float(), expected, rtol=0, atol=6 * eps)
    half.zero_grad()
    objective(z.float()).backward()
    for parameter, gradient in zip(half.parameters(), truth[1:], strict=True):
        assert (parameter.grad - gradient).norm() < 6 * eps * (1 + gradient.norm())


def test_exactly_k_steps_under_autocast(device: torch.device) -> None:
    """Without a tolerance, that is, although the steps beyond its precision change nothing."""
    seen = []
    layer = hf.EquilibriumLayer(
        Cell(0.1),
        Picard(30, rtol=0, batch_dim=0),
        hf.FixedPoint(40, rtol=0),
        on_backward=lambda stats: seen.append(int(stats.num_steps)),
    ).to(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        z, stats = layer(inputs().to(device, torch.float32), return_stats=True)
    objective(z).backward()
    assert stats.num_steps.tolist() == [30] * BATCH
    assert seen == [40]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(N, N).double(), hf.EquilibriumLayer(Cell())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.layer(self.first(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # inside torch
def test_compiled_models_break_their_graph_at_the_layer() -> None:
    model, x = Model(), inputs()
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    check_close(gradients(compiled, x), gradients(model, x))
    assert len(graphs) == 2  # what is before the layer and after it


def train_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model())
    model(inputs()[rank::2]).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=train_in_process, args=(r, str(tmp_path))) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    torch.manual_seed(0)
    model = Model()
    model(inputs()).square().mean().backward()
    for rank in range(2):
        check_close(torch.load(tmp_path / f"{rank}.pt"), [p.grad for p in model.parameters()])


# The regulariser ----------------------------------------------------------------------------------


def test_the_estimate_of_the_jacobian_norm_is_unbiased() -> None:
    W, x = inputs(N), torch.ones(N, dtype=torch.float64)
    f = lambda z, W: {"a": torch.tanh(W @ z["z"]), "b": z["z"].sum()}  # noqa: E731
    J = torch.autograd.functional.jacobian(lambda z: torch.tanh(W @ z), 0.1 * x)
    exact = J.square().sum() + N
    estimates = torch.stack(
        [
            hf.jacobian_frobenius_squared(
                f, {"z": 0.1 * x}, W, generator=torch.Generator().manual_seed(seed)
            )
            for seed in range(1000)
        ]
    )
    error = (estimates.mean() - exact).abs()
    assert error < 4 * estimates.std() / 1000**0.5
    assert error < 0.05 * exact
    many = hf.jacobian_frobenius_squared(f, {"z": 0.1 * x}, W, num_probes=1000)
    assert (many - exact).abs() < 4 * estimates.std() / 1000**0.5


def test_the_regulariser_is_differentiable_and_shrinks_the_jacobian() -> None:
    def estimate(W: Tensor, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return hf.jacobian_frobenius_squared(
            lambda z: torch.tanh(W @ z), z, num_probes=2, generator=generator
        )

    W, z = inputs(N).requires_grad_(), inputs(N)[3].requires_grad_()
    assert torch.autograd.gradcheck(estimate, (W, z))
    assert torch.autograd.gradgradcheck(estimate, (W, z))
    check_close(grad(estimate)(W.detach(), z.detach()), torch.autograd.grad(estimate(W, z), W)[0])
    layer, x = hf.EquilibriumLayer(Cell()), inputs()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sizes = []
    for _ in range(15):
        z = layer(x).detach()
        size = hf.jacobian_frobenius_squared(layer.cell, z, x, num_probes=4) / z.numel()
        optimizer.zero_grad()
        size.backward()
        optimizer.step()
        sizes.append(size.item())
    assert sizes[-1] < 0.7 * sizes[0]


# Errors -------------------------------------------------------------------------------------------


class Closure(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.hidden = [weight]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.hidden[0] + x)


class Nothing(nn.Module):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z + x


class Wide(nn.Module):
    """A cell whose state has another shape than its input; one number a row of input broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Linear(N, N).double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x + (z if z.shape[1] == 1 else self.state(z)))[:, :1].expand(-1, N)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "cell": (
        lambda: hf.EquilibriumLayer(lambda z, x: z),  # type: ignore[arg-type]
        TypeError,
        r"cell is .* expected a torch.nn.Module with forward\(state, \*inputs\)",
    ),
    "solver": (
        lambda: hf.EquilibriumLayer(Cell(), "anderson"),  # type: ignore[arg-type]
        TypeError,
        r"solver is 'anderson'; expected a fixed-point solver such as hf\.fixed_point_solvers",
    ),
    "method": (
        lambda: hf.EquilibriumLayer(Cell(), method=hf.Reverse()),
        ValueError,
        r"expected a linear solver such as hf\.GMRES\(\), hf\.Reverse\(last=K\)",
    ),
    "unknown method": (
        lambda: hf.EquilibriumLayer(Cell(), method="gmress"),
        ValueError,
        "unknown method 'gmress'. Did you mean 'gmres'",
    ),
    "init": (
        lambda: hf.EquilibriumLayer(Cell(), init=torch.zeros(1, N)),  # type: ignore[arg-type]
        TypeError,
        r"init is .* expected a function \(\*inputs\) -> state",
    ),
    "on_backward": (
        lambda: hf.EquilibriumLayer(Cell(), on_backward=[]),  # type: ignore[arg-type]
        TypeError,
        r"on_backward is \[\] of type list; expected a function .* history\.append",
    ),
    "start": (
        lambda: hf.EquilibriumLayer(Wide())(inputs()[:, :2]),
        RuntimeError,
        r"cannot be multiplied \(6x2 and 5x5\)\. The state began as zeros like the first input; .*"
        r"init=lambda x: x\.new_zeros",
    ),
    "start that broadcasts": (
        lambda: hf.EquilibriumLayer(Wide())(inputs()[:, :1]),
        ValueError,
        r"shape \(6, 5\) for a state of shape \(6, 1\)\. The state began as zeros",
    ),
    "no input": (lambda: hf.EquilibriumLayer(Cell())(), TypeError, "first input is missing"),
    "integers": (
        lambda: hf.EquilibriumLayer(Cell())(torch.zeros(3, dtype=torch.int64)),
        TypeError,
        r"first input is of type Tensor and torch.int64; .* Write EquilibriumLayer\(cell, init=",
    ),
    "shape": (
        lambda: hf.EquilibriumLayer(Nothing())(inputs(), init=torch.zeros(1, N).double()),
        ValueError,
        r"the output of fixed_point: the leaf for params has shape \(6, 5\), expected \(1, 5\)",
    ),
    "structure": (
        lambda: hf.EquilibriumLayer(Pair())(inputs(), init={"a": 1}),
        TypeError,
        r"init\['a'\] is 1 of type int; expected a floating-point tensor",
    ),
    "dtype": (
        lambda: hf.EquilibriumLayer(Nothing())(inputs(), init=torch.zeros(BATCH, N)),
        ValueError,
        "the leaf for params has dtype torch.float64, expected torch.float32",
    ),
    "closure": (
        lambda: hf.EquilibriumLayer(Closure(torch.eye(N).double().requires_grad_()))(inputs()),
        ValueError,
        "closes over a tensor that requires grad",
    ),
    "newton unrolled": (
        lambda: hf.EquilibriumLayer(Cell(), Newton(), "reverse_unroll")(inputs()),
        ValueError,
        "Newton: its steps cannot be differentiated",
    ),
    "probes": (
        lambda: hf.jacobian_frobenius_squared(lambda z: z, torch.ones(2), num_probes=0),
        ValueError,
        "num_probes is 0; expected an integer >= 1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


def test_the_default_method() -> None:
    assert isinstance(hf.EquilibriumLayer(Cell()).method, hf.GMRES)
    assert isinstance(hf.EquilibriumLayer(Cell(), compile=True).method, hf.BiCGStab)


def test_second_derivatives_through_steps_that_change_nothing() -> None:
    """Anderson's differences are zeros where it has converged, and their norm has none there."""
    cell, x = nn.Linear(3, 3, dtype=torch.float64), torch.linspace(-1, 1, 6).double().reshape(2, 3)
    with torch.no_grad():
        cell.weight.mul_(0.4)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = cell

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + x)

    found = []
    for solver in (
        hf.fixed_point_solvers.Anderson(60, rtol=0.0),
        hf.fixed_point_solvers.Picard(60, rtol=0.0),
    ):
        layer = hf.EquilibriumLayer(
            Cell(), solver=solver, method="reverse_unroll", init=torch.zeros_like
        )
        grads = torch.autograd.grad(
            (layer(x) ** 3).sum(), list(cell.parameters()), create_graph=True
        )
        found.append(torch.autograd.grad(sum((g**2).sum() for g in grads), list(cell.parameters())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
