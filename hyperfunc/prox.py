r"""Proximal operators, for inner problems with constraints and non-smooth regularisers.

The proximal operator of a function g, with step size lr, is

.. math:: \mathrm{prox}_{\mathrm{lr}\, g}(w)
          = \arg\min_z \; \tfrac{1}{2} \lVert z - w \rVert^2 + \mathrm{lr}\; g(z, \lambda).

Each function of this module makes one, a callable ``prox(params, hparams, lr) -> params`` for
`hyperfunc.proximal_gradient_map`. If g is the indicator of a set (zero inside, infinite outside),
prox is the Euclidean projection onto the set, whatever ``lr`` is.

**Trees.** `l1`, `elastic_net`, `non_negative` and `box` act on each entry. `group_lasso`,
`l2_ball`, `l1_ball` and `simplex` act on vectors: with ``dim=None`` each leaf is one vector; with
``dim`` an int or a tuple of ints the vectors lie along these dimensions of each leaf, one for each
index of the others. `nuclear_norm` acts on the matrices in the last two dimensions. `joint` makes
one vector of the whole tree, and `blocks` gives parts of a tree their own operators.

**Settings** are what the coefficients of `hyperfunc.optim` are: a number; a tensor, 0-d or one that
broadcasts to each leaf (and does not vary within a vector or matrix); a tree of these with the
structure of params cut off at any depth; or a function of hparams that returns one of these. Only
the last has a hypergradient. Numbers are checked against their range; tensors are not.

**Derivatives** exist almost everywhere, with respect to params, settings and ``lr``, and are finite
everywhere: at a kink they are those of one of its sides, for a weight of zero those of the
identity. They hold at every order, those of `nuclear_norm` up to the third.

Constraints whose projection has no such form go into ``optimality=`` as the equations of Karush,
Kuhn and Tucker, with params and multipliers as one tree. For :math:`\min_w \ell(w)` subject to
:math:`C w = d`:

>>> def kkt(solution, hparams):
...     w, multipliers = solution
...     stationary = torch.func.grad(loss)(w, hparams) + C.T @ multipliers
...     return stationary, C @ w - hparams["d"]
>>> def loss(w, hparams):
...     return 0.5 * ((w - hparams["target"]) ** 2).sum()
>>> C = torch.tensor([[1.0, 1.0]])
>>> @hf.implicit_diff(optimality=kkt, method="gmres")
... def solve(hparams):
...     multipliers = torch.linalg.solve(C @ C.T, C @ hparams["target"] - hparams["d"])
...     return hparams["target"] - C.T @ multipliers, multipliers
>>> hparams = {"target": torch.tensor([1.0, 0.0]), "d": torch.tensor([2.0])}
>>> solve(hparams)[0], torch.func.jacrev(solve)(hparams)[0]["target"]
(tensor([1.5000, 0.5000]), tensor([[ 0.5000, -0.5000],
        [-0.5000,  0.5000]]))

The matrix :math:`\begin{pmatrix} H & C^\top \\ C & 0 \end{pmatrix}` of such a system is symmetric
but indefinite, so `hyperfunc.CG` does not apply, and `hyperfunc.BiCGStab` may break down on the
block of zeros: use `hyperfunc.GMRES` or `hyperfunc.NormalCG`. An inequality
:math:`c(w) \le 0` enters as :math:`\mu\, c(w) = 0`, whose matrix is not symmetric, and which is
singular where a constraint is active with multiplier zero: the solution has a kink there.

References: Parikh and Boyd, Proximal algorithms, 2014; Bertrand et al., Implicit differentiation of
Lasso-type models for hyperparameter optimization, 2020, arXiv 2002.08943.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._torch import tracking
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import Coefficient, check_coefficient, describe, values_by_leaf

Dim: TypeAlias = int | tuple[int, ...] | None
"""The dimensions along which the vectors lie; ``None``: all of a leaf."""

__all__ = [
    "Prox",
    "blocks",
    "box",
    "elastic_net",
    "group_lasso",
    "identity",
    "joint",
    "l1",
    "l1_ball",
    "l2_ball",
    "non_negative",
    "nuclear_norm",
    "simplex",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Prox:
    """A proximal operator ``(params, hparams=None, lr=1.0) -> params``, made by this module.

    Attributes:
        name: the function that made it.
        rule: ``(leaf, dims, lr, *settings) -> leaf``.
        settings: the coefficients by name.
        dim: the dimensions of a leaf that the rule couples: ``()`` none, ``None`` all.
    """

    name: str
    rule: Callable[..., Tensor]
    settings: dict[str, Coefficient] = dataclasses.field(default_factory=dict)
    dim: Dim = ()

    def __post_init__(self) -> None:
        for key, setting in self.settings.items():
            check_coefficient(f"prox.{self.name}", key, setting)
        dims = self.dim if isinstance(self.dim, tuple) else (self.dim,)
        if self.dim is not None and any(type(dim) is not int for dim in dims):
            raise TypeError(
                f"prox.{self.name}: dim is {describe(self.dim)}; expected an int, a tuple of ints, "
                f"or None for all of a leaf"
            )

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        """The nearest params, with the regulariser weighted by ``lr``, or those in the set."""
        name = f"prox.{self.name}"
        if not isinstance(lr, int | float | Tensor):
            raise TypeError(f"{name}: lr is {describe(lr)}; expected a number or a 0-d tensor")
        if hparams is None:
            for key, setting in self.settings.items():
                if callable(setting):
                    raise TypeError(
                        f"{name}: {key} is a function of hparams, but hparams is None. "
                        f"Write prox(params, hparams, lr)"
                    )
        leaves, spec = trees.flatten_floating(params, "params")
        rows = values_by_leaf(name, self.settings, hparams, params, leaves, spec)
        if not self.settings:
            rows = [()] * len(leaves)
        paths = trees.paths(spec, "params")
        moved = [
            self._apply(leaf, path, (lr, *row))
            for leaf, path, row in zip(leaves, paths, rows, strict=True)
        ]
        return trees.unflatten(spec, moved)

    def _apply(self, leaf: Tensor, path: str, numbers: tuple[Any, ...]) -> Tensor:
        dims = self._dims(leaf, path)
        if not leaf.numel():
            return leaf
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        # tensors throughout: a number and a 0-d tensor would have a float64 tangent in torch
        lr, *values = (
            number.to(dtype=dtype, device=leaf.device)
            if isinstance(number, Tensor)
            else torch.full((), number, dtype=dtype, device=leaf.device)
            for number in numbers
        )
        for key, value in zip(self.settings, values, strict=True):
            shape = (1,) * (leaf.ndim - value.ndim) + tuple(value.shape)
            if any(shape[dim] != 1 for dim in dims):
                raise ValueError(
                    f"prox.{self.name}: {key} has shape {tuple(value.shape)} for {path}, of shape "
                    f"{tuple(leaf.shape)}; expected one value for each vector or matrix: size 1 in "
                    f"the dimensions {dims}"
                )
        return self.rule(leaf.to(dtype), dims, lr, *values).to(leaf.dtype)

    def _dims(self, leaf: Tensor, path: str) -> tuple[int, ...]:
        if self.dim is None:
            return tuple(range(leaf.ndim))
        dims = self.dim if isinstance(self.dim, tuple) else (self.dim,)
        for dim in dims:
            if not -leaf.ndim <= dim < leaf.ndim:
                raise ValueError(
                    f"prox.{self.name}: {path} has shape {tuple(leaf.shape)} and no dimension "
                    f"{dim}. To give parts of params their own operators, write "
                    f"hf.prox.blocks({{...}})"
                )
        return tuple(sorted({dim % leaf.ndim for dim in dims}))


def l1(weight: Coefficient = 1.0) -> Prox:
    r"""Soft thresholding, for the lasso: :math:`g(w) = \sum_i \mathrm{weight}_i\, |w_i|`.

    .. math:: z_i = \mathrm{sign}(w_i) \max(|w_i| - \mathrm{lr}\; \mathrm{weight}_i, 0)

    Args:
        weight: at least 0, one for all entries, for each leaf or for each entry; see the top of
            this page. A tree such as ``{"w": 1.0, "b": 0.0}`` leaves an intercept alone.

    Returns:
        A `Prox`.

    Raises:
        ValueError: a number below 0.
        TypeError: a weight of another kind.

    Example:
        >>> shrink = hf.prox.l1(weight=lambda h: h.exp())
        >>> shrink(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(0.0), 1.0)
        tensor([ 2.,  0., -1.])
    """
    return Prox("l1", _soft_threshold, {"weight": weight})


def elastic_net(l1: Coefficient = 1.0, l2: Coefficient = 1.0) -> Prox:
    r"""Shrinks and scales, for :math:`g(w) = l_1 \|w\|_1 + \tfrac{1}{2} l_2 \|w\|^2`.

    .. math:: z_i = \mathrm{sign}(w_i) \max(|w_i| - \mathrm{lr}\; l_1, 0) / (1 + \mathrm{lr}\; l_2)

    Args:
        l1: weight of the sum of absolute values, at least 0, as in `hyperfunc.prox.l1`.
        l2: weight of half the sum of squares, likewise.

    Returns:
        A `Prox`.

    Raises:
        ValueError: a number below 0.
        TypeError: a weight of another kind.

    Example:
        >>> hf.prox.elastic_net(l1=1.0, l2=1.0)(torch.tensor([3.0, -0.5]), None, 1.0)
        tensor([1., 0.])

    References:
        Zou and Hastie, Regularization and variable selection via the elastic net, 2005.
    """
    return Prox("elastic_net", _elastic_net, {"l1": l1, "l2": l2})


def group_lasso(weight: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""Shrinks vectors as a whole: :math:`g(w) = \sum_v \mathrm{weight}_v \, \|w_v\|`.

    .. math:: z_v = \max\Big(1 - \frac{\mathrm{lr}\; \mathrm{weight}_v}{\|w_v\|}, 0\Big)\, w_v

    Args:
        weight: at least 0, one for all vectors, for each leaf or for each vector (of size 1 in
            ``dim``).
        dim: where the vectors v lie: ``None``, each leaf is one; otherwise along these dimensions.

    Returns:
        A `Prox`.

    Raises:
        ValueError: a number below 0; when called, a leaf without such a dimension, or a weight that
            varies within a vector.
        TypeError: a weight or ``dim`` of another kind.

    Example:
        >>> hf.prox.group_lasso(2.5, dim=1)(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), None, 1.0)
        tensor([[1.5000, 2.0000],
                [0.0000, 0.0000]])

    References:
        Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006.
    """
    return Prox("group_lasso", _shrink_vectors, {"weight": weight}, dim)


