"""Implicit differentiation of any code, and the tensors that functions may not close over."""

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Problem, ravel, unraveller
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import hyperfunc as hf

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

F64 = torch.float64
RIDGE = PROBLEMS[0]
STEPS = 40


# Solvers of any code ------------------------------------------------------------------------------


def by_torch_optim(reg: Tensor, *args: Tensor) -> Tensor:
    w = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.85)
    for _ in range(STEPS):
        optimizer.zero_grad()
        RIDGE.fn(w, reg, *args).backward()
        optimizer.step()
    return w


def by_lbfgs(reg: Tensor, *args: Tensor) -> Tensor:
    w = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=50, tolerance_grad=1e-15, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = RIDGE.fn(w, reg, *args)
        loss.backward()
        return loss

    optimizer.step(closure)
    return w


def by_steps_with_a_graph(reg: Tensor, *args: Tensor) -> Tensor:
    """The result carries the graph of all steps, which nobody needs."""
    w = torch.zeros(3, dtype=F64, requires_grad=True)
    for _ in range(STEPS):
        (g,) = torch.autograd.grad(RIDGE.fn(w, reg, *args), w, create_graph=True)
        w = w - 0.85 * g
    return w


def by_torch_func(reg: Tensor, *args: Tensor) -> Tensor:
    w = torch.zeros(3, dtype=F64)
    for _ in range(STEPS):
        w = w - 0.85 * grad(RIDGE.fn)(w, reg, *args)
    return w


