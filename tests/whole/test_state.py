"""State that is carried along with the params: counters, and statistics gathered on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import hyperfunc as hf

TASKS, STEPS = 2, 4

Make = Callable[[Any], Callable[..., Any]]

OUTER: dict[str, Make] = {
    "once": lambda fn: fn,
    "vmap": lambda fn: vmap(fn),
    "task_map": lambda fn: hf.task_map(fn),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "jvp": lambda fn: lambda *args: jvp(fn, args, tuple(torch.ones_like(a) for a in args)),
    "vmap of jacrev": lambda fn: vmap(jacrev(fn)),
}

METHODS: dict[str, Any] = {
    "reverse_unroll": "reverse_unroll",
    "reverse": hf.Reverse("sqrt"),
    "reverse, last": hf.Reverse(last=2),
    "forward": "forward",
    "gmres": hf.GMRES(rtol=1e-14),
    "dense": "dense",
}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def condition(w: Any, h: Tensor, x: Tensor) -> Any:
    """The map that is iterated, without the rates."""
    return torch.tanh(0.3 * w["a"] + h * x), 0.5 * w["b"] + torch.sin(w["a"].sum()) + h


def with_counters(w: Any, h: Tensor, x: Tensor) -> Any:
    rate = 1.0 / (1 + w["count"])
    a, b = condition(w, h, x)
    return {
        "a": torch.lerp(w["a"], a, rate),
        "b": torch.lerp(w["b"], b, rate),
        "count": w["count"] + 1,
        "seen": w["seen"] | (w["a"] > 0),
    }


def with_series(w: Any, h: Tensor, x: Tensor, count: Tensor) -> Any:
    rate = 1.0 / (1 + count)
    a, b = condition(w, h, x)
    return {"a": torch.lerp(w["a"], a, rate), "b": torch.lerp(w["b"], b, rate)}


def start(h: Tensor, x: Tensor) -> Any:
    return {"a": 0.1 * x, "b": 0 * h}


def counting_start(h: Tensor, x: Tensor) -> Any:
    return {**start(h, x), "count": torch.tensor(0), "seen": torch.zeros(2, dtype=torch.bool)}


def outer_loss(w: Any, h: Tensor, x: Tensor) -> Tensor:
    return (w["a"] ** 2).sum() * h + torch.exp(0.1 * w["b"])


COUNTERS = hf.iterate(with_counters, STEPS, init=counting_start)
SERIES = hf.iterate(with_series, STEPS, init=start, inputs=torch.arange(STEPS))


def arguments(batched: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(TASKS, generator=generator)
    x = torch.randn(TASKS, 2, generator=generator)
    return (h, x) if batched else (h[0], x[0])


def equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


SELDOM = ("jacfwd", "vmap of jacrev")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "outer", [pytest.param(o, marks=[pytest.mark.slow] if o in SELDOM else []) for o in OUTER]
)
def test_counters_are_state(method: str, outer: str) -> None:
    keywords = {}
    if method in ("gmres", "dense"):

        def fixed_point(w: Any, h: Tensor, x: Tensor) -> Any:
            a, b = condition(w, h, x)
            return {"a": a, "b": b, **{k: v for k, v in w.items() if k in ("count", "seen")}}

        keywords = {"fixed_point": fixed_point}
    make, args = OUTER[outer], arguments("map" in outer)

    def derivative(solver: Any) -> Any:
        fn = hf.hypergrad(solver, outer_loss, method=METHODS[method], **keywords)
        return make(fn)(*args)

    equal(derivative(COUNTERS), derivative(SERIES))


def test_counters_come_out_as_they_are() -> None:
    h, x = arguments(True)
    for method in METHODS.values():
        keywords: Any = {"fixed_point": with_counters} if method in ("gmres", "dense") else {}
        fn = hf.hypergrad_and_solution(COUNTERS, outer_loss, method=method, **keywords)
        _, solution = vmap(fn)(h, x)
        assert solution.params["count"].tolist() == [STEPS] * TASKS
        assert solution.params["count"].dtype == torch.int64
        expected = torch.stack([COUNTERS(h[i], x[i])["seen"] for i in range(TASKS)])
        assert torch.equal(solution.params["seen"], expected)


def test_second_derivatives_and_plain_autograd_with_counters() -> None:
    h, x = arguments(False)
    for method in ("reverse", hf.GMRES(rtol=1e-14)):
        keywords: Any = {}
        if method != "reverse":
            keywords = {"fixed_point": lambda w, h, x: {**w, **condition_tree(w, h, x)}}
        solve = hf.implicit_diff(COUNTERS, method=method, **keywords)
        plain = hf.implicit_diff(SERIES, method=method, **keywords)

        def value(h: Tensor, plain: Any = plain) -> Tensor:
            return outer_loss(plain(h, x), h, x)

        equal(
            hessian(lambda h, solve=solve: outer_loss(solve(h, x), h, x))(h),
            hessian(value)(h),
        )
        leaf = h.clone().requires_grad_()
        params = solve(leaf, x)
        assert not params["count"].requires_grad
        outer_loss(params, leaf, x).backward()
        equal(leaf.grad, grad(value)(h))


def condition_tree(w: Any, h: Tensor, x: Tensor) -> Any:
    return dict(zip("ab", condition(w, h, x), strict=True))


def test_minimize_keeps_what_has_no_gradient() -> None:
    """A loss may look things up in its params; optimisers see the others alone."""
    table, h = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)

    def loss(w: Any, h: Tensor) -> Tensor:
        return ((w["w"] - table[w["row"]]) ** 2).sum() + h * (w["w"] ** 2).sum()

    def init(h: Tensor) -> Any:
        return {"row": torch.tensor(2), "w": torch.zeros(2)}

    def outer(w: Any, h: Tensor) -> Tensor:
        return (w["w"] ** 2).sum()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.3), 40, init=init, rtol=1e-13)
    for method in ("reverse", "reverse_unroll", "forward", "cg", "dense"):
        gradient, solution = hf.hypergrad_and_solution(solver, outer, method=method)(h)
        equal(gradient, -2 * (table[2] ** 2).sum() / (1 + h) ** 3)
        assert solution.params["row"] == 2
    report = hf.check_hypergrad(solver, outer, h)
    assert report.passed, report
    facts = hf.diagnose(solver(h), h, inner_loss=loss)
    torch.testing.assert_close(facts.eig_min.value, 2 * (1 + h))

    def without(w: Any, h: Tensor) -> Tensor:
        return loss({**w, "row": torch.tensor(2)}, h)

    adam = hf.optim.adam(lr=0.05)
    some = hf.minimize(loss, adam, 4, init=init)
    same = hf.minimize(without, adam, 4, init=lambda h: {"w": torch.zeros(2)})
    fn, expected = (hf.hypergrad(s, outer, method="reverse") for s in (some, same))
    equal(fn(h), expected(h))


def test_params_without_a_floating_number_are_refused() -> None:
    solver = hf.iterate(lambda w, h: w + 1, 3, init=lambda h: {"n": torch.tensor(0)})
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype torch.int64; expected a fl"):
        hf.hypergrad(solver, lambda w, h: h, method="reverse")(torch.tensor(1.0))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "instance_norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "functional": lambda: Norm(4),
    "in_place": lambda: Average(4),
}


class Norm(nn.BatchNorm1d):
    """A forward of one's own that calls the function, as those of timm do."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *state, self.weight, self.bias, self.training, 0.2)


