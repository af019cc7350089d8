"""Inner solvers that are written for NumPy arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable
from hyperfunc._engine.wrapped_functions import WrappedFunction
from hyperfunc._types import InnerSolver


def from_numpy(solver: Callable[..., Any]) -> InnerSolver:
    """An inner solver of NumPy arrays, as those of SciPy and scikit-learn, as one of tensors.

    It sees copies of the tensors in ``hparams`` and ``*args`` as arrays, of the same dtype (float32
    for bfloat16, which NumPy lacks), on the CPU. What it returns becomes tensors on the device of
    hparams, floating-point numbers in their dtype. No derivative flows through it: it is for
    implicit methods, which under ``vmap`` call it for one task after the other.

    Args:
        solver: ``(hparams, *args) -> params`` of trees of arrays, or ``(params, aux)`` where that
            is said to `implicit_diff` or `hypergrad`. Also a decorator.

    Returns:
        The inner solver, ``(hparams, *args) -> params``.

    Raises:
        TypeError: ``solver`` is not a function; when called, a tensor that has no strides, such as
            a sparse one.

    Example:
        >>> from scipy.optimize import brentq
        >>> @hf.implicit_diff(optimality=lambda w, a: w + w**3 - a)
        ... @hf.from_numpy
        ... def root(a):
        ...     return brentq(lambda w: w + w**3 - a, -10, 10)
        >>> a = torch.tensor([2.0, 10.0])
        >>> torch.func.vmap(root)(a), torch.func.vmap(torch.func.grad(root))(a)
        (tensor([1., 2.]), tensor([0.2500, 0.0769]))
    """
    check_callable(solver, "from_numpy: solver", "(hparams, *args) -> params of NumPy arrays")
    return _FromNumpy(solver)


class _FromNumpy(WrappedFunction):
    maker = "from_numpy"

    def __call__(self, hparams: Any, /, *args: Any) -> Any:
        leaves, spec = trees.flatten((hparams, *args))
        floating = [x for x in trees.tensors(hparams) if x.is_floating_point()]
        dtypes = (x.dtype for x in floating)
        dtype = functools.reduce(torch.promote_types, dtypes) if floating else None
        device = floating[0].device if floating else None
        arrays = [_as_array(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result = self.__wrapped__(*trees.unflatten(spec, arrays))
        return trees.tree_map(lambda leaf: _as_tensor(leaf, dtype, device), result)


def _as_array(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        raise TypeError(
            f"from_numpy: got a tensor of layout {tensor.layout}; expected dense ones. Call "
            f".to_dense(), or pass sparse data as a matrix of SciPy in *args"
        )
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.detach().cpu().resolve_conj().resolve_neg().numpy().copy()


def _as_tensor(leaf: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    import numpy  # of which torch makes arrays, and the package nothing else

    if not isinstance(leaf, numpy.ndarray | numpy.generic | bool | int | float):
        return leaf
    array = numpy.asarray(leaf)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"from_numpy: the solver returned an array of dtype {array.dtype}; expected numbers. "
            f"Write numpy.asarray(result, dtype=float)"
        )
    tensor = torch.tensor(array.copy())
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
