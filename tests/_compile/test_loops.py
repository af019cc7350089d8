"""Loops that stay loops in compiled code: numbers, codes and statistics of plain calls."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hyperfunc as hf
from hyperfunc._compile.comparison import difference
from hyperfunc._compile.compiler import Compiler
from hyperfunc._engine import loop
from hyperfunc._engine.results import UNFINISHED
from hyperfunc._torch import loops
from hyperfunc._torch.autodiff import Linearization
from hyperfunc.linear_solvers import _auto, _cycles
from tests.cells import slow_but

F64 = torch.float64

# Runs what the others compile, without their seconds of compiling.
BACKEND = "eager"

METHODS: dict[str, Any] = {
    "cg": hf.CG(),
    "few steps": hf.CG(maxiter=3),
    "fixed": hf.CG(maxiter=4, rtol=0),
    "preconditioned": hf.CG(preconditioner=lambda v: 0.5 * v),
    "stop": hf.CG(negative_curvature="stop"),
    "least squares": hf.LeastSquares(),
    "bicgstab": hf.BiCGStab(),
    "normal_cg": hf.NormalCG(),
    "few steps of normal_cg": hf.NormalCG(maxiter=2, preconditioner=lambda v: 0.5 * v),
    "one step of normal_cg": hf.NormalCG(maxiter=1, rtol=0),
    "fixed_point": hf.FixedPoint(maxiter=400, rtol=1e-6, step_size=0.2),
    "preconditioned fixed_point": hf.FixedPoint(
        maxiter=400, rtol=1e-6, step_size=0.4, preconditioner=lambda v: 0.5 * v
    ),
    "neumann": hf.Neumann(maxiter=9, rtol=0, step_size=0.1),
    "diverging": hf.Neumann(maxiter=50, step_size=3.0),
    "pipelined_cg": hf.PipelinedCG(),
    "replaced": hf.PipelinedCG(replace=2, preconditioner=lambda v: 0.5 * v),
    "few steps of pipelined_cg": hf.PipelinedCG(maxiter=3, rtol=0, replace=2),
    "gmres": hf.GMRES(),
    "restarted gmres": hf.GMRES(restart=2),
    "few steps of gmres": hf.GMRES(maxiter=3, restart=2, preconditioner=lambda v: 0.5 * v),
    "auto": hf.Auto(),
    "fallback": hf.Fallback(hf.CG(), hf.GMRES(maxiter=2)),
    "anderson": hf.AndersonFixedPoint(step_size=0.3, memory=3),
    "few steps of anderson": hf.AndersonFixedPoint(
        maxiter=4, rtol=0, memory=2, preconditioner=lambda v: 0.5 * v
    ),
    "fixed gmres": hf.GMRES(maxiter=5, restart=3, rtol=0),
}


def tasks(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Hparams, and four tasks: easy ones, one of many steps, and a concave one."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64))
    spectra = torch.ones(4, 6, dtype=F64)
    spectra[1, 0], spectra[2] = 2.0, torch.linspace(1, 6, 6)
    spectra[3, 0] = -1.0
    matrices = basis @ torch.diag_embed(spectra) @ basis.mT
    b = torch.randn(4, 6, generator=generator, dtype=F64)
    return torch.zeros(6, dtype=dtype), matrices.to(dtype), b.to(dtype)


def hypergradient(method: Any, compile: Any, calls: Any = None) -> Any:
    def inner_loss(w: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        if calls is not None:
            calls.append(1)
        return 0.5 * w @ (A @ w) - w @ (b * h.exp())

    return hf.hypergrad_and_solution(
        lambda h, A, b: torch.linalg.solve(A, b * h.exp()),
        lambda w, h, A, b: (w**3).sum() + w @ b,
        inner_loss=inner_loss,
        method=method,
        throw=False,
        compile=compile,
    )


def close(got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", slow_but("cg", of=METHODS))
def test_each_task_stops_by_itself_with_the_code_of_plain_calls(name: str) -> None:
    h, A, b = tasks()
    plain, compiled = (hypergradient(METHODS[name], c) for c in (False, BACKEND))
    expected = torch.func.vmap(plain, (None, 0, 0))(h, A, b)
    got = torch.func.vmap(compiled, (None, 0, 0))(h, A, b)
    close(got, expected)
    if name == "cg":
        assert expected[1].stats.num_steps.unique().numel() > 2
        assert expected[1].stats.result.tolist() == [0, 0, 0, int(hf.RESULTS.breakdown)]
    for i in (2, 3):
        close(compiled(h, A[i], b[i]), plain(h, A[i], b[i]))


WHOLE = {
    "restarts": hf.GMRES(restart=2),
    "replacement": hf.PipelinedCG(replace=2),
    "the next solver": hf.Auto(),
    "window": hf.AndersonFixedPoint(step_size=0.3, memory=3),
}


@pytest.mark.parametrize("name", slow_but("restarts", of=WHOLE))
def test_compiled_code_holds_all_of_a_solve(name: str) -> None:
    calls: list[int] = []
    compiled = hypergradient(WHOLE[name], BACKEND, calls)
    h, A, b = tasks()
    index = 3 if name == "the next solver" else 2
    first = compiled(h, A[index], b[index])
    assert calls
    assert first[1].stats.result == 0
    calls.clear()
    close(compiled(h, A[index], b[index]), first)
    assert not calls


@pytest.mark.parametrize("method", slow_but("dense", of={"dense": hf.Dense(), "auto": hf.Auto()}))
def test_dense_solves_singular_systems_that_have_a_solution(method: str) -> None:
    A = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, -2.0], [-2.0, 4.0]]], dtype=F64)
    results = []
    for compile in (False, BACKEND):
        fn = hf.hypergrad_and_solution(
            lambda h, A: h,
            lambda w, h, A: (A @ w).sum(),
            optimality=lambda w, h, A: A @ (w - h),
            method={"dense": hf.Dense(), "auto": hf.Auto()}[method],
            throw=False,
            compile=compile,
        )
        results.append(torch.func.vmap(fn, (None, 0))(torch.ones(2, dtype=F64), A))
    assert results[0][1].stats.result.tolist() == [0, 0]
    close(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["of many", "that Jacobi helps", "fixed"])
def test_what_auto_leaves_to_other_methods_and_to_python(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = hf.Auto(num_steps=1, maxiter=80)
    h, A, b = tasks()
    if kind == "of many":
        monkeypatch.setattr(_auto, "MOST_ENTRIES", 0)
        A[2, 0, 1] += 2.0  # not symmetric
    else:
        method = hf.Auto(num_steps=1, maxiter=80, rtol=0) if kind == "fixed" else method
        generator = torch.Generator().manual_seed(1)
        noise = 0.05 * torch.randn(4, 40, 40, generator=generator, dtype=F64)
        d = torch.logspace(0, 5, 40, dtype=F64).sqrt()
        A = torch.eye(40, dtype=F64) + 0.05 * noise @ noise.mT
        A[1:] = d[:, None] * A[1:] * d
        h, b = torch.zeros(40, dtype=F64), torch.ones(4, 40, dtype=F64)
    plain, compiled = (hypergradient(method, c) for c in (False, BACKEND))
    expected = torch.func.vmap(plain, (None, 0, 0))(h, A, b)
    choices = expected[1].stats.choice.unique().tolist()
    assert choices == ([0, 3] if kind == "of many" else [0, 1])
    close(torch.func.vmap(compiled, (None, 0, 0))(h, A, b), expected)


def test_where_another_cycle_is_called_for_python_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cycles: list[int] = []
    check = _cycles._check

    def drifting(operator: Any, b: Any, before: Any, end: Any, *rest: Any) -> Any:
        cycles.append(1)
        factor = torch.where(before.state.num_steps == 0, 0.999, 1.0).to(F64)
        spoilt = end._replace(x=tuple(factor * leaf for leaf in end.x))
        return check(operator, b, before, spoilt, *rest)

    h, A, b = tasks()
    monkeypatch.setattr(_cycles, "_check", drifting)
    expected = hypergradient(hf.CG(), False)(h, A[2], b[2])
    assert len(cycles) == 2
    assert expected[1].stats.result == hf.RESULTS.success
    compiled = hypergradient(hf.CG(), BACKEND)
    for _ in range(2):
        cycles.clear()
        close(compiled(h, A[2], b[2]), expected)
    assert len(cycles) == 2


SOLVERS: dict[str, Any] = {
    "picard": hf.fixed_point_solvers.Picard(step_size=0.7),
    "fixed": hf.fixed_point_solvers.Picard(maxiter=7, rtol=0),
    "anderson": hf.fixed_point_solvers.Anderson(memory=3),
    "fixed anderson": hf.fixed_point_solvers.Anderson(maxiter=9, rtol=0),
    "one step": hf.fixed_point_solvers.Anderson(maxiter=1, rtol=0),
    "few steps": hf.fixed_point_solvers.Broyden(maxiter=3),
    "no step": hf.fixed_point_solvers.Broyden(maxiter=0),
    "broyden": hf.fixed_point_solvers.Broyden(memory=3),
    "memory of one": hf.fixed_point_solvers.Broyden(memory=1),
    "newton": hf.fixed_point_solvers.Newton(linear_solver=hf.BiCGStab()),
}


def cell(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.T) + x


def samples(gain: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W = gain * torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64))[0]
    sizes = torch.tensor([[0.01], [1.0], [3.0], [0.0]], dtype=F64)
    return W, sizes * torch.randn(4, 6, generator=generator, dtype=F64)


def fixed_points(solver: Any, compile: Any, **options: Any) -> Any:
    solver = dataclasses.replace(solver, throw=False, **options)
    init = lambda W, x: torch.zeros_like(x)  # noqa: E731
    return solver.inner_solver(cell, init=init, has_aux=True, compile=compile)


@pytest.mark.parametrize("name", slow_but("anderson", of=SOLVERS))
def test_fixed_points_of_samples_and_tasks(name: str) -> None:
    plain, compiled = (fixed_points(SOLVERS[name], c, batch_dim=0) for c in (False, BACKEND))
    W, x = samples(0.6)
    for scale in (1.0, 0.7):  # by the code that was compiled for the first one
        expected = plain(scale * W, x + 1 - scale)
        close(compiled(scale * W, x + 1 - scale), expected)
    if name == "anderson":
        assert expected[1].num_steps.unique().numel() > 1
        assert len(compiled.compiler.entries) == 1
        return
    if name != "newton":  # whose linear solves may then need a second pass
        close(compiled(*samples(3.0)), plain(*samples(3.0)))  # some diverge
    plain, compiled = (fixed_points(SOLVERS[name], c) for c in (False, BACKEND))
    close(*(torch.func.vmap(solver, (None, 0))(W, x) for solver in (compiled, plain)))


def test_a_product_that_is_first_taken_inside_a_loop() -> None:
    """What it makes there is of use there alone."""

    def both(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        linearization = Linearization(lambda x: (x.tanh() * x[0],), (x,), ((0,),))
        (v, *_), _ = loop.repeat(lambda _, v: linearization.push(v), (v,), 2)
        (w, *_), _ = loop.repeat(lambda _, v: linearization.push(v), (v,), 2)
        return v, w

    x, v = torch.tensor([0.3, 0.5], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    with loops.kept():
        graph = make_fx(both)(x, v)
    close(tuple(graph(2 * x, v)), both(2 * x, v))


def test_what_a_loop_made_is_refused_outside_of_it() -> None:
    kept: list[Tensor] = []

    def leaking(x: Tensor) -> Any:
        def step(_: Any, state: tuple[Tensor]) -> tuple[Tensor]:
            kept.append(kept[0] if kept else x.exp())
            return (state[0] * kept[-1],)

        loop.repeat(step, (x,), 3)
        return loop.repeat(step, (x,), 3)[0]

    with loops.kept(), pytest.raises(AssertionError, match="made inside a loop"):
        make_fx(leaking)(torch.ones(2))


class Cell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = torch.nn.Linear(3, 3).double(), 0.3
        self.drop = torch.nn.Dropout(0.5).eval()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.gain * self.linear(z) + x))


def layers(method: Any, **options: Any) -> list[hf.EquilibriumLayer]:
    solver = hf.fixed_point_solvers.Picard(batch_dim=0)
    cell, make = Cell(), hf.EquilibriumLayer
    return [make(cell, solver, method, compile=c, **options) for c in (False, BACKEND)]


def outputs(layer: hf.EquilibriumLayer, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    z, stats = layer(x, return_stats=True)
    leaves = [x, *layer.cell.parameters()]
    return z.detach(), stats, torch.autograd.grad(z.square().sum(), leaves)


def test_equilibrium_layers_forward_and_backward() -> None:
    plain, compiled = layers(hf.FixedPoint(maxiter=20))
    seen: list[Any] = []
    compiled.on_backward = seen.append
    x = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    for scale in (1.0, 0.5):
        close(outputs(compiled, scale * x), outputs(plain, scale * x))
    (pair,) = compiled._compilers.values()
    assert [len(compiler.entries) for compiler in pair] == [1, 1]
    assert [stats.result.item() for stats in seen] == [0, 0]
    with torch.no_grad():
        compiled.cell.linear.weight.mul_(0.5)
    close(outputs(compiled, x), outputs(plain, x))
    assert [len(compiler.entries) for compiler in pair] == [1, 1]
    # both keep what was compiled, so these are the uncompiled ways
    results = []
    for layer in (compiled, plain):
        z, trace, states = layer(x, return_trace=True, at_steps=(2,))
        a = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(a).sum(), a, create_graph=True)
        results.append((z, trace, states, torch.autograd.grad(first.square().sum(), a)))
    close(*results)


class Symmetric(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        W = self.linear.weight
        return 0.2 * z @ (W + W.mT) + x


ADJOINTS: dict[str, Any] = {
    "gmres": hf.GMRES(restart=4),
    "blocks": hf.Blockwise(hf.GMRES(), blocks="batch"),
    "pipelined_cg": hf.PipelinedCG(),
    "auto": hf.Auto(),
}


@pytest.mark.parametrize("name", slow_but("gmres", of=ADJOINTS))
def test_equilibrium_layers_take_every_adjoint(name: str) -> None:
    histories: list[list[Any]] = [[], []]
    plain, compiled = layers(ADJOINTS[name])
    x = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    cells = (Symmetric(),) if name == "pipelined_cg" else (Symmetric(), Cell())
    for cell in cells:
        for layer, history in zip((plain, compiled), histories, strict=True):
            layer.cell, layer.on_backward = cell, history.append
        close(outputs(compiled, x), outputs(plain, x))
    close(histories[1], histories[0])
    assert all(stats.result == 0 for stats in histories[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", [hf.BiCGStab(), hf.GMRES(), hf.CG(maxiter=2, rtol=0)])
def test_equilibrium_layers_change(method: Any) -> None:
    plain, compiled = layers(method, throw_backward=False)
    x = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    for layer in (plain, compiled):
        layer.cell.gain = 0.3
    close(outputs(compiled, x), outputs(plain, x))
    compiled.cell.gain = 0.7  # of both layers
    close(outputs(compiled, x), outputs(plain, x))
    for copied in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        close(outputs(copied, x), outputs(plain, x))
    batch = torch.stack([x, 2 * x])
    close(*(torch.func.vmap(layer)(batch) for layer in (compiled, plain)))
    plain.cell = compiled.cell = Cell()
    close(outputs(compiled, x), outputs(plain, x))
    compiled.cell.drop.train()
    with pytest.raises(ValueError, match="the fixed-point solve cannot be compiled, as it draws"):
        compiled(x)


def test_a_compiled_backward_pass_fails_as_others_do() -> None:
    plain, compiled = layers(hf.FixedPoint(step_size=5.0))
    for layer in (plain, compiled):
        with pytest.raises(hf.HypergradError, match="the linear solve with FixedPoint"):
            outputs(layer, torch.ones(2, 3, dtype=F64))


@pytest.mark.parametrize("batched", [False, True])
def test_inner_steps_stop_early_and_take_rows_of_inputs(batched: bool) -> None:
    h = torch.tensor([0.5, 2.0, 8.0], dtype=F64)
    options: tuple[dict[str, Any], ...] = (
        {"rtol": 1e-4},
        {"inputs": torch.linspace(0, 1, 30, dtype=F64)},
        {"inputs": torch.linspace(0, 1, 30, dtype=F64), "atol": 1e-3},
    )
    for option in options:
        solvers = [
            hf.minimize(
                lambda w, h, *row: ((w - h * sum(row, torch.ones((), dtype=F64))) ** 2).sum(),
                hf.optim.sgd(0.2, momentum=0.3),
                30,
                init=lambda h: 0 * h,
                compile=compile,
                **option,
            )
            for compile in (False, BACKEND)
        ]
        plain, compiled = (torch.func.vmap(s) if batched else s for s in solvers)
        close(compiled(h), plain(h))


def test_the_size_of_a_trace_is_the_same_for_any_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    trace = Compiler._trace

    def counting(self: Compiler, *args: Any) -> Any:
        graph = trace(self, *args)
        parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        sizes.append(sum(len(part.graph.nodes) for part in parts))
        return graph

    monkeypatch.setattr(Compiler, "_trace", counting)
    h, A, b = tasks()
    for count in (4, 400):
        hypergradient(hf.CG(maxiter=count, rtol=0), BACKEND)(h, A[2], b[2])
        hf.iterate(lambda w, h: w / 2 + h, count, init=lambda h: h, compile=BACKEND)(h)
    assert sizes[:2] == sizes[2:]


def test_a_torch_without_loops_runs_uncompiled_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "supported", lambda: False)
    h, A, b = tasks()
    with pytest.warns(UserWarning, match=r"cannot compile loops, so the adjoint runs uncompiled"):
        got = hypergradient(hf.CG(), True)(h, A[2], b[2])
    close(got, hypergradient(hf.CG(), False)(h, A[2], b[2]))


def capturing(X: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """A loop that uses two views of one tensor, what it starts from, and gives results twice."""
    low, high = X.mT.split(2)

    def step(number: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, c, _, _ = state
        new = (
            (X @ a).tanh()
            + X.mT @ x
            + torch.cat([low, high]).index_select(0, torch.as_tensor(number).reshape(1))[0]
        )
        new = new.add_(high.sum()).unsqueeze(0).squeeze_(0)
        return new, c + (new.sum() > 0), x, new

    start = x, torch.zeros((), dtype=torch.int64), x, x
    state, count = loop.repeat(step, start, 4, lambda state: state[1] < 3)
    state = loop.when(state[1] > 5, lambda s: (0 * s[0], *s[1:]), state)
    state = loop.when(state[1] < 9, lambda s: (s[0] + 1, *s[1:]), state)
    return (*state, torch.as_tensor(count).to(torch.int64))


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_what_a_loop_closes_over(levels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(4, 4, generator=generator, dtype=F64)
    x = torch.randn(*[2, 3][:levels], 4, generator=generator, dtype=F64)
    fn: Any = capturing
    if levels:
        fn = torch.func.vmap(fn, (None, 0))
    if levels == 2:
        fn = torch.func.vmap(fn, (None, 0))
    with loops.kept():
        graph = make_fx(lambda *leaves: fn(*leaves))(X, x)
    loops.sink_views(graph)
    assert loops.has_loops(graph)
    results = graph(X, x)
    counts = results[-1]
    for index in (
        torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist() if levels else [()]
    ):
        at = tuple(index) if isinstance(index, list) else (index,)
        expected = capturing(X, x[at] if levels else x)
        if counts[at if levels else ()] == expected[-1]:  # else it went on for another task
            close(tuple(leaf[at] if levels else leaf for leaf in results), expected)
    pointers = [leaf.data_ptr() for leaf in (*results, X, x)]
    assert len(set(pointers)) == len(pointers)


def test_where_loops_stopped_elsewhere_numbers_may_differ_a_little() -> None:
    """But the code of a result may not, nor a scalar that is no residual."""
    vector, number = torch.linspace(1, 2, 50), torch.tensor(3.0)
    paths = ["output[0]", "output[1]", "output[2].num_steps", "output[2].residual_norm"]
    paths.append("output[2].result")
    expected = (vector, number, torch.tensor(7), torch.tensor(1e-3), torch.tensor(0))

    def differs(count: int, factor: float, scalar: float, code: int, known: bool = True) -> bool:
        norm = torch.tensor(2e-3 if count != 7 else 1e-3)
        outputs = (factor * vector, scalar * number, torch.tensor(count), norm, torch.tensor(code))
        fn = lambda x: expected  # noqa: E731
        return (
            difference(outputs, expected, fn, (vector,), paths=paths if known else None) is not None
        )

    assert not differs(8, 1.01, 1.01, 0)
    assert not differs(8, 1.5, 7.0, UNFINISHED)  # it is computed anew
    for other in ((8, 1.5, 1.0, 0), (8, 1.0, 1.5, 0), (8, 1.0, 1.0, 2), (7, 1.01, 1.0, 0)):
        assert differs(*other)
    assert differs(7, 1.0, 1.0, 2)
    assert differs(8, 1.0, 1.0, 0, known=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", METHODS)
def test_inductor(name: str) -> None:
    h, A, b = tasks()
    plain, compiled = (hypergradient(METHODS[name], c) for c in (False, True))
    for _ in range(2):
        close(compiled(h, A[2], b[2]), plain(h, A[2], b[2]), 1e-6)
        got, expected = (
            torch.func.vmap(fn, (None, 0, 0))(h, A, b)[1].stats for fn in (compiled, plain)
        )
        assert (got.num_steps - expected.num_steps).abs().max() <= 1
        assert got.result.equal(expected.result)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_compiles_what_a_loop_closes_over() -> None:
    X, x = torch.eye(4), torch.linspace(-1, 1, 4)
    compiler = Compiler(hf_backend(), "a loop", ())
    got = compiler.call(capturing, (), compiler.read(), (X, x))
    close(got, capturing(X, x), 1e-5)


def hf_backend() -> Any:
    from hyperfunc._compile.compiler import check_backend

    return check_backend(True)


SHARED = {
    "cg": hf.CG(),
    "few": hf.CG(maxiter=3, rtol=0),
    "normal_cg": "normal_cg",
    "reverse": "reverse",
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", slow_but("cg", of=SHARED))
def test_inductor_takes_data_that_share_memory(name: str) -> None:
    """Losses close over data twice, over views of them, and get them in args too.

    What inductor keeps on disk hides a fault: break it with another ``TORCHINDUCTOR_CACHE_DIR``.
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 3, generator=generator, dtype=F64)
    y, turned = X[:, 0].gt(0).to(F64), X.mT

    def inner(w: Tensor, h: Tensor, Z: Tensor, Z_again: Tensor) -> Tensor:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)
        more = (turned @ Z @ w - w).square().mean() + (Z_again[:4] @ w).cos().mean()
        return fit + 0.1 * more + (h.exp() * w**2).sum()

    def outer(w: Tensor, h: Tensor, Z: Tensor, Z_again: Tensor) -> Tensor:
        return (Z[:6] @ w - y[:6]).square().sum()

    sgd = hf.optim.sgd(lr=0.05)
    solver = hf.minimize(inner, sgd, 150, init=lambda h, *data: torch.zeros(3, dtype=F64))
    plain, compiled = (
        hf.hypergrad(solver, outer, method=SHARED[name], compile=compile)(h, X, X[2:])
        for compile in (False, True)
        for h in [torch.zeros(3, dtype=F64)]
    )
    close(compiled, plain)
