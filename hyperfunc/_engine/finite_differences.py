"""Products with second derivatives as differences of gradients, which take first ones alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.flat import differentiable_indices, scatter, split
from hyperfunc._engine.shown import show
from hyperfunc._torch import autodiff, batching, tracking
from hyperfunc._types import Leaves

Products = Literal["reverse", "finite_difference"]

Value = Callable[..., Tensor]
"""A loss as a function of flat tensors, those of params first."""


def check_products(products: Any) -> None:
    if not isinstance(products, str) or products not in ("reverse", "finite_difference"):
        raise ValueError(f"products is {show(products)}; expected 'reverse' or 'finite_difference'")


class DifferencedLinearization(autodiff.Linearization):
    """The gradient of a loss at a point, with products as differences of gradients.

    ``value(*primals)`` is the loss, and the gradient that by the first ``num_params`` of them, w.
    With a vector u like w, the primals y of a group, and a step t that `difference` chooses,

        pull(u) = (d/dy value(w + t u, ...) - d/dy value(w - t u, ...)) / 2t.

    ``push(v)`` moves the primals of a group along v, and takes gradients by w. Otherwise as
    `autodiff.Linearization`.
    """

    def __init__(
        self,
        value: Value,
        primals: Leaves,
        num_params: int,
        groups: Sequence[Sequence[int]],
    ) -> None:
        self._value, self._primals = value, primals
        self._params, self._groups = tuple(range(num_params)), groups
        self._tracked = tracking.is_tracked(primals)
        self._looks = True
        self._used: dict[int, list[bool]] = {}
        self.captures_gradient = False
        self.aux: Leaves = ()
        since = tracking.now()

        def looking(*leaves: Tensor) -> Tensor:
            result = value(*leaves)
            if not tracking.transforms_active():
                self.captures_gradient = tracking.reaches_foreign_leaf((result,), leaves, since)
            return result

        w = tuple(primals[i] for i in self._params)
        found = autodiff.gradient_used(
            lambda *leaves: looking(*_replaced(primals, self._params, leaves)),
            w,
            create_graph=self._tracked,
            used=[],
        )
        self.used_params = [grad is not None for grad in found]
        self.outputs = autodiff.zeros_for_none(found, w)

    def pull(self, cotangents: Leaves, group: int = 0) -> Leaves:
        """The product with the transposed Jacobian, for the primals of a group."""
        return self._difference(self._params, cotangents, self._groups[group])

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]:
        """`pull`, with None for the primals that the loss does not use."""
        wrt = self._groups[group]
        if group not in self._used:
            primals = tracking.detach(self._primals)
            found = autodiff.gradient_used(
                lambda *leaves: self._value(*_replaced(primals, wrt, leaves)),
                tuple(primals[i] for i in wrt),
                create_graph=False,
                used=[],
            )
            self._used[group] = [grad is not None for grad in found]
        used = self._used[group]
        if not any(used):
            return (None,) * len(used)
        terms = zip(self.pull(cotangents, group), used, strict=True)
        return tuple(term if is_used else None for term, is_used in terms)

    def push(self, tangents: Leaves, group: int = 0) -> Leaves:
        """The product with the Jacobian, for the primals of a group."""
        return self._difference(self._groups[group], tangents, self._params)

    def _difference(self, along: Sequence[int], v: Leaves, wrt: Sequence[int]) -> Leaves:
        if not wrt:
            return ()
        tracked = self._tracked or tracking.is_tracked(v)
        base = self.outputs if self._looks and wrt[0] == 0 else None
        self._looks = self._looks and base is None

        def gradient_at(x: Leaves) -> Leaves:
            return gradient(self._value, _replaced(self._primals, along, x), wrt, tracked)

        return difference(gradient_at, tuple(self._primals[i] for i in along), v, base)


def gradient(value: Value, primals: Leaves, wrt: Sequence[int], tracked: bool) -> Leaves:
    """The gradient by some of the primals."""
    return autodiff.gradient(
        lambda *leaves: value(*_replaced(primals, wrt, leaves)),
        tuple(primals[i] for i in wrt),
        create_graph=tracked,
    )


def difference(
    gradient_at: Callable[[Leaves], Leaves], x: Leaves, v: Leaves, base: Leaves | None = None
) -> Leaves:
    """The derivative along v, from x, of a gradient that is a function of it.

    The step is ``c eps^(1/3) (1 + ||x||) / ||v||`` for leaves of precision ``eps``, best where the
    loss changes its shape within the part c of the params: a tenth, or in half precision all. With
    ``base``, the first leaves of the gradient at x itself, the error is estimated, and told where
    it is large.
    """
    eps = trees.epsilon(x)
    size = trees.norm(tracking.detach(v))
    part = 0.1 if eps < 1e-5 else 1.0
    step = part * eps ** (1 / 3) * (1 + trees.norm(tracking.detach(x)))
    step = step / torch.where(size > 0, size, 1.0)
    ends = [gradient_at(_moved(sign * step, v, x)) for sign in (1.0, -1.0)]
    halves = [trees.scale(sign / (2 * step), end) for sign, end in zip((1, -1), ends, strict=True)]
    if base is not None:
        _tell_of_errors([tracking.detach(end) for end in ends], tracking.detach(base), eps)
    return trees.add(*halves)


def differenced_gradient(
    value: Value, params: Leaves, operands: Leaves, values: list[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradient of ``value(*params, *operands)`` by params, differentiable once, by differences.

    None stands for params that the loss does not use.
    """
    call = _Call(value, len(params))
    *grads, loss = _Gradient.apply(call, *params, *operands)
    if values is not None:
        values.append(loss)
    return tuple(grad if is_used else None for grad, is_used in zip(grads, call.used, strict=True))


