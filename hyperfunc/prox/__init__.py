r"""Proximal operators, for inner problems with constraints and non-smooth regularisers.

The proximal operator of a function g, with step size lr, is

.. math::
    \mathrm{prox}_{\mathrm{lr}\, g}(w)
    = \arg\min_z \; \tfrac{1}{2} \lVert z - w \rVert^2 + \mathrm{lr}\; g(z, \lambda).

Each function of this module makes one, a callable ``(params, hparams=None, lr=1.0) -> params`` for
`hyperfunc.proximal_gradient_map`. If g is the indicator of a set (zero inside, infinite outside),
prox is the Euclidean projection onto the set, whatever ``lr`` is.

**Trees.** `l1`, `elastic_net`, `non_negative` and `box` act on each entry. `group_lasso`,
`l2_ball`, `l2_sphere`, `l1_ball`, `simplex`, `hyperplane`, `halfspace`, `affine_set` and
`box_section` act on vectors: with ``dim=None`` each leaf is one vector; with ``dim`` an int or a
tuple of ints the vectors lie along these dimensions of each leaf, one for each index of the others.
`nuclear_norm` and `transport` act on the matrices in the last two dimensions. `joint` makes one
vector of the whole tree, and `blocks` gives parts of a tree their own operators. `chain` applies
operators one after another, and `intersection` projects onto what several sets share.

**Settings** are what the coefficients of `hyperfunc.optim` are: a number; a tensor, 0-d or one that
broadcasts to each leaf (and does not vary within a vector or matrix, but for bounds and normals);
a tree of these with the structure of params cut off at any depth; or a function of hparams that
returns one of these. Only the last has a hypergradient. Numbers are checked against their range;
tensors are not, and where a set described by equations is empty, the result is NaN.

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
but indefinite: use `hyperfunc.GMRES` or `hyperfunc.NormalCG`, as `hyperfunc.BiCGStab` may break
down on the block of zeros. An inequality :math:`c(w) \le 0` enters as :math:`\mu\, c(w) = 0`, whose
matrix is not symmetric, and singular where a constraint is active with multiplier zero: the
solution has a kink there.

References: Parikh and Boyd, Proximal algorithms, 2014; Bertrand et al., 2020, arXiv 2002.08943.
"""

# Here: one module a kind of operator. May import ``optim``, for its coefficients, and what that
# stands on. A new operator is a rule for one leaf and a function that makes a `Prox` of it, beside
# those of its kind.

from hyperfunc.prox._base import Prox
from hyperfunc.prox._combinations import blocks, chain, intersection, joint
from hyperfunc.prox._entrywise import box, elastic_net, identity, l1, non_negative
from hyperfunc.prox._matrices import nuclear_norm
from hyperfunc.prox._sets import (
    affine_set,
    box_section,
    halfspace,
    hyperplane,
    l2_sphere,
    transport,
)
from hyperfunc.prox._vectors import group_lasso, l1_ball, l2_ball, simplex

__all__ = [
    "Prox",
    "affine_set",
    "blocks",
    "box",
    "box_section",
    "chain",
    "elastic_net",
    "group_lasso",
    "halfspace",
    "hyperplane",
    "identity",
    "intersection",
    "joint",
    "l1",
    "l1_ball",
    "l2_ball",
    "l2_sphere",
    "non_negative",
    "nuclear_norm",
    "simplex",
    "transport",
]
