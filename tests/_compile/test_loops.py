"""Loops that stay loops in compiled code: numbers, codes and statistics of plain calls."""

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
from hyperfunc.linear_solvers import _cycles
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
    "fixed_point": hf.FixedPoint(maxiter=400, rtol=1e-6, step_size=0.2),
    "preconditioned fixed_point": hf.FixedPoint(
        maxiter=400, rtol=1e-6, step_size=0.4, preconditioner=lambda v: 0.5 * v
    ),
    "neumann": hf.Neumann(maxiter=9, rtol=0, step_size=0.1),
    "diverging": hf.Neumann(maxiter=50, step_size=3.0),
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


def hypergradient(method: Any, compile: Any) -> Any:
    def inner_loss(w: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
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
