"""What torch refuses to map is explained, with the function of the user's that is to blame."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import hyperfunc as hf
from hyperfunc._torch.derivative_rules import _mode

TASKS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def writes(w: Tensor, x: Tensor) -> Tensor:
    total = torch.zeros(2)
    total += w * x
    return total.sum()


def branches(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sum() if x.sum() > 4 else w.sum()


def reads_an_item(w: Tensor, x: Tensor) -> Tensor:
    return w.sum() * x[0].item()


def has_no_rule(w: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.rrelu(w * x, training=True).sum()


def goes_backward(w: Tensor, x: Tensor) -> Tensor:
    inner = (w * x).sum()
    inner.backward()
    return inner


def reads_memory(w: Tensor, x: Tensor) -> Tensor:
    return w.sum() * float(x.detach().numpy().sum())


def draws(w: Tensor, x: Tensor) -> Tensor:
    return (w * x * torch.rand(2)).sum()


CASES = {
    writes: r"writes in place, under vmap.*`A = A \+ x`.*task_map\(fn, in_dims, chunk_size=1\)",
    branches: r"branches on the value.*torch\.where\(condition, a, b\).*chunk_size=1",
    reads_an_item: r"branches on the value.*chunk_size=1",
    has_no_rule: r"operation that torch cannot map by vmap\. Use hf\.task_map.*rrelu_with_noise",
    goes_backward: r"calls backward\(\) or torch\.autograd under.*torch\.func\.grad\(loss\)",
    reads_memory: r"reads the memory of a tensor \(by NumPy\?.*chunk_size=1",
    draws: r'draws random numbers.*randomness="different"',
}


@pytest.mark.parametrize("place", ["inner loss", "outer loss", "step"])
@pytest.mark.parametrize("fn", CASES)
def test_the_function_is_named_and_what_to_write(fn: Any, place: str) -> None:
    def simple(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return ((w - h * x) ** 2).sum()

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return simple(w, h, x) + fn(w, x)

    def solver(h: Tensor, x: Tensor) -> Tensor:
        return h * x

    if place == "step":
        stepper = hf.minimize(loss, hf.optim.sgd(lr=0.1), 2, init=solver)
        transformed = hf.hypergrad(stepper, simple, method="reverse")
    elif place == "inner loss":
        transformed = hf.hypergrad(solver, simple, inner_loss=loss)
    else:
        transformed = hf.hypergrad(solver, loss, inner_loss=simple)
    randomness = "different" if fn is has_no_rule else "error"
    mapped = vmap(transformed, (None, 0), randomness=randomness)
    with pytest.raises(RuntimeError, match=CASES[fn]) as caught:
        mapped(torch.ones(2), TASKS)
    name, line = fn.__name__, fn.__code__.co_firstlineno
    assert f"{name} (test_unsupported.py, line {line + 1 if fn is not goes_backward else line + 2}"[
        : len(name) + 24
    ] in str(caught.value)
    assert str(type(caught.value)) == "<class 'RuntimeError'>"


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Out(Old):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.mul(g, 2, out=torch.empty_like(g))


def of_the_old_form(w: Tensor, x: Tensor) -> Tensor:
    return Old.apply(w * x).sin().sum()  # type: ignore[no-any-return]


def goes_out(w: Tensor, x: Tensor) -> Tensor:
    return Out.apply((w * x).sin()).sin().sum()  # type: ignore[no-any-return]


def samples(w: Tensor, x: Tensor) -> Tensor:
    grid = torch.stack([w, x]).reshape(1, 1, 2, 2)
    image = torch.ones(1, 1, 2, 2, dtype=w.dtype)
    return torch.nn.functional.grid_sample(image, grid, align_corners=False).sum()


def is_hard(w: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.hardsigmoid(w * x).sin().sum()


GAPS = {
    (of_the_old_form, True): r"torch\.autograd\.Function that lacks.*Give it setup_context",
    (goes_out, False): r"torch\.autograd\.Function that lacks.*a backward without `out=`",
    (samples, True): r'has no forward mode for.*method="reverse"',
    (is_hard, False): r"derivative torch cannot differentiate again\. Write it by elementary",
}


@pytest.mark.parametrize(("case", "advice"), GAPS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_torch_has_no_derivative_for(
    case: Any, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward mode, or without any transform around the call."""
    monkeypatch.setattr(_mode, "_rows", {})
    fn, forward = case
    loss = lambda w, h, x: ((w - h) ** 2).sum() + fn(w, x)  # noqa: E731
    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), 2, init=lambda h, x: h * x)
    transformed, at = hf.hypergrad(solver, lambda w, h, x: w.sum()), (torch.ones(2), TASKS[0])
    with pytest.raises(RuntimeError, match=f"hypergrad.*: .*{advice}"):
        jvp(transformed, at, at) if forward else transformed(*at)


def test_what_torch_says_without_a_transform_stays_as_it_is() -> None:
    def wrong(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return (w @ torch.ones(3)).sum()

    fn = hf.hypergrad(lambda h, x: h * x, wrong, inner_loss=lambda w, h, x: (w**2).sum())
    with pytest.raises(RuntimeError, match="size") as caught:
        fn(torch.ones(2), TASKS[0])
    assert "hypergrad(" not in str(caught.value)


@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "cg"])
def test_code_that_branches_alike_for_all_tasks_is_mapped(method: str) -> None:
    """As models do that ask whether anything is padded; the branch is that of each task alone."""

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        size = int((x > 0).sum())  # 2 for each task
        scale = float((x > 0).sum()) * (x[0] > x[0]).sum().item() + size
        if (x < 0).any():
            return w.sum()
        return ((w - h * x) ** 2).sum() * scale + (w.exp() if x.sum() > 0 else w).sum()

    steps = 30 if method == "cg" else 2
    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), steps, init=lambda h, x: h * x)
    fn = hf.hypergrad(solver, lambda w, h, x: w.sin().sum() if x[0] > 0 else w.sum(), method=method)
    h = torch.tensor([0.1, 0.2])
    each = vmap(lambda h: vmap(fn, (None, 0))(h, TASKS))(torch.stack([h, -h]))
    alone = torch.stack([torch.stack([fn(s, x) for x in TASKS]) for s in (h, -h)])
    torch.testing.assert_close(each, alone)
    with pytest.raises(RuntimeError, match="branches on the value"):
        vmap(fn, (None, 0))(h, TASKS * torch.tensor([[1.0], [-1.0]]))


def test_no_branch_is_taken_while_code_is_recorded() -> None:
    apply, params = hf.functional(Branching())
    record = make_fx(lambda x: vmap(lambda x: apply(params, x))(x))
    with pytest.raises(RuntimeError, match="branches on the value"):
        record(TASKS)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() if x.sum() > 0 else x
