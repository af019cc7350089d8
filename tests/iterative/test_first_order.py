"""First-order MAML against the same by hand: plain torch, ``create_graph=False``."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import hyperfunc as hf

STEPS, TASKS = 3, 4


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(w: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["a"]) @ w["b"]


def start_of(h: Any, x: Tensor) -> Any:
    return {name: h["start"][name] * 1.5 for name in h["start"]}


def inner_loss(w: Any, h: Any, x: Tensor) -> Tensor:
    decay = sum((leaf**2).sum() for leaf in w.values())
    return F.mse_loss(network(w, x), x.sin().sum(1, keepdim=True)) + h["decay"] * decay


def outer_loss(w: Any, h: Any, x: Tensor) -> Tensor:
    return ((network(w, 2 * x) - x.cos().sum(1, keepdim=True)) ** 2).mean() * (1 + h["decay"])


def hparams_and_tasks() -> tuple[Any, Tensor]:
    g = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(2, 5, generator=g), "b": torch.randn(5, 1, generator=g)}
    h = {"start": start, "lr": torch.tensor(0.1), "decay": torch.tensor(0.3)}
    return h, torch.randn(TASKS, 6, 2, generator=g)


def by_hand(h: Any, x: Tensor, momentum: float = 0.0) -> Any:
    """The steps of a loop as people write it, with gradients that have no graph."""
    leaves = {
        "start": {name: leaf.clone().requires_grad_() for name, leaf in h["start"].items()},
        "lr": h["lr"].clone().requires_grad_(),
        "decay": h["decay"].clone().requires_grad_(),
    }
    w = start_of(leaves, x)
    buffers = {name: torch.zeros_like(leaf) for name, leaf in w.items()}
    for _ in range(STEPS):
        grads = torch.autograd.grad(inner_loss(w, leaves, x), list(w.values()))
        for name, gradient in zip(w, grads, strict=True):
            buffers[name] = momentum * buffers[name] + gradient
            w[name] = w[name] - leaves["lr"] * buffers[name]
    outer_loss(w, leaves, x).backward()
    start = {name: leaf.grad for name, leaf in leaves["start"].items()}
    return {"start": start, "lr": leaves["lr"].grad, "decay": leaves["decay"].grad}


def steps_of(momentum: float = 0.0) -> Any:
    optimizer = hf.optim.sgd(lr=lambda h: h["lr"], momentum=momentum)
    return hf.minimize(inner_loss, optimizer, STEPS, init=start_of)


def descended(h: Any, x: Tensor) -> Any:
    """The same steps by code that only runs on plain tensors, one task at a time."""
    w = {name: leaf.numpy() for name, leaf in start_of(h, x).items()}
    for _ in range(STEPS):
        leaves = {name: torch.from_numpy(leaf).requires_grad_() for name, leaf in w.items()}
        inner_loss(leaves, h, x).backward()
        w = {
            n: leaf.detach().numpy() - h["lr"].item() * leaf.grad.numpy()
            for n, leaf in leaves.items()
        }
    return {name: torch.from_numpy(leaf) for name, leaf in w.items()}


def map_step(w: Any, h: Any, x: Tensor) -> Any:
    grads = grad(inner_loss)(w, h, x)
    return {name: w[name] - h["lr"] * grads[name] for name in w}


# name: the inner solver, the method, and whether the learning rate is followed
SOLVERS: dict[str, tuple[Any, Any, bool]] = {
    "minimize": (steps_of(), "first_order", True),
    "minimize, Reverse's own": (steps_of(0.9), hf.FirstOrder(), True),
    "iterate": (hf.iterate(map_step, STEPS, init=start_of), "first_order", False),
    "any code": (descended, hf.FirstOrder(init=start_of), False),
}

ROUTES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "vmap": lambda fn: vmap(fn, (None, 0)),
    "task_map": lambda fn: hf.task_map(fn, (None, 0), 1),
    "chunks": lambda fn: hf.task_map(fn, (None, 0), 3),
    "task_parallel": lambda fn: hf.distributed.task_parallel(vmap(fn, (None, 0)), reduce=None),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_hypergradients_by_every_route(name: str) -> None:
    solver, method, follows_rate = SOLVERS[name]
    h, tasks = hparams_and_tasks()
    momentum = 0.9 if "own" in name else 0.0
    expected = [by_hand(h, x, momentum) for x in tasks]
    if not follows_rate:
        for each in expected:
            each["lr"] = torch.zeros(())
    fn = hf.hypergrad(solver, outer_loss, method=method)
    for x, each in zip(tasks, expected, strict=True):
        torch.testing.assert_close(fn(h, x), each, rtol=1e-12, atol=1e-13)
    for route in ROUTES.values():
        found = route(fn)(h, tasks)
        for index, each in enumerate(expected):
            for part in ("lr", "decay"):
                torch.testing.assert_close(found[part][index], each[part], rtol=1e-12, atol=1e-13)
            start = {key: leaf[index] for key, leaf in found["start"].items()}
            torch.testing.assert_close(start, each["start"], rtol=1e-12, atol=1e-13)

    # as a rule for autograd and torch.func, over vmap and under it, in both modes
    rule = hf.implicit_diff(solver, method=method)
    torch.testing.assert_close(rule(h, tasks[0]), solver(h, tasks[0]), rtol=0, atol=0)

    def total(h: Any) -> Tensor:
        return vmap(lambda x: outer_loss(rule(h, x), h, x))(tasks).sum()

    by_grad = grad(total)(h)
    torch.testing.assert_close(by_grad["lr"], sum(each["lr"] for each in expected))
    torch.testing.assert_close(by_grad["start"]["a"], sum(e["start"]["a"] for e in expected))
    leaves = {"start": h["start"], "lr": h["lr"].clone().requires_grad_(), "decay": h["decay"]}
    leaves["start"] = {key: leaf.clone().requires_grad_() for key, leaf in h["start"].items()}
    total(leaves).backward()
    torch.testing.assert_close(leaves["start"]["b"].grad, by_grad["start"]["b"])
    direction = {
        "start": {key: torch.ones_like(leaf) for key, leaf in h["start"].items()},
        "lr": torch.tensor(0.5),
        "decay": torch.tensor(-1.0),
    }
    _, forward = jvp(lambda h: outer_loss(rule(h, tasks[0]), h, tasks[0]), (h,), (direction,))
    each = expected[0]
    exact = sum(leaf.sum() for leaf in each["start"].values()) + 0.5 * each["lr"] - each["decay"]
    torch.testing.assert_close(forward, exact)


def test_optimisers_and_inner_losses_in_closed_form() -> None:
    """Adaptive rules and regularisers are constants; decay by the optimiser is one too."""
    h, tasks = hparams_and_tasks()
    pulled = hf.proximal(inner_loss, 0.7, center=lambda h: h["start"])
    for optimizer in (
        hf.optim.adam(0.1),
        hf.optim.adamw(0.1, weight_decay=0.5),
        hf.optim.sgd(0.1, momentum=0.9, weight_decay=0.2),
        hf.optim.from_torch(torch.optim.Rprop, lr=0.01),
    ):
        for loss in (inner_loss, pulled):
            solver = hf.minimize(loss, optimizer, STEPS, init=start_of)
            found, solution = hf.hypergrad_and_solution(solver, outer_loss, method="first_order")(
                h, tasks[0]
            )
            torch.testing.assert_close(solution.params, solver(h, tasks[0]), rtol=0, atol=0)
            expected = grad(outer_loss)(solver(h, tasks[0]), h, tasks[0])
            for key, leaf in found["start"].items():
                torch.testing.assert_close(leaf, 1.5 * expected[key], rtol=1e-12, atol=0)
            assert found["lr"] == 0


def test_counters_and_minibatches_go_along() -> None:
    _, tasks = hparams_and_tasks()
    meta = {"w": torch.ones(2), "count": torch.tensor(3)}

    def batch_loss(w: Any, meta: Tensor, x: Tensor) -> Tensor:
        return ((x @ w["w"]) ** 2).mean()

    solver = hf.minimize(
        batch_loss,
        hf.optim.sgd(0.1),
        TASKS,
        init=lambda meta: {"w": meta, "count": torch.tensor(3)},
        inputs=tasks,
    )
    fn = hf.hypergrad_and_solution(solver, lambda w, h: (w["w"] ** 2).sum(), method="first_order")
    found, solution = fn(meta["w"])
    assert solution.params["count"] == 3
    torch.testing.assert_close(found, 2 * solution.params["w"])


@pytest.mark.parametrize("trace", [False, True])
def test_windows_whose_state_goes_on(trace: bool) -> None:
    """The steps go on from a state that is given, and hand on theirs."""
    optimizer = hf.optim.sgd(lambda h: h["lr"], momentum=0.9)
    loss = lambda w, h, state: (w**4).sum() / 4  # noqa: E731
    window = hf.minimize(
        loss,
        optimizer,
        2,
        init=lambda h, state: 2.0 * h["w"],
        init_state=lambda h, state: state,
        has_aux=True,
        trace=trace,
    )
    outer = lambda w, h, state: (w**2).sum() / 2  # noqa: E731
    h = {"w": torch.tensor([0.4, -0.7]), "lr": torch.tensor(0.1)}
    _, state = optimizer.update(h["w"], optimizer.init(h["w"]), h["w"], h)
    w, buffer, moved = 2.0 * h["w"], h["w"], 0.0 * h["w"]
    for _ in range(2):
        buffer = 0.9 * buffer + w**3
        w, moved = w - h["lr"] * buffer, moved + buffer
    fn = hf.hypergrad_and_solution(window, outer, method="first_order")
    batch = {name: torch.stack([leaf, leaf]) for name, leaf in h.items()}
    for found, solution in (
        fn(h, state),
        map_first(vmap(fn, in_dims=(0, None))(batch, state)),
    ):
        torch.testing.assert_close(found, {"w": 2.0 * w, "lr": -(w @ moved)})
        torch.testing.assert_close(solution.params, w)
        torch.testing.assert_close(solution.solver_aux.state.slots["momentum_buffer"], buffer)
        assert solution.solver_aux.state.step == 3


def map_first(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf[0], tree)


def test_a_solver_that_tells_no_start_starts_from_hparams_or_is_refused() -> None:
    _, tasks = hparams_and_tasks()
    inner = lambda w, m, x: ((w - x) ** 2).sum()  # noqa: E731
    outer = lambda w, m, x: (w**3).sum()  # noqa: E731

    def code(m: Tensor, x: Tensor) -> Tensor:
        return torch.from_numpy(0.2 * m.numpy() + 0.8 * x.numpy())

    found = vmap(hf.hypergrad(code, outer, method="first_order"), (None, 0))(
        torch.ones(6, 2), tasks
    )
    torch.testing.assert_close(found, 3 * (0.2 + 0.8 * tasks) ** 2)
    with pytest.raises(ValueError, match=r"no tree like params: got .*FirstOrder\(init=lambda"):
        hf.hypergrad(code, outer, method="first_order")(torch.ones(2), tasks[0])
    with pytest.raises(TypeError, match="FirstOrder: init"):
        hf.FirstOrder(init=3)  # type: ignore[arg-type]
    # the default of other methods leads here, and where nothing starts from hparams it is told
    solver = hf.minimize(inner, hf.optim.sgd(lr=0.01), 5, init=lambda m, x: m)
    with pytest.raises(ValueError, match="method='first_order'"):
        hf.hypergrad(solver, outer, method="one_step")(torch.ones(2), tasks[0])
    apart = hf.minimize(inner, hf.optim.sgd(lr=0.01), 5, init=lambda m, x: torch.zeros(2))
    moved = hf.iterate(lambda w, m, x: 0.5 * w + m, 5, init=lambda m, x: torch.zeros(2))
    for other in (apart, moved):
        with pytest.raises(ValueError, match="none of them depends on hparams"):
            hf.hypergrad(other, outer, method="first_order")(torch.ones(2), tasks[0])
    with pytest.warns(UserWarning, match="follows the start of the inner solver"):
        grad(lambda m: hf.implicit_diff(moved, method="first_order")(m, 0).sum())(torch.ones(2))
    zeros = hf.hypergrad(apart, outer, method="first_order", throw=False)
    assert not zeros(torch.ones(2), tasks[0]).any()


def test_a_check_calls_it_what_it_is() -> None:
    h, tasks = hparams_and_tasks()
    solver = hf.iterate(map_step, STEPS, init=start_of)
    for method, broken in (("first_order", True), ("reverse", False)):
        report = hf.check_hypergrad(solver, outer_loss, h, tasks[0], method=method)
        assert bool(report.causes.assumption_broken) is broken
        assert not bool(report.causes.linear_solve)


def test_nothing_of_the_steps_is_kept() -> None:
    """The graph does not grow with the number of steps, and no second derivative is taken."""
    kept = {}
    for num_steps in (2, 20):
        solver = hf.minimize(inner_loss, hf.optim.sgd(0.01), num_steps, init=start_of)
        rule = hf.implicit_diff(solver, method="first_order")
        h, tasks = hparams_and_tasks()
        h["start"] = {key: leaf.requires_grad_() for key, leaf in h["start"].items()}
        saved = []

        def pack(tensor: Tensor, saved: list[Any] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            params = rule(h, tasks[0])
            nodes, stack = set(), [leaf.grad_fn for leaf in params.values()]
            while stack:
                node = stack.pop()
                if node is not None and node not in nodes:
                    nodes.add(node)
                    stack += [parent for parent, _ in node.next_functions]
        kept[num_steps] = len(nodes)
    assert kept[2] == kept[20]
