"""Compiled solves and steps: the numbers of plain ones, plain and under transforms."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfunc as hf
from hyperfunc._compile import compiler
from hyperfunc._compile.compiler import Compiler
from tests.cells import slow_but

F64 = torch.float64

# Runs the trace that the others compile, without their minutes of compiling.
BACKEND = "eager"

METHODS: dict[str, Any] = {
    "cg": hf.CG(maxiter=2, rtol=0),
    "neumann": hf.Neumann(maxiter=2, rtol=0, step_size=0.1),
    "fixed_point": hf.FixedPoint(maxiter=3, rtol=0, step_size=0.1),
    "dense": hf.Dense(),
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": hf.optim.sgd(lambda meta: 0.1 * meta["rate"], momentum=0.5),
    "adam": hf.optim.adam(0.05),
    "heavy_ball": hf.optim.heavy_ball(0.05, 0.5),
}
Meta = dict[str, Tensor]


@torch._dynamo.register_backend(name="without_loops")
def without_loops(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return graph.forward


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    torch.compiler.reset()


def loss(w: Meta, meta: Meta, x: Tensor, y: Tensor) -> Tensor:
    return ((x @ w["a"] + w["b"] - y) ** 2).mean() + 0.1 * (w["a"] ** 4).sum()


def outer_loss(w: Meta, meta: Meta, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    return (w["a"] ** 3).sum() + meta["rate"] * w["b"], {"twice": 2 * w["a"], "empty": ()}


def make(
    compile: bool | str,
    method: Any = METHODS["cg"],
    optimizer: Any = None,
    steps: bool = True,
    adjoint: bool = True,
) -> Any:
    """The compiled or plain transform; of the steps or of the adjoint alone, if one is False."""
    inner_loss = hf.proximal(loss, lambda meta: meta["rate"], center=lambda meta: meta["w"])
    solver = hf.minimize(
        inner_loss,
        optimizer or OPTIMIZERS["sgd"],
        8,
        init=lambda meta, x, y: meta["w"],
        compile=steps and compile,
    )
    return hf.hypergrad_and_solution(
        solver, outer_loss, method=method, has_aux=True, compile=adjoint and compile
    )


def arguments(dtype: torch.dtype = F64) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 3, generator=generator), torch.randn(2, 6, generator=generator)
    meta = {
        "w": {
            "a": torch.randn(3, generator=generator).to(dtype),
            "b": torch.zeros((), dtype=dtype),
        },
        "rate": torch.tensor(0.7, dtype=dtype),
    }
    return meta, x.to(dtype), y.to(dtype)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", slow_but("cg", of=METHODS))
def test_the_numbers_are_those_of_plain_calls(name: str) -> None:
    meta, x, y = arguments()
    compiled = make(BACKEND, METHODS[name], steps=name == "cg")
    plain = make(False, METHODS[name])
    for task in (0, 1, 0):
        close(compiled(meta, x[task], y[task]), plain(meta, x[task], y[task]))
    dims = (None, 0, 0)
    for _ in range(2):
        close(torch.func.vmap(compiled, dims)(meta, x, y), torch.func.vmap(plain, dims)(meta, x, y))


def test_under_vmap_all_blocks_but_the_first_are_one_signature() -> None:
    # the step counter comes expanded from the first block, and is no view where inductor made it
    @torch._dynamo.register_backend(name="expanding")
    def expanding(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*tensors: Tensor) -> Any:
            return [own(leaf) if leaf.stride() == (0,) else leaf for leaf in graph(*tensors)]

        def own(leaf: Tensor) -> Tensor:
            return torch.empty_like(leaf).set_(leaf[:1].clone(), 0, leaf.shape, (0,))

        return run

    solver = hf.minimize(
        lambda w, h: (w**3).sum(), OPTIMIZERS["adam"], 12, init=lambda h: h, compile="expanding"
    )
    torch.func.vmap(solver)(torch.ones(3, 2, dtype=F64))
    assert len(solver.compiler.entries) == 2


@pytest.mark.parametrize("name", slow_but("adam", of=OPTIMIZERS))
def test_steps_of_any_optimizer(name: str) -> None:
    meta, x, y = arguments()
    compiled = make(BACKEND, optimizer=OPTIMIZERS[name], adjoint=False)
    plain = make(False, optimizer=OPTIMIZERS[name])
    close(compiled(meta, x[0], y[0]), plain(meta, x[0], y[0]))
    close(
        torch.func.vmap(compiled, (None, 0, 0))(meta, x, y)[0]["w"],
        torch.func.vmap(plain, (None, 0, 0))(meta, x, y)[0]["w"],
    )


def test_what_nothing_uses_is_not_kept() -> None:
    # the rule of division notes the shapes of some zeros on the device "meta"
    def softsign(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return (torch.nn.functional.softsign(w * x) - h).square().sum()

    h, x = torch.tensor(0.3, dtype=F64), torch.randn(3, dtype=F64)
    found = []
    for backend in (BACKEND, False):
        sgd = hf.optim.sgd(0.1)
        solver = hf.minimize(softsign, sgd, 6, init=lambda h, x: torch.ones_like(x))
        found.append(hf.hypergrad(solver, softsign, method="reverse_unroll", compile=backend)(h, x))
    close(*found)


@pytest.mark.slow
def test_nested_vmap_and_task_map() -> None:
    meta, x, y = arguments()
    rates = torch.tensor([0.5, 0.7, 0.9], dtype=F64)
    results = []
    for compile in (False, BACKEND):
        fn = make(compile)

        def both(rate: Tensor, fn: Any = fn) -> Any:
            return torch.func.vmap(fn, (None, 0, 0))({**meta, "rate": rate}, x, y)

        results.append(torch.func.vmap(both)(rates))
        results.append(
            hf.task_map(lambda rate, fn=fn: fn({**meta, "rate": rate}, x[0], y[0]), 0, 2)(rates)
        )
    close(results[2], results[0])
    close(results[3], results[1])


@pytest.mark.slow
def test_derivatives_run_uncompiled() -> None:
    meta, x, y = arguments()

    def total(fn: Any, rate: Tensor) -> Tensor:
        grads, _ = fn({**meta, "rate": rate}, x[0], y[0])
        return (grads["w"]["a"] ** 2).sum()

    compiled, plain = make(BACKEND), make(False)
    rate = meta["rate"]
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        close(
            transform(lambda rate: total(compiled, rate))(rate),
            transform(lambda rate: total(plain, rate))(rate),
        )
    tracked = rate.clone().requires_grad_()
    (got,) = torch.autograd.grad(total(compiled, tracked), tracked)
    close(got, torch.func.grad(lambda rate: total(plain, rate))(rate))
    for method in (hf.ReverseUnroll(), hf.Reverse()):
        solvers = [
            hf.minimize(
                loss, OPTIMIZERS["adam"], 5, init=lambda meta, x, y: meta["w"], compile=compile
            )
            for compile in (False, BACKEND)
        ]
        grads = [
            hf.hypergrad(solver, outer_loss, method=method, has_aux=True)(meta, x[0], y[0])
            for solver in solvers
        ]
        close(grads[1][0], grads[0][0])


@pytest.mark.parametrize(
    ("num_steps", "calls"), [(0, 0), (1, 1), (3, 1), (4, 1), (7, 7), (16, 4), (30, 10)]
)
def test_blocks_of_steps(num_steps: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    run = Compiler.run

    def counting(self: Compiler, *args: Any) -> Any:
        counted.append(1)
        return run(self, *args)

    monkeypatch.setattr(Compiler, "run", counting)
    rows = torch.linspace(0, 1, num_steps, dtype=F64)
    solvers = [
        hf.iterate(
            lambda w, h, row: 0.5 * w + h * row,
            num_steps,
            init=lambda h: h,
            inputs=rows,
            compile=compile,
        )
        for compile in ("without_loops", False, BACKEND)
    ]
    h = torch.tensor(3.0, dtype=F64)
    close(solvers[0](h), solvers[1](h))
    assert len(counted) == calls
    close(solvers[2](h), solvers[1](h))
    assert len(counted) == calls + (num_steps > 0)


def test_early_stop_inputs_and_iterate() -> None:
    x = torch.tensor([1.0, 5.0], dtype=F64)
    for options in (
        {"inputs": torch.linspace(0, 1, 30, dtype=F64)},
        {"rtol": 1e-3},
    ):
        solvers = [
            hf.iterate(
                lambda w, h, *row: 0.5 * w + h * sum(row, torch.ones((), dtype=F64)),
                30,
                init=lambda h: h,
                compile=compile,
                **options,
            )
            for compile in (False, BACKEND)
        ]
        for h in x:
            close(solvers[1](h), solvers[0](h))
        close(torch.func.vmap(solvers[1])(x), torch.func.vmap(solvers[0])(x))


def test_a_signature_is_compiled_once_and_changes_are_seen() -> None:
    scale, offset = 1.0, torch.zeros(3, dtype=F64)
    traces = itertools.count()  # which code may count with: what changes in a list is taken up

    def num_traces() -> int:
        return int(repr(traces).strip("count()"))

    def phi(w: Tensor, h: Tensor, *flags: Any) -> Tensor:
        next(traces)
        return 0.5 * w + scale * h + offset

    solver = hf.iterate(phi, 60, init=lambda h, *flags: torch.zeros_like(h), compile=BACKEND)
    h = torch.ones(3, dtype=F64)
    close(solver(h), torch.full((3,), 2.0, dtype=F64))
    count = num_traces()  # a block of steps, traced, and all of them run uncompiled to compare
    assert count == 4 + 60
    for _ in range(3):
        close(solver(h), torch.full((3,), 2.0, dtype=F64))
    assert num_traces() == count
    scale = 2.0
    close(solver(h), torch.full((3,), 4.0, dtype=F64))
    count = num_traces()
    offset.add_(1.0)  # in place: the compiled code reads it
    close(solver(h), torch.full((3,), 6.0, dtype=F64))
    assert num_traces() == count
    offset = torch.full((3,), 2.0, dtype=F64)
    close(solver(h), torch.full((3,), 8.0, dtype=F64))
    close(solver(h[:1].expand(3)), torch.full((3,), 8.0, dtype=F64))
    count = num_traces()
    solver(h, "flag")
    assert num_traces() > count


def test_operands_of_one_shape_in_other_dimensions() -> None:
    def phi(w: Tensor, h: Tensor) -> Tensor:
        return 0.5 * w + h.cumsum(0) * h.sum()

    solvers = [hf.iterate(phi, 3, init=lambda h: h, compile=c) for c in (BACKEND, False)]
    h = torch.randn(3, 3, dtype=F64)
    for transform in (lambda fn: fn, torch.func.vmap, lambda fn: torch.func.vmap(fn, 1)):
        compiled, plain = map(transform, solvers)
        close(compiled(h), plain(h))
    cube = torch.randn(3, 3, 3, dtype=F64)
    for dims in ((0, 0), (0, 1), (2, 0)):
        compiled, plain = (
            torch.func.vmap(torch.func.vmap(solver, dims[1]), dims[0]) for solver in solvers
        )
        close(compiled(cube), plain(cube))


def test_failures_are_those_of_plain_calls() -> None:
    def concave(w: Tensor, h: Tensor) -> Tensor:
        return -(w**2).sum() + w @ h

    results = []
    for compile in (False, BACKEND):
        options = {
            "inner_loss": concave,
            "method": hf.CG(maxiter=2, rtol=0),
            "compile": compile,
        }
        fn = hf.hypergrad_and_solution(lambda h: h / 2, lambda w, h: w.sum(), **options)
        with pytest.raises(hf.HypergradError, match="broke down"):
            fn(torch.ones(2))
        with pytest.raises(hf.HypergradError, match="for 3 of 3 tasks"):
            torch.func.vmap(fn)(torch.ones(3, 2))
        quiet = hf.hypergrad_and_solution(
            lambda h: h / 2, lambda w, h: w.sum(), throw=False, **options
        )
        results.append(quiet(torch.ones(2)))
    assert results[0][1].stats.result == results[1][1].stats.result == hf.RESULTS.breakdown
    close(results[1][0], results[0][0])


class Choosing(hf.linear_solvers.AbstractLinearSolver):
    def solve(self, operator: Any, b: Any, x0: Any = None) -> Any:
        solver = hf.CG() if b[0].sum() > 0 else hf.GMRES()
        return solver.solve(operator, b, x0)


def choosing() -> Any:
    return make(BACKEND, Choosing())(*(leaf for leaf in one_task()))


def one_task() -> tuple[Any, Tensor, Tensor]:
    meta, x, y = arguments()
    return meta, x[0], y[0]


def solve_random() -> Any:
    solver = hf.iterate(
        lambda w, h: w + torch.rand(()), 2, init=lambda h: torch.zeros(()), compile=BACKEND
    )
    return solver(torch.ones(()))


def branching() -> Any:
    solver = hf.iterate(
        lambda w, h: w if w.sum() > 0 else w + h, 2, init=lambda h: h, compile=BACKEND
    )
    return solver(torch.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (choosing, r"the adjoint cannot be compiled.*values of tensors.*write rtol=0, atol=0"),
        (branching, r"the inner solver's step cannot be compiled.*an if or \.item\(\)"),
        (solve_random, r"the inner solver's step cannot be compiled, as it draws random numbers"),
        (
            lambda: hf.iterate(lambda w, h: w, 2, init=lambda h: h, compile="nonsense"),
            r"compile is 'nonsense'; expected True, False, the name .*a mode of it \(.*reduce",
        ),
        (
            lambda: hf.iterate(lambda w, h: w, 2, init=lambda h: h, compile={"max_autotoon": True}),
            r"compile holds 'max_autotoon', which is no option .*list_options\(\) lists them",
        ),
        (
            lambda: hf.iterate(lambda w, h, s: w, 2, init=lambda h, s: h, compile=BACKEND)(
                torch.ones(2), {1, 2}
            ),
            r"neither a tensor nor hashable",
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("compile", "passed", "copied"),
    [
        (True, {"realize_reads_threshold": 1}, False),
        ("aot_eager", {"backend": "aot_eager", "mode": None, "options": None}, False),
        ("reduce-overhead", {"backend": "inductor", "mode": "reduce-overhead"}, True),
        ({"max_autotune": True}, {"realize_reads_threshold": 1, "max_autotune": True}, False),
        ({"realize_reads_threshold": 2}, {"realize_reads_threshold": 2}, False),
        ({"triton.cudagraphs": True}, {"options": {"triton.cudagraphs": True}}, True),
    ],
    ids=str,
)
def test_modes_and_options_are_passed_on(
    compile: Any, passed: dict[str, Any], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    memory = torch.zeros(3, dtype=F64)

    def fake(function: Any, **options: Any) -> Any:
        calls.append(options)

        def run(*operands: Tensor) -> Any:  # as a CUDA graph, into the same memory in each call
            output, *rest = function(*operands)
            return (memory.copy_(output), *rest)

        return run

    def direct(function: Any, example: list[Tensor], options: dict[str, Any]) -> Any:
        return fake(function, **options, fullgraph=True)

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(torch._inductor, "compile", direct)
    solver = hf.iterate(lambda w, h: 0.5 * w + h, 4, init=lambda h: h, compile=compile)
    h = torch.ones(3, dtype=F64)
    first = solver(h)
    assert len(calls) == 1
    assert passed.items() <= calls[0].items()
    assert calls[0]["fullgraph"] is True
    if copied:
        solver(2 * h)
    close(first, hf.iterate(lambda w, h: 0.5 * w + h, 4, init=lambda h: h)(h))
    assert (first.data_ptr() != memory.data_ptr()) is copied


def test_a_backend_that_fails_is_named() -> None:
    @torch._dynamo.register_backend(name="broken")
    def broken(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("nothing here compiles")

    solver = hf.iterate(lambda w, h: w + h, 2, init=lambda h: h, compile="broken")
    with pytest.raises(RuntimeError, match=r"'broken' of torch.compile failed on the inner solver"):
        solver(torch.ones(2))


def test_it_warns_when_every_call_compiles_anew() -> None:
    data = torch.ones(2)
    solver = hf.iterate(lambda w, h: h * data, 1, init=lambda h: h, compile=BACKEND)
    kept = []
    for k in range(16):
        data = torch.full((2,), float(k))
        kept.append(data)
        close(solver(torch.ones(2)), data)
    data = torch.full((2,), 17.0)
    with pytest.warns(UserWarning, match=r"step is compiled for the 17th time.*in \*args"):
        solver(torch.ones(2))


def test_another_number_of_threads_is_another_signature() -> None:
    solver = hf.iterate(lambda w, h: 0.5 * w + h, 1, init=lambda h: h, compile=BACKEND)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            close(solver(torch.ones(2, dtype=F64)), torch.full((2,), 1.5, dtype=F64))
    finally:
        torch.set_num_threads(threads)
    assert len(solver.compiler.entries) == 2


def test_inference_mode() -> None:
    compiled, plain = make(BACKEND), make(False)
    with torch.inference_mode():
        close(compiled(*one_task())[0], plain(*one_task())[0])


def spoilt(spoil: Callable[[list[Tensor]], None]) -> str:
    """A backend whose code changes its outputs so."""

    @torch._dynamo.register_backend(name=spoil.__name__)
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*tensors: Tensor) -> list[Tensor]:
            outputs = [output.clone() for output in graph(*tensors)]
            spoil(outputs)
            return outputs

        return run

    return spoil.__name__


def spoil_small_leaf(outputs: list[Tensor]) -> None:
    min(outputs, key=lambda leaf: leaf.norm()).mul_(1.001)


def spoil_one_entry(outputs: list[Tensor]) -> None:
    outputs[0].view(-1)[7] *= 1.05


def spoil_one_task(outputs: list[Tensor]) -> None:
    outputs[0][2] *= 1.001


def spoil_by_nan(outputs: list[Tensor]) -> None:
    outputs[1].fill_(torch.nan)


@pytest.mark.parametrize(
    ("spoil", "batched", "message"),
    [
        (spoil_small_leaf, False, r"output\[1\] is off by 1\.0e-06 where its largest .* 1\.0e-03"),
        (spoil_one_entry, False, r"output\[0\] is off by 5\.0e\+01 where its largest .* 1\.0e\+03"),
        (spoil_one_task, True, r"uncompiled code, for 1 of 3 tasks: output\[0\]"),
        (spoil_by_nan, True, r"for 3 of 3 tasks: output\[1\] is off by nan"),
    ],
)
def test_wrong_numbers_are_told(spoil: Any, batched: bool, message: str) -> None:
    solver = hf.iterate(
        lambda w, h: {"big": w["big"] + 1000 * h[:, None], "small": w["small"] + h.sum() / 1e5},
        1,
        init=lambda h: {"big": torch.zeros(100, 3), "small": torch.zeros(())},
        compile=spoilt(spoil),
    )
    call = torch.func.vmap(solver) if batched else solver
    with pytest.raises(
        RuntimeError, match=f"compiled of the inner solver's step gives .*{message}"
    ):
        call(torch.ones(3, 100) if batched else torch.ones(100))


def test_rounding_at_a_kink_is_no_error() -> None:
    # the code of the backend is right, but rounds otherwise, which turns the sign
    def round_otherwise(outputs: list[Tensor]) -> None:
        outputs[0].neg_()

    def kinked(w: Tensor, h: Tensor) -> Tensor:
        return torch.sign(h - h.new_tensor(1.0)) + 0 * w

    solver = hf.iterate(kinked, 1, init=lambda h: h, compile=spoilt(round_otherwise))
    near = torch.ones(3) * (1 + 2 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(solver(near), -torch.ones(3))
    with pytest.raises(RuntimeError, match="gives other numbers"):
        solver(2 * torch.ones(5))


SCALED_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda w, h: torch.add(w @ h, h, alpha=2),
    "add, product second": lambda w, h: torch.add(h, w @ h, alpha=2),
    "add in place": lambda w, h: (w @ h).add_(h, alpha=2),
    "sub": lambda w, h: torch.sub(w @ h, h, alpha=2),
    "sub, product second": lambda w, h: torch.sub(h, w @ h, alpha=2),
}


def test_no_scaled_sum_reaches_the_backend() -> None:
    seen: list[Any] = []

    @torch._dynamo.register_backend(name="watching")
    def watching(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    h = torch.randn(3, 3, dtype=F64)
    for phi in SCALED_SUMS.values():
        solver = hf.iterate(phi, 2, init=lambda h: h, compile="watching")
        close(solver(h), phi(phi(h, h), h))
    assert seen
    assert not any("alpha" in node.kwargs for node in seen if "add" in str(node.target))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_needs_scaled_sums_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no sum is wrong any more without it, `_spell_out_scaled_sums` can go."""
    h = torch.randn(8, 8)

    def wrong() -> set[str]:
        names = set()
        for name, phi in SCALED_SUMS.items():
            solver = hf.iterate(phi, 1, init=lambda h: h, compile=True)
            try:
                torch.testing.assert_close(solver(h), phi(h, h))
            except RuntimeError as error:  # which the comparison of the first call raises
                names.add(name if "gives other numbers" in str(error) else str(error))
        return names

    assert not wrong()
    monkeypatch.setattr(compiler, "_spell_out_scaled_sums", lambda graph: None)
    assert wrong() == {"add", "add, product second", "add in place"}