class Average(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.8).add_(0.2 * x.mean((0, 2))[:, None])
        return x - self.mean


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_flow_through_statistics(norm: str) -> None:
    """Gathered in the inner steps, and used by the outer loss in evaluation mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 1), NORMS[norm](), nn.Tanh(), nn.Conv1d(4, 1, 1))
    x, y = torch.randn(TASKS, 6, 3, 5), torch.randn(TASKS, 6, 1, 5)
    query, target = torch.randn(6, 3, 5), torch.randn(6, 1, 5)
    train, start = hf.functional(net, buffers="update")
    evaluate, _ = hf.functional(net.eval(), buffers="frozen")

    def loss(w: Any, state: Any, x: Tensor, y: Tensor) -> Any:
        output, new = train(w, x, buffers=state)
        return ((output - y) ** 2).mean(), new

    def step(s: Any, h: Tensor, x: Tensor, y: Tensor) -> Any:
        gradient, state = grad(loss, has_aux=True)(s["w"], s["state"], x, y)
        # what was gathered is used inside, too
        pull = evaluate(s["w"], query, buffers=state).mean()
        return {
            "w": {
                k: p - h * g - 0.1 * h * pull
                for (k, p), g in zip(s["w"].items(), gradient.values(), strict=True)
            },
            "state": state,
        }

    def outer(s: Any, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return ((evaluate(s["w"], query, buffers=s["state"]) - target) ** 2).mean()

    solver = hf.iterate(step, 3, init=lambda h, x, y: {"w": start, "state": train.buffers})
    h, eps = torch.tensor(0.2), 1e-5

    def value(h: Tensor, task: int) -> Tensor:
        return outer(solver(h, x[task], y[task]), h, x[task], y[task])

    expected = [(value(h + eps, i) - value(h - eps, i)) / (2 * eps) for i in range(TASKS)]
    for method in ("reverse_unroll", "reverse", "forward"):
        fn = hf.hypergrad(solver, outer, method=method)
        found = vmap(fn, (None, 0, 0))(h, x, y)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(fn(h, x[0], y[0]), expected[0], rtol=1e-6, atol=1e-9)
    assert not any(buffer.requires_grad for buffer in train.buffers.values())


def test_derivatives_flow_into_given_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    evaluate, w = hf.functional(net, buffers="frozen")
    x, mean, eps = torch.randn(6, 3), torch.randn(4), 1e-5

    def fn(mean: Tensor) -> Tensor:
        buffers = {**evaluate.buffers, "1.running_mean": mean, "1.running_var": mean.exp()}
        return (evaluate(w, x, buffers=buffers) ** 3).sum()

    gradient = grad(fn)(mean)
    v = torch.ones(4)
    torch.testing.assert_close(
        gradient.sum(), (fn(mean + eps * v) - fn(mean - eps * v)) / (2 * eps), rtol=1e-7, atol=0
    )
    leaf = mean.clone().requires_grad_()
    equal(torch.autograd.grad(fn(leaf), leaf)[0], gradient)
    second = (grad(fn)(mean + eps * v) - grad(fn)(mean - eps * v)) / (2 * eps)
    torch.testing.assert_close(hessian(fn)(mean).sum(0), second, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jacfwd(grad(fn))(mean).sum(1), second, rtol=1e-6, atol=1e-8)


def test_statistics_of_a_module_of_ones_own_get_no_graph() -> None:
    """A module that is called as it is keeps its buffers, which outlive the call, as constants."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x, buffers = torch.randn(6, 3), dict(net.named_buffers())

    def loss(w: Any, h: Tensor) -> Tensor:
        return (torch.func.functional_call(net, {**w, **buffers}, (x,)) ** 2 * h).sum()

    w = {k: p.detach() for k, p in net.named_parameters()}
    solver = hf.minimize(loss, hf.optim.sgd(lr=0.01), 2, init=lambda h: w)
    hf.hypergrad(solver, loss, method="reverse_unroll")(torch.tensor(1.0))
    assert not any(buffer.requires_grad for buffer in net.buffers())
    assert net[1].num_batches_tracked > 0
