"""Functions of flat tensors with derivatives of their own making.

An operation can run without recording a graph, and knows the operations of its pull
(vector-Jacobian product), its push (Jacobian-vector product) and its version for a batch. One
`torch.autograd.Function`, `Recorded`, presents operations to autograd and to torch.func. It peels
off one transform at a time, so that an operation itself runs on plain tensors and the fast engine.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperfunc._engine.flat import differentiable_indices, scatter, split
from hyperfunc._torch import autodiff, derivative_rules, internals, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves


class Operation(Protocol):
    """A function of flat tensors, with the operations of its derivatives."""

    def run(self, operands: Leaves) -> Leaves:
        """The value; called with gradient mode off and no transform active."""

    def pull(self, wrt: tuple[int, ...], live: tuple[int, ...]) -> Operation:
        """``(operands, cotangents of the live outputs) -> gradients`` for the operands ``wrt``."""

    def push(self, wrt: tuple[int, ...]) -> Operation:
        """``(operands, tangents of the operands wrt) -> tangents`` of differentiable outputs."""

    def vmap(self, info: Any, in_dims: tuple[int | None, ...], operands: Leaves) -> Any:
        """The outputs for a batch, and their batch dimension."""


class Recorded(torch.autograd.Function):
    """An operation as autograd and torch.func see it."""

    @staticmethod
    def forward(operation: Operation, *operands: Tensor) -> Leaves:
        # Detached: code that switches gradient mode on again must not extend a graph from here.
        operands = tracking.detach(operands)
        taken = {id(tensor) for tensor in operands}
        outputs = []
        with derivative_rules.inactive():  # operations enter the rules where they call the user
            results = operation.run(operands)
        for output in results:
            # Autograd wants outputs that are neither inputs, nor views of them, nor equal.
            fresh = output.clone() if id(output) in taken or internals.is_view(output) else output
            taken.add(id(output))
            outputs.append(fresh)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.operation, *operands = inputs
        ctx.smooth = [tracking.is_differentiable(out) for out in output]
        ctx.mark_non_differentiable(*(out for out in output if not tracking.is_differentiable(out)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        live = tuple(i for i, cotangent in enumerate(cotangents) if cotangent is not None)
        wrt = differentiable_indices(operands, ctx.needs_input_grad[1:])
        if not live or not wrt:
            return (None,) * (1 + len(operands))
        pull = ctx.operation.pull(wrt, live)
        grads = Recorded.apply(pull, *operands, *(cotangents[i] for i in live))
        return (None, *scatter(grads, wrt, len(operands)))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with autodiff.nested_forward_mode(ctx.saved_tensors) as operands:
            wrt = tuple(i for i, tangent in enumerate(tangents) if tangent is not None)
            push = ctx.operation.push(wrt)
            results = iter(Recorded.apply(push, *operands, *(tangents[i] for i in wrt)))
            return tuple(next(results) if smooth else None for smooth in ctx.smooth)

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, *operands: Tensor) -> Any:
        return operation.vmap(info, tuple(in_dims[1:]), operands)


class Recomputed(abc.ABC):
    """An operation that computes its function again for each derivative.

    With a name, it is refused if it uses differentiable tensors that are not among its operands.
    """

    fn: Callable[..., Leaves]
    name: str | None = None

    @abc.abstractmethod
    def derivative(self, fn: Callable[..., Leaves], wrt: tuple[int, ...]) -> Operation:
        """The operation of a function of the operands, then cotangents or tangents."""

    def pull(self, wrt: tuple[int, ...], live: tuple[int, ...]) -> Operation:
        def pulled(*tensors: Tensor) -> Leaves:
            operands, cotangents = split(tensors, len(tensors) - len(live))
            linearized = self._linearize(operands, wrt, lambda outputs: [outputs[i] for i in live])
            return linearized.pull(cotangents)

        return self.derivative(pulled, wrt)

    def push(self, wrt: tuple[int, ...]) -> Operation:
        def pushed(*tensors: Tensor) -> Leaves:
            operands, tangents = split(tensors, len(tensors) - len(wrt))
            return self._linearize(operands, wrt, _differentiable).push(tangents)

        return self.derivative(pushed, wrt)

    def _linearize(
        self, operands: Leaves, wrt: tuple[int, ...], select: Callable[[Leaves], Sequence[Tensor]]
    ) -> autodiff.Linearization:
        linearized = autodiff.Linearization(
            lambda *leaves: tuple(select(self.fn(*leaves))), operands, (wrt,)
        )
        if self.name is not None and linearized.captures_gradient:
            raise ValueError(captured_message(self.name))
        return linearized


def _differentiable(outputs: Leaves) -> Leaves:
    return tuple(out for out in outputs if tracking.is_differentiable(out))