ROWS, VALUES = torch.tensor([0, 0, 1, 1]), torch.linspace(-1, 1, 24, dtype=F64).reshape(2, 4, 3)
WRITES: dict[str, Any] = {
    "index_add": lambda x: x.index_add(1, ROWS, VALUES),
    "index_copy": lambda x: x.index_copy(1, ROWS[1:3], VALUES[:, :2]),
    "index_fill": lambda x: x.index_fill(1, ROWS[:1], 1.0),
    "index_put": lambda x: x.index_put((ROWS[1:3], ROWS[1:3]), VALUES[0, :2]),
    "accumulated": lambda x: x.index_put((ROWS.flip(0), ROWS), VALUES[0], accumulate=True),
    "diagonal_scatter": lambda x: x.diagonal_scatter(VALUES[0, :3, :2]),
    "scatter": lambda x: x.scatter(1, ROWS[None, :, None].expand(2, 4, 3), 2.0),
    "scatter_add": lambda x: x.scatter_add(1, ROWS[None, :, None].expand(2, 4, 3), VALUES),
    "select_scatter": lambda x: x.select_scatter(VALUES[0, :2], 0, 0),
    "masked_scatter": lambda x: x.masked_scatter(VALUES[:, :2] > 0, VALUES),
}
RIGHT = {"scatter", "scatter_add", "select_scatter", "masked_scatter"}  # without a copy


