"""Functions made from functions and numbers, which pickle, copy and print as these do."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

from hyperfunc._engine.shown import show


class Wrapped:
    """A callable with the name and doc of a function, which pickles as its parts do.

    What stands under that name, as after decoration, pickles as the name; but in ``__main__``,
    which is another module in another process, cloudpickle takes functions by value, and so these.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, fn: Callable[..., Any]) -> None:
        wrapper: Any = self
        functools.update_wrapper(wrapper, fn, updated=())

    def __reduce_ex__(self, protocol: Any) -> Any:
        module = getattr(self, "__module__", "")
        pickler = sys._getframe(1).f_globals.get("__name__", "")
        if module == "__main__" and pickler.endswith("cloudpickle"):
            return super().__reduce_ex__(protocol)
        found: Any = sys.modules.get(module)
        for part in getattr(self, "__qualname__", "").split("."):
            found = getattr(found, part, None)
        return self.__qualname__ if found is self else super().__reduce_ex__(protocol)


class WrappedFunction(Wrapped):
    """One that binds to an instance as a function does; ``maker`` says what made it."""

    maker: str

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        function: Any = self
        return function if instance is None else types.MethodType(function, instance)

    def __repr__(self) -> str:
        return f"{self.maker}({name_of(self.__wrapped__)})"


class PrintsAsCall:
    """A dataclass that prints as the call of the function, ``name``, that makes it."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        named: Any = self
        shown = [field.name for field in dataclasses.fields(named) if field.repr]
        return f"{self.name}({', '.join(f'{key}={show(getattr(self, key))}' for key in shown)})"


def name_of(function: Any) -> str:
    """What a function is called in a text."""
    return getattr(function, "__qualname__", None) or show(function)
