"""Calls of the user's functions, whose errors say what these were called with."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine.checks import is_number
from hyperfunc._engine.results import HypergradError
from hyperfunc._engine.shown import is_array, kind_of
from hyperfunc._engine.wrapped_functions import name_of

# Where code is that only passes its arguments on, and raises errors of its own.
_ROOMS = ("inner_solvers", "fixed_point_solvers", "iterative", "equilibrium")
_OURS = tuple(f"hyperfunc.{room}" for room in _ROOMS)


def call(role: str, function: Callable[..., Any], /, *args: Any) -> Any:
    """``function(*args)``; ``role`` is what it is to the library, ``"init(hparams, *args)"``."""
    try:
        return function(*args)
    except Exception as error:
        explain(error, role, function, args)
        raise


def explain(
    error: Exception, role: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Add to an error of a function what it was called with; raise if it does not take that.

    What the innermost function says stands: those that it was called by add nothing.
    """
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    done = isinstance(error, HypergradError) or getattr(error, "_is_explained", False)
    if done or module.startswith(_OURS):
        return
    name, known = role.partition("(")[0], name_of(function)
    who = name if name.endswith(known) else f"{name} ({known})"
    named, misfit = _bound(error, role, function, args)
    kinds = ", ".join(f"{path}: {kind_of(value)}" for path, value in named.items()) or "nothing"
    if misfit:
        starred = f"*{_starred(role)}"
        wrong: Any = TypeError(
            f"{who} does not take what it is called with: {misfit}. It is called as {role}, here "
            f"with {kinds}. Your call passes {starred} on to all functions alike: add there what "
            f"is missing, and let the parameters of a function that needs fewer end in {starred}"
        )
        wrong._is_explained = True
        raise wrong from error
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"hyperfunc called {who} with {kinds}{_advice(str(error), named)}")
        error._is_explained = True  # type: ignore[attr-defined]


def _bound(
    error: Exception, role: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[dict[str, Any], str]:
    """The arguments by the names that the function has for them, and why it takes others."""
    first, starred = re.findall(r"\w+", role.partition("(")[2].partition("*")[0]), _starred(role)
    names = itertools.chain(first, (f"{starred}[{i}]" for i in itertools.count()))
    ours = dict(zip(names, args, strict=False))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of builtins
        return ours, str(error) if "positional argument" in str(error) else ""
    try:
        bound = signature.bind(*args).arguments
    except TypeError as reason:
        return ours, str(reason) if isinstance(error, TypeError) else ""
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}[{i}]": each for i, each in enumerate(value)}
        else:
            named[name] = value
    return named, ""


def _starred(role: str) -> str:
    return role.partition("*")[2].rstrip(")")


def _advice(text: str, named: Mapping[str, Any]) -> str:
    """What to write, where an error of torch or Python is due to the kind of an argument."""
    leaves = {path: leaf for name, value in named.items() for path, leaf in _leaves(name, value)}
    words = set(re.findall(r"\w+", text))
    first, like = next(
        ((path, leaf) for path, leaf in leaves.items() if isinstance(leaf, Tensor)), ("", None)
    )
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            if is_array(leaf) and "numpy" in text.lower():
                return f". {path} is a NumPy array: write torch.as_tensor({path})"
            if f"'{type(leaf).__name__}'" in text and (is_number(leaf) or isinstance(leaf, list)):
                return f". {path} is of type {type(leaf).__name__}: write torch.tensor({path})"
        elif like is None or leaf is like:
            continue
        elif leaf.device != like.device and "device" in text:
            return (
                f". {path} is on {leaf.device}, {first} on {like.device}: write "
                f"{path}.to('{like.device}')"
            )
        elif leaf.dtype != like.dtype and {_word(leaf), _word(like)} <= words:
            return f". {path} is not of the dtype of {first}: write {path}.to({like.dtype})"
    return ""


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in nested dictionaries, lists and tuples; a list of numbers is one."""
    if type(value) is dict:
        for key, each in value.items():
            yield from _leaves(f"{path}[{key!r}]", each)
    elif type(value) in (list, tuple) and not all(map(is_number, value)):
        for i, each in enumerate(value):
            yield from _leaves(f"{path}[{i}]", each)
    else:
        yield path, value


def _word(tensor: Tensor) -> str:
    """What errors of torch call the dtype of a tensor: ``Double``."""
    name: str = torch.empty(0, dtype=tensor.dtype).type()
    return name.removeprefix("torch.").removesuffix("Tensor")
