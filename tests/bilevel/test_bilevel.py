"""Stochastic bilevel loops: closed forms, single steps by hand, transforms, and real data."""

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import stochastic_bilevel
import torch
import warm_start
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State
from tests.cells import slow_but
from tests.problems import ravel, stack

N, M = 6, 4  # inner and outer batches
DIM, HDIM = 4, 3


def assert_close(a: Any, b: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# Quadratics --------------------------------------------------------------------------------------
#
#   inner:  w A_i w / 2 - w (B_i h + c_i)      outer:  |w - t_j|^2 / 2 + |h - s_j|^2 / 4


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The matrices of all batches, with a leading dimension."""

    A: Tensor
    B: Tensor
    c: Tensor
    t: Tensor
    s: Tensor

    def inner(self, i: Any) -> tuple[Tensor, ...]:
        return self.A[i], self.B[i], self.c[i]

    def outer(self, j: Any) -> tuple[Tensor, ...]:
        return self.t[j], self.s[j]

    def full(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The batches that hold everything."""
        return (self.A.mean(0), self.B.mean(0), self.c.mean(0)), (self.t.mean(0), self.s.mean(0))

    def optimum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Params, adjoint and hparams, from the value function in closed form."""
        (A, B, c), (t, s) = self.full()
        G, offset = torch.linalg.solve(A, B), torch.linalg.solve(A, c)
        hessian = G.T @ G + 0.5 * torch.eye(HDIM, dtype=A.dtype)
        h = torch.linalg.solve(hessian, G.T @ (t - offset) + 0.5 * s)
        w = G @ h + offset
        return w, torch.linalg.solve(A, w - t), h


@functools.cache
def quadratic(seed: int = 0) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = randn(N, DIM, DIM) / 4
    A = factors @ factors.mT + 0.6 * torch.eye(DIM, dtype=torch.float64)
    B = 0.2 * randn(N, DIM, HDIM) + torch.eye(DIM, HDIM, dtype=torch.float64)
    return Quadratic(A, B, randn(N, DIM), randn(M, DIM), randn(M, HDIM))


def inner_loss(params: Any, hparams: Any, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    w, h = ravel(params), ravel(hparams)
    return 0.5 * w @ A @ w - w @ (B @ h + c)


def outer_loss(params: Any, hparams: Any, t: Tensor, s: Tensor) -> Tensor:
    return 0.5 * ((ravel(params) - t) ** 2).sum() + 0.25 * ((ravel(hparams) - s) ** 2).sum()


def start() -> tuple[Any, Any]:
    """Params and hparams as trees, with a 0-d leaf."""
    zeros = torch.zeros(5, dtype=torch.float64)
    return {"a": [zeros[:3].clone()], "b": zeros[3].clone()}, (zeros[:1].clone(), zeros[:2].clone())


T, Q = 3, 4


def make(name: str, **keywords: Any) -> Loop:
    settings: dict[str, Any] = {"inner_lr": 0.4, "outer_lr": 0.1}
    if name == "saba":
        settings |= {"num_inner_batches": N, "num_outer_batches": M}
    if name in ("stocbio", "amigo"):
        settings |= {"num_inner_steps": T, "num_adjoint_steps": Q}
    return getattr(hf.bilevel, name)(inner_loss, outer_loss, **(settings | keywords))


LOOPS = ["soba", "saba", "stocbio", "amigo"]


def batches(name: str, problem: Quadratic, i: Tensor, j: Tensor, copies: int = T + Q + 1) -> Any:
    """What update takes after the state, for the indices of this step."""
    if name in ("stocbio", "amigo"):
        return problem.inner(i[:copies]), problem.outer(j)
    pair = problem.inner(i[0]), problem.outer(j)
    return (*pair, i[0], j) if name == "saba" else pair


def draw(num_steps: int, seed: int = 0, width: int = T + Q + 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(N, (num_steps, width), generator=generator)
    j = torch.randint(M, (num_steps,), generator=generator)
    return list(zip(i, j, strict=True))


def run(name: str, loop: Loop, num_steps: int, problem: Quadratic | None = None) -> State:
    problem = problem or quadratic()
    state = loop.init(*start())
    for i, j in draw(num_steps):
        state = loop.update(state, *batches(name, problem, i, j))
    return state


def distance(state: State, problem: Quadratic | None = None) -> float:
    """Of all three variables together from the optimum."""
    w, u, h = (problem or quadratic()).optimum()
    found = torch.cat([ravel(state.params), ravel(state.adjoint), ravel(state.hparams)])
    return (found - torch.cat([w, u, h])).norm().item()


def average(problem: Quadratic) -> Quadratic:
    """The problem all of whose batches are the same."""
    leaves = (leaf.mean(0, keepdim=True).expand_as(leaf) for leaf in dataclasses.astuple(problem))
    return Quadratic(*leaves)


# For a run without noise: adjoint steps (the series of stocbio must be long), updates, step size.
EXACT = {
    "soba": (0, 250, 0.9),
    "saba": (0, 700, 0.3),
    "stocbio": (20, 50, 0.9),
    "amigo": (2, 80, 0.9),
}


@pytest.mark.parametrize("name", LOOPS)
def test_without_noise_every_loop_finds_the_optimum(name: str) -> None:
    problem = average(quadratic())
    assert_close(problem.optimum(), quadratic().optimum())
    num_adjoint_steps, num_updates, inner_lr = EXACT[name]
    keywords: dict[str, Any] = {"inner_lr": inner_lr}
    if num_adjoint_steps:
        keywords |= {"num_adjoint_steps": num_adjoint_steps, "outer_lr": 0.3}
    loop = make(name, **keywords)
    state = loop.init(*start())
    copies = T + num_adjoint_steps + 1
    for i, j in draw(num_updates, width=copies):
        state = loop.update(state, *batches(name, problem, i, j, copies))
    assert distance(state) < 1e-8
    assert state.step == num_updates


def test_a_short_series_is_biased_and_a_carried_adjoint_is_not() -> None:
    problem = average(quadratic())
    far, near = (
        distance(run(name, _truncated(make(name, num_adjoint_steps=1)), 150, problem))
        for name in ("stocbio", "amigo")
    )
    assert near < 1e-7
    assert far > 1e-2


def _truncated(loop: Loop) -> Loop:
    """A loop with one adjoint step, on the batches that are made for Q of them."""

    def update(state: State, inner: Any, outer: Any) -> State:
        return loop.update(state, optree.tree_map(lambda leaf: leaf[: T + 2], inner), outer)

    return Loop(loop.init, update)


@pytest.mark.slow
def test_variance_reduction_and_decreasing_steps() -> None:
    """SABA converges with constant steps, SOBA with decreasing ones only."""
    decreasing = {
        "inner_lr": hf.bilevel.power_decay(0.6, 0.4),
        "outer_lr": hf.bilevel.power_decay(0.3, 0.6),
    }
    assert distance(run("saba", make("saba", outer_lr=0.05), 900)) < 1e-7
    soba = distance(run("soba", make("soba", outer_lr=0.05), 900))
    assert soba > 0.1
    assert distance(run("soba", make("soba", **decreasing), 900)) < 0.5 * soba


# Single steps by hand ----------------------------------------------------------------------------


def random_state(loop: Loop) -> State:
    generator = torch.Generator().manual_seed(7)
    return optree.tree_map(
        lambda leaf: (
            torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            if leaf.is_floating_point()
            else leaf
        ),
        loop.init(*start()),
    )


def vectors(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return ravel(state.params), ravel(state.adjoint), ravel(state.hparams)


def test_a_step_of_soba() -> None:
    problem, loop = quadratic(), make("soba", adjoint_lr=0.3)
    state = random_state(loop)
    w, u, h = vectors(state)
    (A, B, c), (t, s) = problem.inner(2), problem.outer(1)
    new = loop.update(state, (A, B, c), (t, s))
    expected = (
        w - 0.4 * (A @ w - B @ h - c),
        u - 0.3 * (A @ u - (w - t)),
        h - 0.1 * (0.5 * (h - s) + B.T @ u),
    )
    assert_close(vectors(new), expected)
    assert_close(new.step, torch.tensor(1), 0)


def test_a_step_of_saba() -> None:
    problem, loop = quadratic(), make("saba", adjoint_lr=0.3)
    state = random_state(loop)
    w, u, h = vectors(state)
    i, j = 2, 1
    (A, B, c), (t, s) = problem.inner(i), problem.outer(j)
    seen = (A @ w - B @ h - c, A @ u, -B.T @ u, w - t, 0.5 * (h - s))
    old = [
        torch.cat([leaf.flatten(1) for leaf in optree.tree_leaves(tree)], 1)
        for tree in [
            optree.tree_map(lambda leaf: leaf.reshape(leaf.shape[0], -1), table)
            for table in state.memory
        ]
    ]
    rows = (i, i, i, j, j)
    d = [g - table[k] + table.mean(0) for g, table, k in zip(seen, old, rows, strict=True)]
    new = loop.update(state, problem.inner(i), problem.outer(j), i, torch.tensor(j))
    expected = (w - 0.4 * d[0], u - 0.3 * (d[1] - d[3]), h - 0.1 * (d[4] - d[2]))
    assert_close(vectors(new), expected)
    for table, previous, g, k in zip(new.memory, old, seen, rows, strict=True):
        found = torch.cat(
            [
                leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None]
                for leaf in optree.tree_leaves(table)
            ],
            1,
        )
        assert_close(found[k], g)
        others = torch.arange(len(found)) != k
        assert_close(found[others], previous[others], 0)


@pytest.mark.parametrize("name", ["stocbio", "amigo"])
def test_a_step_of_the_double_loops(name: str) -> None:
    problem, loop = quadratic(), make(name, adjoint_lr=0.3)
    state = random_state(loop)
    w, u, h = vectors(state)
    i, j = torch.arange(T + Q + 1) % N, 3
    t, s = problem.outer(j)
    for k in range(T):
        A, B, c = problem.inner(i[k])
        w = w - 0.4 * (A @ w - B @ h - c)
    series = [w - t]
    for k in range(T, T + Q):
        A, _, _ = problem.inner(i[k])
        u = u - 0.3 * (A @ u - (w - t))
        series.append(series[-1] - 0.3 * A @ series[-1])
    if name == "stocbio":
        u = 0.3 * torch.stack(series).sum(0)
    _, B, _ = problem.inner(i[-1])
    h = h - 0.1 * (0.5 * (h - s) + B.T @ u)
    assert_close(vectors(loop.update(state, problem.inner(i), problem.outer(j))), (w, u, h))


def test_the_directions_of_saba_have_the_right_mean_whatever_the_memory() -> None:
    problem, loop = quadratic(), make("saba")
    state = random_state(loop)
    w, u, h = vectors(state)
    (A, B, c), (t, s) = problem.full()
    steps = [
        vectors(loop.update(state, problem.inner(i), problem.outer(j), i, j))
        for i in range(N)
        for j in range(M)
    ]
    mean = tuple(torch.stack(column).mean(0) for column in zip(*steps, strict=True))
    expected = (
        w - 0.4 * (A @ w - B @ h - c),
        u - 0.4 * (A @ u - (w - t)),
        h - 0.1 * (0.5 * (h - s) + B.T @ u),
    )
    assert_close(mean, expected)


def test_step_sizes_see_the_step() -> None:
    seen: list[int] = []

    def rate(step: Tensor) -> float:
        seen.append(int(step))
        return 0.1

    run("soba", make("soba", inner_lr=rate, outer_lr=torch.tensor(0.1)), 3)
    assert seen == [0, 0, 1, 1, 2, 2]  # params and adjoint
    still = run("amigo", make("amigo", inner_lr=0, outer_lr=0), 2)
    assert_close((still.params, still.hparams), start(), 0)
    decay = hf.bilevel.power_decay(2.0, 0.5)
    assert [decay(torch.tensor(k)).item() for k in (0, 3, 99)] == [2.0, 1.0, 0.2]


# A pure transform --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_vmap_over_problems_is_a_loop(name: str) -> None:
    loop = make(name, inner_lr=hf.bilevel.power_decay(0.3, 0.5))
    tasks = [quadratic(seed) for seed in range(3)]
    plans = [draw(3, seed) for seed in range(3)]
    expected = []
    for task, plan in zip(tasks, plans, strict=True):
        state = loop.init(*start())
        for i, j in plan:
            state = loop.update(state, *batches(name, task, i, j))
        expected.append(state)
    states = vmap(loop.init)(*stack([start()] * 3))
    for step in range(3):
        inputs = [batches(name, task, *plan[step]) for task, plan in zip(tasks, plans, strict=True)]
        states = vmap(loop.update)(states, *stack(inputs))
    assert_close(states, stack(expected))


@pytest.mark.parametrize("name", LOOPS)
def test_a_run_that_is_saved_and_loaded_goes_on(name: str) -> None:
    loop, plan = make(name), draw(6)
    state = loop.init(*start())
    half = None
    for step, (i, j) in enumerate(plan):
        if step == 3:
            buffer = io.BytesIO()
            torch.save(list(optree.tree_leaves(state)), buffer)
            structure = optree.tree_structure(state)
        state = loop.update(state, *batches(name, quadratic(), i, j))
    buffer.seek(0)
    half = optree.tree_unflatten(structure, torch.load(buffer, weights_only=True))
    assert half.step == 3
    for i, j in plan[3:]:
        half = loop.update(half, *batches(name, quadratic(), i, j))
    assert_close(half, state, 0)


@pytest.mark.parametrize("name", LOOPS)
def test_a_state_is_stored_by_torch_save(name: str) -> None:
    loop = make(name)
    state = run(name, loop, 2)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, State)
    assert_close(loaded, state, 0)
    i, j = draw(1)[0]
    inputs = batches(name, quadratic(), i, j)
    assert_close(loop.update(loaded, *inputs), loop.update(state, *inputs), 0)


@pytest.mark.parametrize("name", LOOPS)
def test_a_state_shares_no_memory_with_the_start(name: str) -> None:
    loop, (params, hparams) = make(name), start()
    state = loop.init(params, hparams)
    params["a"][0].add_(1.0)
    hparams[0].add_(1.0)
    assert_close((state.params, state.hparams), start(), 0)


# Evaluations of the inner and of the outer loss in one update.
ORACLES = {"soba": (1, 1), "saba": (1, 1), "stocbio": (T + Q + 1, 1), "amigo": (T + Q + 1, 1)}


@pytest.mark.parametrize("name", LOOPS)
def test_one_set_of_oracle_calls_in_an_update(name: str) -> None:
    """The gradient, the product and the cross product of `soba` and `saba` come of one graph."""
    calls: dict[Any, list[int]] = {inner_loss: [], outer_loss: []}

    def counted(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: calls[loss].append(1) or loss(*args)

    keywords = {"inner_lr": 0.4, "outer_lr": 0.1}
    keywords |= {
        "soba": {},
        "saba": {"num_inner_batches": N, "num_outer_batches": M},
        "stocbio": {"num_inner_steps": T, "num_adjoint_steps": Q},
        "amigo": {"num_inner_steps": T, "num_adjoint_steps": Q},
    }[name]
    loop = getattr(hf.bilevel, name)(counted(inner_loss), counted(outer_loss), **keywords)
    state = loop.init(*start())
    i, j = draw(1)[0]
    inputs = batches(name, quadratic(), i, j)
    loop.update(state, *inputs)
    assert (len(calls[inner_loss]), len(calls[outer_loss])) == ORACLES[name]
    for seen in calls.values():
        seen.clear()
    vmap(loop.update)(stack([state] * 2), *stack([inputs] * 2))
    assert (len(calls[inner_loss]), len(calls[outer_loss])) == ORACLES[name]


@pytest.mark.parametrize("name", LOOPS)
def test_nothing_is_written_to_and_no_graph_is_kept(name: str) -> None:
    loop = make(name)
    params, hparams = optree.tree_map(lambda leaf: leaf.requires_grad_(), start())
    state = loop.init(params, hparams)
    before = optree.tree_map(torch.clone, state)
    i, j = draw(1)[0]
    new = loop.update(state, *batches(name, quadratic(), i, j))
    assert_close(loop.update(state, *batches(name, quadratic(), i, j)), new, 0)
    assert_close(state, before, 0)
    assert all(leaf.grad is None for leaf in optree.tree_leaves((params, hparams)))
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves((state, new)))


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch.compile of 2.4 cannot trace optree")
@pytest.mark.parametrize("name", slow_but("saba", of=["saba", "amigo"]))
def test_an_update_compiles_into_one_graph(name: str) -> None:
    loop = make(name, inner_lr=hf.bilevel.power_decay(0.3, 0.5))
    state = loop.init(*start())
    compiled = torch.compile(loop.update, fullgraph=True, backend="eager")
    for i, j in draw(2):
        inputs = batches(name, quadratic(), i, j)
        expected = loop.update(state, *inputs)
        assert_close(compiled(state, *inputs), expected)
        state = expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOOPS)
def test_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    loop = make(name, inner_lr=hf.bilevel.power_decay(0.3, 0.5))
    exact = run(name, loop, 2)
    problem = Quadratic(*(leaf.to(dtype) for leaf in dataclasses.astuple(quadratic())))
    state = loop.init(*optree.tree_map(lambda leaf: leaf.to(dtype), start()))
    for i, j in draw(2):
        state = loop.update(state, *batches(name, problem, i, j))
    tol = 30 * torch.finfo(dtype).eps
    for a, b in zip(vectors(state), vectors(exact), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol)


# Real data ---------------------------------------------------------------------------------------


@functools.cache
def digits(noise: float) -> tuple[Tensor, ...]:
    """Two halves of the digits, centred; a share of the labels of the first half is drawn anew."""
    X, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)[:1600]
    X, y = torch.tensor(X / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    X = X - X.mean(0)
    noisy = y[:800].clone()
    corrupted = torch.rand(800, generator=generator) < noise
    noisy[corrupted] = (noisy + torch.randint(1, 10, (800,), generator=generator))[corrupted] % 10
    return X[:800], noisy, corrupted, X[800:], y[800:]


def train(name: str, losses: Any, hparams: Tensor, num_steps: int, batch: int, **lrs: Any) -> State:
    """A loop on batches of the digits, each with its indices."""
    X, y, _, X_val, y_val = digits(0.3)
    inner_steps = {"num_inner_steps": 2, "num_adjoint_steps": 2}
    tables = {"num_inner_batches": len(y) // batch, "num_outer_batches": len(y) // batch}
    more = {"soba": {}, "saba": tables, "stocbio": inner_steps, "amigo": inner_steps}[name]
    loop = getattr(hf.bilevel, name)(*losses, **lrs, **more)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.arange(len(y)).reshape(-1, batch)
    width = 5 if name in ("stocbio", "amigo") else 1
    inner = torch.randint(len(blocks), (num_steps, width), generator=generator)
    outer = torch.randint(len(blocks), (num_steps,), generator=generator)
    state = loop.init(torch.zeros(64, 10), hparams)
    for i, j in zip(inner, outer.tolist(), strict=True):
        chosen = blocks[i] if width > 1 else blocks[i[0]]
        inputs = (X[chosen], y[chosen], chosen), (X_val[blocks[j]], y_val[blocks[j]])
        indices = (int(i[0]), j) if name == "saba" else ()
        state = loop.update(state, *inputs, *indices)
    return state


cross_entropy = torch.nn.functional.cross_entropy


@pytest.mark.parametrize("name", slow_but(of=LOOPS))
def test_hyper_cleaning_finds_the_wrong_labels(name: str) -> None:
    def inner(W: Tensor, weights: Tensor, X: Tensor, y: Tensor, i: Tensor) -> Tensor:
        losses = cross_entropy(X @ W, y, reduction="none")
        return (weights[i].sigmoid() * losses).mean() + 2e-3 * (W**2).sum()

    def outer(W: Tensor, weights: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(X @ W, y)

    steps = 1000 if name in ("soba", "saba") else 400
    lrs = {"inner_lr": 0.5, "outer_lr": 100.0 if name in ("soba", "saba") else 200.0}
    state = train(name, (inner, outer), torch.zeros(800), steps, 40, **lrs)
    _, _, corrupted, X_val, y_val = digits(0.3)
    assert roc_auc_score(~corrupted, state.hparams) > 0.9
    fixed = train("soba", (inner, outer), torch.zeros(800), steps, 40, inner_lr=0.5, outer_lr=0)
    assert outer(state.params, None, X_val, y_val) < 0.8 * outer(fixed.params, None, X_val, y_val)


def regularised(W: Tensor, reg: Tensor, X: Tensor, y: Tensor, i: Any = None) -> Tensor:
    return cross_entropy(X @ W, y) + 0.5 * (reg.exp()[:, None] * W**2).sum()


@pytest.mark.parametrize("name", slow_but("stocbio", of=LOOPS))
def test_regularisation_of_logistic_regression_nears_the_optimum(name: str) -> None:
    """The value function at the hparams that a loop finds, beside that of full-batch AID."""
    _, _, _, X_val, y_val = digits(0.3)

    def outer(W: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(X @ W, y)

    first, best = regularisation()
    steps = 600 if name in ("soba", "saba") else 250
    start = torch.full((64,), -5.0)
    state = train(name, (regularised, outer), start, steps, 80, inner_lr=1.0, outer_lr=30.0)
    found = outer(solve_regularised(state.hparams), state.hparams, X_val, y_val)
    assert found - best < 0.4 * (first - best)


def solve_regularised(reg: Tensor) -> Tensor:
    X, y, _, _, _ = digits(0.3)
    W = torch.zeros(64, 10, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = regularised(W, reg, X, y)
        loss.backward(inputs=[W])
        return loss

    optimizer.step(closure)
    return W.detach()


@functools.cache
def regularisation() -> tuple[Tensor, Tensor]:
    """The value function at the start and at the best point of full-batch AID with Adam."""
    X, y, _, X_val, y_val = digits(0.3)
    fn = hf.hypergrad_and_value(
        lambda reg, X, y: solve_regularised(reg),
        lambda W, reg, X, y: cross_entropy(X_val @ W, y_val),
        inner_loss=regularised,
        method=hf.CG(maxiter=50, rtol=1e-3),
    )
    reg = torch.full((64,), -5.0)
    values = []
    optimizer = hf.optim.adam(lr=0.5)
    memory = optimizer.init(reg)
    for _ in range(18):
        grads, value = fn(reg, X, y)
        reg, memory = optimizer.update(grads, memory, reg)
        values.append(value)
    return values[0], min(values)


# Bad input ---------------------------------------------------------------------------------------

losses = (inner_loss, outer_loss)
rates = {"inner_lr": 0.1, "outer_lr": 0.1}
soba, saba, amigo = make("soba"), make("saba"), make("amigo")
state = soba.init(*start())
inner_batch, outer_batch = quadratic().full()
wide = quadratic().inner(torch.zeros(T + Q + 1, dtype=torch.int64))
MISUSE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no loss": (
        lambda: hf.bilevel.soba(3.0, outer_loss, **rates),
        TypeError,
        r"soba: inner_loss is 3\.0 of type float; expected a function \(params, hparams, \*batch\)",
    ),
    "negative rate": (
        lambda: hf.bilevel.amigo(*losses, inner_lr=-1, outer_lr=1),
        ValueError,
        r"amigo: inner_lr is -1; expected a finite number >= 0",
    ),
    "rate that is none": (
        lambda: hf.bilevel.soba(*losses, inner_lr="1", outer_lr=1),
        TypeError,
        r"soba: inner_lr is '1' of type str; expected a number or a function of the step",
    ),
    "rate that is a vector": (
        lambda: hf.bilevel.soba(*losses, inner_lr=torch.ones(2), outer_lr=1),
        TypeError,
        r"soba: inner_lr is a tensor of shape \(2,\) .* expected a 0-d floating-point tensor",
    ),
    "schedule of no number": (
        lambda: make("soba", outer_lr=lambda step: None).update(state, inner_batch, outer_batch),
        TypeError,
        r"soba: outer_lr\(step\) is None of type NoneType; expected a number",
    ),
    "schedule that grows negative": (
        lambda: make("soba", outer_lr=lambda step: -1.0).update(state, inner_batch, outer_batch),
        ValueError,
        r"soba: outer_lr\(step\) is -1\.0; expected a finite number >= 0",
    ),
    "no batches": (
        lambda: hf.bilevel.saba(*losses, num_inner_batches=0, num_outer_batches=2, **rates),
        ValueError,
        r"saba: num_inner_batches is 0; expected an integer >= 1",
    ),
    "no steps": (
        lambda: hf.bilevel.amigo(*losses, num_adjoint_steps=0, **rates),
        ValueError,
        r"amigo: num_adjoint_steps is 0; expected an integer >= 1",
    ),
    "batch that is no tuple": (
        lambda: soba.update(state, inner_batch[0], outer_batch),
        TypeError,
        r"soba: inner_batch is of type Tensor; expected the tuple of arguments .* Write \(X, y\)",
    ),
    "outer batch that is no tuple": (
        lambda: amigo.update(state, wide, list(outer_batch)),
        TypeError,
        r"amigo: outer_batch is of type list; .* in outer_loss",
    ),
    "batches without a leading dimension": (
        lambda: amigo.update(state, inner_batch, outer_batch),
        ValueError,
        r"amigo: inner_batches\[0\] has shape \(4, 4\); expected a leading dimension of size "
        r"num_inner_steps \+ num_adjoint_steps \+ 1 = 8",
    ),
    "batches of numbers": (
        lambda: amigo.update(state, (1.0, *wide[1:]), outer_batch),
        TypeError,
        r"amigo: inner_batches\[0\] is of type float; expected a tensor with a leading dimension",
    ),
    "state that is none": (
        lambda: soba.update(start(), inner_batch, outer_batch),
        TypeError,
        r"soba: state is of type tuple; expected a State\. Write state = loop\.init",
    ),
    "state of another loop": (
        lambda: saba.update(state, inner_batch, outer_batch, 0, 0),
        TypeError,
        r"saba: state\.memory is not a Memory; make the state with the init of saba itself",
    ),
    "index out of range": (
        lambda: saba.update(saba.init(*start()), inner_batch, outer_batch, 0, M),
        ValueError,
        r"saba: outer_index is 4; expected an integer in \[0, 4\)",
    ),
    "index that is a float": (
        lambda: saba.update(saba.init(*start()), inner_batch, outer_batch, 0.0, 0),
        TypeError,
        r"saba: inner_index is 0\.0 of type float; expected an integer or a 0-d integer tensor",
    ),
    "indices of several batches": (
        lambda: saba.update(saba.init(*start()), inner_batch, outer_batch, torch.zeros(2), 0),
        TypeError,
        r"saba: inner_index is a tensor of shape \(2,\) and dtype torch\.float32",
    ),
    "loss that is no scalar": (
        lambda: hf.bilevel.soba(lambda w, h: ravel(w), outer_loss, **rates).update(
            state, (), outer_batch
        ),
        ValueError,
        r"soba: inner_loss returned a tensor of shape \(4,\); expected a scalar",
    ),
    "integer params": (
        lambda: soba.init({"w": torch.arange(3)}, torch.zeros(3)),
        TypeError,
        r"params\['w'\] has dtype torch\.int64; expected a floating-point tensor",
    ),
    "decay from zero": (
        lambda: hf.bilevel.power_decay(0.0, 0.5),
        ValueError,
        r"power_decay: initial is 0\.0; expected a finite number > 0",
    ),
    "growth": (
        lambda: hf.bilevel.power_decay(1.0, -0.5),
        ValueError,
        r"power_decay: exponent is -0\.5; expected a finite number >= 0",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        call()


# The examples ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_the_loops(tmp_path: Path) -> None:
    results = stochastic_bilevel.main(["--scale", "0.02", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "picture.png"}
    for runs in results.values():
        for run in runs.values():
            assert run["suboptimality"][-1] < run["suboptimality"][0]


@pytest.mark.slow
def test_the_example_of_warm_starts(tmp_path: Path) -> None:
    rows = warm_start.main(["--steps", "10", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "picture.png"}
    cold, warm = rows["cold"], rows["warm params and adjoint"]
    assert warm["products"] < 0.8 * cold["products"]
    assert warm["gradients"] < 0.8 * cold["gradients"]
    assert abs(warm["value"] - cold["value"]) < 1e-3 * cold["value"]
