"""Errors from wrong *args and hparams name the user's function and what it was called with."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf

D = torch.float64
X = torch.linspace(-1, 1, 15, dtype=D).reshape(5, 3)
y = torch.linspace(0, 2, 5, dtype=D)
H = torch.tensor(0.1, dtype=D)


def inner_loss(w: Any, reg: Any, X: Any, y: Any) -> Any:
    return ((X @ w - y) ** 2).sum() + reg.exp() * (w**2).sum()


def outer_loss(w: Any, reg: Any, X: Any, y: Any) -> Any:
    return ((X @ w - y) ** 2).mean()


def step(w: Any, reg: Any, X: Any, y: Any) -> Any:
    return w - 0.02 * (X.T @ (X @ w - y) + reg.exp() * w)


def start(reg: Any, X: Any, y: Any) -> Tensor:
    return torch.zeros(3, dtype=D)


def zeros(h: Any, *args: Any) -> Tensor:
    return torch.zeros(3, dtype=D)


def model(w: Any, reg: Any, X: Any, y: Any) -> Any:
    return X @ w


def misfit(outputs: Any, reg: Any, X: Any, y: Any) -> Any:
    return ((outputs - y) ** 2).sum() * reg


def ridge(reg: Any, X: Any, y: Any) -> Any:
    matrix = X.T @ X + reg.exp() * torch.eye(3, dtype=D)
    return torch.linalg.solve(matrix, X.T @ y)


def descent(loss: Any = inner_loss, init: Any = zeros, **options: Any) -> Any:
    return hf.minimize(loss, hf.optim.sgd(lr=0.02), 3, init=init, **options)


def picard(init: Any) -> Any:
    return hf.fixed_point_solvers.Picard(maxiter=3).inner_solver(step, init=init, has_aux=True)


def soba(h: Any, *args: Any) -> Any:
    loop = hf.bilevel.soba(inner_loss, outer_loss, inner_lr=0.02, outer_lr=0.02)
    return loop.update(loop.init(torch.zeros(3, dtype=D), h), args, args)


def hypergrad(solver: Any, **options: Any) -> Any:
    return hf.hypergrad(solver, outer_loss, throw=False, **options)


def mapped(h: Any, *args: Any) -> Any:
    fn = hypergrad(descent(), inner_loss=inner_loss)
    return vmap(fn, in_dims=(0, *[None] * len(args)))(torch.stack([h, h]), *args)


# What is called, and the function that the mistake is noticed in first, by both its names.
WAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "minimize": (descent(), "inner_loss"),
    "init": (descent(init=start), "init (start)"),
    "iterate": (hf.iterate(step, 3, init=zeros), "step"),
    "hypergrad": (hypergrad(ridge, inner_loss=inner_loss), "the inner solver (ridge)"),
    "outer loss": (
        hypergrad(lambda h, *args: torch.ones(3, dtype=D), inner_loss=lambda w, h, *_: w @ w * h),
        "outer_loss",
    ),
    "inner loss": (hf.implicit_diff(zeros, inner_loss=inner_loss), "inner_loss"),
    "fixed point": (hf.implicit_diff(zeros, fixed_point=step), "fixed_point (step)"),
    "optimality": (hf.implicit_diff(zeros, optimality=step), "optimality (step)"),
    "implicit_diff": (
        hf.implicit_diff(ridge, inner_loss=inner_loss),
        "the inner solver (ridge)",
    ),
    "reverse": (hypergrad(descent(), method="reverse"), "inner_loss"),
    "reverse_unroll": (hypergrad(ridge, method="reverse_unroll"), "the inner solver (ridge)"),
    "first_order": (hypergrad(descent(init=start), method="first_order"), "init (start)"),
    "picard": (picard(zeros), "fixed_point (step)"),
    "its init": (picard(start), "init (start)"),
    "soba": (soba, "soba: inner_loss"),
    "composed model": (descent(hf.composed(model, misfit)), "composed: model"),
    "proximal": (descent(hf.proximal(inner_loss, 0.1, center=zeros)), "inner_loss"),
    "its loss": (
        hf.implicit_diff(zeros, inner_loss=hf.proximal(inner_loss, 0.1, center=zeros)),
        "inner_loss",
    ),
    "compile": (hypergrad(descent(compile="eager"), compile="eager"), "inner_loss"),
    "vmap": (mapped, "inner_loss"),
    "a solver in a solver": (
        hypergrad(lambda h, *args: descent()(h, *args), inner_loss=inner_loss),
        "inner_loss",
    ),
}
READS_ALL = WAYS.keys() - {"init", "first_order", "its init"}  # whose start reads nothing


def text_of(call: Callable[[], Any]) -> str:
    """The message of the error of a call, and its notes."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


needs_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are of Python 3.11")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("args", [(X,), (X, y, y)], ids=["one too few", "one too many"])
def test_another_number_of_arguments(way: str, args: tuple[Any, ...]) -> None:
    function, name = WAYS[way]
    text = text_of(lambda: function(H, *args))
    reason = "missing a required argument: 'y'" if len(args) == 1 else "too many positional"
    assert text.startswith(f"{name} does not take what it is called with: {reason}")
    assert "hparams: float64 ()" in text
    rest = "batch" if way == "soba" else "args"
    assert f"{rest}[0]: float64 (5, 3)" in text
    assert (f"{rest}[2]: float64 (5,)" in text) == (len(args) == 3)
    assert "hyperfunc called" not in text
    assert f"let the parameters of a function that needs fewer end in *{rest}" in text


