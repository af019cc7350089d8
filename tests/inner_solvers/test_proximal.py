"""The regulariser in closed form against the same loss written by hand."""

import itertools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

import hyperfunc as hf
from tests.cells import slow_but

X, y, X_val, y_val = (
    torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for seed, shape in enumerate([(20, 4), (20,), (20, 4), (20,)])
)


def base(w, h):
    logistic = torch.nn.functional.softplus(X @ w["a"] * y).sum()
    return logistic + w["b"] ** 4 * h["c"].exp().sum()


def center(h):
    return {"a": h["m"].tanh(), "b": h["n"]}


def weight(h):
    return h["log_weight"].exp()


def by_hand(w, h):
    c = center(h)
    return base(w, h) + 0.5 * weight(h) * sum(((w[k] - c[k]) ** 2).sum() for k in w)


in_closed_form = hf.proximal(base, weight, center)


def outer(w, h):
    return ((X_val @ w["a"] - y_val) ** 2).mean() + w["b"] ** 2 + h["m"].sum() ** 2


def newton(h):
    w = {k: v.detach().clone() for k, v in center(h).items()}
    for _ in range(20):
        g, H = grad(by_hand)(w, h), hessian(by_hand)(w, h)
        rows = [torch.cat([H[i][j].reshape(w[i].numel(), -1) for j in "ab"], 1) for i in "ab"]
        step = torch.linalg.solve(torch.cat(rows), torch.cat([g["a"], g["b"].reshape(1)]))
        w = {"a": w["a"] - step[:4], "b": w["b"] - step[4]}
    return w


@pytest.fixture
def hparams():
    sizes = {"m": (4,), "n": (), "log_weight": (), "c": (2,)}
    return {key: 0.5 * torch.randn(size, dtype=torch.float64) for key, size in sizes.items()}


def difference(a, b):
    leaves = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return max(((x - y).abs() / (1 + y.abs())).max().item() for x, y in zip(*leaves, strict=True))


@pytest.mark.parametrize(
    "method",
    slow_but(
        "cg", "dense", of=["cg", hf.NormalCG(rtol=1e-15), "dense", hf.FixedPoint(step_size=0.05)]
    ),
)
def test_hypergradient_is_that_of_the_loss_by_hand(method, hparams):
    expected = hf.hypergrad(newton, outer, inner_loss=by_hand, method=method)
    got = hf.hypergrad(newton, outer, inner_loss=in_closed_form, method=method)
    assert difference(got(hparams), expected(hparams)) < 1e-12
    batch = {key: torch.stack([value, value + 0.1]) for key, value in hparams.items()}
    assert difference(vmap(got)(batch), vmap(expected)(batch)) < 1e-12


@pytest.mark.parametrize("modes", list(itertools.product([jacfwd, jacrev], repeat=2)))
def test_second_derivatives_are_those_of_the_loss_by_hand(modes, hparams):
    outermost, innermost = modes
    values = []
    for inner_loss in (by_hand, in_closed_form):
        solve = hf.implicit_diff(newton, inner_loss=inner_loss, method="dense")
        values.append(outermost(innermost(lambda h, s=solve: outer(s(h), h)))(hparams))
    assert difference(*values) < 1e-10


def test_value_and_gradient_are_those_of_the_loss_by_hand(hparams):
    w = {"a": torch.randn(4, dtype=torch.float64), "b": torch.tensor(0.3, dtype=torch.float64)}
    for argnums in (0, 1):
        expected = grad(by_hand, argnums=argnums)(w, hparams)
        assert difference(grad(in_closed_form, argnums)(w, hparams), expected) < 1e-12
    assert (in_closed_form(w, hparams) - by_hand(w, hparams)).abs() < 1e-12


def linear(w, h):
    return (w["a"] * h["m"].detach()).sum() + w["b"]


