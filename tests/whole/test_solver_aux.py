"""What an inner solver returns beside its params, and windows of steps whose state goes on."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf

F64 = torch.float64


def close(got: Any, expected: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


# Any solver --------------------------------------------------------------------------------------


def newton(a: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Square roots by steps whose number depends on the values, with how it went."""
    w, steps, errors = torch.ones_like(a), 0, []
    while (w**2 - a).abs().max() > 1e-12 and steps < 50:
        w, steps = 0.5 * (w + a / w), steps + 1
        errors.append((w**2 - a).abs().max())
    aux = {"steps": steps, "converged": steps < 50, "last": errors[-1], "a": a, "name": "newton"}
    return {"w": w}, aux


def residual(params: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
    return {"w": params["w"] ** 2 - a}


def unrolled(a: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    w = torch.ones_like(a)
    for _ in range(8):
        w = 0.5 * (w + a / w)
    return {"w": w}, {"steps": 8, "distance": ((w**2 - a) ** 2).sum(), "name": "unrolled"}


A = torch.tensor([2.0, 9.0], dtype=F64)


def make(solver: Any) -> Any:
    if solver is newton:
        return hf.implicit_diff(newton, optimality=residual, method="gmres", has_aux=True)
    return hf.implicit_diff(unrolled, method="reverse_unroll", has_aux=True)


@pytest.mark.parametrize("solver", [newton, unrolled])
def test_a_differentiable_solver_returns_the_pair(solver: Any) -> None:
    fn = make(solver)
    params, aux = fn(A)
    close(params["w"], A.sqrt())
    expected = solver(A)[1]
    assert aux.keys() == expected.keys()
    assert aux["name"] == solver.__name__
    assert aux["steps"].dtype == torch.int64
    assert int(aux["steps"]) == expected["steps"]

    def total(a: Tensor) -> Tensor:
        """The sum of the roots, and more that would count if aux had a derivative."""
        params, aux = fn(a)
        rest = sum(leaf.sum() for leaf in aux.values() if isinstance(leaf, Tensor))
        value: Tensor = params["w"].sum() + rest
        return value

    slope = 0.5 * A**-0.5
    close(grad(total)(A), slope)
    leaf = A.clone().requires_grad_()
    total(leaf).backward()
    assert leaf.grad is not None
    close(leaf.grad, slope)
    assert not fn(leaf)[1]["steps"].requires_grad
    for transform in (jacrev, jacfwd):
        close(transform(lambda a: fn(a)[0]["w"])(A), torch.diag(slope))
    close(hessian(total)(A), torch.diag(-0.25 * A**-1.5))
    jacobian, steps = jacrev(lambda a: (fn(a)[0]["w"], fn(a)[1]["steps"]), has_aux=True)(A)
    close(jacobian, torch.diag(slope))
    assert int(steps) == expected["steps"]


@pytest.mark.parametrize("solver", [newton, unrolled])
def test_aux_of_tasks_is_that_of_one_task_at_a_time(solver: Any) -> None:
    fn = make(solver)

    def tensors(a: Tensor) -> Any:
        params, aux = fn(a)
        return params, {key: value for key, value in aux.items() if isinstance(value, Tensor)}

    tasks = torch.stack([A, 2 * A, A**0.1])
    got = vmap(tensors)(tasks)
    close(got, torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *map(tensors, tasks)))
    nested = vmap(vmap(tensors))(tasks[:, None])
    close(nested[1]["steps"][:, 0], got[1]["steps"])
    slopes = vmap(grad(lambda a: tensors(a)[0]["w"].sum()))(tasks)
    close(slopes, 0.5 * tasks**-0.5)


def outer(params: dict[str, Tensor], a: Tensor) -> tuple[Tensor, Tensor]:
    return (params["w"] * a).sum(), a + 1


def test_hypergradients_see_params_and_solutions_hold_aux() -> None:
    options: list[dict[str, Any]] = [
        {"inner_solver": newton, "optimality": residual, "method": "gmres"},
        {"inner_solver": unrolled, "method": "reverse_unroll"},
    ]
    first_order = {"inner_solver": newton, "method": hf.FirstOrder(init=lambda a: {"w": a})}
    close(
        hf.hypergrad(**first_order, outer_loss=outer, has_aux=True, solver_has_aux=True)(A)[0],
        A.sqrt() + A,
    )
    slope = 1.5 * A**0.5
    for each in options:
        options_ = {**each, "outer_loss": outer, "has_aux": True, "solver_has_aux": True}
        grads, solution = hf.hypergrad_and_solution(**options_)(A)
        close(grads, slope)
        close(solution.params["w"], A.sqrt())
        close(solution.aux, A + 1)
        expected = each["inner_solver"](A)[1]
        assert int(solution.solver_aux["steps"]) == expected["steps"]
        assert solution.solver_aux["name"] == expected["name"]
        close(hf.hypergrad(**options_)(A), (slope, A + 1))


@pytest.mark.slow
def test_compiled_adjoints_and_checks_leave_aux_out() -> None:
    _, solution = hf.hypergrad_and_solution(
        newton,
        lambda w, a: outer(w, a)[0],
        optimality=residual,
        method=hf.NormalCG(maxiter=2, rtol=0, atol=0),
        solver_has_aux=True,
        compile="eager",
    )(A)
    assert int(solution.solver_aux["steps"]) == newton(A)[1]["steps"]
    report = hf.check_hypergrad(
        newton,
        lambda w, a: outer(w, a)[0],
        A,
        optimality=residual,
        solver_has_aux=True,
        method="gmres",
        unroll=False,
        routes=(),
    )
    report.raise_if_failed()


def test_statistics_of_fixed_point_solvers_are_aux() -> None:
    def cell(z: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + h)

    def solve(h: Tensor) -> Any:
        return hf.fixed_point_solvers.Anderson(maxiter=60, rtol=1e-10)(cell, 0 * h, h)

    h = torch.tensor([0.3, -0.2], dtype=F64)
    solver = hf.fixed_point_solvers.Anderson(maxiter=60, rtol=1e-10)
    ours = solver.inner_solver(cell, init=lambda h: 0 * h, has_aux=True)
    fn = hf.implicit_diff(solve, fixed_point=cell, method="gmres", has_aux=True)
    z, stats = fn(h)
    close(hf.implicit_diff(ours, method="gmres")(h), (z, stats))
    close(
        hf.hypergrad_and_solution(ours, lambda z, h: z.sum(), method="gmres")(h)[1].solver_aux,
        stats,
    )
    assert isinstance(stats, hf.SolveStats)
    assert int(stats.result) == 0
    assert int(stats.num_steps) > 2
    close(z, cell(z, h), 1e-8)
    slope = (1 - z**2) / (1 - 0.5 * (1 - z**2))
    close(jacrev(lambda h: fn(h)[0])(h), torch.diag(slope), 1e-8)


ERRORS: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: hf.implicit_diff(lambda a: a, optimality=residual, has_aux=True)(A),
        TypeError,
        r"the inner solver returned Tensor; expected a tuple \(params, aux\), since has_aux=True",
    ),
    (
        lambda: hf.implicit_diff(newton, optimality=residual)(A),
        TypeError,
        r"'converged'\] is True .* If the inner solver returns \(params, aux\), pass has_aux",
    ),
    (
        lambda: hf.hypergrad(
            lambda a: (a.sqrt(), torch.tensor(3)),
            lambda w, a: w[0].sum(),
            optimality=lambda w, a: w[0] ** 2 - a,
        )(A),
        ValueError,
        "the output of optimality has another structure .* solver_has_aux=True to hypergrad",
    ),
    (
        lambda: vmap(
            hf.implicit_diff(
                lambda a: (a.sqrt(), str(a.item())), optimality=lambda w, a: w**2 - a, has_aux=True
            )
        )(A),
        ValueError,
        "the inner solver returned aux of another structure for one task than for another",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors_of_aux(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


# Windows of steps --------------------------------------------------------------------------------

generator = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=generator, dtype=F64)
Y = torch.randn(12, generator=generator, dtype=F64)
K = 4
H = {"reg": torch.tensor(-1.0, dtype=F64), "lr": torch.tensor(0.1, dtype=F64)}
W = torch.zeros(3, dtype=F64)


def loss(w: Tensor, h: dict[str, Tensor], *args: Any) -> Tensor:
    return ((X @ w - Y) ** 2).mean() + h["reg"].exp() * (w**2).sum()


def away(w: Tensor, h: dict[str, Tensor], *args: Any) -> Tensor:
    return ((w - 1) ** 2).sum()


ADAM = hf.optim.adam(lr=hf.optim.schedule(lambda h, step: h["lr"] * 0.9**step))


def window(**options: Any) -> Any:
    return hf.minimize(
        loss, ADAM, K, init=lambda h, w, s: w, init_state=lambda h, w, s: s, **options
    )


def by_hand(h: dict[str, Tensor], w: Tensor, s: Any, num_steps: int = K) -> Any:
    traces: list[tuple[Tensor, Tensor]] = []
    for _ in range(num_steps):
        g = grad(loss)(w, h)
        traces.append((loss(w, h).detach(), g.detach().norm()))
        w, s = ADAM.update(g, s, w, h)
    return away(w, h), (w, s, traces)


@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", hf.Reverse("sqrt"), "forward"])
def test_the_state_goes_on_from_window_to_window(method: Any) -> None:
    fn = hf.hypergrad_and_solution(window(trace=True), away, method=method)
    w = here = W
    s = state = ADAM.init(W)
    for number in range(1, 4):
        expected, (w, s, traces) = grad(by_hand, has_aux=True)(H, w, s)
        grads, solution = fn(H, here, state)
        here, (state, num_steps, losses, norms) = solution.params, solution.solver_aux
        close((grads, here, state), (expected, w, s))
        close(losses, torch.stack([loss for loss, _ in traces]))
        close(norms, torch.stack([norm for _, norm in traces]))
        assert int(num_steps) == K
        assert int(state.step) == K * number
    tasks = {"reg": H["reg"].expand(2), "lr": torch.stack([H["lr"], 2 * H["lr"]])}
    grads, solution = vmap(fn, in_dims=(0, None, None))(tasks, here, state)
    for i in range(2):
        one = fn({key: value[i] for key, value in tasks.items()}, here, state)
        close(torch.utils._pytree.tree_map(lambda x, i=i: x[i], (grads, solution)), one)
    # the state among the params of an iteration is the same, and so are steps in one
    params = {"w": W, "s": ADAM.init(W)}

    def step(p: Any, h: Any, *args: Any) -> Any:
        w, s = ADAM.update(grad(loss)(p["w"], h), p["s"], p["w"], h)
        return {"w": w, "s": s}

    iterated = hf.iterate(step, K, init=lambda h, p: p)
    for _ in range(3):
        grads, solution = hf.hypergrad_and_solution(
            iterated, lambda p, h, *args: away(p["w"], h), method=method
        )(H, params)
        params = solution.params
    close((grads, params), (expected, {"w": w, "s": s}))
    close(by_hand(H, W, ADAM.init(W), 3 * K)[1][:2], (w, s))


def test_implicit_methods_and_plain_calls_carry_the_state() -> None:
    start = (W, ADAM.init(W))
    w, s = by_hand(H, *start)[1][:2]
    params, aux = window(has_aux=True)(H, *start)
    close((params, aux.state), (w, s))
    assert aux.losses == aux.grad_norms == ()
    assert torch.is_tensor(window()(H, *start))
    grads, solution = hf.hypergrad_and_solution(window(trace=True), away, method="cg")(H, *start)
    close(solution.solver_aux.state, s)
    plain = hf.hypergrad(window(), away, method="cg")(H, *start)
    close(grads, plain)
    differentiable = hf.implicit_diff(window(has_aux=True), method="cg")
    params, aux = differentiable(H, *start)
    close((params, aux.state), (w, s))
    close(grad(lambda h: away(differentiable(h, *start)[0], h))(H), plain)
    leaf = {key: value.clone().requires_grad_() for key, value in H.items()}
    for method in ("first_order", hf.FirstOrder(init=lambda h, w, s: w + 0 * h["lr"])):
        grads, solution = hf.hypergrad_and_solution(window(trace=True), away, method=method)(
            H, *start
        )
        close(solution.solver_aux.state, s)
        assert hf.hypergrad(window(), away, method=method)(H, *start) == grads
    params, aux = window(has_aux=True)(leaf, *start)
    assert params.requires_grad
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(aux))


