"""Projections onto sets that equations describe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.optim._base import Coefficient
from hyperfunc.prox._base import Dim, Prox, UnfitShape
from hyperfunc.prox._vectors import norm, threshold


def l2_sphere(radius: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{\|z\| = \mathrm{radius}\}`, with the 2-norm.

    ``radius`` is at least 0. The set is not convex: all its points are as near to zero, for which
    the one with equal entries is taken, and fixed points of proximal gradient descent are
    stationary points on the sphere. The rest is as for `group_lasso`.

    Example:
        >>> hf.prox.l2_sphere(10.0)(torch.tensor([3.0, 4.0]))
        tensor([6., 8.])
    """
    return Prox("l2_sphere", _project_l2_sphere, {"radius": radius}, dim)


def hyperplane(normal: Coefficient = 1.0, offset: Coefficient = 0.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{a^\top z = b\}`, for the normal a and offset b.

    .. math:: z = w - \frac{a^\top w - b}{a^\top a}\, a

    Args:
        normal: any numbers, one for all entries, for each leaf or for each entry.
        offset: any, one for all vectors, for each leaf or for each vector, of size 1 in dim.
        dim: as for `group_lasso`.

    Returns:
        A `Prox`, whose result is NaN where the set is empty: where a is 0, and b is not.

    Raises:
        ValueError: when called, a leaf without such a dimension, or an offset that varies within a
            vector.
        TypeError: a setting or ``dim`` of another kind.

    Example:
        >>> hf.prox.hyperplane(normal=torch.tensor([1.0, 2.0]), offset=5.0)(torch.zeros(2))
        tensor([1., 2.])
    """
    settings = {"normal": normal, "offset": offset}
    return Prox("hyperplane", _project_hyperplane, settings, dim, within={"normal"})


def halfspace(normal: Coefficient = 1.0, offset: Coefficient = 0.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{a^\top z \le b\}`.

    .. math:: z = w - \frac{\max(a^\top w - b,\, 0)}{a^\top a}\, a

    All is as for `hyperplane`; the set is empty where a is 0 and b is negative.

    Example:
        >>> hf.prox.halfspace(offset=1.0)(torch.tensor([2.0, 1.0]))
        tensor([1., 0.])
    """
    settings = {"normal": normal, "offset": offset}
    return Prox("halfspace", _project_halfspace, settings, dim, within={"normal"})


def affine_set(matrix: Coefficient, vector: Coefficient = 0.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{C z = d\}`, for a matrix C and a vector d.

    .. math:: z = w - C^+ (C w - d)

    with the pseudo-inverse of C, so that equations may be redundant. Derivatives with respect to C
    are those for matrices of its rank.

    Args:
        matrix: of shape ``(m, n)``, for vectors of n entries; a tensor, a tree of them with the
            structure of params cut off at any depth, or a function of hparams that returns one.
        vector: of shape ``(m,)``, or one number for all equations.
        dim: as for `group_lasso`; the entries of a vector are in the order of the leaf's.

    Returns:
        A `Prox`, whose result is NaN where the set is empty: where d is not in the range of C, by
        more than the square root of the rounding error.

    Raises:
        ValueError: when called, a matrix or vector of another shape.
        TypeError: a setting or ``dim`` of another kind.

    Example:
        >>> C = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> hf.prox.affine_set(C, lambda d: d)(torch.zeros(3), torch.tensor([2.0, 3.0]))
        tensor([1., 1., 3.])
    """
    settings = {"matrix": matrix, "vector": vector}
    return Prox("affine_set", _project_affine_set, settings, dim, shaped=set(settings))


def box_section(
    lower: Coefficient = 0.0,
    upper: Coefficient = 1.0,
    normal: Coefficient = 1.0,
    offset: Coefficient = 1.0,
    dim: Dim = None,
) -> Prox:
    r"""The projection of vectors onto a box cut by a hyperplane.

    .. math::
        z_i = \min(\max(w_i - \tau a_i,\, l_i),\, u_i), \qquad
        \text{with } \tau \text{ such that } a^\top z = b

    for :math:`\{l \le z \le u,\; a^\top z = b\}`: the dual of a support vector machine, portfolios
    with limits, the k largest entries (``offset=k``). It is found exactly, by bisection over the
    sorted places at which entries reach their bounds.

    Args:
        lower: :math:`l`, one for all entries, for each leaf or for each entry; minus infinity is
            no bound.
        upper: :math:`u`, not below l.
        normal: :math:`a`, any numbers.
        offset: :math:`b`, one for all vectors, for each leaf or for each vector.
        dim: as for `group_lasso`.

    Returns:
        A `Prox`, whose result is NaN where the set is empty.

    Raises:
        ValueError: when called, a leaf without such a dimension, or an offset that varies within a
            vector.
        TypeError: a setting or ``dim`` of another kind.

    Example:
        >>> hf.prox.box_section(offset=2.0)(torch.tensor([3.0, 0.9, 0.3, -4.0]))
        tensor([1.0000, 0.8000, 0.2000, 0.0000])

    References:
        Kiwiel, Breakpoint searching algorithms for the continuous quadratic knapsack problem, 2008.
    """
    settings = {"lower": lower, "upper": upper, "normal": normal, "offset": offset}
    within = {"lower", "upper", "normal"}
    return Prox("box_section", _project_box_section, settings, dim, within=within)


def transport(rows: Coefficient = 1.0, columns: Coefficient = 1.0) -> Prox:
    r"""The projection of matrices onto the transport plans with given marginals.

    .. math::
        Z_{ij} = \max(W_{ij} - \alpha_i - \beta_j,\, 0), \qquad \text{with } \alpha, \beta
        \text{ such that } Z 1 = \mathrm{rows}, \; Z^\top 1 = \mathrm{columns}

    Of ``W = -cost / eps`` it is the optimal transport with quadratic regularisation
    :math:`\tfrac{\mathrm{eps}}{2} \|Z\|^2`. With marginals of ones, the default, the set is
    Birkhoff's polytope of doubly stochastic matrices.

    Args:
        rows: the sums of the rows, at least 0: of shape ``(r,)`` for matrices of shape ``(r, c)``,
            or one number; the matrices lie in the last two dimensions of a leaf.
        columns: the sums of the columns, of shape ``(c,)``, with the same total.

    Returns:
        A `Prox`, for leaves with two dimensions at least, whose result is NaN where the totals
        differ by more than the square root of the rounding error. Derivatives are those along
        marginals whose totals agree. It waits for the device, and cannot be compiled; its cost is
        that of some 10 to 50 solves with ``r + c`` unknowns. Entries beyond 1e8 times the marginals
        count as that.

    Raises:
        ValueError: a number below 0; when called, marginals of another shape, or a leaf with fewer
            dimensions.
        TypeError: a setting of another kind.

    Example:
        >>> plan = hf.prox.transport(rows=torch.tensor([1.0, 2.0]), columns=1.5)
        >>> plan(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1.0000, 0.0000],
                [0.5000, 1.5000]])

    References:
        Lorenz, Manns and Meyer, Quadratically regularized optimal transport, arXiv 1903.01112.
    """
    settings = {"rows": rows, "columns": columns}
    return Prox("transport", _project_transport, settings, (-2, -1), shaped=set(settings))


def _project_l2_sphere(w: Tensor, dims: tuple[int, ...], lr: Tensor, radius: Tensor) -> Tensor:
    size = norm(w, dims)
    centre = size == 0
    even = torch.ones_like(w) / torch.ones_like(w).sum(dims, keepdim=True).sqrt()
    return radius * torch.where(centre, even, w / torch.where(centre, 1.0, size))


def _project_hyperplane(
    w: Tensor, dims: Any, lr: Any, normal: Tensor, offset: Tensor, least: float | None = None
) -> Tensor:
    largest = normal.detach().expand(w.shape).abs().amax(dims, keepdim=True)
    none = largest == 0
    unit = torch.where(none, 1.0, largest)
    a = (normal / unit).expand(w.shape)
    excess = (a * w).sum(dims, keepdim=True) - offset / unit
    excess = excess if least is None else excess.clamp(min=least)
    squared = torch.where(none, 1.0, (a * a).sum(dims, keepdim=True))
    return torch.where(none & (excess != 0), torch.nan, w - a * (excess / squared))


def _project_halfspace(w: Tensor, dims: Any, lr: Any, normal: Tensor, offset: Tensor) -> Tensor:
    return _project_hyperplane(w, dims, lr, normal, offset, 0.0)


def _project_affine_set(w: Tensor, dims: Any, lr: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    rows = _rows(w, w.shape, dims)
    n = rows.shape[-1]
    if matrix.ndim < 2 or matrix.shape[-1] != n:
        raise UnfitShape("matrix", matrix, f"(m, {n}), for vectors of {n} entries")
    if vector.ndim and vector.shape[-1] != matrix.shape[-2]:
        raise UnfitShape("vector", vector, f"(m,) = ({matrix.shape[-2]},), as matrix has rows")
    inverse = torch.linalg.pinv(matrix)
    residual = _times(matrix, rows) - vector
    z = rows - _times(inverse, residual)
    with torch.no_grad():
        size = _times(matrix.abs(), rows.abs()) + vector.abs()
        missed = (_times(matrix, z) - vector).abs() > _slack(w.dtype) * size
    return _unrows(torch.where(missed.any(-1, keepdim=True), torch.nan, z), w.shape, dims)


def _project_box_section(
    w: Tensor, dims: Any, lr: Any, lower: Tensor, upper: Tensor, normal: Tensor, offset: Tensor
) -> Tensor:
    v, low, high, a = (_rows(x, w.shape, dims) for x in (w, lower, upper, normal))
    kept = [1 if dim in dims else size for dim, size in enumerate(w.shape)]
    b = _rows(offset, kept, dims)
    exact = tuple(x.detach().double() for x in (v, low, high, a, b))
    free, at_low, empty = _active_set(exact, _slack(w.dtype))
    bound = torch.where(free, 0.0, torch.where(at_low, low, high))
    # First tau of the values, exactly; all that is small, and every derivative, is in the second.
    tau = _multiplier(free, exact[0], bound.detach().double(), exact[3], exact[4])
    v = (
        (exact[0] - tau * exact[3]).to(v.dtype)
        + (v - v.detach())
        - tau.to(v.dtype) * (a - a.detach())
    )
    z = torch.where(free, v - _multiplier(free, v, bound, a, b) * a, bound)
    z = torch.where(empty, torch.nan, torch.clamp(z, low, high))
    return _unrows(torch.where(torch.isfinite(exact[0]).all(-1, True), z, torch.nan), w.shape, dims)


def _multiplier(free: Tensor, v: Tensor, bound: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The tau with ``a^T z = b`` for ``z = v - tau a`` on the free entries, at bounds elsewhere."""
    squared = torch.where(free, a * a, 0.0).sum(-1, keepdim=True)
    excess = (a * torch.where(free, v, bound)).sum(-1, keepdim=True) - b
    return excess / torch.where(squared == 0, 1.0, squared)


def _active_set(operands: Leaves, slack: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are free, which of the others are at the lower bound, and whether none fits.

    ``a^T z(tau)`` falls from one breakpoint to the next, where an entry reaches or leaves a bound.
    """
    w, low, high, a, b = operands
    flat, up = a == 0, a > 0
    divisor = torch.where(flat, 1.0, a)
    to_low, to_high = (w - low) / divisor, (w - high) / divisor
    first, last = torch.minimum(to_low, to_high), torch.maximum(to_low, to_high)
    # a zero in the normal has no breakpoint; infinite ones change nothing
    first, last = torch.where(flat, -torch.inf, first), torch.where(flat, torch.inf, last)
    ends = torch.cat([first, last], -1).sort(dim=-1).values
    left = torch.zeros_like(b, dtype=torch.int64)
    right = left + ends.shape[-1] - 1
    for _ in range(ends.shape[-1].bit_length()):
        middle = (left + right) // 2
        tau = ends.gather(-1, middle)
        z = torch.where(flat, 0.0, torch.clamp(w - tau * divisor, low, high))
        above = torch.where(flat, 0.0, a * z).sum(-1, keepdim=True) >= b
        left, right = torch.where(above, middle, left), torch.where(above, right, middle)
    begin, end = ends.gather(-1, left), ends.gather(-1, right)
    inside = (first <= begin) & (end <= last) & (first < last)
    free = torch.where(flat, (low <= w) & (w <= high), inside)
    at_low = torch.where(flat, w < low, (last <= begin) == up)
    least = torch.where(flat, 0.0, torch.where(up, low, high) * a).sum(-1, keepdim=True)
    most = torch.where(flat, 0.0, torch.where(up, high, low) * a).sum(-1, keepdim=True)
    short = (b < least - slack * least.abs()) | (b > most + slack * most.abs())
    return free, at_low, short | (low > high).any(-1, keepdim=True)


_NEWTON_STEPS = 100
_SHORTEST = 16
_GROWTH = 8.0
_LARGEST = 1e8


def _project_transport(W: Tensor, dims: Any, lr: Any, rows: Tensor, columns: Tensor) -> Tensor:
    for key, value, size in (("rows", rows, W.shape[-2]), ("columns", columns, W.shape[-1])):
        if value.ndim and value.shape[-1] != size:
            raise UnfitShape(key, value, f"({size},), or one number")
    r = rows.expand(*W.shape[:-2], W.shape[-2])
    c = columns.expand(*W.shape[:-2], W.shape[-1])
    cost, *marginals = (x.detach().double() for x in (W, r, c))
    finite = torch.isfinite(cost).all(-1, True).all(-2, True)
    V = _reduced(torch.where(finite, cost, 0.0), *marginals)
    support = V > 0
    V = V.to(W.dtype) + (W - W.detach())
    # On the support the potentials are linear in V and the marginals; these here are corrections.
    inverse = torch.linalg.pinv(_jacobian(support.double()), hermitian=True).to(W.dtype)
    held = torch.where(support, V, 0.0)
    change = _times(inverse, torch.cat([held.sum(-1) - r, held.sum(-2) - c], -1))
    Z = torch.where(support, _less(V, change).clamp(min=0), 0.0)
    missed = torch.cat([Z.detach().sum(-1) - r, Z.detach().sum(-2) - c], -1).abs().amax(-1)
    fits = missed <= _slack(W.dtype) * torch.maximum(r.sum(-1), c.sum(-1))
    return torch.where(fits[..., None, None] & finite, Z, torch.nan)


def _reduced(W: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """``W - alpha - beta`` for the potentials of the projection.

    They minimise the convex function ``|max(W - alpha - beta, 0)|^2 / 2 + alpha r + beta c``. What
    is projected grows from the size of the marginals to that of W, so that each problem starts near
    its solution. In the end the plan changes no more, and then is lost in rounding errors: so W
    beyond a size counts as of that size.
    """
    r, c = r.clamp(min=0), c.clamp(min=0)
    total = c.sum(-1, keepdim=True)
    c = c * (r.sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total))
    marginals = torch.cat([r, c], -1)
    mean = marginals.mean(-1)[..., None, None]
    W = W - W.mean(-1, keepdim=True)
    W = W - W.mean(-2, keepdim=True)
    largest = W.abs().amax((-2, -1), keepdim=True)
    W = W * (_LARGEST * mean / torch.where(largest > 0, largest, 1.0)).clamp(max=1.0)
    largest = torch.maximum(W.abs(), mean).amax((-2, -1), keepdim=True)
    begin = torch.where(largest > 0, mean / largest, 1.0)
    stages = math.ceil(math.log(batching.largest((1 / begin).amax()), _GROWTH))
    potentials, scale = torch.zeros_like(marginals), begin
    for power in range(stages + 1):
        before, scale = scale, (begin * _GROWTH**power).clamp(max=1.0)
        start = potentials * (scale / before)[..., 0]
        potentials = _minimise(scale * W, start, r, c)
    return _less(W, potentials)


def _less(W: Tensor, potentials: Tensor) -> Tensor:
    """``W - alpha - beta`` for the potentials alpha and beta, one behind the other."""
    alpha, beta = potentials.split([W.shape[-2], W.shape[-1]], -1)
    reduced: Tensor = W - alpha[..., :, None] - beta[..., None, :]
    return reduced


def _minimise(W: Tensor, best: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """The potentials from a start: by exact minimisation in alpha, in beta, and Newton steps.

    The first two alone converge, and the third ends it.
    """

    def plan(potentials: Tensor) -> Tensor:
        return _less(W, potentials).clamp(min=0)

    def value(potentials: Tensor) -> Tensor:
        size: Tensor = plan(potentials).square().sum((-2, -1))
        return 0.5 * size + torch.sum(potentials * marginals, -1)

    def surplus(potentials: Tensor) -> Tensor:
        Z = plan(potentials)
        return torch.cat([Z.sum(-1), Z.sum(-2)], -1) - marginals

    marginals = torch.cat([r, c], -1)
    noise = 16 * torch.finfo(W.dtype).eps * (W.abs().amax((-2, -1)) + marginals.amax(-1))
    eye = torch.eye(marginals.shape[-1], dtype=W.dtype, device=W.device)
    dims = (W.ndim - 2, W.ndim - 1)
    for _ in range(_NEWTON_STEPS):
        beta = best[..., r.shape[-1] :]
        alpha = threshold(W - beta[..., None, :], dims[1:], r[..., :, None])[1][..., 0]
        beta = threshold(W - alpha[..., :, None], dims[:1], c[..., None, :])[1][..., 0, :]
        start = best = torch.cat([alpha, beta], -1)
        excess = surplus(start)
        error = excess.abs().amax(-1)
        settled = error <= noise
        if batching.all_true(settled.all()):
            break
        support = (plan(start) > 0).to(W.dtype)
        step = torch.linalg.solve(_jacobian(support) + 1e-9 * eye, excess)
        least, blur = value(start), noise * r.sum(-1)
        for power in range(_SHORTEST):
            moved = start + 0.25**power * step
            change = value(moved) - least
            nearer = surplus(moved).abs().amax(-1) < error
            taken = ~settled & ((change < -blur) | ((change <= blur) & nearer))
            best, settled = torch.where(taken[..., None], moved, best), settled | taken
            if batching.all_true(settled.all()):
                break
    return best


def _jacobian(support: Tensor) -> Tensor:
    """The derivative of minus the sums of a plan with respect to its potentials."""
    rows = torch.cat([torch.diag_embed(support.sum(-1)), support], -1)
    return torch.cat([rows, torch.cat([support.mT, torch.diag_embed(support.sum(-2))], -1)], -2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _slack(dtype: torch.dtype) -> float:
    """The relative error beyond which equations count as unsolvable."""
    return float(torch.finfo(dtype).eps ** 0.5)


def _rows(x: Tensor, shape: Any, dims: tuple[int, ...]) -> Tensor:
    """The vectors along dims of what broadcasts to a shape, in a last dimension of their own."""
    if not dims:
        return x.expand(shape)[..., None]
    last = tuple(range(-len(dims), 0))
    moved = x.expand(shape).movedim(dims, last)
    return moved.reshape(*moved.shape[: moved.ndim - len(dims)], -1)


def _unrows(rows: Tensor, shape: Any, dims: tuple[int, ...]) -> Tensor:
    """The inverse of `_rows`."""
    if not dims:
        return rows[..., 0]
    last = tuple(range(-len(dims), 0))
    sizes = [shape[dim] for dim in range(len(shape)) if dim not in dims]
    return rows.reshape(*sizes, *(shape[dim] for dim in dims)).movedim(last, dims)