def nuclear_norm(weight: Coefficient = 1.0) -> Prox:
    r"""Soft thresholding of singular values: :math:`g(W) = \mathrm{weight}\, \sum_i \sigma_i(W)`.

    .. math:: Z = U\, \mathrm{diag}(\max(\sigma - \mathrm{lr}\; \mathrm{weight}, 0))\, V^\top
              \qquad \text{for} \quad W = U\, \mathrm{diag}(\sigma)\, V^\top

    The derivatives never pass through those of singular vectors, which are infinite where singular
    values are equal. They come from the equations that the singular subspace above the threshold
    and the polar factor on it satisfy, and hold up to the third order.

    Args:
        weight: at least 0, one for all matrices, for each leaf or for each matrix (of size 1 in the
            last two dimensions).

    Returns:
        A `Prox`, for leaves with two dimensions at least.

    Raises:
        ValueError: a number below 0; when called, a leaf with fewer dimensions.
        TypeError: a weight of another kind.

    Example:
        >>> hf.prox.nuclear_norm(1.0)(torch.diag(torch.tensor([3.0, 0.5])), None, 1.0)
        tensor([[2., 0.],
                [0., 0.]])

    References:
        Cai, Candès and Shen, A singular value thresholding algorithm for matrix completion, 2010.
    """
    return Prox("nuclear_norm", _shrink_singular_values, {"weight": weight}, (-2, -1))