def test_an_early_stop_is_counted_for_each_task() -> None:
    solver = hf.minimize(
        lambda w, h: ((w - h) ** 2).sum() / 2,
        hf.optim.sgd(lr=0.5),
        40,
        init=torch.zeros_like,
        atol=1e-3,
        trace=True,
    )
    tasks = torch.tensor([[1.0, 2.0], [1e-2, 0.0], [100.0, 1.0]], dtype=F64)
    for fn in (solver, hf.implicit_diff(solver, method="reverse")):
        for size, task in enumerate(vmap(fn)(tasks)[1].num_steps):
            _, aux = fn(tasks[size])
            assert int(task) == int(aux.num_steps) == int(aux.state.step) < 40
            t = torch.arange(int(task), dtype=F64)
            norms = tasks[size].norm() * 0.5**t
            close(aux.grad_norms[: int(task)], norms)
            close(aux.losses[: int(task)], norms**2 / 2)
            assert aux.losses[int(task) :].isnan().all()
            assert not aux.losses[: int(task)].isnan().any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "forward"])
def test_compiled_windows_carry_the_state(method: Any) -> None:
    start = (W, ADAM.init(W))
    fn, compiled = (
        hf.hypergrad_and_solution(window(trace=True, compile=compile), away, method=method)
        for compile in (False, True)
    )
    close(compiled(H, *start), fn(H, *start))
    alone = window(trace=True, compile=True)
    close(alone(H, *start), window(trace=True)(H, *start))