@pytest.mark.parametrize(
    "optimizer", [hf.optim.sgd(0.05), hf.optim.sgd(0.05, 0.5), hf.optim.adam()]
)
@pytest.mark.parametrize("loss", [base, linear])
@pytest.mark.parametrize("weight", [0.7, weight])
@pytest.mark.parametrize("center", [center, lambda h: {"a": torch.ones_like(X[0]), "b": X[0, 0]}])
def test_gradient_steps_are_those_of_the_loss_by_hand(center, weight, loss, optimizer, hparams):
    in_closed_form = hf.proximal(loss, weight, center)

    def by_hand(w, h):
        return in_closed_form(w, h)

    starts = {key: value.clone() for key, value in center(hparams).items()}
    start = {key: value + 1 for key, value in starts.items()}
    kept = {key: value.clone() for key, value in start.items()}
    values = []
    for inner_loss in (by_hand, in_closed_form):
        solver = hf.minimize(inner_loss, optimizer, 5, init=lambda h: start)
        derived = hf.hypergrad(solver, outer, method="reverse_unroll")
        batch = {key: torch.stack([value, value + 0.1]) for key, value in hparams.items()}
        tracked = {key: value.clone().requires_grad_() for key, value in hparams.items()}
        through = solver(tracked)
        grads = torch.autograd.grad(
            outer(through, tracked), tracked.values(), allow_unused=True, materialize_grads=True
        )
        batched = vmap(solver)(batch), vmap(derived)(batch)
        values.append((solver(hparams), derived(hparams), list(grads), *batched))
    assert difference(*values) < 1e-12
    assert difference(start, kept) == 0


def fits(w, meta, X):
    return torch.nn.functional.softplus(X @ w).sum()


def fits_with_scales(w, meta, X):
    return fits(w * meta.cosh(), meta, X)


def count_work(loss, num_products):
    """Evaluations of the loss and matrix products with the data, alone and under vmap."""
    calls = []

    def counted(w, meta, X):
        calls.append(1)
        return loss(w, meta, X)

    fn = hf.hypergrad(
        lambda meta, X: meta.clone(),
        lambda w, meta, X: ((w - 1) ** 2).sum(),
        inner_loss=hf.proximal(counted, 3.0),
        method=hf.CG(maxiter=num_products, rtol=0),
        throw=num_products > 0,  # the zeros of no product would be looked into
    )
    n, k = 30, 20
    data, meta = torch.randn(2, n, n) / n, torch.randn(n, k)
    counts = []
    for run, tasks in (
        (lambda: fn(meta, data[0]), 1),
        (lambda: vmap(fn, in_dims=(None, 0))(meta, data), 2),
    ):
        calls.clear()
        with FlopCounterMode(display=False) as counter:
            run()
        # under vmap, inner products of vectors count as well; they are small
        counts.append((len(calls), round(counter.get_total_flops() / (2 * n * n * k * tasks))))
    return counts


@pytest.mark.parametrize("num_products", [0, 1, 5])
def test_the_cross_term_costs_no_product(num_products):
    """A gradient is two matrix products with the data, and a product with the Hessian two more."""
    needed = 2 + 2 * num_products
    assert count_work(fits, num_products) == [(1, needed)] * 2
    # where the loss itself depends on the hparams, the term costs a product
    assert count_work(fits_with_scales, num_products) == [(1, needed + 2), (2, needed + 4)]


WRAPPED = {
    "plain": lambda fn, solve, m: fn(m),
    "vmap": lambda fn, solve, m: vmap(fn)(torch.stack([m, -m])),
    "grad": lambda fn, solve, m: grad(lambda m: fn(m).sum())(m),
    "vmap of grad": lambda fn, solve, m: vmap(grad(lambda m: fn(m).sum()))(torch.stack([m, -m])),
    "jacfwd": lambda fn, solve, m: jacfwd(solve)(m),
    "jacfwd of jacrev": lambda fn, solve, m: jacfwd(jacrev(solve))(m),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("loss", [fits, fits_with_scales])
def test_hparams_that_the_loss_uses_are_told_from_those_that_it_does_not(loss, name):
    def by_hand(w, m):
        return loss(w, m, X) + 1.5 * ((w - m) ** 2).sum()

    def newton(m):
        w = m.detach()
        for _ in range(10):
            w = w - torch.linalg.solve(hessian(by_hand)(w, m), grad(by_hand)(w, m))
        return w

    values = []
    for inner in (by_hand, hf.proximal(lambda w, m: loss(w, m, X), 3.0)):
        fn = hf.hypergrad(newton, lambda w, m: (w**2).sum(), inner_loss=inner, method="dense")
        solve = hf.implicit_diff(newton, inner_loss=inner, method="dense")
        m = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64)
        values.append(WRAPPED[name](fn, solve, m))
    assert difference(*values) < 1e-11