def non_negative() -> Prox:
    r"""The projection onto :math:`w \ge 0`: each entry becomes :math:`\max(w_i, 0)`.

    Returns:
        A `Prox`.

    Example:
        >>> hf.prox.non_negative()(torch.tensor([1.0, -2.0]))
        tensor([1., 0.])
    """
    return Prox("non_negative", _positive_part)


def box(lower: Coefficient = 0.0, upper: Coefficient = 1.0) -> Prox:
    r"""The projection onto :math:`\mathrm{lower} \le w \le \mathrm{upper}`, entry by entry.

    Args:
        lower: the lower bound; minus infinity is none. One for all entries, for each leaf or for
            each entry.
        upper: the upper bound, not below ``lower``, likewise.

    Returns:
        A `Prox`.

    Raises:
        ValueError: numbers with ``lower > upper``.
        TypeError: a bound of another kind.

    Example:
        >>> clip = hf.prox.box(lower=-1.0, upper=lambda h: h)
        >>> clip(torch.tensor([-3.0, 0.5, 4.0]), torch.tensor(2.0), 1.0)
        tensor([-1.0000,  0.5000,  2.0000])
    """
    if isinstance(lower, int | float) and isinstance(upper, int | float) and lower > upper:
        raise ValueError(f"prox.box: got lower={lower}, upper={upper}; expected lower <= upper")
    return Prox("box", _clip, {"lower": lower, "upper": upper})


