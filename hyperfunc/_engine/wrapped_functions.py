"""Functions made from functions, which pickle and copy as what they were made from does."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T", bound=tuple[Any, ...])


class Wrapped:
    """A callable with the name and doc of a function, which pickles as its parts do.

    What stands under that name, as after decoration, pickles as the name.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, fn: Callable[..., Any]) -> None:
        wrapper: Any = self
        functools.update_wrapper(wrapper, fn, updated=())

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = sys.modules.get(getattr(self, "__module__", ""))
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
        fn = self.__wrapped__
        return f"{self.maker}({getattr(fn, '__qualname__', None) or repr(fn)})"


class _Part:
    """One of several functions that are made together; it pickles as the call that makes them."""

    def __init__(self, name: str, made: Any, recipe: tuple[Any, ...]) -> None:
        self._name = name
        self._fn = getattr(made, name)
        self._recipe = recipe

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._fn(*args, **keywords)

    @property
    def bind(self) -> Any:
        """The function's own ``bind``, for one that can be given a part of its arguments."""
        return getattr(self._fn, "bind", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._name, *self._recipe)

    def __repr__(self) -> str:
        factory, args, keywords = self._recipe
        arguments = [repr(arg) for arg in args]
        arguments += [f"{key}={value!r}" for key, value in keywords.items()]
        return f"{factory.__name__}({', '.join(arguments)}).{self._name}"


def picklable(factory: Callable[P, T]) -> Callable[P, T]:
    """Make the functions in the named tuple that a function returns picklable, if its args are."""

    @functools.wraps(factory)
    def make(*args: P.args, **keywords: P.kwargs) -> T:
        made: Any = factory(*args, **keywords)
        parts = (_Part(name, made, (make, args, keywords)) for name in made._fields)
        return type(made)(*parts)  # type: ignore[no-any-return]

    return make


def _remake(name: str, factory: Callable[..., Any], args: Any, keywords: Any) -> Any:
    return getattr(factory(*args, **keywords), name)
