"""Inner solvers made from a step or from an optimiser."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import hyperfunc as hf
from hyperfunc.inner_solvers import gradient_descent_map, iterate, minimize
from hyperfunc.iterative import ForwardMode, Reverse, ReverseUnroll
from tests.cells import slow_but


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def halve(w: Tensor, h: Tensor, *args: Tensor) -> Tensor:
    """A contraction with fixed point h."""
    return 0.5 * (w + h)


def zeros(h: Tensor, *args: Tensor) -> Tensor:
    return torch.zeros_like(h)


def ridge(w: dict[str, Tensor], h: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
    residual = X @ w["w"] + w["b"] - y
    return 0.5 * (residual**2).mean() + 0.5 * h["l2"].exp() * (w["w"] ** 2).sum()


def ridge_init(h: dict[str, Tensor], X: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"w": X.new_zeros(X.shape[-1]), "b": X.new_zeros(())}


def ridge_data(tasks: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    return torch.randn(*tasks, 12, 3), torch.randn(*tasks, 12)


H = {"l2": torch.tensor(-1.0, dtype=torch.float64), "lr": torch.tensor(0.2, dtype=torch.float64)}


def test_iterate_repeats_its_step() -> None:
    h = torch.tensor([1.0, 2.0])
    assert torch.equal(iterate(halve, 3, init=zeros)(h), h * (1 - 0.5**3))


def test_minimize_repeats_the_optimizer() -> None:
    X, y = ridge_data()
    w = minimize(ridge, hf.optim.sgd(0.2, momentum=0.5), 4, init=ridge_init)(H, X, y)
    expected, buffer = ridge_init(H, X, y), ridge_init(H, X, y)
    for _ in range(4):
        grads = grad(ridge)(expected, H, X, y)
        buffer = {key: 0.5 * buffer[key] + grads[key] for key in grads}
        expected = {key: expected[key] - 0.2 * buffer[key] for key in grads}
    for key, value in expected.items():
        torch.testing.assert_close(w[key], value, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_few_steps(num_steps: int) -> None:
    h = torch.tensor([1.0, 2.0])
    assert torch.equal(iterate(halve, num_steps, init=lambda h: h)(h), h)
    descent = minimize(lambda w, h: (w * h).sum(), hf.optim.sgd(0.1), num_steps, init=zeros)
    assert torch.equal(descent(h), -0.1 * num_steps * h)


def test_inputs_are_handed_out_step_by_step() -> None:
    inputs = {"x": torch.randn(5, 2), "t": torch.arange(5)}
    seen = []

    def step(w: Tensor, h: Tensor, arg: str, row: dict[str, Tensor]) -> Tensor:
        seen.append((arg, row["t"].item()))
        return w * h + row["x"]

    w = iterate(step, 5, init=lambda h, arg: torch.zeros(2), inputs=inputs)(torch.tensor(0.5), "a")
    assert seen == [("a", t) for t in range(5)]
    torch.testing.assert_close(w, sum(0.5 ** (4 - t) * inputs["x"][t] for t in range(5)))


def test_minimize_on_minibatches() -> None:
    X, y = ridge_data((4,))
    solver = minimize(
        lambda w, h, batch: ridge(w, h, *batch),
        hf.optim.sgd(0.2),
        4,
        init=lambda h: ridge_init(h, X, y),
        inputs=(X, y),
    )
    expected = ridge_init(H, X, y)
    for t in range(4):
        expected = gradient_descent_map(ridge, 0.2)(expected, H, X[t], y[t])
    torch.testing.assert_close(solver(H), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("lr", [0.2, torch.tensor(0.2), lambda h: h["lr"], lambda h: 0.2])
def test_gradient_descent_map(lr: object) -> None:
    X, y = ridge_data()
    w = {"w": torch.randn(3), "b": torch.randn(())}
    new = gradient_descent_map(ridge, lr)(w, H, X, y)  # type: ignore[arg-type]
    grads = grad(ridge)(w, H, X, y)
    for key in w:
        torch.testing.assert_close(new[key], w[key] - 0.2 * grads[key])


def test_gradient_descent_map_is_differentiable_in_its_rate() -> None:
    X, y = ridge_data()
    w = {"w": torch.randn(3), "b": torch.randn(())}
    phi = gradient_descent_map(ridge, lambda h: h["lr"])
    jacobian = jacrev(phi, argnums=1)(w, H, X, y)
    torch.testing.assert_close(jacobian["w"]["lr"], -grad(ridge)(w, H, X, y)["w"])


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: minimize(loss, hf.optim.sgd(0.1), 5, init=lambda h: 0 * h),
        lambda loss: iterate(gradient_descent_map(loss, 0.1), 5, init=lambda h: 0 * h),
    ],
)
def test_proximal_is_the_sum_written_by_hand(make: object) -> None:
    def loss(w: Tensor, h: Tensor) -> Tensor:
        return (w**4).sum() + (w * h).sum()

    def by_hand(w: Tensor, h: Tensor) -> Tensor:
        return loss(w, h) + 0.5 * h.exp().sum() * ((w - h) ** 2).sum()

    solvers = [make(hf.proximal(loss, lambda h: h.exp().sum())), make(by_hand)]  # type: ignore[operator]
    h = torch.tensor([0.3, -0.4])
    for method in (ReverseUnroll(), Reverse()):
        maps = [method.solution_map(solver) for solver in solvers]
        values = [(m(h), jacrev(m)(h), jacrev(jacrev(m))(h)) for m in maps]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-13)


def test_conditions() -> None:
    assert iterate(halve, 3, init=zeros).condition == ("fixed_point", halve)
    assert minimize(ridge, hf.optim.adam(0.1), 3, init=zeros).condition == ("inner_loss", ridge)
    assert iterate(halve, 3, init=zeros, inputs=torch.zeros(3)).condition is None
    with pytest.raises(ValueError, match="minibatch"):
        hf.hypergrad(iterate(halve, 3, init=zeros, inputs=torch.zeros(3)), halve, method="cg")


def test_implicit_methods_use_the_solvers_own_condition() -> None:
    X, y = ridge_data()

    def outer_loss(w: dict[str, Tensor], h: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
        return (w["w"] ** 3).sum() + w["b"]

    def solution(l2: Tensor) -> Tensor:
        A = torch.cat([X, X.new_ones(12, 1)], 1)
        D = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        w = torch.linalg.solve(A.T @ A / 12 + l2.exp() * D, A.T @ y / 12)
        return (w[:3] ** 3).sum() + w[3]

    phi = gradient_descent_map(ridge, lambda h: h["lr"])
    for solver in (
        minimize(ridge, hf.optim.adam(0.05), 3000, init=ridge_init, rtol=1e-15),
        iterate(phi, 3000, init=ridge_init, rtol=1e-15),
    ):
        implicit = hf.hypergrad(solver, outer_loss, method=hf.NormalCG(rtol=1e-13))(H, X, y)
        torch.testing.assert_close(implicit["l2"], grad(solution)(H["l2"]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("tolerance", "steps"),
    [({}, 50), ({"rtol": 0.0, "atol": 0.0}, 50), ({"atol": 0.01}, 7), ({"rtol": 0.01}, 7)],
)
def test_early_stop(tolerance: dict[str, float], steps: int) -> None:
    # From 0 the iterates are 1 - 2^-t, and the change of step t is 2^-t: below 0.01 from t = 7.
    calls = []

    def step(w: Tensor, h: Tensor) -> Tensor:
        calls.append(1)
        return halve(w, h)

    w = iterate(step, 50, init=zeros, **tolerance)(torch.tensor([1.0]))
    assert len(calls) == steps
    assert w.item() == 1 - 0.5**steps


def test_minimize_stops_early_too() -> None:
    X, y = ridge_data()
    make = lambda steps, **kw: minimize(ridge, hf.optim.sgd(0.2), steps, init=ridge_init, **kw)  # noqa: E731
    stopped, converged = make(10_000, rtol=1e-10)(H, X, y), make(2_000)(H, X, y)
    torch.testing.assert_close(stopped, converged, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "method",
    slow_but(ReverseUnroll(), of=[ReverseUnroll(), Reverse(2), Reverse("binomial", slots=2)]),
)
def test_each_task_stops_by_itself(method: object) -> None:
    rates = torch.tensor([0.1, 0.5, 0.9, 0.5])
    targets = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0], [0.0, 0.0]])

    def step(w: Tensor, h: Tensor, rate: Tensor) -> Tensor:
        return rate * w + (1 - rate) * h.sin()

    solver = iterate(step, 200, init=lambda h, rate: 0 * h, rtol=1e-3)
    solve = method.solution_map(solver)  # type: ignore[attr-defined]

    def value(h: Tensor, rate: Tensor) -> Tensor:
        return (solve(h, rate) ** 2).sum()

    batched = vmap(solve)(targets, rates)
    assert torch.equal(
        batched, torch.stack([solver(*task) for task in zip(targets, rates, strict=True)])
    )
    for function in (grad(value, argnums=(0, 1)), jacrev(grad(value))):
        expected = [function(*task) for task in zip(targets, rates, strict=True)]
        torch.testing.assert_close(
            vmap(function)(targets, rates), torch.utils._pytree.tree_map(_stack, *expected)
        )
    # Forward accumulation has its own treatment of tasks; so has a sum over them.
    total = grad(lambda rates: vmap(value)(targets, rates).sum())(rates)
    torch.testing.assert_close(total, vmap(grad(value, argnums=1))(targets, rates))
    nested = vmap(vmap(grad(value), (None, 0)), (0, None))(targets, rates)
    torch.testing.assert_close(nested[2, 1], grad(value)(targets[2], rates[1]))


def _stack(*leaves: Tensor) -> Tensor:
    return torch.stack(leaves)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: iterate(halve, -1, init=zeros),
            ValueError,
            "iterate: num_steps is -1; expected an integer >= 0",
        ),
        (lambda: iterate(halve, 2.0, init=zeros), TypeError, "num_steps is 2.0; expected an int"),
        (lambda: iterate(halve, True, init=zeros), TypeError, "num_steps is True"),
        (lambda: iterate(None, 2, init=zeros), TypeError, "step is None"),
        (lambda: iterate(halve, 2, init=torch.zeros(2)), TypeError, "init is <tensor of shape"),
        (lambda: iterate(halve, 2, init=zeros, rtol=-1.0), ValueError, "rtol is -1.0"),
        (lambda: iterate(halve, 2, init=zeros, atol=float("nan")), ValueError, "atol is nan"),
        (
            lambda: iterate(halve, 2, init=zeros, inputs={"x": torch.zeros(3, 2)}),
            ValueError,
            "inputs['x'] has shape (3, 2); expected leading dimension num_steps = 2",
        ),
        (
            lambda: iterate(halve, 2, init=zeros, inputs=torch.tensor(1.0)),
            ValueError,
            "inputs has shape ()",
        ),
        (lambda: iterate(halve, 2, init=zeros, inputs=[3]), TypeError, "inputs[0] is 3"),
        (lambda: iterate(halve, 2, init=zeros, inputs=()), ValueError, "inputs is an empty tree"),
        (
            lambda: minimize(
                lambda w, h: h, hf.optim.sgd(0.1), 2, init=zeros, inputs=torch.ones(2)
            ),
            TypeError,
            "minimize: inner_loss takes two arguments, but inputs= adds the minibatch",
        ),
        (
            lambda: iterate(lambda w, h: w, 2, init=zeros, inputs=torch.ones(2)),
            TypeError,
            "iterate: step takes two arguments, but inputs= adds the minibatch",
        ),
        (lambda: minimize(3, hf.optim.sgd(0.1), 2, init=zeros), TypeError, "inner_loss is 3"),
        (
            lambda: minimize(ridge, torch.optim.SGD, 2, init=zeros),
            TypeError,
            "Write hf.optim.from_torch(torch.optim.SGD",
        ),
        (lambda: gradient_descent_map(3, 0.1), TypeError, "inner_loss is 3"),
    ],
)
def test_wrong_arguments(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda w, h: {"a": w["a"]}, "the step's result has another structure than params"),
        (lambda w, h: {"a": w["a"], "b": w["a"]}, "the leaf for params['b'] has shape (2,)"),
        (lambda w, h: {"a": w["a"].float(), "b": w["b"]}, "params['a'] has dtype torch.float32"),
        (lambda w, h: {"a": 1.0, "b": w["b"]}, "params['a'] is 1.0 of type float"),
    ],
)
@pytest.mark.parametrize("method", [ReverseUnroll(), Reverse(), Reverse(last=2), ForwardMode()])
@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(torch.tensor(1.0)),
        lambda f: f(torch.tensor(1.0, requires_grad=True)),
        lambda f: jacrev(f)(torch.tensor(1.0)),
        lambda f: jacfwd(f)(torch.tensor(1.0)),
        lambda f: vmap(jacrev(f))(torch.ones(3)),
        lambda f: jacrev(vmap(f))(torch.ones(3)),
    ],
    ids=["plain", "autograd", "jacrev", "jacfwd", "vmap of jacrev", "jacrev of vmap"],
)
def test_a_step_that_changes_the_params_is_refused_at_once(
    step: object, message: str, method: object, call: object
) -> None:
    calls = []

    def counted(w: object, h: Tensor) -> object:
        calls.append(1)
        return step(w, h)  # type: ignore[operator]

    solver = iterate(counted, 5, init=lambda h: {"a": torch.zeros(2), "b": torch.zeros(())})
    with pytest.raises(ValueError, match=re.escape(message)):
        call(method.solution_map(solver))  # type: ignore[attr-defined,operator]
    assert len(calls) == 1


def test_wrong_starts_and_states_are_refused() -> None:
    with pytest.raises(TypeError, match=re.escape("params[0] has dtype torch.int64")):
        iterate(halve, 2, init=lambda h: [torch.zeros(2, dtype=torch.int64)])(torch.tensor(1.0))
    forgetful = hf.optim.Optimizer(lambda params: {"m": params}, lambda g, s, p, h=None: (p, {}))
    with pytest.raises(ValueError, match="the optimizer's new state has another structure"):
        minimize(lambda w, h: (w * h).sum(), forgetful, 2, init=zeros)(torch.ones(2))
    counting = hf.optim.Optimizer(lambda params: {"t": 0}, lambda g, s, p, h=None: (p, s))
    with pytest.raises(TypeError, match=re.escape("the optimizer's state['t'] is 0 of type int")):
        minimize(lambda w, h: (w * h).sum(), counting, 2, init=zeros)(torch.ones(2))
    with pytest.raises(ValueError, match="inner_loss returned a tensor of shape"):
        minimize(lambda w, h: w * h, hf.optim.sgd(0.1), 2, init=zeros)(torch.ones(2))


def test_no_graph_is_kept_that_nobody_asked_for() -> None:
    X, y = ridge_data()
    w = minimize(ridge, hf.optim.sgd(0.2), 4, init=ridge_init)(H, X, y)
    assert not any(leaf.requires_grad for leaf in w.values())


@pytest.mark.parametrize(
    "solver",
    [
        minimize(lambda w, h: (w * h).sum(), hf.optim.sgd(0.0), 0, init=lambda h: h),
        minimize(lambda w, h: (w * h).sum(), hf.optim.sgd(0.0), 2, init=lambda h: h),
        minimize(lambda w, h: (w * h).sum(), hf.optim.heavy_ball(0.0, 0.0), 2, init=lambda h: h),
        iterate(lambda w, h: h, 2, init=lambda h: h),
    ],
)
def test_a_solution_shares_no_memory_with_the_hparams(solver: object) -> None:
    h = torch.ones(2)
    fn = hf.hypergrad_and_solution(solver, lambda w, h: w.sum(), method="one_step")
    _, solution = fn(h)
    assert torch.equal(solution.params, h)
    assert solution.params.untyped_storage().data_ptr() != h.untyped_storage().data_ptr()


def unused_problem(**keywords: Any) -> tuple[Any, Any, Any]:
    """A solver whose loss does not use one parameter, its start, and an outer loss of both."""

    def loss(params: Any, hparams: Any) -> Tensor:
        return ((params["w"] - hparams["w"]) ** 2).sum() + 0 * params["head"].detach().sum()

    solver = hf.minimize(
        loss,
        hf.optim.adamw(lr=0.1, weight_decay=lambda hparams: hparams["decay"]),
        4,
        init=lambda hparams: {"w": 2 * hparams["w"], "head": 3 * hparams["head"]},
        **keywords,
    )
    hparams = {
        "w": torch.tensor([1.0, -2.0], dtype=torch.float64),
        "head": torch.tensor([0.5, 4.0], dtype=torch.float64),
        "decay": torch.tensor(0.3, dtype=torch.float64),
    }
    return solver, hparams, lambda params, hparams: sum((x**3).sum() for x in params.values())


@pytest.mark.parametrize("compile", [False, pytest.param("eager", marks=pytest.mark.slow)])
def test_parameters_that_the_loss_does_not_use_keep_their_values(compile: Any) -> None:
    solver, hparams, outer_loss = unused_problem(compile=compile)
    w, head = 2 * hparams["w"], 3 * hparams["head"]
    variables = [w.clone().requires_grad_(), head.clone().requires_grad_()]
    theirs = torch.optim.AdamW(variables, lr=0.1, weight_decay=0.3)
    for _ in range(4):
        theirs.zero_grad()
        ((variables[0] - hparams["w"]) ** 2).sum().backward()
        theirs.step()
    expected = {"w": variables[0].detach(), "head": head}
    batch = {key: torch.stack([leaf, leaf]) for key, leaf in hparams.items()}
    found = [solver(hparams), {key: leaf[0] for key, leaf in vmap(solver)(batch).items()}]
    if not compile:
        found += [jvp(solver, (hparams,), (hparams,))[0], vjp(solver, hparams)[0]]
    for params in found:
        torch.testing.assert_close(params, expected)
        assert torch.equal(params["head"], head)

    grads = grad(lambda h: outer_loss(solver(h), h))(hparams)
    torch.testing.assert_close(grads["head"], 81 * hparams["head"] ** 2)
    shift = {"w": 0.0, "head": 0.0, "decay": 1e-6}
    up, down = (
        outer_loss(solver({key: leaf + s * shift[key] for key, leaf in hparams.items()}), None)
        for s in (1, -1)
    )
    torch.testing.assert_close(grads["decay"], (up - down) / 2e-6, rtol=1e-6, atol=0)
    methods = [hf.Reverse(), hf.ForwardMode(), hf.Reverse(checkpoint="sqrt"), hf.ReverseUnroll()]
    for method in methods[: 1 if compile else 4]:
        through = hf.hypergrad(solver, outer_loss, method=method)
        torch.testing.assert_close(through(hparams), grads)
        torch.testing.assert_close({k: g[1] for k, g in vmap(through)(batch).items()}, grads)
