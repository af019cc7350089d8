"""StochasticAID: against FixedPoint, in expectation, under transforms, and what it refuses."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import hyperfunc as hf
from tests import problems
from tests.cells import thinned
from tests.problems import PROBLEMS, Problem, ravel

pytestmark = pytest.mark.filterwarnings(
    # torch's forward mode compiles its rules by a deprecated function when first used.
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)

CONFIDENCE = 0.999
NUM_SAMPLES, BATCH, DIM = 24, 4, 3


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.name)
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param


def assert_close(a: Any, b: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# A regression whose data are sampled: mean over samples, one regulariser a feature ---------------


def inner_loss(w: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).mean() + 0.5 * (reg.exp() * w**2).sum()


def descent_map(w: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return w - 0.2 * (X.T @ (X @ w - y) / y.shape[0] + reg.exp() * w)


def outer_loss(w: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return ((X @ w - 2 * y) ** 2).mean() + (reg * w).sum()


def solver(reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
    n = y.shape[0]
    return torch.linalg.solve(X.mT @ X / n + torch.diag_embed(reg.exp()), X.mT @ y / n)


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hyperparameters, inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(NUM_SAMPLES, DIM, generator=generator, dtype=torch.float64)
    y = torch.randn(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    return torch.linspace(-2, 0, DIM, dtype=torch.float64), X, y


def draw_indices(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(NUM_SAMPLES, shape, generator=torch.Generator().manual_seed(seed))


def take(indices: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda step, X, y: (X[indices[step]], y[indices[step]])


def estimate(method: Any, *args: Any, **keywords: Any) -> tuple[Any, hf.Solution]:
    return hf.hypergrad_and_solution(solver, outer_loss, inner_loss=inner_loss, method=method)(
        *args, **keywords
    )


STEP = hf.optim.sgd(lr=0.2)
STOCHASTIC = hf.StochasticAID(
    6,
    STEP,
    sampler=take(draw_indices(10, BATCH)),
    outer_sampler=take(draw_indices(3, BATCH, seed=1)),
    num_outer_batches=3,
    num_cross_batches=4,
)

INNER = dataclasses.replace(STOCHASTIC, outer_sampler=None, num_outer_batches=1)


def by_hand(
    method: hf.StochasticAID, reg: Tensor, X: Tensor, y: Tensor, lr: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Hypergradient and adjoint of algorithm 1 with plain steps, from the formulas of the data."""
    w = solver(reg, X, y)
    dw, dh = (
        sum(each) / method.num_outer_batches
        for each in zip(
            *(
                grad(outer_loss, argnums=(0, 1))(w, reg, *method.outer_sampler(j, X, y))
                for j in range(method.num_outer_batches)
            ),
            strict=True,
        )
    )
    u = torch.zeros_like(w)
    for step in range(method.num_steps):
        batch, targets = method.sampler(step, X, y)
        A = batch.T @ batch / len(targets) + torch.diag(reg.exp())
        u = u - lr * (A @ u - dw)
    # the derivative of the regulariser does not depend on the samples
    return dh - reg.exp() * w * u, u


# Full batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["zero", "outer_gradient", "adjoint_init"])
def test_full_batches_and_plain_steps_are_the_fixed_point_iteration(
    problem: Problem, start: str
) -> None:
    hparams, args = problem.tasks()[0]
    compute = functools.partial(
        hf.hypergrad_and_solution, problem.inner_solver, problem.outer_loss, **problem.keywords
    )
    init = None
    if start != "zero":
        params = problem.inner_solver(hparams, *args)
        init = grad(problem.outer_loss)(params, hparams, *args)
    optimizer = hf.optim.sgd(lr=problem.step_size)
    name = start if start == "outer_gradient" else "zero"
    for num_steps in (1, 12):
        fixed_point = hf.FixedPoint(num_steps, rtol=0, step_size=problem.step_size)
        expected, reference = compute(method=fixed_point)(hparams, *args, adjoint_init=init)
        method = hf.StochasticAID(num_steps, optimizer, start=name)
        keywords = {"adjoint_init": init} if start == "adjoint_init" else {}
        grads, solution = compute(method=method)(hparams, *args, **keywords)
        assert_close(ravel(grads), ravel(expected))
        assert_close(ravel(solution.adjoint), ravel(reference.adjoint))
        assert solution.stats.num_steps == num_steps
        assert_close(solution.stats.residual_norm, reference.stats.residual_norm)


def test_the_short_name_and_the_identity_sampler(problem: Problem) -> None:
    hparams, args = problem.tasks()[1]
    transform = functools.partial(
        hf.hypergrad, problem.inner_solver, problem.outer_loss, **problem.keywords
    )
    if problem.step_size == 1.0:
        assert_close(
            ravel(transform(method="stoch_aid")(hparams, *args)),
            ravel(transform(method=hf.FixedPoint(100, rtol=0))(hparams, *args)),
        )
    method = hf.StochasticAID(8, hf.optim.sgd(lr=problem.step_size))
    sampled = dataclasses.replace(
        method,
        sampler=lambda step, *args: args,
        outer_sampler=lambda step, *args: args,
        num_cross_batches=3,
        num_outer_batches=2,
    )
    assert_close(
        ravel(transform(method=sampled)(hparams, *args)),
        ravel(transform(method=method)(hparams, *args)),
        1e-14,
    )


