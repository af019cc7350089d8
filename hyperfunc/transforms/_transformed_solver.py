"""What a transform returns: a function made from an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.contact import in_contact
from hyperfunc._engine.wrapped_functions import Wrapped, name_of
from hyperfunc._torch import tracking
from hyperfunc._torch.internals import forward_mode_active
from hyperfunc._torch.tangents import in_own_dtype
from hyperfunc._torch.unsupported import explained
from hyperfunc._types import TensorTree
from hyperfunc.iterative import ReverseUnroll


class Transformed(Wrapped):
    """A transformed inner solver: a callable with the solver's name and doc, and its own repr."""

    def __init__(
        self, transform: str, inner_solver: Any, method: Any, call: Callable[..., Any]
    ) -> None:
        super().__init__(inner_solver)
        if not hasattr(self, "__name__"):  # as of a solver object; torch.func then asks no repr
            self.__name__ = transform
        self._transform, self._inner_solver = transform, inner_solver
        self._method, self._call = method, call

    def __call__(self, hparams: TensorTree, *args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name != "adjoint_init" or self._transform == "implicit_diff":
                raise TypeError(
                    f"{self!r} got the keyword argument {name!r}; pass hparams and *args by "
                    f"position"
                )
        run = self._run
        if torch.compiler.is_compiling():
            if self._is_traceable():
                return self._call(hparams, *args, **keywords)
            run = torch.compiler.disable(run)
        return run(hparams, *args, **keywords)

    def __repr__(self) -> str:
        solver = self._inner_solver
        name = name_of(solver)
        return f"{self._transform}({name}, method={self._method!r})"

    def _run(self, hparams: TensorTree, *args: Any, **keywords: Any) -> Any:
        if tracking.loses_gradients():
            raise RuntimeError(
                f"{self!r} is differentiated in inference mode, where this version of torch makes "
                f"zeros of all gradients. Use torch.no_grad() in place of torch.inference_mode()"
            )
        with explained(self, lambda: trees.named_tensors(hparams, args)), in_contact(self):
            if torch.is_inference_mode_enabled():
                # in that mode no graph is recorded, of which older versions of torch make zeros
                with torch.inference_mode(False), torch.no_grad():
                    return self._call(hparams, *args, **keywords)
            result = self._call(hparams, *args, **keywords)
            return trees.tree_map(in_own_dtype, result) if forward_mode_active() else result

    def _is_traceable(self) -> bool:
        """Whether this is the solver itself, and not a loop that stops by the values it sees."""
        return self._transform == "implicit_diff" and isinstance(self._method, ReverseUnroll)
