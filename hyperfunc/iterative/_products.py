"""Products with the Jacobian of a function at a point, where no transform is active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hyperfunc._torch import tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves

STEP = "the inner solver's step"


def pull(
    fn: Callable[..., Leaves],
    primals: Leaves,
    wrt: Sequence[int],
    cotangents: dict[int, Tensor],
    *,
    batched: bool,
    check: bool = False,
) -> dict[int, Tensor]:
    """Transposed products; zeros are left out."""
    return value_and_pull(fn, primals, wrt, cotangents, batched=batched, check=check)[1]


def value_and_pull(
    fn: Callable[..., Leaves],
    primals: Leaves,
    wrt: Sequence[int],
    cotangents: dict[int, Tensor],
    *,
    batched: bool,
    check: bool = False,
) -> tuple[Leaves, dict[int, Tensor]]:
    """`pull`, and the value of the function."""
    inputs, outputs = _record(fn, primals, wrt, check)
    values = tracking.detach(outputs)
    live = [i for i in cotangents if outputs[i].requires_grad]
    if not live or not wrt:
        return values, {}
    grads = _grad(
        [outputs[i] for i in live],
        [inputs[i] for i in wrt],
        [cotangents[i] for i in live],
        batched=batched,
    )
    return values, {i: grad for i, grad in zip(wrt, grads, strict=True) if grad is not None}


def push(
    fn: Callable[..., Leaves],
    primals: Leaves,
    tangents: dict[int, Tensor],
    *,
    batched: bool,
    check: bool = False,
) -> tuple[Leaves, dict[int, Tensor]]:
    """Outputs and their tangents, as the transpose of a transposed product; zeros are left out."""
    inputs, outputs = _record(fn, primals, tangents, check)
    live = [i for i, out in enumerate(outputs) if out.requires_grad]
    if not live:
        return outputs, {}
    with torch.enable_grad():
        dummies = [torch.zeros_like(outputs[i], requires_grad=True) for i in live]
        grads = torch.autograd.grad(
            [outputs[i] for i in live],
            [inputs[i] for i in tangents],
            dummies,
            create_graph=True,
            allow_unused=True,
        )
    pairs = [
        (grad, tangent)
        for grad, tangent in zip(grads, tangents.values(), strict=True)
        if grad is not None and grad.requires_grad
    ]
    if not pairs:
        return tracking.detach(outputs), {}
    dots = _grad(
        [grad for grad, _ in pairs],
        dummies,
        [tangent for _, tangent in pairs],
        batched=batched,
    )
    return tracking.detach(outputs), {
        i: dot for i, dot in zip(live, dots, strict=True) if dot is not None
    }


def _grad(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], *, batched: bool
) -> tuple[Tensor | None, ...]:
    if batched and torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        raise RuntimeError(
            "anomaly detection looks for NaN in each gradient, which torch cannot do where several "
            "are taken at once, as here. Use torch.autograd.set_detect_anomaly(True, "
            "check_nan=False), or under it method='reverse' in place of 'forward'"
        )
    return torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, is_grads_batched=batched
    )


def _record(
    fn: Callable[..., Leaves], primals: Leaves, wrt: Iterable[int], check: bool
) -> tuple[Leaves, Leaves]:
    """The graph of a function; looks for tensors that should have been arguments on ``check``."""
    chosen = set(wrt)
    with torch.enable_grad():
        inputs = tuple(
            primal.detach().requires_grad_(i in chosen) for i, primal in enumerate(primals)
        )
        outputs = tuple(fn(*inputs))
    if check and tracking.reaches_foreign_leaf(outputs, inputs):
        raise ValueError(captured_message(STEP))
    return inputs, outputs
