"""Modules that use torch.utils.checkpoint have the derivatives of those that do not."""

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import hyperfunc as hf

F64 = torch.float64


class Net(nn.Module):
    """``body`` runs through a function that may compute it again."""

    def __init__(self, again: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self._again = again

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._again(self.body, x))


def nested(body: nn.Sequential, x: Tensor) -> Tensor:
    def outer(x: Tensor) -> Tensor:
        return body[2:](checkpoint(body[:2], x, use_reentrant=False))

    return checkpoint(outer, x, use_reentrant=False)


def variable(body: nn.Sequential, x: Tensor) -> Tensor:
    """As transformers does, so that checkpoints of a model whose first layer is frozen work."""
    return body[1:](checkpoint(body[0], x, use_reentrant=False).requires_grad_())


def set_variable(body: nn.Sequential, x: Tensor) -> Tensor:
    y: Tensor = body[0](x)
    if not y.requires_grad:  # torch allows it for leaves alone
        y.requires_grad = True
    return body[1:](y)


KINDS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "sequential": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=False),
    "nested": nested,
    "variable": variable,
    "variable that is set": set_variable,
}


def plain(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)


def routes(again: Any, frozen: bool) -> dict[str, Any]:
    """Derivatives of all kinds of a network."""
    torch.manual_seed(1)
    net = Net(again).double()
    net.body[0].requires_grad_(not frozen)
    apply, w0 = hf.functional(net)
    x, y, xq = (
        torch.randn(10, 5, dtype=F64),
        torch.randn(10, 2, dtype=F64),
        torch.randn(3, 10, 5, dtype=F64),
    )

    def loss(w: Any, h: Any, x: Tensor) -> Tensor:
        return ((apply(w, x) - y) ** 2).mean()

    def outer(w: Any, h: Any, x: Tensor) -> Tensor:
        return (apply(w, 2 * x) ** 2).mean()

    found = {}
    leaves = {name: p.clone().requires_grad_() for name, p in w0.items()}
    loss(leaves, None, x).backward()
    found["backward"] = {name: leaf.grad for name, leaf in leaves.items()}
    found["grad"] = grad(loss)(w0, None, x)
    found["vmap of grad"] = vmap(grad(loss), (None, None, 0))(w0, None, xq)
    found["jvp"] = jvp(lambda w: loss(w, None, x), (w0,), (w0,))[1]
    steps = hf.minimize(loss, hf.optim.sgd(lr=0.3), 3, init=lambda h, x: h)
    solved = hf.minimize(hf.proximal(loss, 2.0), hf.optim.sgd(lr=0.2), 60, init=lambda h, x: h)
    for method in ("reverse_unroll", "reverse", "forward", "cg"):
        fn = hf.hypergrad(solved if method == "cg" else steps, outer, method=method)
        found[method] = fn(w0, x)
        if method != "forward":
            found[f"vmap of {method}"] = vmap(fn, (None, 0))(w0, xq)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[bool, dict[str, Any]]:
    return {frozen: routes(plain, frozen) for frozen in (False, True)}


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_without_checkpoints(
    kind: str, expected: dict[bool, dict[str, Any]]
) -> None:
    assert not torch.allclose(expected[True]["jvp"], expected[False]["jvp"])
    for frozen in {False, "variable" in kind}:
        actual = routes(KINDS[kind], frozen)
        for route, values in expected[frozen].items():
            message = lambda text, r=route: f"{r}: {text}"  # noqa: E731
            torch.testing.assert_close(actual[route], values, rtol=1e-12, atol=1e-14, msg=message)


def test_dropout_draws_once() -> None:
    def body(body: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.dropout(body(x), 0.5, True), x, use_reentrant=False)

    apply, w0 = hf.functional(Net(body))
    leaves = {name: p.clone().requires_grad_() for name, p in w0.items()}
    torch.manual_seed(3)
    value = apply(leaves, torch.ones(2, 5)).sum()
    value.backward()
    torch.manual_seed(3)
    slope = grad(lambda w: apply(w, torch.ones(2, 5)).sum())(w0)
    assert torch.equal(leaves["body.0.weight"].grad, slope["body.0.weight"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_everywhere_else_checkpoints_compute_again(reentrant: bool) -> None:
    calls = []

    def segment(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(x)

    def ordinary() -> None:
        x = torch.ones(2, requires_grad=True)
        calls.clear()
        checkpoint(segment, x, use_reentrant=reentrant).sum().backward()
        assert len(calls) == 2
        torch.testing.assert_close(x.grad, 1 - torch.tanh(torch.ones(2)) ** 2)

    apply, w0 = hf.functional(Net(KINDS["reentrant"]))
    apply(w0, torch.ones(2, 5))
    ordinary()
    errors: list[BaseException] = []

    def other_thread() -> None:
        try:
            ordinary()
        except BaseException as error:
            errors.append(error)

    def meanwhile(body: nn.Module, x: Tensor) -> Tensor:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        return checkpoint(body, x, use_reentrant=reentrant)

    apply, w0 = hf.functional(Net(meanwhile))
    apply(w0, torch.ones(2, 5))
    assert not errors, errors

    def fails(body: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        hf.functional(Net(fails))[0](w0, torch.ones(2, 5))
    ordinary()


@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "forward", "dense"])
@pytest.mark.parametrize("closes_over", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_of_ones_own_with_checkpoints(
    method: str, closes_over: bool, reentrant: bool
) -> None:
    """Without a module: by arguments, and by what the checkpointed part closes over."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(4, 2, generator=generator, dtype=torch.float64) / 4
    h = torch.tensor(-1.0, dtype=torch.float64)

    def body(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    def checkpointed(x: Tensor, w: Tensor) -> Any:
        if closes_over:
            return checkpoint(lambda x: body(x, w), x, use_reentrant=reentrant)
        return checkpoint(body, x, w, use_reentrant=reentrant)

    def gradient(net: Any) -> Any:
        def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
            return ((net(x, w) - x[:, :2]) ** 2).mean() + h.exp() * (w**2).sum()

        solver = hf.minimize(loss, hf.optim.sgd(lr=0.3), 3, init=lambda h, x: start)
        return hf.hypergrad(solver, loss, method=method)

    found, expected = gradient(checkpointed), gradient(body)
    for route in (
        lambda fn: fn(h, x[0]),
        lambda fn: torch.func.vmap(fn, (None, 0))(h, x),
        lambda fn: torch.func.jacrev(fn)(h, x[0]),
        lambda fn: torch.func.jacfwd(fn)(h, x[0]),
    ):
        torch.testing.assert_close(route(found), route(expected), rtol=1e-10, atol=1e-12)


def test_outside_of_transforms_checkpoints_still_save_memory() -> None:
    """The part is computed again in the backward pass, where torch has that right."""
    calls = []

    def body(x: Tensor) -> Tensor:
        calls.append(None)
        return torch.sin(x)

    def loss(w: Tensor, h: Tensor) -> Tensor:
        return checkpoint(body, h * w, use_reentrant=False).sum()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), 1, init=lambda h: torch.ones(3))
    solver(torch.tensor(1.0))
    assert len(calls) == 2