@pytest.mark.parametrize("problem", thinned(PROBLEMS))
def test_second_derivatives_without_a_sampler_are_right(problem: Problem) -> None:
    hparams, args = problem.tasks()[0]
    unravel = problems.unraveller(hparams)
    method = hf.StochasticAID(120, hf.optim.sgd(lr=problem.step_size))
    solve = hf.implicit_diff(problem.inner_solver, method=method, **problem.keywords)
    result = hessian(
        lambda v: problem.outer_loss(solve(unravel(v), *args), unravel(v), *args),
    )(ravel(hparams))
    assert_close(result, problem.reference("hessian"), 1e-9)


# Minibatches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["inner_loss", "fixed_point"])
def test_every_minibatch_is_used_where_it_should_be(condition: str) -> None:
    reg, X, y = data()
    expected, adjoint = by_hand(STOCHASTIC, reg, X, y)
    keywords: dict[str, Any] = {"inner_loss": inner_loss, "method": STOCHASTIC}
    if condition == "fixed_point":
        # its operator is 0.2 times that of the loss
        method = dataclasses.replace(STOCHASTIC, optimizer=hf.optim.sgd(lr=1.0))
        keywords = {"fixed_point": descent_map, "method": method}
        adjoint = adjoint / 0.2
    compute = hf.hypergrad_and_solution(solver, outer_loss, **keywords)
    grads, solution = compute(reg, X, y)
    assert_close(grads, expected)
    assert_close(solution.adjoint, adjoint)
    values = [
        outer_loss(solution.params, reg, *STOCHASTIC.outer_sampler(j, X, y)) for j in range(3)
    ]
    assert_close(solution.value, torch.stack(values).mean())


def test_the_cross_term_is_a_mean_over_the_minibatches_after_the_steps() -> None:
    """The samples are weighted by hparams here, so that the cross term depends on the minibatch."""
    reg, X, y = data()
    weights = torch.linspace(-1, 1, NUM_SAMPLES, dtype=torch.float64)
    indices = torch.arange(NUM_SAMPLES)

    def weighted(w: Tensor, hparams: Tensor, X: Tensor, y: Tensor, i: Tensor) -> Tensor:
        losses = 0.5 * hparams[i].sigmoid() * (X @ w - y) ** 2
        return losses.mean() + 0.5 * (reg.exp() * w**2).sum()

    def weighted_solver(hparams: Tensor, X: Tensor, y: Tensor, i: Tensor) -> Tensor:
        D = hparams.sigmoid()[:, None] / NUM_SAMPLES
        return torch.linalg.solve(X.T @ (D * X) + torch.diag(reg.exp()), X.T @ (D[:, 0] * y))

    drawn = draw_indices(10, BATCH)
    method = hf.StochasticAID(
        6,
        STEP,
        sampler=lambda step, X, y, i: (X[drawn[step]], y[drawn[step]], i[drawn[step]]),
        num_cross_batches=4,
    )
    grads, solution = hf.hypergrad_and_solution(
        weighted_solver, lambda w, *rest: (w**2).sum(), inner_loss=weighted, method=method
    )(weights, X, y, indices)
    w, u = solution.params, solution.adjoint
    expected = torch.zeros(NUM_SAMPLES, dtype=torch.float64)
    for i in drawn[6:].flatten():
        s = weights[i].sigmoid()
        expected[i] -= s * (1 - s) * (X[i] @ w - y[i]) * (X[i] @ u) / (4 * BATCH)
    assert_close(grads, expected)