def written(h: Tensor) -> dict[str, Tensor]:
    """Values put into a tensor that is expanded along either dimension."""
    expanded = h.sin().expand(2, 2, 3), h.sin()[:, None].expand(2, 2, 3)
    return {
        f"{name} {i}": write(x).cos()
        for name, write in WRITES.items()
        for i, x in enumerate(expanded)
    }


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated", "ignore:`torch._prims_common.check`"
)
def test_inductor_needs_copies_of_what_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is wrong any more without them, `_lay_out_expanded` can go."""
    h = torch.linspace(0.1, 1.0, 6, dtype=F64).reshape(2, 3)

    def wrong() -> set[str]:
        off = set()
        for name, expected in written(h).items():
            solver = hf.iterate(
                lambda w, h, name=name: written(h)[name],
                1,
                init=lambda h: h.expand(2, 2, 3),
                compile=True,
            )
            try:
                close(solver(h), expected)
            except RuntimeError as error:
                off.add(name.split()[0] if "gives other numbers" in str(error) else str(error))
        return off

    assert not wrong()
    monkeypatch.setattr(compiler, "_lay_out_expanded", lambda graph: None)
    assert wrong() == {*WRITES} - RIGHT


def test_nothing_expanded_is_written_into() -> None:
    seen: list[torch.fx.Node] = []

    @torch._dynamo.register_backend(name="watching writes")
    def watching(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    h = torch.linspace(0.1, 1.0, 6, dtype=F64).reshape(2, 3)
    solver = hf.iterate(
        lambda w, h: w + sum(x.sum() for x in written(h).values()),
        1,
        init=lambda h: h,
        compile="watching writes",
    )
    close(solver(h), h + sum(x.sum() for x in written(h).values()))
    writes = [node for node in seen if str(node.target).split(".")[1] in {*WRITES} - RIGHT]
    assert len(writes) == 2 * len({*WRITES} - RIGHT)
    assert all("clone" in str(node.args[0].target) for node in writes)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_draws_numbers_with_dropout_alone(dropout: float) -> None:
    """Of one task, whose gradient of the outer loss is torch's fused one."""
    x = torch.linspace(-1, 1, 24, dtype=F64).reshape(1, 2, 3, 4)

    def outer(w: Tensor, h: Tensor) -> Tensor:
        q = w * x
        return torch.nn.functional.scaled_dot_product_attention(q, q, x, dropout_p=dropout).sum()

    plain, compiled = (
        hf.hypergrad(
            lambda h: h / 2,
            outer,
            inner_loss=lambda w, h: (w**2 - h * w).sum(),
            method=hf.CG(maxiter=2, rtol=0),
            compile=compile,
        )
        for compile in (False, BACKEND)
    )
    if dropout:
        with pytest.raises(ValueError, match="cannot be compiled, as it draws random numbers"):
            compiled(torch.ones(4, dtype=F64))
        return
    close(compiled(torch.ones(4, dtype=F64)), plain(torch.ones(4, dtype=F64)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor() -> None:
    h = torch.randn(8, 8)
    offset = torch.zeros(8)
    shifted = hf.iterate(lambda w, h: w + offset, 2, init=lambda h: h, compile=True)
    torch.testing.assert_close(shifted(h), h)
    offset.add_(1)  # in place: the compiled code reads it
    torch.testing.assert_close(shifted(h), h + 2)
    meta, x, y = arguments(torch.float32)
    compiled, plain = make(True), make(False)
    for _ in range(2):
        torch.testing.assert_close(compiled(meta, x[0], y[0]), plain(meta, x[0], y[0]))
        torch.testing.assert_close(
            torch.func.vmap(compiled, (None, 0, 0))(meta, x, y),
            torch.func.vmap(plain, (None, 0, 0))(meta, x, y),
        )


@pytest.mark.slow
def test_threads_share_compiled_functions() -> None:
    """One of them compiles each signature, while the others run what is compiled already."""

    def make(compile: bool | str) -> Any:
        return hf.hypergrad(
            lambda h, A: torch.linalg.solve(A, h),
            lambda w, h, A: (w**2).sum(),
            inner_loss=lambda w, h, A: 0.5 * w @ (A @ w) - h @ w,
            method=hf.CG(maxiter=3, rtol=0),
            compile=compile,
        )

    def work(task: tuple[int, Any]) -> Any:
        n, fn = task
        h, A = torch.ones(n, dtype=F64), 2 * torch.eye(n, dtype=F64)
        return fn(h, A), torch.func.vmap(fn, (0, None))(torch.stack([h, 2 * h]), A)

    plain, first, second = make(False), make("eager"), make("aot_eager")
    tasks = [(1 + i % 2, first if i % 3 else second) for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        for (n, _), got in zip(tasks, pool.map(work, tasks), strict=True):
            close(got, work((n, plain)))
    for fn in (first, second):  # two shapes, each plain and under vmap
        assert len(fn._call.args[1].compiler.entries) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two transforms of two signatures each, first called by two threads each at the same time."""
    compilations: list[object] = []
    inductor = torch._inductor.compile

    def counting(*args: Any, **kwargs: Any) -> Any:
        compilations.append(args)
        return inductor(*args, **kwargs)

    monkeypatch.setattr(torch._inductor, "compile", counting)

    def make(compile: bool) -> Any:
        return hf.hypergrad(
            lambda h, x: h / x,
            lambda w, h, x: (w**2).sum(),
            inner_loss=lambda w, h, x: (0.5 * x * w**2 - h * w).sum(),
            method=hf.CG(maxiter=2, rtol=0),
            compile=compile,
        )

    def calls(fn: Any, mapped: bool, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(2, 1000, generator=generator, dtype=F64)
        x = 1 + torch.rand(1000, generator=generator, dtype=F64)
        call = torch.func.vmap(fn, (0, None)) if mapped else lambda h, x: fn(h[0], x)
        return [call(k * h, x) for k in range(1, 101)]

    def work(task: tuple[Any, bool, int]) -> list[Tensor]:
        start.wait()
        return calls(*task)

    compiled, plain = [make(True), make(True)], make(False)
    tasks = [(compiled[i % 2], i % 4 < 2, i) for i in range(8)]
    start = threading.Barrier(len(tasks))
    with ThreadPoolExecutor(len(tasks)) as pool:
        for (_, mapped, seed), got in zip(tasks, pool.map(work, tasks), strict=True):
            close(got, calls(plain, mapped, seed))
    assert len(compilations) == 4


def quartic(w: Tensor, h: Any) -> Tensor:
    return ((w - 1.5) ** 4).sum()


def by_map(rate: Callable[[Tensor, Tensor], Tensor], num_steps: int) -> Any:
    """Gradient descent whose rate is some function of rates and of the number of the step."""

    def step(w: Tensor, h: Tensor, i: Tensor) -> Tensor:
        return w - rate(h, i).exp() * torch.func.grad(quartic)(w, h)

    inputs = torch.arange(num_steps)
    return hf.iterate(step, num_steps, init=lambda h: torch.ones(4, dtype=F64), inputs=inputs)


def by_schedule(rate: Callable[[Tensor, Tensor], Tensor], num_steps: int) -> Any:
    lr = hf.optim.schedule(lambda h, step: rate(h, step).exp())
    return hf.minimize(
        quartic, hf.optim.sgd(lr=lr), num_steps, init=lambda h: torch.ones(4, dtype=F64)
    )


RATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "this step": lambda rates, i: rates[i],
    "the last step": lambda rates, i: rates[i - 1],  # of the first one, the last of all
    "both": lambda rates, i: rates[i.int()] + 0.1 * rates[i - 1],
}


@pytest.mark.parametrize("make", [by_map, by_schedule])
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, BACKEND) for name in RATES), pytest.param("both", True, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_rows_by_the_number_of_a_step(make: Any, name: str, backend: Any) -> None:
    """The derivative of index_select under vmap, which inductor gets wrong, is not in the way."""
    cases = ((3, "reverse"), (7, "reverse"), (7, "forward"))
    for num_steps, method in cases[:1] if backend is True else cases:
        rates = torch.linspace(-3, -1, num_steps, dtype=F64)
        rates = torch.stack([rates, rates + 0.1])
        w, expected = torch.ones(2, 1, dtype=F64), rates.clone().requires_grad_()
        for i in range(num_steps):
            rate = torch.stack([RATES[name](row, torch.tensor(i)) for row in expected])
            w = w - rate.exp()[:, None] * 4 * (w - 1.5) ** 3
        expected = torch.autograd.grad(4 * ((w - 1.5) ** 4).sum(), expected)[0]
        fn = hf.hypergrad(make(RATES[name], num_steps), quartic, method=method, compile=backend)
        close(fn(rates[0]), expected[0])
        close(torch.func.vmap(fn)(rates), expected)