MISTAKES: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "a NumPy array": (
        (X.numpy(), y),
        "X: array float64 (5, 3)",
        "X is a NumPy array: write torch.as_tensor(X)",
    ),
    "float32": (
        (X.float(), y),
        "X: float32 (5, 3)",
        "X is not of the dtype of {first}: write X.to(torch.float64)",
    ),
    "integers": (
        (X.long(), y),
        "X: int64 (5, 3)",
        "X is not of the dtype of {first}: write X.to(torch.float64)",
    ),
    "a device": (
        (X.to("meta"), y),
        "X: float64 (5, 3) on meta",
        "X is on meta, {first} on cpu: write X.to('cpu')",
    ),
    "features": ((torch.ones(5, 4, dtype=D), y), "X: float64 (5, 4)", ""),
    "a list": ((X, [0.1] * 5), "y: list of 5 numbers", "y is of type list: write torch.tensor(y)"),
}


@needs_notes
@pytest.mark.parametrize("way", sorted(READS_ALL))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_arguments_of_another_kind(way: str, mistake: str) -> None:
    function, name = WAYS[way]
    args, kind, advice = MISTAKES[mistake]
    text = text_of(lambda: function(H, *args))
    if way == "composed model" and mistake == "a list":
        name = "composed: loss (misfit)"
    if way == "compile" and mistake == "a NumPy array":
        assert "write torch.as_tensor(...) around an array" in text
        return
    assert f"hyperfunc called {name} with " in text
    assert kind in text
    first = "reg" if "solver" in name else "w"
    assert text.endswith(advice.format(first=first))
    assert text.count("hyperfunc called") == 1  # the innermost function alone


@needs_notes
def test_hparams_that_are_a_number() -> None:
    text = text_of(lambda: descent()(0.1, X, y))
    assert text.startswith("'float' object has no attribute 'exp'")
    assert "hyperfunc called inner_loss with w: float64 (3,), reg: float, X: " in text
    assert text.endswith("reg is of type float: write torch.tensor(reg)")


@needs_notes
def test_nested_arguments_are_named_by_their_paths_and_not_printed() -> None:
    def loss(w: Any, hparams: Any, *data: Any) -> Any:
        return (data[0]["train"][0] @ w).sum()

    tree = {"train": (torch.full((5, 3), 1234.5), ["a", 7]), "rate": np.float64(1234.5)}
    text = text_of(lambda: descent(loss)({"a": H}, tree, None))
    assert "hparams: {'a': float64 ()}" in text
    assert "data[0]: {'train': (float32 (5, 3), [str, int]), 'rate': array float64 ()}" in text
    assert "data[1]: NoneType" in text
    assert text.endswith(
        "data[0]['train'][0] is not of the dtype of w: write data[0]['train'][0].to(torch.float64)"
    )
    assert "1234" not in text


def test_other_errors_of_a_function_stay_what_they_are() -> None:
    class Own(Exception):
        pass

    def fails(w: Any, h: Any, *args: Any) -> Any:
        raise Own("of the user")

    def inner(w: Any, h: Any, *args: Any) -> Any:
        return start(1)  # type: ignore[call-arg]

    with pytest.raises(Own, match="of the user") as caught:
        hf.implicit_diff(zeros, inner_loss=fails)(H, X)
    assert str(caught.value) == "of the user"
    with pytest.raises(TypeError, match=r"^start\(\) missing 2 required positional arguments"):
        descent(inner)(H, X)


def test_a_builtin_that_takes_fewer_arguments() -> None:
    text = text_of(lambda: descent(init=torch.zeros_like)(H, X, y))
    assert text.startswith("init (_VariableFunctionsClass.zeros_like) does not take what it ")
    assert "called with: zeros_like() takes 1 positional argument but 3 were given" in text
    assert "hparams: float64 (), args[0]: float64 (5, 3)" in text


class Cell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z + self.linear(x)


def test_an_equilibrium_layer() -> None:
    layer = hf.EquilibriumLayer(Cell(), init=lambda *inputs: torch.zeros(2, 4))
    text = text_of(lambda: layer(torch.ones(2, 3), 1))
    assert text.startswith("the cell (Cell.forward) does not take what it is called with: too many")
    assert "state: float32 (2, 4), inputs[0]: float32 (2, 3), inputs[1]: int" in text
    layer = hf.EquilibriumLayer(Cell(), init=lambda x: torch.zeros(2, 4))
    text = text_of(layer)
    assert text.startswith("init (test_an_equilibrium_layer.<locals>.<lambda>) does not take")
    assert "here with nothing" in text


@needs_notes
def test_an_equilibrium_layer_with_other_features() -> None:
    layer = hf.EquilibriumLayer(Cell(), init=lambda x: torch.zeros(2, 4))
    text = text_of(lambda: layer(torch.ones(2, 5)))
    note = "hyperfunc called the cell (Cell.forward) with z: float32 (2, 4), x: float32 (2, 5)"
    assert text.endswith(note)