def simplex(total: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{z \ge 0, \; \sum_i z_i = \mathrm{total}\}`.

    .. math:: z_i = \max(w_i - \tau, 0), \qquad \text{with } \tau \text{ such that the sum is right}

    Args:
        total: the sum, at least 0; 1 for probabilities. One for all vectors, for each leaf or for
            each vector.
        dim: where the vectors lie: ``None``, each leaf is one; otherwise along these dimensions.

    Returns:
        A `Prox`.

    Raises:
        ValueError: a number below 0; when called, a leaf without such a dimension, or a total that
            varies within a vector.
        TypeError: a total or ``dim`` of another kind.

    Example:
        >>> hf.prox.simplex()(torch.tensor([1.0, 0.8, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])

    References:
        Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the l1-ball for
        learning in high dimensions, 2008.
    """
    return Prox("simplex", _project_simplex, {"total": total}, dim)


def l1_ball(radius: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{\sum_i |z_i| \le \mathrm{radius}\}`.

    Args:
        radius: at least 0, one for all vectors, for each leaf or for each vector.
        dim: where the vectors lie: ``None``, each leaf is one; otherwise along these dimensions.

    Returns:
        A `Prox`.

    Raises:
        ValueError: a number below 0; when called, a leaf without such a dimension, or a radius that
            varies within a vector.
        TypeError: a radius or ``dim`` of another kind.

    Example:
        >>> hf.prox.l1_ball(radius=2.0)(torch.tensor([3.0, -2.0, 0.1]))
        tensor([ 1.5000, -0.5000,  0.0000])

    References:
        Duchi et al., 2008, as in `simplex`.
    """
    return Prox("l1_ball", _project_l1_ball, {"radius": radius}, dim)


def l2_ball(radius: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{\|z\| \le \mathrm{radius}\}`, with the 2-norm.

    Args:
        radius: at least 0, one for all vectors, for each leaf or for each vector.
        dim: where the vectors lie: ``None``, each leaf is one; otherwise along these dimensions.

    Returns:
        A `Prox`.

    Raises:
        ValueError: a number below 0; when called, a leaf without such a dimension, or a radius that
            varies within a vector.
        TypeError: a radius or ``dim`` of another kind.

    Example:
        >>> hf.prox.l2_ball()(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return Prox("l2_ball", _project_l2_ball, {"radius": radius}, dim)


def identity() -> Prox:
    """No regulariser and no constraint, for parts of params in `blocks`.

    Returns:
        A `Prox` that returns params as they are.

    Example:
        >>> hf.prox.identity()(torch.tensor([3.0, -4.0]))
        tensor([ 3., -4.])
    """
    return Prox("identity", _unchanged)


def joint(prox: Callable[..., TensorTree]) -> Callable[..., TensorTree]:
    r"""Apply an operator to all leaves as one vector, in flattening order.

    Args:
        prox: ``(params, hparams, lr) -> params``, called with a vector; such as
            ``hf.prox.l2_ball(3.0)``, which then bounds the norm of the whole tree.

    Returns:
        The operator ``(params, hparams=None, lr=1.0) -> params`` on trees.

    Raises:
        TypeError: ``prox`` is not a function, or is one that still makes an operator.

    Example:
        >>> hf.prox.joint(hf.prox.l2_ball())({"a": torch.tensor(3.0), "b": torch.tensor([4.0])})
        {'a': tensor(0.6000), 'b': tensor([0.8000])}
    """
    return _Joint(check_prox(prox, "prox.joint"))


def blocks(proxes: Any) -> Callable[..., TensorTree]:
    r"""Give parts of params their own operators.

    Args:
        proxes: a tree of operators with the structure of params cut off at any depth, such as
            ``{"weights": hf.prox.simplex(), "bias": hf.prox.identity()}``.

    Returns:
        The operator ``(params, hparams=None, lr=1.0) -> params``, which hands the same hparams to
        all.

    Raises:
        TypeError: the tree holds something else than functions.
        ValueError: when called, the tree does not fit params.

    Example:
        >>> prox = hf.prox.blocks({"b": hf.prox.identity(), "w": hf.prox.l1(2.0)})
        >>> prox({"w": torch.tensor([5.0, 1.0]), "b": torch.tensor(1.0)}, None, 1.0)
        {'b': tensor(1.), 'w': tensor([3., 0.])}
    """
    for prox in trees.flatten(proxes)[0]:
        check_prox(prox, "prox.blocks")
    return _Blocks(proxes)


def check_prox(prox: Any, caller: str) -> Callable[..., TensorTree]:
    """Return an operator, or raise an error that says how to get one; it begins with the caller."""
    maker = getattr(prox, "__module__", None) == __name__ and not isinstance(
        prox, Prox | _Joint | _Blocks
    )
    if maker or not callable(prox):
        got = f"the function hf.prox.{prox.__name__}" if maker else describe(prox)
        advice = f"Call it: hf.prox.{prox.__name__}(...)" if maker else "Write hf.prox.l1(weight)"
        raise TypeError(
            f"{caller}: prox is {got}; expected an operator (params, hparams, lr) -> params. "
            f"{advice}"
        )
    return prox  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, eq=False)
class _Joint:
    prox: Callable[..., TensorTree]

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        leaves, spec = trees.flatten_floating(params, "params")
        dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
        flat = torch.cat([leaf.to(dtype).reshape(-1) for leaf in leaves])
        parts = self.prox(flat, hparams, lr).split([leaf.numel() for leaf in leaves])
        moved = [
            part.reshape(leaf.shape).to(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return trees.unflatten(spec, moved)


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    proxes: Any

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        proxes, spec = trees.flatten(self.proxes)
        try:
            parts = spec.flatten_up_to(params)
        except ValueError as error:
            raise ValueError(
                f"prox.blocks has another structure than params: got {spec}, expected "
                f"{trees.flatten(params)[1]} or that tree cut off at some depth"
            ) from error
        moved = [prox(part, hparams, lr) for prox, part in zip(proxes, parts, strict=True)]
        return trees.unflatten(spec, moved)


def _soft_threshold(w: Tensor, dims: Any, lr: Tensor, weight: Tensor) -> Tensor:
    threshold = lr * weight
    # at |w| = threshold = 0 the derivative is that of the identity; NaN is not below anything
    return torch.where(w.abs() < threshold, 0.0, w - w.sign() * threshold)


def _positive_part(w: Tensor, dims: Any, lr: Tensor) -> Tensor:
    return torch.clamp(w, min=0)


def _unchanged(w: Tensor, dims: Any, lr: Tensor) -> Tensor:
    return w


def _elastic_net(w: Tensor, dims: Any, lr: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
    return _soft_threshold(w, dims, lr, l1) / (1 + lr * l2)


def _clip(w: Tensor, dims: Any, lr: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.clamp(w, lower, upper)


def _shrink_vectors(w: Tensor, dims: tuple[int, ...], lr: Tensor, weight: Tensor) -> Tensor:
    norm, threshold = _norm(w, dims), lr * weight
    divisor = torch.where(norm == 0, 1.0, norm)
    return torch.where(norm < threshold, 0.0, w * (1 - threshold / divisor))


def _project_l2_ball(w: Tensor, dims: tuple[int, ...], lr: Tensor, radius: Tensor) -> Tensor:
    norm = _norm(w, dims)
    inside = norm <= radius
    return torch.where(inside, w, w * (radius / torch.where(inside, 1.0, norm)))


def _project_simplex(w: Tensor, dims: tuple[int, ...], lr: Tensor, total: Tensor) -> Tensor:
    support, shift = _threshold(w, dims, total)
    return torch.where(support, (w - shift).clamp(min=0), 0.0)


def _project_l1_ball(w: Tensor, dims: tuple[int, ...], lr: Tensor, radius: Tensor) -> Tensor:
    size = w.abs()
    support, shift = _threshold(size, dims, radius)
    projected = torch.where(support, w.sign() * (size - shift).clamp(min=0), 0.0)
    return torch.where(size.sum(dims, keepdim=True) <= radius, w, projected)


def _norm(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The norm along dims, which neither overflows nor has a derivative other than 0 at 0."""
    largest = w.detach().abs().amax(dims, keepdim=True)
    unit = torch.where(largest == 0, 1.0, largest)
    squared = ((w / unit) ** 2).sum(dims, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0.0, unit * torch.where(zero, 1.0, squared).sqrt())


def _threshold(w: Tensor, dims: tuple[int, ...], total: Tensor) -> tuple[Tensor, Tensor]:
    """The tau with ``sum(max(w - tau, 0)) = total`` along dims, and where ``w > tau``."""
    # Which entries are positive is found by sorting; tau is a linear function of those.
    kept = [1 if dim in dims else size for dim, size in enumerate(w.shape)]
    last = tuple(range(-len(dims), 0))
    rows = w.detach().movedim(dims, last).reshape(*(n for n in kept if n != 1), -1)
    sums = total.detach().expand(kept).reshape(*rows.shape[:-1], 1)
    ordered = rows.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - sums
    numbers = torch.arange(1, rows.shape[-1] + 1, dtype=w.dtype, device=w.device)
    count = (ordered * numbers > excess).sum(-1, keepdim=True).clamp(min=1)
    tau = excess.gather(-1, count - 1) / count
    support = ~(w <= tau.reshape(kept))  # true for NaN
    size = support.sum(dims, keepdim=True).clamp(min=1)
    return support, (torch.where(support, w, 0.0).sum(dims, keepdim=True) - total) / size


_ORDERS = 3  # of the derivatives of `nuclear_norm`


def _shrink_singular_values(W: Tensor, dims: Any, lr: Tensor, weight: Tensor) -> Tensor:
    finite = torch.isfinite(W).all(-1, keepdim=True).all(-2, keepdim=True)
    W = torch.where(finite, W, 0.0)
    wide = W.shape[-2] < W.shape[-1]
    tall = W.mT if wide else W
    threshold = lr * weight
    threshold = threshold.expand(*W.shape[:-2], 1, 1)
    U, sigma, Vh = torch.linalg.svd(tall.detach(), full_matrices=False)
    at = threshold.detach()[..., 0]
    Z = (U * (sigma - at).clamp(min=0)[..., None, :]) @ Vh
    if tracking.is_tracked((W, threshold)):
        change = _singular_value_expansion(tall, threshold, sigma, Vh, sigma >= at)
        Z = Z + (change - change.detach())
    return torch.where(finite, Z.mT if wide else Z, torch.nan)


def _singular_value_expansion(
    W: Tensor, threshold: Tensor, sigma: Tensor, Vh: Tensor, active: Tensor
) -> Tensor:
    """The shrunk W as a function of W that agrees with it near the W that was decomposed.

    In the basis V, with ``M = W V`` and ``G = M^T M``, it is ``M (P - threshold K) V^T``. P is the
    projector on the eigenvectors of G that are active, the range of ``B = diag(active) + X``, with
    X from inactive to active the root of ``(I - X) G (I + X)`` there. ``K = (P G P)^{-1/2}`` is the
    root of ``K G K = P``. At the point itself all are diagonal, so both equations linearise to
    divisions: by ``sigma_j^2 - sigma_i^2`` across the threshold, and by ``sigma_i + sigma_j``
    above it, but for singular values that are rounding errors of zero. A step with these gains one
    order of the expansion.
    """
    eye = torch.eye(sigma.shape[-1], dtype=W.dtype, device=W.device)
    row, column = sigma[..., :, None], sigma[..., None, :]
    rising = ~active[..., :, None] & active[..., None, :]
    noise = sigma[..., :1, None] * (max(W.shape[-2:]) * torch.finfo(W.dtype).eps)
    both = active[..., :, None] & active[..., None, :] & (row + column > noise)
    across = torch.where(rising, 1 / torch.where(rising, (column - row) * (column + row), 1.0), 0.0)
    above = torch.where(both, 1 / torch.where(both, row + column, 1.0), 0.0)
    M = W @ Vh.mT
    G = M.mT @ M
    X = torch.zeros_like(across)
    for _ in range(_ORDERS):
        X = X + across * ((eye - X) @ G @ (eye + X))
    B = eye * active[..., None, :] + X
    gram = X.mT @ X  # of second order, so that the inverse of I + gram is this
    P = B @ (eye - gram + gram @ gram) @ B.mT
    K = P @ (eye * 2 * above) @ P
    for _ in range(_ORDERS):
        K = K + P @ (above * (P - K @ G @ K)) @ P
    return M @ (P - threshold * K) @ Vh