def test_a_regulariser_in_closed_form_is_not_sampled() -> None:
    _, X, y = data()
    center = torch.linspace(-2, 0, DIM, dtype=torch.float64)

    def loss(w: Tensor, center: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).mean()

    def whole(w: Tensor, center: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return loss(w, center, X, y) + 0.35 * ((w - center) ** 2).sum()

    results = [
        hf.hypergrad_and_solution(solver, outer_loss, inner_loss=inner, method=STOCHASTIC)(
            center, X, y
        )
        for inner in (whole, hf.proximal(loss, 0.7))
    ]
    assert_close(results[1], results[0])


def test_the_forms_of_a_sampler_agree() -> None:
    reg, X, y = data()
    indices = draw_indices(10, BATCH)
    expected = estimate(STOCHASTIC, reg, X, y)
    tree = dataclasses.replace(STOCHASTIC, sampler=(X[indices], y[indices]))
    # from zero the first step needs no product, and so draws no minibatch
    order = [*range(1, 6), *range(6, 10)]
    iterator = dataclasses.replace(
        STOCHASTIC, sampler=iter([(X[indices[i]], y[indices[i]]) for i in order])
    )
    for method in (tree, iterator):
        assert_close(estimate(method, reg, X, y), expected, 0)
    with pytest.raises(ValueError, match=r"sampler has no minibatch for step 1 \(StopIteration"):
        estimate(iterator, reg, X, y)


def test_an_iterator_goes_on_where_it_stopped() -> None:
    reg, X, y = data()
    drawn: list[int] = []

    def batches() -> Any:
        for i in itertools.cycle(range(NUM_SAMPLES)):
            drawn.append(i)
            yield X[[i]], y[[i]]

    method = dataclasses.replace(STOCHASTIC, sampler=batches())
    init = torch.zeros(DIM, dtype=torch.float64)
    first = estimate(method, reg.requires_grad_(), X, y, adjoint_init=init)[0]
    assert drawn == list(range(10))  # 6 steps, the first of them not from a known zero, and 4
    second = estimate(method, reg, X, y, adjoint_init=init)[0]
    assert drawn == list(range(20))
    assert not torch.allclose(first, second)


def test_aux_and_value_of_several_outer_minibatches() -> None:
    reg, X, y = data()

    def with_aux(*args: Any) -> tuple[Tensor, Any]:
        value = outer_loss(*args)
        return value, {"value": value, "count": args[3].shape[0]}

    _, solution = hf.hypergrad_and_solution(
        solver, with_aux, inner_loss=inner_loss, method=STOCHASTIC, has_aux=True
    )(reg, X, y)
    assert [aux["count"] for aux in solution.aux] == [BATCH] * 3
    assert_close(torch.stack([aux["value"] for aux in solution.aux]).mean(), solution.value)


def test_nothing_that_shares_storage_is_written_to() -> None:
    """The gradients of <w, h> are h and w themselves: a sum in place would change both."""
    _, X, y = data()
    reg = torch.linspace(-2, 0, DIM, dtype=torch.float64)
    original = reg.clone(), X.clone(), y.clone()
    method = dataclasses.replace(STOCHASTIC, start="outer_gradient")
    for optimizer in (STEP, lambda tensors: torch.optim.SGD(tensors, lr=0.2)):
        grads, solution = hf.hypergrad_and_solution(
            solver,
            lambda w, h, X, y: (w * h).sum(),
            inner_loss=inner_loss,
            method=dataclasses.replace(method, optimizer=optimizer),
        )(reg, X, y, adjoint_init=reg)
        assert_close((reg, X, y), original, 0)
        assert_close(solution.params, solver(reg, X, y), 0)
        assert_close(grads, solution.params * (1 - reg.exp() * solution.adjoint))


@pytest.mark.parametrize("factory", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers_that_write_in_place_write_to_copies(factory: Any) -> None:
    b, x0 = (torch.ones(2),), (torch.full((2,), 3.0),)
    seen = []

    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append((v[0], v[0].clone()))
        return v

    operator = hf.linear_solvers.LinearOperator(product, product)
    hf.StochasticAID(3, factory).solve(operator, b, x0)
    hf.StochasticAID(3, factory, start="outer_gradient").solve(operator, b)
    assert_close((b, x0), ((torch.ones(2),), (torch.full((2,), 3.0),)), 0)
    assert len(seen) == 6
    for vector, then in seen:
        assert_close(vector, then, 0)


def test_two_calls_agree() -> None:
    reg, X, y = data()
    assert_close(estimate(STOCHASTIC, reg, X, y), estimate(STOCHASTIC, reg, X, y), 0)


# Optimisers --------------------------------------------------------------------------------------

PAIRS = {
    "sgd": (STEP, lambda tensors: torch.optim.SGD(tensors, lr=0.2), None),
    "momentum": (
        hf.optim.sgd(lr=0.1, momentum=0.5),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5),
        None,
    ),
    "adam": (hf.optim.adam(lr=0.1), functools.partial(torch.optim.Adam, lr=0.1), None),
    "class alone": (hf.optim.adam(lr=1e-3), torch.optim.Adam, None),
    "schedule": (
        hf.optim.sgd(lr=lambda step: 0.2 / (1 + step)),
        functools.partial(torch.optim.SGD, lr=0.2),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_torch_optimizers_and_pure_ones_agree(name: str) -> None:
    pure, factory, scheduler = PAIRS[name]
    reg, X, y = data()
    expected = estimate(dataclasses.replace(STOCHASTIC, optimizer=pure), reg, X, y)
    method = dataclasses.replace(STOCHASTIC, optimizer=factory, scheduler=scheduler)
    assert_close(estimate(method, reg, X, y), expected)
    # the solve runs inside an autograd.Function when hparams require grad
    assert_close(
        optree.tree_map(torch.detach, estimate(method, reg.requires_grad_(), X, y)), expected
    )
    stacked = torch.stack([reg.detach(), reg.detach() + 1])
    with pytest.raises(ValueError, match=r"updates tensors in place.*hf\.optim\.from_torch"):
        vmap(functools.partial(estimate, method), in_dims=(0, None, None))(stacked, X, y)


GRADIENT_OPTIMIZERS = [
    getattr(torch.optim, name)
    for name in sorted(dir(torch.optim))
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    # two need another gradient or a loss, and one matrices
    and name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon")
]
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=9, cycle_momentum=False
    ),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.filterwarnings("ignore:.*weight decay")  # which AdamW has by default
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("factory", GRADIENT_OPTIMIZERS, ids=lambda factory: factory.__name__)
def test_every_torch_optimizer_takes_its_own_steps(factory: Any, scheduler: str) -> None:
    """As the same optimiser does in a loop written by hand, with and without a scheduler."""
    reg, X, y = data()
    make = SCHEDULERS[scheduler]
    method = dataclasses.replace(
        STOCHASTIC, optimizer=lambda tensors: factory(tensors, lr=0.05), scheduler=make
    )
    _, solution = estimate(method, reg, X, y)
    gradients = [
        grad(outer_loss)(solution.params, reg, *STOCHASTIC.outer_sampler(j, X, y)) for j in range(3)
    ]
    b = torch.stack(gradients).mean(0)
    u = torch.zeros_like(b)
    optimizer = factory([u], lr=0.05)
    schedule = make and make(optimizer)
    for step in range(6):
        batch, targets = STOCHASTIC.sampler(step, X, y)
        u.grad = batch.T @ (batch @ u) / len(targets) + reg.exp() * u - b
        optimizer.step()
        if scheduler == "plateau":
            schedule.step(u.grad.norm().item())
        elif schedule:
            schedule.step()
    assert_close(solution.adjoint, u, 1e-10)
    assert u.norm() > 0


PURE = {
    "sgd": hf.optim.sgd(lr=0.2, momentum=0.5, nesterov=True),
    "heavy_ball": hf.optim.heavy_ball(lr=0.1, momentum=0.3),
    "adam": hf.optim.adam(lr=0.1),
    "adamw": hf.optim.adamw(lr=0.1, weight_decay=0.0),
    "rmsprop": hf.optim.rmsprop(lr=0.1),
    "adagrad": hf.optim.adagrad(lr=0.1),
    "from_torch": hf.optim.from_torch(torch.optim.RAdam, lr=0.1),
    "schedule": hf.optim.sgd(lr=hf.bilevel.power_decay(0.2, 0.5)),
}


def test_steps_of_decreasing_size_remove_the_variance() -> None:
    """The mean squared error of 1 / t steps falls like 1 / K, that of constant steps does not."""
    reg, X, y = data()
    w = solver(reg, X, y)
    A = X.T @ X / NUM_SAMPLES + torch.diag(reg.exp())
    exact = torch.linalg.solve(A, grad(outer_loss)(w, reg, X, y))

    def error(optimizer: Any, num_steps: int) -> float:
        drawn = draw_indices(200, num_steps + 1, BATCH)

        def adjoint(chosen: Tensor) -> Tensor:
            method = hf.StochasticAID(
                num_steps, optimizer, sampler=lambda step, X, y, c: (X[c[step]], y[c[step]], c)
            )
            return hf.hypergrad_and_solution(
                lambda reg, X, y, c: w,
                lambda w, reg, X, y, c: outer_loss(w, reg, X, y),
                inner_loss=lambda w, reg, X, y, c: inner_loss(w, reg, X, y),
                method=method,
            )(reg, X, y, chosen)[1].adjoint

        return ((vmap(adjoint)(drawn) - exact) ** 2).sum(-1).mean().item()

    decreasing = hf.optim.sgd(lr=lambda step: 4 / (step + 20))
    assert error(decreasing, 320) < 0.5 * error(decreasing, 80)
    assert error(STEP, 320) > 0.5 * error(STEP, 80)


def test_step_sizes_for_blocks_of_params() -> None:
    rates = {"a": 0.3, "b": 0.1}
    curvatures = {"a": 2.0, "b": 5.0}

    def loss(w: Any, h: Tensor) -> Tensor:
        return sum(0.5 * curvatures[k] * ((w[k] - h) ** 2).sum() for k in w)

    def adjoint(optimizer: Any) -> Any:
        method = hf.StochasticAID(4, optimizer, sampler=lambda step: ())
        return hf.hypergrad_and_solution(
            lambda h: {"a": h.expand(2), "b": h.expand(3)},
            lambda w, h: w["a"].sum() + w["b"].sum(),
            inner_loss=loss,
            method=method,
        )(torch.ones((), dtype=torch.float64))[1].adjoint

    expected = {
        k: torch.full((n,), (1 - (1 - rates[k] * c) ** 4) / c, dtype=torch.float64)
        for (k, c), n in zip(curvatures.items(), (2, 3), strict=True)
    }
    assert_close(adjoint(hf.optim.sgd(lr=rates)), expected)


# In expectation ----------------------------------------------------------------------------------


def hotelling(samples: Tensor, expected: Tensor) -> float:
    """T squared of the mean; for many samples chi squared with a degree for each dimension."""
    centred = samples - samples.mean(0)
    covariance = centred.T @ centred / (len(samples) - 1)
    difference = samples.mean(0) - expected
    return (len(samples) * difference @ torch.linalg.solve(covariance, difference)).item()


def replicates(num_cross: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Independent hypergradients, and the deterministic one; the samples' weights are hparams."""
    _, X, y = data()
    h = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    num_steps, num_outer = 5, 2

    def loss(w: Tensor, h: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return (0.5 * torch.exp(X @ h / 4) * (X @ w - y) ** 2).mean() + 0.1 * (w**2).sum()

    def solve(h: Tensor, X: Tensor, y: Tensor) -> Tensor:
        D = torch.exp(X @ h / 4)[:, None] / NUM_SAMPLES
        return torch.linalg.solve(
            X.T @ (D * X) + 0.2 * torch.eye(DIM, dtype=X.dtype), X.T @ (D[:, 0] * y)
        )

    w = solve(h, X, y)

    def one(inner: Tensor, outer: Tensor) -> Tensor:
        method = hf.StochasticAID(
            num_steps,
            STEP,
            sampler=lambda step, X, y, i, o: (X[i[step]], y[i[step]], i, o),
            outer_sampler=lambda step, X, y, i, o: (X[o[step]], y[o[step]], i, o),
            num_outer_batches=num_outer,
            num_cross_batches=num_cross,
        )
        return hf.hypergrad(
            lambda h, *args: w,
            lambda w, h, X, y, i, o: outer_loss(w, h, X, y),
            inner_loss=lambda w, h, X, y, i, o: loss(w, h, X, y),
            method=method,
        )(h, X, y, inner, outer)

    inner = draw_indices(20000, num_steps + num_cross, BATCH, seed=2)
    if shared:  # the cross term on the minibatch of the last step
        inner[:, -1] = inner[:, -2]
    outer = draw_indices(20000, num_outer, BATCH, seed=3)
    deterministic = hf.hypergrad(
        lambda h, X, y: w,
        outer_loss,
        inner_loss=loss,
        method=hf.FixedPoint(num_steps, rtol=0, step_size=0.2),
    )(h, X, y)
    return vmap(one)(inner, outer), deterministic


@pytest.mark.parametrize("num_cross", [1, 3])
def test_the_expected_hypergradient_is_the_deterministic_one(num_cross: int) -> None:
    """Hotelling's test of 20000 replicates at confidence 99.9 %."""
    samples, deterministic = replicates(num_cross, shared=False)
    assert hotelling(samples, deterministic) < chi2.ppf(CONFIDENCE, DIM)


def test_the_statistical_test_has_power() -> None:
    """It rejects the bias that comes of a cross term on the minibatch of the last step."""
    samples, deterministic = replicates(1, shared=True)
    assert hotelling(samples, deterministic) > 2 * chi2.ppf(CONFIDENCE, DIM)


# Transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PURE)
def test_vmap_over_tasks_is_a_loop(name: str) -> None:
    method = dataclasses.replace(STOCHASTIC, optimizer=PURE[name])
    compute = functools.partial(estimate, method)
    tasks = [data(seed) for seed in range(4)]
    expected = problems.stack([compute(*task) for task in tasks])
    regs, X, y = problems.stack(tasks)
    assert_close(vmap(compute)(regs, X, y), expected)
    assert_close(vmap(compute, chunk_size=3)(regs, X, y), expected)
    nested = vmap(vmap(compute))(
        *(t.reshape(2, 2, *t.shape[1:]) for t in (regs, X, y)),
    )
    assert_close(optree.tree_map(lambda t: t.flatten(0, 1), nested), expected)


def test_vmap_over_minibatches_is_a_loop() -> None:
    reg, X, y = data()
    drawn = draw_indices(5, 10, BATCH)

    def compute(chosen: Tensor) -> Tensor:
        method = hf.StochasticAID(
            6,
            STEP,
            sampler=lambda step, X, y, c: (X[c[step]], y[c[step]], c),
            num_cross_batches=4,
        )
        return hf.hypergrad(
            lambda reg, X, y, c: solver(reg, X, y),
            lambda w, reg, X, y, c: outer_loss(w, reg, X, y),
            inner_loss=lambda w, reg, X, y, c: inner_loss(w, reg, X, y),
            method=method,
        )(reg, X, y, chosen)

    assert_close(vmap(compute)(drawn), torch.stack([compute(chosen) for chosen in drawn]))


def test_first_derivatives_of_the_solution_map() -> None:
    """Reverse mode, forward mode and plain autograd take the same minibatches."""
    reg, X, y = data()
    solve = hf.implicit_diff(solver, inner_loss=inner_loss, method=INNER)

    def value(reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return outer_loss(solve(reg, X, y), reg, X, y)

    u = torch.zeros(DIM, dtype=torch.float64)
    w = solver(reg, X, y)
    for step in range(6):
        batch, _ = STOCHASTIC.sampler(step, X, y)
        A = batch.T @ batch / BATCH + torch.diag(reg.exp())
        u = u - 0.2 * (A @ u - grad(outer_loss)(w, reg, X, y))
    expected = w - reg.exp() * w * u
    assert_close(grad(value)(reg, X, y), expected)
    assert_close(vmap(grad(value), (0, None, None))(reg[None], X, y)[0], expected)
    leaf = reg.clone().requires_grad_()
    value(leaf, X, y).backward()
    assert_close(leaf.grad, expected)
    # forward mode solves with A instead of its transpose, from another right-hand side
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    t = torch.zeros(DIM, dtype=torch.float64)
    for step in range(6):
        batch, _ = STOCHASTIC.sampler(step, X, y)
        A = batch.T @ batch / BATCH + torch.diag(reg.exp())
        t = t - 0.2 * (A @ t + reg.exp() * w * direction)
    _, tangent = jvp(lambda reg: solve(reg, X, y), (reg,), (direction,))
    assert_close(tangent, t)


def test_derivatives_with_respect_to_arguments_go_through_a_function_but_not_a_tree() -> None:
    reg, X, y = data()

    def value(method: Any, y: Tensor) -> Tensor:
        solve = hf.implicit_diff(solver, inner_loss=inner_loss, method=method)
        return (solve(reg, X, y) ** 2).sum()

    everything = torch.arange(NUM_SAMPLES)
    sampled = hf.StochasticAID(50, STEP, sampler=lambda step, X, y: (X[everything], y[everything]))
    assert_close(
        grad(functools.partial(value, sampled))(y),
        grad(functools.partial(value, hf.StochasticAID(50, STEP)))(y),
    )
    tree = hf.StochasticAID(50, STEP, sampler=(X.expand(51, *X.shape), y.expand(51, *y.shape)))
    lost = pytest.raises(ValueError, match=r"derivatives with respect to them are lost")
    with lost:
        grad(functools.partial(value, tree))(y)
    with lost:
        jvp(functools.partial(value, tree), (y,), (y,))
    with lost:  # the first of all arguments
        grad(
            lambda X: (
                hf.implicit_diff(solver, inner_loss=inner_loss, method=tree)(reg, X, y)
            ).sum()
        )(X)
    # those with respect to hparams are not
    solve, whole = (
        hf.implicit_diff(solver, inner_loss=inner_loss, method=method)
        for method in (tree, hf.StochasticAID(50, STEP))
    )
    assert_close(
        grad(lambda reg: solve(reg, X, y).sum())(reg), grad(lambda reg: whole(reg, X, y).sum())(reg)
    )
    assert_close(
        jvp(lambda reg: solve(reg, X, y), (reg,), (reg,)),
        jvp(lambda reg: whole(reg, X, y), (reg,), (reg,)),
    )


SECOND = {
    "backward of the hypergradient": lambda f, x: f(x.requires_grad_()).sum().backward(),
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sum()))(x[None]),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(x[None]).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("sampler", ["function", "iterator"])
def test_second_derivatives_are_refused(name: str, sampler: str) -> None:
    reg, X, y = data()
    method = STOCHASTIC
    if sampler == "iterator":
        batches = itertools.repeat((X, y))
        method = dataclasses.replace(STOCHASTIC, sampler=batches)
    message = r"second derivative through StochasticAID.*Use a deterministic method"
    if sampler == "iterator" and name != "backward of the hypergradient":
        message = r"sampler is an iterator, which cannot be replayed"
    with pytest.raises((RuntimeError, ValueError), match=message):
        SECOND[name](lambda reg: estimate(method, reg, X, y)[0], reg)


def test_hessians_of_the_solution_map_are_refused() -> None:
    reg, X, y = data()
    solve = hf.implicit_diff(solver, inner_loss=inner_loss, method=INNER)
    for derivative in (torch.func.hessian, lambda f: grad(lambda x: grad(f)(x).sum())):
        with pytest.raises(RuntimeError, match="second derivative through StochasticAID"):
            derivative(lambda reg: solve(reg, X, y).sum())(reg)


# Outcomes ----------------------------------------------------------------------------------------


def test_outcomes() -> None:
    reg, X, y = data()
    zero = hf.hypergrad_and_solution(
        solver, lambda w, reg, X, y: 0 * w.sum(), inner_loss=inner_loss, method=STOCHASTIC
    )(reg, X, y)
    assert_close(zero[0], torch.zeros_like(reg), 0)
    assert (zero[1].stats.result, zero[1].stats.num_steps) == (hf.RESULTS.success, 6)

    diverging = dataclasses.replace(STOCHASTIC, num_steps=60, optimizer=hf.optim.sgd(lr=50.0))
    diverging = dataclasses.replace(diverging, sampler=take(draw_indices(70, BATCH)))
    with pytest.raises(hf.HypergradError, match=r"StochasticAID\(num_steps=60.*residual grew"):
        estimate(diverging, reg, X, y)
    compute = hf.hypergrad_and_solution(
        solver, outer_loss, inner_loss=inner_loss, method=diverging, throw=False
    )
    assert compute(reg, X, y)[1].stats.result == hf.RESULTS.divergence
    mixed = torch.stack([reg, reg * torch.nan])
    codes = vmap(compute, in_dims=(0, None, None))(mixed, X, y)[1].stats.result
    assert codes.tolist() == [hf.RESULTS.divergence, hf.RESULTS.nonfinite]

    none = estimate(hf.StochasticAID(0), reg, X, y)[1]
    assert_close(none.adjoint, torch.zeros_like(reg), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    reg, X, y = data()
    expected = estimate(STOCHASTIC, reg, X, y)[0]

    def low_precision_solver(reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return solver(reg.double(), X.double(), y.double()).to(reg.dtype)

    for optimizer in (STEP, functools.partial(torch.optim.SGD, lr=0.2)):
        result = hf.hypergrad(
            low_precision_solver,
            outer_loss,
            inner_loss=inner_loss,
            method=dataclasses.replace(STOCHASTIC, optimizer=optimizer),
        )(reg.to(dtype), X.to(dtype), y.to(dtype))
        assert result.dtype == dtype
        tol = 60 * torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), expected, rtol=tol, atol=tol)


# Bad input ---------------------------------------------------------------------------------------

reg, X, y = data()
indices = draw_indices(10, BATCH)
MISUSE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative steps": (
        lambda: hf.StochasticAID(-1),
        ValueError,
        r"StochasticAID: num_steps is -1; expected an integer >= 0",
    ),
    "no batches": (
        lambda: hf.StochasticAID(num_outer_batches=0, outer_sampler=take(indices)),
        ValueError,
        r"num_outer_batches is 0; expected an integer >= 1",
    ),
    "several equal batches": (
        lambda: hf.StochasticAID(num_cross_batches=2),
        ValueError,
        r"num_cross_batches is 2, but without sampler all batches are the same\. Pass sampler=",
    ),
    "several equal outer batches": (
        lambda: hf.StochasticAID(num_outer_batches=2, sampler=take(indices)),
        ValueError,
        r"num_outer_batches is 2, but without outer_sampler .* Pass outer_sampler=",
    ),
    "unknown start": (
        lambda: hf.StochasticAID(start="one"),
        ValueError,
        r"start is 'one'; expected one of 'zero', 'outer_gradient'. To start elsewhere",
    ),
    "no optimizer": (
        lambda: hf.StochasticAID(optimizer=0.1),
        TypeError,
        r"StochasticAID: got 0\.1 .* expected an hf\.optim\.Optimizer\. Write hf\.optim\.sgd",
    ),
    "optimizer not called": (
        lambda: hf.StochasticAID(optimizer=hf.optim.adam),
        TypeError,
        r"StochasticAID: got the function hf\.optim\.adam; .* Call it: hf\.optim\.adam\(lr=",
    ),
    "optimizer of other tensors": (
        lambda: hf.StochasticAID(optimizer=torch.optim.SGD([torch.zeros(1)])),
        TypeError,
        r"an instance of torch\.optim\.SGD; .* Write hf\.optim\.from_torch\(torch\.optim\.SGD",
    ),
    "factory of something else": (
        lambda: estimate(hf.StochasticAID(optimizer=lambda tensors: 3), reg, X, y),
        TypeError,
        r"optimizer= returned int; expected a torch\.optim\.Optimizer of the tensors",
    ),
    "factory for tensors of its own": (
        lambda: estimate(
            hf.StochasticAID(optimizer=lambda tensors: torch.optim.SGD([torch.zeros(1)])), reg, X, y
        ),
        ValueError,
        r"optimizer= returned a SGD without 1 of the 1 tensors it was given, which would never move"
        r"\. Write optimizer=lambda tensors: torch\.optim\.Adam\(tensors",
    ),
    "optimizer that needs a loss": (
        lambda: estimate(hf.StochasticAID(optimizer=torch.optim.LBFGS), reg, X, y),
        TypeError,
        r"torch\.optim\.LBFGS evaluates a loss several times a step.* such as torch\.optim\.SGD",
    ),
    "scheduler of a pure optimizer": (
        lambda: hf.StochasticAID(optimizer=STEP, scheduler=torch.optim.lr_scheduler.StepLR),
        ValueError,
        r"scheduler= goes with a torch\.optim factory; .* hf\.optim\.sgd\(lr=lambda step",
    ),
    "scheduler that is none": (
        lambda: hf.StochasticAID(optimizer=torch.optim.SGD, scheduler=0.5),
        TypeError,
        r"scheduler is 0\.5 of type float; expected a function of the torch\.optim optimizer",
    ),
    "factory of no scheduler": (
        lambda: estimate(
            hf.StochasticAID(optimizer=torch.optim.SGD, scheduler=lambda optimizer: 1), reg, X, y
        ),
        TypeError,
        r"scheduler= returned int, which has no step\(\)",
    ),
    "loader": (
        lambda: hf.StochasticAID(sampler=[(X, y)]),
        TypeError,
        r"sampler is of type list; expected a function .* Write iter\(\.\.\.\) around it",
    ),
    "number": (
        lambda: hf.StochasticAID(outer_sampler=3),
        TypeError,
        r"outer_sampler is of type int; expected a function \(step, \*args\) -> args",
    ),
    "tree of numbers": (
        lambda: hf.StochasticAID(3, sampler=(X, {"y": 1.0})),
        TypeError,
        r"sampler\[1\]\['y'\] is of type float; expected a function",
    ),
    "tree that is too short": (
        lambda: hf.StochasticAID(10, sampler=(X[indices], y[indices])),
        ValueError,
        r"sampler\[0\] has shape \(10, 4, 3\); expected a leading step dimension of at least 11",
    ),
    "tree that requires grad": (
        lambda: hf.StochasticAID(4, sampler=(X[indices].requires_grad_(), y[indices])),
        ValueError,
        r"sampler\[0\] requires grad .* Call \.detach\(\) on it, or pass it in \*args",
    ),
    "function that is too short": (
        lambda: estimate(hf.StochasticAID(11, STEP, sampler=take(indices)), reg, X, y),
        ValueError,
        r"sampler has no minibatch for step 10 \(IndexError.*num_steps \+ num_cross_batches",
    ),
    "one tensor": (
        lambda: estimate(hf.StochasticAID(3, STEP, sampler=lambda step, X, y: X), reg, X, y),
        TypeError,
        r"sampler gave Tensor at step 1; expected the tuple of arguments .* Write `return \(X\[",
    ),
    "argument left out": (
        lambda: estimate(hf.StochasticAID(3, STEP, sampler=lambda step, X, y: (X,)), reg, X, y),
        ValueError,
        r"sampler changed the structure of args at step 1: got .* Let it return all of \*args",
    ),
    "argument of another kind": (
        lambda: estimate(hf.StochasticAID(3, STEP, sampler=lambda s, X, y: (X, 1.0)), reg, X, y),
        ValueError,
        r"sampler changed the structure of args at step 1",
    ),
    "outer argument left out": (
        lambda: estimate(
            hf.StochasticAID(3, STEP, outer_sampler=lambda step, X, y: (X,)), reg, X, y
        ),
        ValueError,
        r"outer_sampler changed the structure of args at step 0",
    ),
    "sampler that closes over hparams": (
        lambda: (
            lambda h: estimate(hf.StochasticAID(3, sampler=lambda s, X, y: (X, h[0] * y)), h, X, y)
        )(reg.clone().requires_grad_()),
        ValueError,
        r"sampler closes over a tensor that requires grad",
    ),
    "inside another solver": (
        lambda: hf.StochasticAID(3, STEP, sampler=take(indices)).solve(
            hf.linear_solvers.LinearOperator.from_matrix(torch.eye(2)), (torch.ones(2),)
        ),
        ValueError,
        r"Pass it as method= itself, not inside another solver",
    ),
    "inside another solver, with the outer loss sampled": (
        lambda: estimate(
            hf.Damped(hf.StochasticAID(3, STEP, outer_sampler=take(indices)), 1.0), reg, X, y
        ),
        ValueError,
        r"Pass it as method= itself, not inside another solver",
    ),
    "outer minibatches without an outer loss": (
        lambda: hf.implicit_diff(solver, inner_loss=inner_loss, method=STOCHASTIC),
        ValueError,
        r"implicit_diff: the method has an outer_sampler, but there is no outer loss",
    ),
    "adjoint_init of another structure": (
        lambda: estimate(STOCHASTIC, reg, X, y, adjoint_init={"w": reg}),
        ValueError,
        r"adjoint_init has another structure than params",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        call()


def test_an_iterator_under_vmap_is_refused() -> None:
    method = hf.StochasticAID(3, STEP, sampler=itertools.repeat((X, y)))
    with pytest.raises(ValueError, match=r"sampler is an iterator.*Pass a function"):
        vmap(functools.partial(estimate, method), in_dims=(0, None, None))(reg[None], X, y)


def test_a_solver_prints_without_its_functions() -> None:
    solver = hf.StochasticAID(
        num_steps=3, sampler=len, outer_sampler=len, scheduler=len, optimizer=torch.optim.SGD
    )
    assert repr(solver) == (
        "StochasticAID(num_steps=3, num_outer_batches=1, num_cross_batches=1, start='zero')"
    )