def test_the_hparams_are_the_default_center():
    meta = torch.randn(4, dtype=torch.float64)
    A = X.T @ X
    loss = hf.proximal(lambda w, m: 0.5 * w @ A @ w - w @ X.T @ y, 2.0)
    system = A + 2.0 * torch.eye(4, dtype=torch.float64)
    solve = hf.implicit_diff(
        lambda m: torch.linalg.solve(system, X.T @ y + 2.0 * m), inner_loss=loss, method="cg"
    )
    expected = 2.0 * torch.linalg.inv(system)
    assert (jacrev(solve)(meta) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_in_half_precision_do_not_take_the_short_way(dtype):
    """With a rate that is a number two passes do, which would round coefficients and products."""
    w, m, c = (torch.randn(300).to(dtype) for _ in range(3))
    loss = hf.proximal(lambda w, m: (w * c).sum(), 0.3)
    steps = [
        hf.minimize(loss, hf.optim.sgd(lr), 1, init=lambda m: w)(m)
        for lr in (0.07, torch.tensor(0.07))
    ]
    assert torch.equal(*steps)


@pytest.mark.parametrize("weight", [2.0, lambda m: 2.0 + 0.0 * m.sum()])
def test_derivatives_by_what_comes_after_the_hparams(weight):
    """The centre is the hparams alone, also where an argument has their shape."""
    A, meta, shift = X.T @ X, torch.randn(4, dtype=torch.float64), X.T @ y
    loss = hf.proximal(lambda w, m, c, s: 0.5 * w @ A @ w - s * w @ c, weight)
    system = A + 2.0 * torch.eye(4, dtype=torch.float64)
    inverse, two = torch.linalg.inv(system), torch.tensor(2.0, dtype=torch.float64)

    def solve(m, c, s):
        with torch.no_grad():
            return torch.linalg.solve(system, s * c + 2.0 * m)

    solve = hf.implicit_diff(solve, inner_loss=loss, method="cg")
    expected = (2.0 * inverse, 2.0 * inverse, inverse @ shift)
    for jac in (jacrev, jacfwd):
        for argnums in ((0, 1, 2), (1,), (2, 1), (2, 0)):
            got = jac(solve, argnums)(meta, shift, two)
            assert difference(got, tuple(expected[i] for i in argnums)) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1.0, 2.0), TypeError, "proximal: loss is 1.0 of type float; expected a function"),
        ((base, -1.0), ValueError, "weight is -1.0; expected a finite number >= 0"),
        ((base, "big"), TypeError, "weight is 'big'; expected a number >= 0, a 0-d tensor"),
        ((base, True), TypeError, "weight is True"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        hf.proximal(*arguments)


def test_a_center_of_another_structure_is_named(hparams):
    loss = hf.proximal(base, 1.0)  # the hparams are no tree like params
    text = "the hparams, as the centre of proximal, has another.* Pass center="
    with pytest.raises(ValueError, match=text + "a tree like params"):
        hf.hypergrad(newton, outer, inner_loss=loss)(hparams)
    with pytest.raises(ValueError, match=rf"{text}lambda hparams: hparams\['a'\]\[1\]$"):
        loss(newton(hparams), {"a": [hparams, center(hparams)]})


def test_a_weight_that_is_no_scalar_is_refused(hparams):
    loss = hf.proximal(base, lambda h: h["c"], center)
    with pytest.raises(ValueError, match=r"weight has shape \(2,\); expected a 0-d tensor"):
        hf.hypergrad(newton, outer, inner_loss=loss)(hparams)


def test_a_weight_that_requires_grad_is_refused_unless_passed_in_hparams(hparams):
    loss = hf.proximal(base, torch.tensor(1.0, dtype=torch.float64, requires_grad=True), center)
    with pytest.raises(ValueError, match="inner_loss closes over a tensor that requires grad"):
        hf.hypergrad(newton, outer, inner_loss=loss)(hparams)