def test_traces_are_of_the_whole_loss_and_change_nothing() -> None:
    proximal = hf.proximal(loss, weight=0.3, center=lambda h: torch.zeros(3, dtype=F64))

    def noisy(w: Tensor, h: Any, *args: Any) -> Tensor:
        return loss(w, h) * torch.rand((), dtype=F64)

    for inner in (proximal, noisy):
        results = []
        for trace in (False, True):
            solver = hf.minimize(
                *(inner, hf.optim.sgd(0.1), 3),
                init=lambda h: torch.zeros(3, dtype=F64),
                has_aux=True,
                trace=trace,
            )
            torch.manual_seed(3)
            results.append(solver(H))
        params, (state, num_steps, losses, norms) = results[1]
        close(params, results[0][0])
        assert int(num_steps) == int(state.step) == int(results[0][1].state.step) == 3
        torch.manual_seed(3)
        w = W
        for t in range(3):
            value = inner(w, H)
            factor = value / loss(w, H)
            close(losses[t], value)
            g = factor * grad(loss)(w, H) if inner is noisy else grad(inner)(w, H)
            close(norms[t], g.norm())
            w = w - 0.1 * g
        close(params, w)


def test_a_state_of_another_optimiser_is_refused() -> None:
    solver = functools.partial(
        hf.minimize, loss, ADAM, K, init=lambda h, w, s: w, init_state=lambda h, w, s: s
    )()
    with pytest.raises(ValueError, match="the state that init_state returned has another structu"):
        solver(H, W, hf.optim.sgd(0.1).init(W))
    with pytest.raises(ValueError, match=r"the leaf for optimizer.init.* has shape \(2,\)"):
        solver(H, W, ADAM.init(W[:2]))
    with pytest.raises(TypeError, match="minimize: init_state is 3 of type int"):
        hf.minimize(loss, ADAM, K, init=lambda h: W, init_state=3)  # type: ignore[arg-type]


def test_states_of_params_with_integers_are_mapped_and_go_on() -> None:
    start = {"w": torch.ones(2, dtype=F64), "count": torch.tensor(3)}
    options: dict[str, Any] = {"has_aux": True}

    def window(num_steps: int, **keywords: Any) -> Any:
        solver = hf.minimize(
            lambda w, h, *start: (w["w"] ** 2 * h).sum(),
            hf.optim.adam(0.1),
            num_steps,
            **keywords,
            **options,
        )
        return vmap(
            hf.hypergrad_and_solution(solver, lambda w, *_: (w["w"] ** 3).sum(), method="reverse")
        )

    h = torch.tensor([0.5, 0.7], dtype=F64)
    _, first = window(2, init=lambda h: start)(h)
    going_on = {"init": lambda h, w, state: w, "init_state": lambda h, w, state: state}
    _, second = window(3, **going_on)(h, first.params, first.solver_aux.state)
    _, whole = window(5, init=lambda h: start)(h)
    torch.testing.assert_close(second.params, whole.params)
    torch.testing.assert_close(second.solver_aux.state, whole.solver_aux.state)
