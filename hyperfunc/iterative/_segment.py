"""A function of flat tensors that is computed again when its derivative is needed.

Its random numbers and the state of autocast are then those of the first time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable
from hyperfunc._engine.operations import Recomputed, Recorded
from hyperfunc._engine.wrapped_functions import WrappedFunction
from hyperfunc._torch import batching, derivative_rules, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves

F = TypeVar("F", bound=Callable[..., Any])


def checkpoint(fn: F) -> F:
    r"""Do not keep the graph of a function: compute it again when its derivative is needed.

    The result is ``fn`` with the same values and derivatives of every order, by autograd and by
    any composition of `torch.func` transforms, in reverse and forward mode (a forward product is
    taken as the transpose of a transposed one). It keeps the arguments alone and may be nested.

    Random numbers are those of the first time, also under ``vmap``: those of the default generators
    of the CPU and of the devices of the arguments, and of any `torch.Generator` among the arguments
    (not one that ``fn`` closes over). The streams are left as if nothing had been computed again.
    So is the state of autocast, but not that of module buffers.

    Args:
        fn: a pure function of any trees. Every tensor that a derivative is to be taken for must
            be an argument; with a module, pass its parameters and use `torch.func.functional_call`.

    Raises:
        TypeError: if ``fn`` is not a function.
        ValueError: when differentiated, if ``fn`` closes over a tensor whose gradient
            would be lost.

    Example:
        >>> block = hf.checkpoint(lambda x, w: torch.tanh(x @ w))
        >>> x, w = torch.ones(2, 3), torch.zeros(3, 3)
        >>> torch.func.grad(lambda w: block(block(x, w), w).sum())(w).shape
        torch.Size([3, 3])

    References:
        Griewank and Walther, Algorithm 799, ACM TOMS 26 (2000); Chen et al., arXiv 1604.06174.
    """
    check_callable(fn, "fn", "of trees of tensors")
    return cast(F, _Checkpointed(fn))


class _Checkpointed(WrappedFunction):
    maker = "checkpoint"

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__(fn)
        self._fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fn = self._fn
        tensors, frame = trees.partition((args, kwargs))
        if not tensors or not tracking.is_tracked(tensors):
            return fn(*args, **kwargs)
        name = f"the checkpointed function {getattr(fn, '__name__', repr(fn))}"
        result: list[trees.Frame] = []

        def flat(*operands: Tensor) -> Leaves:
            inner_args, inner_kwargs = frame.fill(operands)
            outputs, output_frame = trees.partition(fn(*inner_args, **inner_kwargs))
            result[:] = [output_frame]
            return outputs

        operands = (*tensors, *batching.vmap_marker())
        rng_autocast = RngAutocastState.capture((*tensors, *frame.constants))
        segment = Segment(flat, rng_autocast, len(operands), name)
        outputs = Recorded.apply(segment, *operands)
        return result[0].fill(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class RngAutocastState:
    """What besides its operands a segment depends on: random number streams and autocast."""

    generators: tuple[torch.Generator, ...]
    states: Leaves
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    transformed: bool

    @staticmethod
    def capture(leaves: Sequence[Any]) -> RngAutocastState:
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        generators = [torch.default_generator]
        for device in devices:
            # Empty for a backend without generators of its own, such as the CPU.
            all_of_type = getattr(getattr(torch, device.type, None), "default_generators", ())
            if all_of_type and device.index is not None:
                generators.append(all_of_type[device.index])
        generators.extend(dict.fromkeys(x for x in leaves if isinstance(x, torch.Generator)))
        types = {"cpu", *(device.type for device in devices)} - {"meta"}
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(types)
        )
        states = tuple(generator.get_state() for generator in generators)
        return RngAutocastState(tuple(generators), states, autocast, tracking.transforms_active())

    def read(self, known: Leaves) -> Leaves:
        """The present states of the streams; those that are known already are not kept twice."""
        states = (generator.get_state() for generator in self.generators)
        return tuple(
            old if torch.equal(old, new) else new for old, new in zip(known, states, strict=True)
        )

    def write(self, states: Leaves) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def refuse_foreign(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A context that refuses tensors of enclosing transforms, if there are transforms."""
        return _RefuseForeignTensors(name) if self.transformed else contextlib.nullcontext()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """This state, for as long as the context lasts."""
        present = self.read(self.states)
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # Casts that were cached with gradient mode off would cut the graph.
                stack.enter_context(
                    torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)
                )
            self.write(self.states)
            try:
                yield
            finally:
                self.write(present)


@dataclasses.dataclass(frozen=True, eq=False)
class Segment(Recomputed):
    """Any differentiable function of flat tensors, computed again for each derivative."""

    fn: Callable[..., Leaves]
    rng_autocast: RngAutocastState
    num_points: int  # at which random numbers are drawn; then come cotangents and tangents
    name: str | None = None  # of the one that is no repetition, and draws as the streams are

    def run(self, operands: Leaves) -> Leaves:
        if self.name is not None:
            with self.rng_autocast.refuse_foreign(self.name), derivative_rules.active():
                return self.fn(*operands)
        with self.rng_autocast.restored(), derivative_rules.active():
            return self.fn(*operands)

    def derivative(self, fn: Callable[..., Leaves], wrt: tuple[int, ...]) -> Segment:
        return Segment(fn, self.rng_autocast, self.num_points)

    def vmap(self, info: Any, in_dims: tuple[int | None, ...], operands: Leaves) -> Any:
        # A vmap over directions at one point is not one that the random numbers were drawn in.
        same_point = all(dim is None for dim in in_dims[: self.num_points])
        randomness = "same" if same_point else info.randomness
        fn = torch.func.vmap(self.fn, in_dims=in_dims, randomness=randomness)
        return Recorded.apply(dataclasses.replace(self, fn=fn), *operands), 0


class _RefuseForeignTensors(TorchFunctionMode):
    """Refuses tensors of transforms that are not active where the code in the context runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        foreign = filter(tracking.is_foreign, trees.tensors((args, kwargs)))
        if not all(tracking.carries_no_derivative(func, tensor) for tensor in foreign):
            raise ValueError(captured_message(self._name))
        return func(*args, **kwargs)