class _Call:
    """What `_Gradient` is called with besides tensors."""

    def __init__(self, value: Value, num_params: int) -> None:
        self.value, self.num_params = value, num_params
        self.used: list[bool] = []  # which params the loss uses, once that is known


class _Gradient(torch.autograd.Function):
    """params, operands -> the gradient by params; both derivatives come from one difference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *primals: Tensor) -> Leaves:
        w, operands = split(tracking.detach(primals), call.num_params)
        values: list[Tensor] = []
        found = autodiff.gradient_used(
            lambda *leaves: call.value(*leaves, *operands),
            w,
            create_graph=False,
            used=[],
            values=values,
        )
        call.used[:] = [grad is not None for grad in found]
        grads = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(w, found, strict=True)
        ]
        return (*grads, values[0].detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.call, *primals = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*primals, *output[:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        n = ctx.call.num_params
        tensors = autodiff.saved_tensors(ctx)
        primals, base = split(tensors, len(tensors) - n)
        wrt = differentiable_indices(primals, ctx.needs_input_grad[1:])
        tracked = torch.is_grad_enabled() and tracking.is_tracked((*primals, *cotangents[:n]))
        first = base if wrt[:n] == tuple(range(n)) else None

        def gradient_at(x: Leaves) -> Leaves:
            return gradient(ctx.call.value, (*x, *primals[n:]), wrt, tracked)

        found = difference(gradient_at, primals[:n], cotangents[:n], first)
        return (None, *scatter(found, wrt, len(primals)))


def _moved(step: Tensor, v: Leaves, x: Leaves) -> Leaves:
    """``x + step v``, summed in the accumulation dtype and then rounded to that of each leaf."""
    return tuple(
        torch.addcmul(
            leaf.to(dtype), step.to(device=leaf.device, dtype=dtype), direction.to(dtype)
        ).to(leaf.dtype)
        for direction, leaf in zip(v, x, strict=True)
        for dtype in [trees.accumulation_dtype((leaf,))]
    )


def _tell_of_errors(ends: list[Leaves], base: Leaves, eps: float) -> None:
    """Warn of a difference of gradients that rounding or third derivatives spoil.

    With the gradients g at the point and g+, g- at the ends, ``||g+ - 2 g + g-|| / ||g+ - g-||`` is
    how much the product changes between the halves, whose square is about what a central difference
    leaves out, and ``eps ||g|| / ||g+ - g-||`` is what rounding does.
    """
    plus, minus = (end[: len(base)] for end in ends)
    change = trees.norm(trees.sub(plus, minus))
    if torch.compiler.is_compiling() or not batching.can_look(change):
        return
    bend = trees.norm(trees.sub(trees.add(plus, minus), trees.scale(2.0, base)))
    scale = torch.where(change > 0, change, torch.inf)
    error = batching.largest((bend / scale) ** 2 + eps * trees.norm(base) / scale)
    bound = 1e-6 if eps < 1e-12 else 1e-2 if eps < 1e-5 else 0.2
    if error > bound:
        warnings.warn(
            f"products='finite_difference': a product is off by about {error:.0e} of its size, "
            f"where {bound:.0e} is usual for this dtype: the gradients at the ends of the "
            f"difference are large beside what they differ by, or the loss is far from quadratic "
            f"there. Use float64, or products='reverse'",
            RuntimeWarning,
            stacklevel=2,
        )


def _replaced(primals: Leaves, where: Sequence[int], new: Sequence[Tensor]) -> Leaves:
    replaced = list(primals)
    for index, tensor in zip(where, new, strict=True):
        replaced[index] = tensor
    return tuple(replaced)