@torch.no_grad()
def in_place(reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    w = torch.zeros_like(target)
    for _ in range(STEPS):
        w.sub_(0.85 * (X.T @ (X @ w - y) + reg.exp() * w))
    return w


def by_numpy(reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    A = X.numpy().T @ X.numpy() + np.exp(reg.item()) * np.eye(3)
    return torch.from_numpy(np.linalg.solve(A, X.numpy().T @ y.numpy()))


def by_sklearn(reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    model = Ridge(alpha=reg.exp().item(), fit_intercept=False, solver="cholesky")
    return torch.from_numpy(model.fit(X.numpy(), y.numpy()).coef_)


SOLVERS = [
    by_torch_optim,
    by_lbfgs,
    by_steps_with_a_graph,
    by_torch_func,
    in_place,
    by_numpy,
    by_sklearn,
    RIDGE.solution,
]
CALLS: dict[str, tuple[Callable[[Any, Tensor, tuple[Tensor, ...]], Tensor], str]] = {
    "grad": (lambda E, h, a: grad(E)(h, *a), "gradient"),
    "jacrev": (lambda E, h, a: jacrev(E)(h, *a), "gradient"),
    "jacfwd": (lambda E, h, a: jacfwd(E)(h, *a), "gradient"),
    "jacfwd(jacrev)": (lambda E, h, a: hessian(E)(h, *a), "hessian"),
    "jacrev(jacrev)": (lambda E, h, a: jacrev(jacrev(E))(h, *a), "hessian"),
    "jacrev(jacfwd)": (lambda E, h, a: jacrev(jacfwd(E))(h, *a), "hessian"),
}


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.__name__)
def test_solvers_of_any_code(solver: Any) -> None:
    hparams, args = RIDGE.tasks()[0]
    keywords: Any = {"inner_loss": RIDGE.fn, "method": "cg"}
    implicit = hf.implicit_diff(solver, **keywords)

    def value(reg: Tensor, *args: Tensor) -> Tensor:
        return RIDGE.outer_loss(implicit(reg, *args), reg, *args)

    def assert_close(actual: Any, what: str) -> None:
        expected = RIDGE.reference(what).reshape(actual.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    assert_close(hf.hypergrad(solver, RIDGE.outer_loss, **keywords)(hparams, *args), "gradient")
    for compute, what in CALLS.values():
        assert_close(compute(value, hparams, args), what)
    leaf = hparams.clone().requires_grad_()
    value(leaf, *args).backward()
    assert_close(leaf.grad, "gradient")
    fn = hf.hypergrad(solver, RIDGE.outer_loss, **keywords)
    assert_close(jacrev(fn)(hparams, *args), "hessian")
    if solver in (by_torch_func, in_place, RIDGE.solution):
        batch = [x.expand(2, *x.shape) for x in (hparams, *args)]
        for row in vmap(fn)(*batch):
            assert_close(row, "gradient")


def test_the_start_of_a_solver_has_derivative_zero() -> None:
    """An iterative solver may take its start as an argument: the solution does not depend on it."""

    @hf.implicit_diff(optimality=lambda w, h, start: w**2 - h)
    def sqrt(h: Tensor, start: Tensor) -> Tensor:
        w = start
        for _ in range(20):
            w = 0.5 * (w + h / w)
        return w

    h, start = torch.tensor(4.0, dtype=F64), torch.tensor(3.0, dtype=F64)
    dh, dstart = grad(sqrt, (0, 1))(h, start)
    assert dh.item() == pytest.approx(0.25, rel=1e-14)
    assert dstart.item() == 0.0
    leaf = start.clone().requires_grad_()
    assert torch.autograd.grad(sqrt(h, leaf), leaf)[0].item() == 0.0


def test_several_roots_are_told_apart_by_the_solver() -> None:
    root = hf.implicit_diff(
        lambda h, sign: sign * h.sqrt(), optimality=lambda w, h, sign: w**2 - h, method="dense"
    )
    h = torch.tensor(4.0)
    assert [grad(root)(h, sign).item() for sign in (1.0, -1.0)] == [0.25, -0.25]


def test_integers_and_objects_among_the_arguments() -> None:
    """Integer tensors, flags and strings reach all functions; floating ones get derivatives."""

    def optimality(w: Tensor, h: Tensor, index: Tensor, mask: Tensor, config: Any) -> Tensor:
        assert config["name"] == "config"
        assert config["none"] is None
        return torch.where(mask, w - h[index] * config["scale"], w)

    @hf.implicit_diff(optimality=optimality)
    def solve(h: Tensor, index: Tensor, mask: Tensor, config: Any) -> Tensor:
        return torch.where(mask, h[index] * config["scale"], 0.0)

    h = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    index, mask = torch.tensor([2, 2, 0]), torch.tensor([True, True, False])
    config = {"name": "config", "none": None, "scale": torch.tensor(5.0, dtype=F64)}
    expected = torch.zeros(3, 3, dtype=F64)
    expected[0, 2] = expected[1, 2] = 5
    assert torch.equal(jacfwd(solve)(h, index, mask, config), expected)
    assert torch.equal(jacrev(solve)(h, index, mask, config), expected)
    scale = grad(lambda s: solve(h, index, mask, config | {"scale": s}).sum())(config["scale"])
    assert scale.item() == 6.0
    fn = hf.hypergrad(solve.__wrapped__, lambda w, *_: w.sum(), optimality=optimality)
    assert fn(h, index, mask, config).tolist() == [0.0, 0.0, 10.0]
    batched = vmap(lambda i: solve(h, i, mask, config))(torch.stack([index, 0 * index]))
    assert batched.tolist() == [[15.0, 15.0, 0.0], [5.0, 5.0, 0.0]]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_forward_mode_without_torch_func(problem: Problem) -> None:
    hparams, args = problem.tasks()[0]
    unravel, v = unraveller(hparams), ravel(hparams)
    t = torch.linspace(0.5, 1, len(v), dtype=F64)
    keywords = problem.keywords | {"method": "dense"}
    solution = hf.implicit_diff(problem.inner_solver, **keywords)
    fn = hf.hypergrad(problem.inner_solver, problem.outer_loss, **keywords)
    with forward_ad.dual_level():
        dual = unravel(forward_ad.make_dual(v, t))
        for value, what in ((solution(dual, *args), "jacobian"), (fn(dual, *args), "hessian")):
            value = ravel(value)
            assert not value.requires_grad
            tangent = forward_ad.unpack_dual(value).tangent
            torch.testing.assert_close(tangent, problem.reference(what) @ t, rtol=1e-12, atol=1e-12)
        assert not ravel(fn(hparams, *args)).requires_grad


def test_inference_mode() -> None:
    hparams, args = RIDGE.tasks()[0]
    fn = hf.implicit_diff(RIDGE.inner_solver, inner_loss=RIDGE.fn)
    with torch.inference_mode():
        value = fn(hparams, *args)
        if grad(torch.sin)(torch.zeros(())) != 1:  # so up to torch 2.4: refused, as all are zero
            with pytest.raises(RuntimeError, match=r"^implicit_diff\(.*in inference mode.*no_grad"):
                jacrev(fn)(hparams, *args)
            return
        J = jacrev(fn)(hparams, *args)
    assert torch.equal(value, RIDGE.inner_solver(hparams, *args))
    torch.testing.assert_close(J.reshape(3, 1), RIDGE.reference("jacobian"), rtol=1e-12, atol=0)


def test_a_failed_solve_in_backward_raises() -> None:
    singular = hf.implicit_diff(lambda h: 0 * h, optimality=lambda w, h: 0 * w - h, method="cg")
    h = torch.ones(2, requires_grad=True)
    with pytest.raises(hf.HypergradError, match="broke down"):
        singular(h).sum().backward()
    with pytest.raises(hf.HypergradError, match="broke down"):
        jacfwd(singular)(torch.ones(2))


def test_complete_jacobians_with_failed_columns_name_the_number() -> None:
    singular = hf.implicit_diff(
        lambda h: h.clone(), optimality=lambda w, h: torch.stack([w[0] - h[0], 0 * w[1] - h[1]])
    )
    with pytest.raises(hf.HypergradError, match=r"failed for 1 of 2 tasks \(index 1\)"):
        jacrev(singular)(torch.ones(2))


# Captured tensors ---------------------------------------------------------------------------------

# Everywhere below, w = c h. What is refused is a c with a derivative that is no argument.
H, C = torch.tensor(2.0, dtype=F64), torch.tensor(3.0, dtype=F64)

CONDITIONS: dict[str, Callable[[Any], Any]] = {
    "inner_loss": lambda c: lambda w, h: (w - h * c()) ** 2 / 2,
    "optimality": lambda c: lambda w, h: w - h * c(),
    "fixed_point": lambda c: lambda w, h: (w + h * c()) / 2,
}


def constant() -> Tensor:
    return C


class Holder:
    def __init__(self, c: Tensor, other: Any = None) -> None:
        self.c, self.other = c, other

    def solve(self, h: Tensor) -> Tensor:
        return h * self.c

    def solve_with_other(self, h: Tensor) -> Tensor:
        return h * self.other

    def __call__(self, h: Tensor) -> Tensor:
        return self.solve(h)


CAPTURED: Any = None


def use_captured(h: Tensor) -> Tensor:
    return h * CAPTURED


def in_nested(c: Tensor) -> Any:
    def solve(h: Tensor) -> Tensor:
        def inner() -> Tensor:
            return h * c

        return inner()

    return solve


def by_default(c: Tensor) -> Any:
    def solve(h: Tensor, c: Tensor = c) -> Tensor:
        return h * c

    return solve


def by_keyword_default(c: Tensor) -> Any:
    def solve(h: Tensor, *, c: Tensor = c) -> Tensor:
        return h * c

    return solve


def through_dict(c: Tensor) -> Any:
    hparams = {"outer": [{"c": c}]}
    return lambda h: h * hparams["outer"][0]["c"]


def through_attribute(c: Tensor) -> Any:
    namespace = types.SimpleNamespace(c=c)
    return lambda h: h * namespace.c


def through_function(c: Tensor) -> Any:
    helper = in_nested(c)
    return lambda h: helper(h)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "a variable": lambda c: lambda h: h * c,
    "a nested function's variable": in_nested,
    "a tree": through_dict,
    "an attribute": through_attribute,
    "a function's variable": through_function,
    "a default": by_default,
    "a keyword default": by_keyword_default,
    "a partial": lambda c: functools.partial(lambda c, h: h * c, c),
    "a partial's keyword": lambda c: functools.partial(lambda h, c: h * c, c=c),
    "a method": lambda c: Holder(c).solve,
    "a callable object": lambda c: Holder(c),
}


@pytest.mark.parametrize("way", WAYS)
def test_solvers_may_not_hold_differentiable_tensors(way: str) -> None:
    def fns(c: Tensor) -> list[Any]:
        keywords: Any = {"optimality": lambda w, h: w - 3 * h}
        solver = WAYS[way](c)
        return [
            hf.implicit_diff(solver, **keywords),
            hf.hypergrad(solver, lambda w, h: w**2, **keywords),
        ]

    refused = functools.partial(pytest.raises, ValueError, match="^the inner solver closes over a")
    leaf = C.clone().requires_grad_()
    for i in range(2):
        for c in (leaf, 2 * leaf):
            with refused():
                fns(c)[i](H)
            with refused():
                vmap(fns(c)[i])(H.expand(2))
        for transform in (
            lambda f: grad(f)(C),
            lambda f: jvp(f, (C,), (C,)),
            lambda f: vjp(f, C),
            lambda f: vmap(grad(f))(C.expand(2)),
            lambda f: grad(lambda t: vmap(f)(t.expand(2)).sum())(C),
        ):
            with refused():
                transform(lambda c, i=i: fns(c)[i](H))
        for c in (C, leaf.detach()):
            assert fns(c)[i](H).item() == [6.0, 36.0][i]


def test_solvers_may_not_use_differentiable_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = hf.implicit_diff(use_captured, optimality=lambda w, h: w - 3 * h)
    monkeypatch.setitem(globals(), "CAPTURED", C)
    assert fn(H).item() == 6.0
    monkeypatch.setitem(globals(), "CAPTURED", C.clone().requires_grad_())
    with pytest.raises(ValueError, match="the inner solver closes over a tensor that requires"):
        fn(H)


def test_what_a_solver_holds_but_does_not_use_is_allowed() -> None:
    leaf = C.clone().requires_grad_()
    module = nn.Linear(1, 1)
    fns = [
        Holder(leaf, C).solve_with_other,
        lambda h: torch.func.functional_call(
            module, {"weight": C.reshape(1, 1), "bias": 0 * C.reshape(1)}, (h.reshape(1),)
        ).reshape(()),
    ]
    for fn in fns:
        assert hf.implicit_diff(fn, optimality=lambda w, h: w - 3 * h)(H).item() == 6.0


class Box(nn.Module):
    """Holds a tensor where no look at the function's variables finds it."""

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.c = c


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("hidden", [False, True])
def test_conditions_may_not_use_differentiable_tensors(kind: str, hidden: bool) -> None:
    """However they got there: the function is evaluated, and its value looked at."""

    def fns(c: Tensor) -> list[Any]:
        box = Box(c)
        held: Any = (lambda: box.c) if hidden else (lambda: c)
        keywords: Any = {kind: CONDITIONS[kind](held)}
        return [
            hf.implicit_diff(lambda h: 3 * h, **keywords),
            hf.hypergrad(lambda h: 3 * h, lambda w, h: w**2, **keywords),
        ]

    refused = functools.partial(pytest.raises, ValueError, match=f"^{kind} closes over a tensor")
    leaf, h_leaf = C.clone().requires_grad_(), H.clone().requires_grad_()
    for i in range(2):
        for c in (leaf, 2 * leaf):
            with refused():
                fns(c)[i](H)
            with refused():
                torch.autograd.grad(fns(c)[i](h_leaf), h_leaf)
            with refused():
                vmap(fns(c)[i])(H.expand(2))
            with refused():
                grad(fns(c)[i])(H)
        for transform in (
            lambda f: grad(f)(C),
            lambda f: jvp(f, (C,), (C,)),
            lambda f: vjp(f, C),
            lambda f: vmap(grad(f))(C.expand(2)),
            lambda f: vmap(jacfwd(f))(C.expand(2)),
            lambda f: grad(lambda t: vmap(f)(t.expand(2)).sum())(C),
            lambda f: grad(grad(f))(C),
        ):
            with refused():
                transform(lambda c, i=i: fns(c)[i](H))
            with refused():
                transform(lambda c, i=i: fns(c)[i](c))
    for c in (C, leaf.detach()):
        solution, fn = fns(c)
        assert solution(H).item() == 6.0
        assert fn(H).item() == grad(lambda h, s=solution: s(h) ** 2)(H).item() == 36.0


def test_outer_losses_may_not_use_what_requires_grad() -> None:
    leaf = C.clone().requires_grad_()
    keywords: Any = {"optimality": lambda w, h: w - 3 * h}
    fn = hf.hypergrad(lambda h: 3 * h, lambda w, h: leaf * w, **keywords)
    for call in (fn, lambda h: vmap(fn)(h.expand(2))):
        with pytest.raises(
            ValueError, match=r"^outer_loss closes over a tensor that requires grad"
        ):
            call(H)


def test_outer_losses_may_use_tensors_of_a_transform() -> None:
    """There, unlike by plain autograd, no derivative is lost."""
    for kind, condition in CONDITIONS.items():

        def fn(c: Tensor, kind: str = kind, condition: Any = condition) -> Tensor:
            return hf.hypergrad(
                lambda h: 3 * h, lambda w, h: c * w + c**2, **{kind: condition(constant)}
            )(H)

        assert grad(fn)(C).item() == pytest.approx(3.0)
        assert jvp(fn, (C,), (C,))[1].item() == pytest.approx(9.0)
        assert vmap(grad(fn))(C.expand(2)).tolist() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize("kind", CONDITIONS)
def test_functions_may_use_tensors_that_vmap_has_batched(kind: str) -> None:
    """All of solver, condition and outer loss: each task has its own c."""

    def implicit(c: Tensor) -> Any:
        return hf.implicit_diff(lambda h: h * c, **{kind: CONDITIONS[kind](lambda: c)})

    def hyper(c: Tensor) -> Any:
        return hf.hypergrad(
            lambda h: h * c, lambda w, h: c * w**2, **{kind: CONDITIONS[kind](lambda: c)}
        )

    c = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    square = 2 * c**2
    for fn, expected in {
        (lambda c: implicit(c)(H)): c * H,
        (lambda c: hyper(c)(H)): 2 * c**3 * H,
        (lambda c: grad(implicit(c))(H)): c,
        (lambda c: jacfwd(implicit(c))(H)): c,
        (lambda c: vmap(hyper(c))(H.expand(2)).sum()): 4 * c**3 * H,
        (lambda c: grad(hyper(c))(H)): 2 * c**3,
        (lambda c: hessian(lambda h: implicit(c)(h) ** 2)(H)): square,
        (lambda c: jacrev(jacfwd(lambda h: implicit(c)(h) ** 2))(H)): square,
        (lambda c: jvp(grad(lambda h: implicit(c)(h) ** 2), (H,), (H,))[1]): square * H,
        (lambda c: grad(lambda h: vmap(implicit(c))(h.expand(2)).sum())(H)): 2 * c,
    }.items():
        torch.testing.assert_close(vmap(fn)(c), expected, rtol=1e-10, atol=0)
        nested = vmap(lambda h: vmap(fn)(c))(torch.zeros(2))  # noqa: B023
        torch.testing.assert_close(nested, expected.expand(2, 3), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_functions_may_use_constants_made_inside_a_transform(kind: str) -> None:
    def fn(h: Tensor) -> Tensor:
        c = torch.tensor(3.0, dtype=F64)
        return hf.implicit_diff(lambda h: h * c, **{kind: CONDITIONS[kind](lambda: c)})(h) ** 2

    assert grad(fn)(H).item() == pytest.approx(36.0)
    assert grad(grad(fn))(H).item() == pytest.approx(18.0)


def test_a_function_that_would_leave_the_level_of_a_tensor_is_told_so() -> None:
    """torch runs it outside the inner of two levels, and fails with an internal assertion."""

    def task(c: Tensor, in_solver: bool) -> Tensor:
        def value(h: Tensor) -> Tensor:
            six = torch.tensor(6.0, dtype=F64)
            return hf.implicit_diff(
                lambda h: h * (six if in_solver else 6.0), optimality=lambda w, h: w - h * six
            )(h)

        return grad(grad(value))(c) if in_solver else grad(grad(grad(value)))(c)

    text = r"^the inner solver uses a tensor that was made inside an .* Pass that tensor in \*args"
    with pytest.raises(ValueError, match=text):
        vmap(task, (0, None))(C.expand(2), True)
    with pytest.raises(ValueError, match=text.replace("the inner solver", "optimality")):
        vmap(task, (0, None))(C.expand(2), False)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_a_random_solver_under_vmap(randomness: str) -> None:
    """Where nothing is batched, numbers are drawn once, unless each task asks for its own."""

    def solver(h: Tensor) -> Tensor:
        return torch.where(torch.rand(()) < 0.5, -1.0, 1.0) * h.sqrt()

    fn = hf.implicit_diff(solver, optimality=lambda w, h: w**2 - h, method="dense")
    signs = vmap(lambda x: fn(H) + 0 * x, randomness=randomness)(torch.zeros(20)).sign()
    assert len(signs.unique()) == (2 if randomness == "different" else 1)
    assert jacfwd(fn)(H).abs().item() == pytest.approx(1 / 8**0.5)


@pytest.mark.parametrize("method", ["cg", hf.FixedPoint(2, rtol=0, step_size=0.5)])
def test_from_any_start_the_adjoint_of_an_outer_loss_without_gradient_is_zero(method: Any) -> None:
    h = torch.ones(3, dtype=torch.float64)
    fn = hf.hypergrad_and_solution(
        lambda h, scale: h.detach(),
        lambda w, h, scale: scale * w.sum() + h.sum(),
        inner_loss=lambda w, h, scale: 0.5 * ((w - h) ** 2).sum(),
        method=method,
    )
    for scale in (0.0, 2.0**0.5, 3.0**-0.5):
        grads, solution = fn(h, torch.tensor(scale, dtype=h.dtype), adjoint_init=scale + 1 + 0 * h)
        start = 0.0 if scale == 0 or method == "cg" else scale + 1
        exact = scale if method == "cg" else scale + (start - scale) / 4
        torch.testing.assert_close(solution.adjoint, exact + 0 * h)
        torch.testing.assert_close(grads, 1 + exact + 0 * h)


def test_parts_of_a_solution_that_are_the_same_for_all_tasks_count_once_a_task() -> None:
    """Their cotangents are those of each task, not their sum: at both orders, in every engine."""

    def phi(w: Any, h: Any, x: Tensor) -> Any:
        return {
            "own": 0.3 * torch.tanh(w["own"]) + h["own"] * x,
            "same": 0.5 * torch.sin(w["same"]) + h["same"],
        }

    def solver(h: Any, x: Tensor) -> Any:
        w = {"own": torch.zeros_like(h["own"]), "same": torch.zeros_like(h["same"])}
        for _ in range(50):
            w = phi(w, h, x)
        return w

    g = torch.Generator().manual_seed(0)
    xs = torch.randn(3, 2, generator=g).double()
    h = {name: torch.randn(2, generator=g).double() for name in ("own", "same")}
    for method, derivative in (
        (hf.GMRES(rtol=1e-14), torch.func.grad),
        (hf.FixedPoint(rtol=1e-14), torch.func.grad),
        (hf.FixedPoint(rtol=1e-14), torch.func.hessian),
    ):
        rule = hf.implicit_diff(solver, fixed_point=phi, method=method)

        def value(h: Any, x: Tensor, rule: Any = rule) -> Tensor:
            return sum((leaf**3).sum() for leaf in rule(h, x).values())

        by_vmap = derivative(lambda h, f=value: torch.func.vmap(f, (None, 0))(h, xs).sum())(h)
        alone = derivative(lambda h, f=value: torch.stack([f(h, x) for x in xs]).sum())(h)
        torch.testing.assert_close(by_vmap, alone)
