"""Calls from surroundings that are not the plain ones: modes, odd tensors, compilation."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc.transforms._methods import METHODS
from tests.cells import each_cell, slow_but, thinned

F64 = torch.float64
A = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.9, 0.1], [0.0, 0.1, 1.1]], dtype=F64)
H = torch.tensor([1.0, 2.0, -1.0], dtype=F64)


def fixed_point(w: Tensor, h: Tensor, A: Tensor) -> Tensor:
    return w - 0.5 * (A @ w - h)


def inner_loss(w: Tensor, h: Tensor, A: Tensor) -> Tensor:
    return 0.5 * w @ (A @ w) - h @ w


def outer_loss(w: Tensor, h: Tensor, A: Tensor) -> Tensor:
    return (w**2).sum() + h.sum()


def start(h: Tensor, A: Tensor) -> Tensor:
    return torch.zeros_like(h)


SOLVER = hf.iterate(fixed_point, 60, init=start)
ALL = {name: method() for name, method in METHODS.items()} | {
    "first_order": hf.FirstOrder(init=lambda h, *_: h),
    "fixed_point": hf.FixedPoint(step_size=0.5),
    "neumann": hf.Neumann(step_size=0.5),
    "anderson": hf.AndersonFixedPoint(step_size=0.5),
    "pipelined_cg": hf.PipelinedCG(),
    "preconditioned": hf.CG(preconditioner=hf.JacobiPreconditioner()),
    "nystrom_cg": hf.CG(preconditioner=hf.NystromPreconditioner(rank=2)),
    "damped": hf.Damped(hf.CG(), 0.1),
    "fallback": hf.Fallback(hf.CG(), hf.GMRES()),
    "blockwise": hf.Blockwise(hf.CG(), "leaves"),
}


def make(name: str) -> Any:
    return hf.hypergrad(SOLVER, outer_loss, inner_loss=inner_loss, method=ALL[name])


# Modes --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: default_dtype(F64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize(("name", "some"), thinned(ALL, [0, 1], every=4))
def test_modes_do_not_change_the_numbers(name: str, some: int) -> None:
    """Every other mode, of which the rest is slow."""
    fn = make(name)
    expected = fn(H, A)
    with each_cell() as cell:
        for mode in list(MODES)[some::2]:
            with cell(mode):
                with MODES[mode]():
                    alone = fn(H.clone(), A.clone())
                    batch = vmap(fn, (0, None))(torch.stack([H, H]), A.clone())
                for got in (alone, batch[0], batch[1]):
                    assert not got.requires_grad
                    torch.testing.assert_close(got.clone(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_tensors_from_inference_mode(name: str) -> None:
    """They are copied; autograd refuses to save them."""
    fn = make(name)
    with torch.inference_mode():
        h, data = H.clone(), A.clone()
    expected = fn(H, A)
    torch.testing.assert_close(fn(h, data), expected, rtol=0, atol=0)
    tracked = fn(H.clone().requires_grad_(), data)
    assert tracked.requires_grad
    torch.testing.assert_close(tracked.detach(), expected, rtol=1e-9, atol=1e-11)
    batch = vmap(fn, (0, None))(torch.stack([H, H]), data)
    torch.testing.assert_close(batch[1], expected, rtol=1e-9, atol=1e-11)


def refusing(name: str) -> contextlib.AbstractContextManager[Any]:
    """Where a second derivative is taken, of which a least-squares solution has none."""
    if name == "least_squares":
        return pytest.raises(RuntimeError, match="LeastSquares gives first derivatives only")
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", thinned(ALL))
def test_anomaly_detection(name: str) -> None:
    """It looks at gradients for NaN, also where several are taken at once."""
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"):
        anomaly = torch.autograd.detect_anomaly(check_nan=True)
    fn, h = make(name), H.clone().requires_grad_()
    with anomaly:
        torch.testing.assert_close(fn(h, A).detach(), fn(H, A), rtol=1e-9, atol=1e-11)
        with refusing(name):
            torch.autograd.grad(fn(h, A).sum(), h)


@pytest.mark.parametrize("name", thinned(ALL))
def test_hparams_that_require_grad_are_used_after(name: str) -> None:
    h, fn = H.clone().requires_grad_(), make(name)
    with torch.no_grad():
        assert not fn(h, A).requires_grad
    grads = fn(h, A)
    assert h.grad is None
    assert h.is_leaf
    torch.testing.assert_close(grads.detach(), fn(H, A), rtol=1e-9, atol=1e-11)
    with refusing(name):
        (grads.sum() + (h**2).sum()).backward()
        expected = jacrev(lambda h: fn(h, A))(H).sum(0) + 2 * H
        torch.testing.assert_close(h.grad, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ALL if name != "blockwise"])
def test_parameters_that_are_params_and_hparams(name: str) -> None:
    """With leaves that require no grad beside them; a Parameter comes back as a tensor."""
    shared, fixed = nn.Parameter(H.clone()), nn.Parameter(H.clone(), requires_grad=False)

    def phi(w: Any, h: Any) -> Any:
        return {k: w[k] - 0.5 * (w[k] - h[k]) for k in w}

    def loss(w: Any, h: Any) -> Tensor:
        return sum(((w[k] - h[k]) ** 2).sum() / 2 for k in w)

    solver = hf.iterate(phi, 60, init=lambda h: h)
    fn = hf.hypergrad_and_solution(
        solver,
        lambda w, h: (w["a"] ** 2).sum() + w["b"] @ h["b"],
        inner_loss=loss,
        method=ALL[name],
    )
    grads, solution = fn({"a": shared, "b": fixed})
    assert solution.params["a"] is not shared
    assert type(grads["a"]) is type(solution.params["b"]) is Tensor
    assert shared.grad is None
    damping = {"damped": 1.1, "nystrom": 1.01}.get(name, 1.0)
    torch.testing.assert_close(grads["a"].detach(), 2 * H / damping, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grads["b"].detach(), H + H / damping, rtol=1e-6, atol=1e-9)


# Odd tensors --------------------------------------------------------------------------------------

EYE = torch.eye(3, dtype=F64)
SPARSE = (
    r"^(hypergrad|implicit_diff|diagnose|the derivative of).*: args\[0\] has layout "
    r"torch.LAYOUT, for which torch lacks .*[sS]parse.*\. Write args\[0\].to_dense\(\)\. .*"
    r"hf.task_map\(fn, in_dims, chunk_size=1\) maps tasks in a loop$"
)
ODD: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "sparse COO": lambda: (EYE.to_sparse(), torch.ones(3, dtype=F64)),
    "complex": lambda: ((1 + 1j) / 2**0.5 * EYE, torch.ones(3, dtype=torch.complex128)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    thinned(["cg", "normal_cg", "dense", "reverse_unroll", "reverse", "forward"], ODD),
)
def test_odd_tensors_among_the_arguments(name: str, kind: str) -> None:
    """As data; as hparams and params they are refused by name."""
    X, y = ODD[kind]()

    def predict(w: Tensor, X: Tensor) -> Tensor:
        return (X @ w.to(X.dtype)[:, None])[:, 0]

    def loss(w: Tensor, h: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((predict(w, X) - y).abs() ** 2).sum() + 0.5 * h.exp() * (w**2).sum()

    def phi(w: Tensor, h: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return w - 0.4 * grad(loss)(w, h, X, y)

    solver = hf.iterate(phi, 60, init=lambda h, X, y: torch.zeros(3, dtype=F64))
    fn = hf.hypergrad(solver, lambda w, h, X, y: (w**2).sum(), inner_loss=loss, method=name)
    if (kind, name) == ("sparse COO", "forward"):
        with pytest.raises(NotImplementedError, match=SPARSE.replace("LAYOUT", "sparse_coo")):
            fn(torch.zeros((), dtype=F64), X, y)
        return
    for h in (torch.zeros((), dtype=F64), torch.zeros((), dtype=F64, requires_grad=True)):
        c = 1 if kind == "sparse COO" else 0.5**0.5  # w = c / (1 + exp(h)) in each entry
        torch.testing.assert_close(
            fn(h, X, y).detach(), torch.tensor(-0.75 * c**2, dtype=F64), rtol=1e-7, atol=0
        )


def predict(w: Tensor, h: Tensor, X: Tensor) -> Tensor:
    return (X @ w[:, None])[:, 0]


def ridge(w: Tensor, h: Tensor, X: Tensor) -> Tensor:
    return 0.5 * ((predict(w, h, X) - 1) ** 2).sum() + 0.5 * h.exp() * (w**2).sum()


def shrunken(h: Tensor, X: Tensor) -> Tensor:
    return torch.ones(3, dtype=F64) / (1 + h.exp())


MAPPED: dict[str, Callable[[Any, Any, Tensor, Tensor], Any]] = {
    "vmap": lambda fn, solution, h, X: vmap(fn, (0, None))(h, X),
    "nested vmap": lambda fn, solution, h, X: vmap(vmap(fn, (0, None)), (0, None))(h[None], X),
    "vmap of grad": lambda fn, solution, h, X: vmap(grad(lambda h: solution(h, X).sum()))(h),
    "jacfwd": lambda fn, solution, h, X: jacfwd(lambda h: fn(h, X))(h[0]),
    "jacrev": lambda fn, solution, h, X: jacrev(lambda h: fn(h, X))(h[0]),
    "diagnose": lambda fn, solution, h, X: vmap(
        lambda h: hf.diagnose(torch.ones(3, dtype=F64), h, X, inner_loss=ridge).eig_min.value
    )(h),
}


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
@pytest.mark.parametrize(
    ("name", "layout"),
    thinned(
        ["cg", "gmres", "dense", hf.FixedPoint(step_size=0.4)],
        ["sparse_coo", "sparse_csr", "sparse_csc"],
        every=3,
    ),
)
def test_sparse_data_are_named_where_torch_cannot_map_them(name: Any, layout: str) -> None:
    X = EYE.to_sparse(layout=getattr(torch, layout))
    h = torch.zeros(2, dtype=F64)
    fn = hf.hypergrad(shrunken, lambda w, h, X: (w**2).sum(), inner_loss=ridge, method=name)
    solution = hf.implicit_diff(shrunken, inner_loss=ridge, method=name)
    for call in MAPPED.values():
        with pytest.raises(NotImplementedError, match=SPARSE.replace("LAYOUT", layout)):
            call(fn, solution, h, X)
    looped = hf.task_map(fn, in_dims=(0, None), chunk_size=1)(h, X)
    torch.testing.assert_close(looped, torch.full_like(h, -0.75), rtol=1e-7, atol=0)
    torch.testing.assert_close(vmap(fn, (0, None))(h, X.to_dense()), looped)


def test_errors_of_other_kinds_stay_as_they_are_beside_sparse_data() -> None:
    def broken(h: Tensor, X: Tensor) -> Tensor:
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError) as error:  # whose notes would be part of a match
        hf.hypergrad(broken, outer_loss, inner_loss=ridge)(H[0], EYE.to_sparse())
    assert str(error.value) == "of the user's own"


NO_TASKS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda fn: vmap(fn, (0, None))(torch.zeros(0, 3, dtype=F64), A),
    "inner of two": lambda fn: vmap(vmap(fn, (0, None)), (0, None))(
        torch.zeros(2, 0, 3, dtype=F64), A
    ),
    "data": lambda fn: vmap(fn, (None, 0))(H, torch.zeros(0, 3, 3, dtype=F64)),
}


@pytest.mark.parametrize("name", ALL)
def test_a_batch_without_tasks(name: str) -> None:
    """Empty where torch has all operations for it, as torch.vmap itself; else the error says so."""
    with pytest.raises(IndexError):  # of torch, for a 0-d tensor of each task times a vector
        vmap(lambda h: h.sum() * h)(torch.zeros(0, 3))
    with each_cell() as cell:
        for call, mapped in NO_TASKS.items():
            with cell(call):
                if name in ("reverse_unroll", "reverse") and call != "data":
                    assert mapped(make(name)).numel() == 0
                    continue
                path = r"args\[0\]" if call == "data" else "hparams"
                error = rf"^(hypergrad\(|the deriv).*: {path} is mapped over no tasks, by a "
                with pytest.raises(ValueError, match=error):
                    mapped(make(name))


def test_a_batch_without_tasks_in_other_calls() -> None:
    empty = torch.zeros(0, 3, dtype=F64)
    solution = hf.implicit_diff(SOLVER, inner_loss=inner_loss)
    assert vmap(SOLVER, (0, None))(empty, A).shape == (0, 3)
    for call in (
        lambda h: solution(h, A),
        lambda h: hf.diagnose(h, h, A, inner_loss=inner_loss),
        grad(lambda h: solution(h, A).sum()),
    ):
        with pytest.raises(
            ValueError, match=r"^(implicit_diff|diagnose|the deriv).*: hparams is mapped over no"
        ):
            vmap(call)(empty)
    with pytest.raises(ValueError, match="got numbers of tasks 0"):
        hf.task_map(solution, (0, None))(empty, A)


# Compilation --------------------------------------------------------------------------------------

COMPILED: dict[str, Callable[[Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "the function": lambda fn: fn,
    "a function around it": lambda fn: lambda h, A: 2 * fn(h + 1 - 1, A) / 2,
    "vmap": lambda fn: lambda h, A: vmap(fn, (0, None))(torch.stack([h, h]), A)[1],
    "a function that vmap takes": lambda fn: (
        lambda h, A: vmap(lambda h: fn(2 * h / 2, A), chunk_size=1)(torch.stack([h, h]))[0]
    ),
}


# torch 2.15 says so of the vmap that tensordict, once imported, puts in place of torch's
NO_TRACE = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")


@NO_TRACE
@pytest.mark.parametrize(
    ("name", "form"),
    thinned(
        ["cg", "normal_cg", "dense", "reverse_unroll", "reverse", "forward"], COMPILED, every=6
    ),
)
def test_compiled(name: str, form: str) -> None:
    torch.compiler.reset()
    fn = make(name)
    compiled = torch.compile(COMPILED[form](fn), backend="eager")
    for h in (H, 2 * H):
        torch.testing.assert_close(compiled(h, A), fn(h, A), rtol=1e-12, atol=1e-12)


@NO_TRACE
# torch 2.4 says of each graph break at a tree that there is one
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin optree")
# torch looks at .grad of tensors that are no leaves where a compiled function goes on after a break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", slow_but("cg", of=["cg", "dense", "reverse_unroll", "reverse"]))
def test_compiled_losses_of_a_differentiable_solver(name: str) -> None:
    torch.compiler.reset()
    solution = hf.implicit_diff(SOLVER, inner_loss=inner_loss, method=name)

    def loss(h: Tensor) -> Tensor:
        return outer_loss(solution(h, A), h, A)

    h = H.clone().requires_grad_()
    (got,) = torch.autograd.grad(torch.compile(loss, backend="eager")(h), h)
    torch.testing.assert_close(got, make(name)(H, A), rtol=1e-9, atol=1e-11)


def test_one_graph_is_refused() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"(?s)disable.*_transformed_solver.py"):
        torch.compile(make("cg"), backend="eager", fullgraph=True)(H, A)


# raised inside torch by the first use of the default backend
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.slow
def test_compiled_by_the_default_backend() -> None:
    torch.compiler.reset()
    for name in ("cg", "reverse"):
        compiled = torch.compile(COMPILED["a function around it"](make(name)))
        torch.testing.assert_close(compiled(H, A), make(name)(H, A), rtol=1e-9, atol=1e-11)


# The interpreter ----------------------------------------------------------------------------------

WITHOUT_ASSERTS = """
import torch
from tests.transforms import test_errors
torch.set_num_threads(1)
assert False, "asserts are on"
for cases in (test_errors.CONSTRUCTION, test_errors.CALLS):
    for case in cases.values():
        test_errors.check(case, test_errors.TRANSFORMS["plain"])
print(len(test_errors.CALLS))
"""


@pytest.mark.slow
def test_errors_do_not_rely_on_asserts() -> None:
    """Under ``python -O``, which leaves them out."""
    result = subprocess.run(
        [sys.executable, "-O", "-c", WITHOUT_ASSERTS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50
