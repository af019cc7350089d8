"""Proximal operators against their definition, and their derivatives."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import hyperfunc as hf
from hyperfunc import prox
from tests.cells import thinned

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SLACK = 1e-9
LR = 0.7


def finite_if(flag: Tensor, value: Tensor) -> Tensor:
    return torch.where(flag, value, torch.inf)


def nuclear(W: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(W, "nuc")


def spectral(W: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(W, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator, the function g that it belongs to, and the conjugate of g.

    Both functions are infinite outside their domain. ``z = prox(w)`` if and only if ``d = (w - z) /
    lr`` is a subgradient of g at z, which is so if and only if ``g(z) + conjugate(d) = <d, z>``.
    """

    operator: Callable[..., Any]
    g: Callable[[Tensor, Any], Tensor]
    conjugate: Callable[[Tensor, Any], Tensor]
    settings: tuple[float, ...] = (0.6,)
    shape: tuple[int, ...] = (6,)
    projection: bool = False


def vectors(reduce: Callable[..., Tensor], dim: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: reduce(z, dim=dim, keepdim=True)


def norm_case(make: Callable[..., Any], norm: Any, dual: Any, **keywords: Any) -> Case:
    """The sum of the norms of the vectors, each weighted: its conjugate bounds the dual norm."""
    return Case(
        make(weight=lambda h: h[0]),
        lambda z, h: (h[0] * norm(z)).sum(),
        lambda d, h: finite_if((dual(d) <= h[0] + SLACK).all(), torch.zeros_like(h[0])),
        **keywords,
    )


def set_case(make: Callable[..., Any], contains: Any, support: Any, **keywords: Any) -> Case:
    """The indicator of a set: its conjugate is the support function."""
    return Case(
        make(lambda h: h[0]),
        lambda z, h: finite_if(contains(z, h[0]).all(), torch.zeros_like(h[0])),
        lambda d, h: support(d, h[0]).sum(),
        projection=True,
        **keywords,
    )


def ball_case(make: Callable[..., Any], norm: Any, dual: Any, **keywords: Any) -> Case:
    return set_case(make, lambda z, r: norm(z) <= r + SLACK, lambda d, r: r * dual(d), **keywords)


def equations_case(operator: Any, system: Any, inequality: bool = False, **keywords: Any) -> Case:
    """The solutions z of ``C z = d`` (or at most d): C has independent rows."""

    def contains(z: Tensor, h: Tensor) -> Tensor:
        C, d = system(h)
        excess = C @ z.reshape(-1) - d
        within = (excess if inequality else excess.abs()) <= SLACK
        return finite_if(within.all(), torch.zeros_like(h[0]))

    def support(u: Tensor, h: Tensor) -> Tensor:
        C, d = system(h)
        y = torch.linalg.solve(C @ C.mT, C @ u.reshape(-1))
        reached = (C.mT @ y - u.reshape(-1)).norm() <= SLACK * (1 + u.norm())
        return finite_if(reached & (not inequality or (y >= -SLACK).all()), y @ d)

    return Case(
        operator, contains, support, projection=True, **{"settings": (0.6, 0.8), **keywords}
    )


def box_section_support(d: Tensor, h: Tensor) -> Tensor:
    """The least of a function that is linear between the places where an entry of d is zero."""
    multiplier = (d / NORMAL)[:, None]
    rest = d - multiplier * NORMAL
    return (multiplier[:, 0] * h[2] + torch.maximum(h[0] * rest, h[1] * rest).sum(1)).amin()


NORMAL = torch.tensor([1.0, -2.0, 0.5, 1.5, -0.3, 0.7], dtype=torch.float64)
MATRIX = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5, 0.3], [0.2, -1.0, 1.0, 0.7, 0.0, 2.0]]).double()
VECTOR = torch.tensor([0.4, -1.2], dtype=torch.float64)
UNITS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
PERMUTED = torch.tensor(sorted(set(itertools.permutations([0, 1, 1, 2]))))
two = {dim: vectors(torch.linalg.vector_norm, dim) for dim in (None, 1, (0, 2))}
largest = {dim: vectors(lambda z, **k: z.abs().amax(**k), dim) for dim in (0, 1)}
sums = {dim: vectors(lambda z, **k: z.abs().sum(**k), dim) for dim in (0, 1)}

CASES = {
    "l1": norm_case(prox.l1, torch.abs, torch.abs),
    "elastic_net": Case(
        prox.elastic_net(l1=lambda h: h[0], l2=lambda h: h[1]),
        lambda z, h: h[0] * z.abs().sum() + h[1] / 2 * (z**2).sum(),
        lambda d, h: ((d.abs() - h[0]).clamp(min=0) ** 2).sum() / (2 * h[1]),
        settings=(0.6, 0.8),
    ),
    "group_lasso": norm_case(prox.group_lasso, two[None], two[None]),
    "group_lasso, dim=1": norm_case(
        lambda weight: prox.group_lasso(weight, dim=1), two[1], two[1], shape=(5, 2)
    ),
    "group_lasso, dim=(-1, 0)": norm_case(
        lambda weight: prox.group_lasso(weight, dim=(-1, 0)), two[0, 2], two[0, 2], shape=(2, 4, 2)
    ),
    "nuclear_norm": norm_case(prox.nuclear_norm, nuclear, spectral, shape=(4, 3)),
    "nuclear_norm, wide": norm_case(prox.nuclear_norm, nuclear, spectral, shape=(2, 5)),
    "nuclear_norm, batch": norm_case(prox.nuclear_norm, nuclear, spectral, shape=(2, 3, 3)),
    "non_negative": set_case(
        lambda _: prox.non_negative(),
        lambda z, _: z >= 0,
        lambda d, _: finite_if(d <= SLACK, torch.zeros_like(d)),
    ),
    "box": Case(
        prox.box(lower=lambda h: h[0], upper=lambda h: h[1]),
        lambda z, h: finite_if(((h[0] <= z) & (z <= h[1])).all(), torch.zeros_like(h[0])),
        lambda d, h: torch.where(d > 0, h[1] * d, h[0] * d).sum(),
        settings=(-0.3, 0.8),
        projection=True,
    ),
    "simplex": set_case(
        prox.simplex,
        lambda z, s: (z >= 0) & ((z.sum() - s).abs() <= SLACK),
        lambda d, s: s * d.max(),
        settings=(1.0,),
    ),
    "simplex, dim=0": set_case(
        lambda total: prox.simplex(total, dim=0),
        lambda z, s: (z >= 0) & ((z.sum(0) - s).abs() <= SLACK),
        lambda d, s: s * d.amax(0),
        shape=(4, 3),
    ),
    "l1_ball": ball_case(prox.l1_ball, sums[0], largest[0], settings=(1.5,)),
    "l1_ball, dim=1": ball_case(
        lambda radius: prox.l1_ball(radius, dim=1), sums[1], largest[1], shape=(4, 3)
    ),
    "l2_ball": ball_case(prox.l2_ball, two[None], two[None], settings=(1.5,)),
    "l2_ball, dim=1": ball_case(
        lambda radius: prox.l2_ball(radius, dim=1), two[1], two[1], shape=(5, 2)
    ),
    "hyperplane": equations_case(
        prox.hyperplane(lambda h: h[0] * NORMAL, lambda h: h[1]),
        lambda h: (h[0] * NORMAL[None], h[1:]),
    ),
    "halfspace": equations_case(
        prox.halfspace(lambda h: h[0] * NORMAL, lambda h: h[1]),
        lambda h: (h[0] * NORMAL[None], h[1:]),
        inequality=True,
        settings=(0.6, -0.8),
    ),
    "affine_set": equations_case(
        prox.affine_set(lambda h: h[0] * MATRIX, lambda h: h[1] * VECTOR),
        lambda h: (h[0] * MATRIX, h[1] * VECTOR),
        shape=(2, 3),
    ),
    "box_section": Case(
        prox.box_section(lambda h: h[0], lambda h: h[1], NORMAL, lambda h: h[2]),
        lambda z, h: finite_if(
            ((h[0] <= z) & (z <= h[1])).all() & ((NORMAL @ z - h[2]).abs() <= SLACK),
            torch.zeros_like(h[0]),
        ),
        box_section_support,
        settings=(-0.3, 0.8, 0.5),
        projection=True,
    ),
    "transport": set_case(
        lambda unit: prox.transport(
            lambda h: unit(h) * UNITS[0].to(h), lambda h: unit(h) * UNITS[1].to(h)
        ),
        lambda z, s: (
            (z >= 0) & ((torch.stack([z.sum(1), z.sum(0)]) - s * UNITS).abs() <= SLACK).all()
        ),
        # the vertices are plans of whole units, which are permutations of them
        lambda d, s: s * d[torch.tensor([0, 0, 1, 2]), PERMUTED].sum(1).amax(),
        shape=(3, 3),
    ),
    "chain: sparse group lasso": Case(
        prox.chain(prox.l1(lambda h: h[0]), prox.group_lasso(lambda h: h[1])),
        lambda z, h: h[0] * z.abs().sum() + h[1] * z.norm(),
        lambda d, h: finite_if(
            (d.abs() - h[0]).clamp(min=0).norm() <= h[1] + SLACK, torch.zeros_like(h[0])
        ),
        settings=(0.6, 0.8),
    ),
    "chain: l1, non_negative": Case(
        prox.chain(prox.l1(lambda h: h[0]), prox.non_negative()),
        lambda z, h: finite_if((z >= 0).all(), h[0] * z.sum()),
        lambda d, h: finite_if((d <= h[0] + SLACK).all(), torch.zeros_like(h[0])),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SLOW = {"transport": pytest.mark.slow}


def sample(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(case.shape, dtype=dtype), torch.tensor(case.settings, dtype=dtype)


def points(case: Case) -> dict[str, Tensor]:
    """Points at kinks and where naive formulas divide by zero."""
    w, h = sample(case)
    zeros = torch.zeros_like(w)
    first = zeros.clone()
    first.view(-1)[0] = 1.0
    return {
        "zero": zeros,
        "equal": torch.ones_like(w),
        "single": first,
        "at the threshold": LR * h[0] * first,
        "at the bound": h[0] * first,
        "in the interior": 1e-3 * w.abs(),
        "large": 1e30 * w,
        "small": 1e-30 * w,
    }


@every_case
def test_operators_fit_their_definition(case):
    h = sample(case)[1]
    moved = 0
    for w in (*(2 * torch.randn(10, *case.shape, dtype=torch.float64)), *points(case).values()):
        z = case.operator(w, h, LR)
        d = (w - z) / LR
        moved += bool((z != w).any())
        if w.abs().max() > 1e10:  # the gap is rounding errors
            assert torch.isfinite(z).all()
            continue
        gap = case.g(z, h) + case.conjugate(d, h) - (d * z).sum()
        assert gap.abs() < 1e-8 * (1 + (d * z).abs().sum())
    assert moved > 8


@every_case
def test_projections_are_idempotent_and_ignore_the_step(case):
    w, h = sample(case)
    once = case.operator(w, h, LR)
    if case.projection:
        torch.testing.assert_close(case.operator(once, h, LR), once, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(case.operator(w, h, 5.0), once, rtol=0, atol=0)
    else:  # the step multiplies the settings
        torch.testing.assert_close(case.operator(w, LR * h, 1.0), once, rtol=1e-13, atol=1e-14)
        assert not torch.allclose(case.operator(w, h, 2 * LR), once)


# of gradcheck itself, in torch 2.4
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")
@pytest.mark.parametrize(
    "case", [pytest.param(CASES[name], id=name, marks=SLOW.get(name, ())) for name in CASES]
)
def test_derivatives_are_those_of_finite_differences(case):
    w, h = sample(case)
    inputs = tuple(x.requires_grad_() for x in (2 * w, h, torch.tensor(LR, dtype=torch.float64)))
    keywords = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(case.operator, inputs, **keywords)
    assert torch.autograd.gradgradcheck(case.operator, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", thinned(CASES))
def test_derivatives_are_finite_everywhere(name):
    case = CASES[name]
    h = sample(case)[1]
    lr = torch.tensor(LR, dtype=torch.float64)
    for name, w in points(case).items():
        for settings in (h, 0 * h):
            for transform in (jacrev, jacfwd, lambda f, **k: jacfwd(jacrev(f, **k), **k)):
                blocks = transform(case.operator, argnums=(0, 1, 2))(w, settings, lr)
                assert all(torch.isfinite(x).all() for x in leaves(blocks)), name


@pytest.mark.parametrize("tiny", [1e-16, 1e-40, 1e-160, 1e-300])
def test_singular_values_that_are_rounding_errors_of_zero(tiny):
    W = torch.diag(torch.tensor([3.0, tiny, tiny / 3], dtype=torch.float64))
    lr = torch.tensor(LR, dtype=torch.float64)
    operator = prox.nuclear_norm(lambda h: h)
    for weight in (torch.zeros_like(lr), torch.full_like(lr, 0.6)):
        first = jacfwd(operator, argnums=(0, 1, 2))(W, weight, lr)
        second = jacfwd(jacrev(operator, argnums=(0, 1, 2)), argnums=(0, 1, 2))(W, weight, lr)
        assert all(torch.isfinite(x).all() for x in leaves((first, second)))
        if weight == 0:
            torch.testing.assert_close(first[0].reshape(9, 9), torch.eye(9, dtype=W.dtype))


@every_case
def test_hessian_of_a_smooth_function_of_the_result(case):
    w, h = sample(case)

    def value(w, h):
        return (case.operator(w, h, LR).sin() ** 2).sum()

    def by_differences(w, h):
        rows = []
        for e in torch.eye(w.numel(), dtype=w.dtype).reshape(-1, *w.shape):
            step = 1e-6 * e
            rows.append((grad(value)(w + step, h) - grad(value)(w - step, h)) / 2e-6)
        return torch.stack(rows).reshape(*w.shape, *w.shape)

    torch.testing.assert_close(hessian(value)(w, h), by_differences(w, h), rtol=1e-6, atol=1e-6)


@every_case
def test_a_batch_is_a_loop(case):
    W = torch.randn(3, 2, *case.shape, dtype=torch.float64)
    H = torch.tensor(case.settings, dtype=torch.float64) * torch.tensor([[1.0], [0.5], [0.1]])

    def one(w, h):
        return case.operator(w, h, LR), *jacrev(case.operator, argnums=(0, 1))(w, h, LR)

    batched = vmap(vmap(one, in_dims=(0, None)))(W, H)
    looped = [one(w, h) for rows, h in zip(W, H, strict=True) for w in rows]
    for got, expected in zip(batched, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(got.flatten(0, 1), torch.stack(expected))


@every_case
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_low_precision(case, dtype, tolerance):
    w, h = (x.to(dtype) for x in sample(case))
    got = case.operator(w, h, LR)
    assert got.dtype is dtype
    expected = case.operator(w.double(), h.double(), LR)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    tangent = jvp(lambda w: case.operator(w, h, LR), (w,), (w,))[1]
    assert tangent.dtype is dtype


@every_case
def test_nan_stays_nan(case):
    w, h = sample(case)
    w.view(-1)[0] = torch.nan
    assert torch.isnan(case.operator(w, h, LR)).any()


def test_the_sphere_is_the_rescaled_vector_and_its_centre_has_no_derivative():
    w, radius = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 1, dtype=torch.float64)
    operator = prox.l2_sphere(lambda h: h, dim=1)
    z = operator(w, radius)
    torch.testing.assert_close(z, radius * torch.nn.functional.normalize(w, dim=1))
    inputs = (w.requires_grad_(), radius.requires_grad_())
    assert torch.autograd.gradcheck(operator, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operator, inputs)
    w = torch.zeros(3, 4, dtype=torch.float64)
    torch.testing.assert_close(operator(w, radius).norm(dim=1), radius[:, 0])
    for transform in (jacrev, jacfwd):
        assert not transform(operator)(w, radius).any()


LARGE = torch.tensor([1e8, 1e8 + 8, 1e8 - 8, -1e8, 3e7, 0.0, 5.0, 1e8 + 8])
LARGE_CASES = {
    "simplex": prox.simplex(),
    "simplex, total": prox.simplex(30.0),
    "simplex, dim": prox.simplex(dim=0),
    "l1_ball": prox.l1_ball(3.0),
    "box_section": prox.box_section(0.0, 2.0, torch.tensor([1.0, 3, 1, 2, 1, 1, 0, 1.5]), 4.0),
    "transport": lambda w: prox.transport(torch.tensor([1.0, 3.0]), 1.0)(w.reshape(2, 4)),
}


@pytest.mark.parametrize("operator", LARGE_CASES.values(), ids=LARGE_CASES)
def test_large_entries_in_float32(operator):
    got, expected = operator(LARGE), operator(LARGE.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    # of many entries that are equal, each has its part
    many = prox.simplex()(LARGE.repeat_interleave(1000)).double()
    torch.testing.assert_close(
        many.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert (many > 0).sum() == 2000


def test_sets_that_are_empty_give_nan():
    w = torch.randn(3, 3)
    assert torch.isnan(prox.hyperplane(0.0, 1.0)(w)).all()
    assert torch.isnan(prox.halfspace(0.0, -1.0)(w)).all()
    assert torch.equal(prox.halfspace(0.0, 1.0)(w), w)
    assert torch.isnan(prox.box_section(offset=3.1)(w[0])).all()
    assert torch.isnan(prox.box_section(1.0, 0.0)(w[0])).all()
    assert torch.isnan(prox.transport(1.0, 1.1)(w)).all()
    for value in (-1.0, torch.nan):
        marginals = torch.tensor([value, 2.0, 2.0])
        assert torch.isnan(prox.transport(marginals, 1.0)(w)).all()
    C = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # equations that say the same, or not
    by_row = prox.affine_set(C, lambda h: h, dim=1)
    assert torch.isnan(by_row(w, torch.tensor([1.0, 2.1]))).all()
    torch.testing.assert_close(by_row(w, C[:, 0]), prox.hyperplane(C[0], 1.0, dim=1)(w))


def test_plans_between_many_points():
    rows, columns = torch.randn(2, 12, dtype=torch.float64).softmax(1)
    for size in (1e-4, 1.0, 1e4, 1e12):  # all entries, a few, a vertex, and beyond rounding
        W = size * torch.randn(12, 12, dtype=torch.float64)
        Z = prox.transport(rows, columns)(W)
        torch.testing.assert_close(Z.sum(1), rows)
        torch.testing.assert_close(Z.sum(0), columns)
        for _ in range(3):  # <W - Z, P - Z> is at most 0 for every plan P
            P = prox.transport(rows, columns)(torch.randn(12, 12, dtype=torch.float64))
            assert ((W - Z) * (P - Z)).sum() <= 1e-9 * size


def test_intersections():
    w = 2 * torch.randn(4, 6, dtype=torch.float64)
    h = torch.tensor([0.4, 1.0], dtype=torch.float64)
    both = prox.intersection(prox.box(-torch.inf, lambda h: h[0]), prox.simplex(lambda h: h[1]))
    exact = prox.box_section(0.0, lambda h: h[0], 1.0, lambda h: h[1])
    for transform in (lambda f, **k: f, jacrev, jacfwd):
        got, expected = (
            vmap(transform(f, argnums=(0, 1)), in_dims=(0, None))(w, h) for f in (both, exact)
        )
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    apart = prox.intersection(prox.box(2.0, 3.0), prox.simplex(), maxiter=20)
    with pytest.warns(
        hf.ConvergenceWarning, match="prox.intersection did not converge: it took 20"
    ):
        apart(w[0])


def test_norms_neither_overflow_nor_underflow():
    direction = torch.tensor([0.6, 0.8])
    for scale in (1e30, 1e-30):  # whose squares are infinite and zero in float32
        w = scale * direction
        torch.testing.assert_close(prox.l2_ball(scale / 2)(w), w / 2, rtol=1e-6, atol=0)
        torch.testing.assert_close(prox.group_lasso(scale / 2)(w), w / 2, rtol=1e-6, atol=0)


def test_empty_leaves_and_scalars():
    tree = {"a": torch.empty(0, 2, 0), "b": torch.tensor(3.0)}
    made = [prox.l1(), prox.elastic_net(), prox.group_lasso(), prox.non_negative(), prox.box()]
    sets = [prox.l2_sphere(), prox.hyperplane(), prox.halfspace(1.0, 2.0), prox.box_section()]
    sets += [prox.affine_set(torch.ones(1, 1), 1.0)]
    for operator in (*made, *sets, prox.simplex(), prox.l1_ball(), prox.l2_ball()):
        result = operator(tree)
        assert result["a"].shape == (0, 2, 0)
        tangent = jvp(lambda b, f=operator: f({"b": b})["b"], (tree["b"],), (tree["b"],))[1]
        assert (result["b"].shape, tangent.dtype) == ((), torch.float32)


# Each operator here is the identity minus the projection onto a dual ball.
MOREAU = {
    "l1": (prox.l1(0.6), lambda w, r: prox.box(-r, r)(w)),
    "group_lasso": (prox.group_lasso(0.6), lambda w, r: prox.l2_ball(r)(w)),
    "group_lasso, dim=1": (prox.group_lasso(0.6, dim=1), lambda w, r: prox.l2_ball(r, dim=1)(w)),
}


@pytest.mark.parametrize(("operator", "dual"), MOREAU.values(), ids=MOREAU)
def test_moreau_decomposition(operator, dual):
    w = torch.randn(4, 5, dtype=torch.float64)
    total = operator(w, None, LR) + dual(w, 0.6 * LR)
    torch.testing.assert_close(total, w, rtol=0, atol=1e-15)
    whole = jacrev(lambda w: operator(w, None, LR) + dual(w, 0.6 * LR))(w)
    torch.testing.assert_close(whole.reshape(20, 20), torch.eye(20, dtype=w.dtype))


def orthonormal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


SPECTRA = {
    "distinct": (2.0, 1.1, 0.3),
    "equal above": (2.0, 2.0, 0.3),
    "equal below": (2.0, 0.3, 0.3),
    "zeros": (2.0, 0.0, 0.0),
    "all above": (2.0, 1.0, 0.9),
    "all below": (0.3, 0.2, 0.2),
    "nearly equal": (2.0, 2.0 + 1e-9, 1e-9),
}


@pytest.mark.parametrize(("spectrum", "wide"), thinned(SPECTRA, [False, True]))
def test_derivatives_of_the_nuclear_norm_where_singular_values_are_equal_or_zero(spectrum, wide):
    spectrum = SPECTRA[spectrum]
    W = orthonormal(4)[:, :3] @ torch.diag(torch.tensor(spectrum).double()) @ orthonormal(3)
    W = W.mT.contiguous() if wide else W
    inputs = (W.requires_grad_(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True))

    def operator(W, weight):
        return prox.nuclear_norm(lambda h: h)(W, weight, 1.0)

    assert torch.autograd.gradcheck(operator, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operator, inputs)


def test_third_derivatives_of_the_nuclear_norm_are_those_through_singular_vectors():
    W, step = torch.randn(2, 4, 3, dtype=torch.float64)
    step = 0.3 * step

    def by_vectors(W, weight):
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        return (U * (s - weight).clamp(min=0)) @ Vh

    def third(operator):
        def along(t):
            return operator(W + t * step, 1.0 + 0.2 * t)

        return jacfwd(jacfwd(jacrev(along)))(torch.tensor(0.0, dtype=torch.float64))

    ours = third(lambda W, weight: prox.nuclear_norm(lambda h: h)(W, weight, 1.0))
    torch.testing.assert_close(ours, third(by_vectors), rtol=1e-8, atol=1e-8)


def test_a_weight_of_zero_is_the_identity_with_its_derivative():
    w = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for operator in (prox.l1(0.0), prox.elastic_net(0.0, 0.0), prox.group_lasso(0.0, dim=1)):
        assert torch.equal(operator(w), w)
        J = jacrev(operator)(w).reshape(4, 4)
        torch.testing.assert_close(J, torch.eye(4, dtype=w.dtype))
    J = jacrev(prox.nuclear_norm(0.0))(w).reshape(4, 4)
    torch.testing.assert_close(J, torch.eye(4, dtype=w.dtype))


def test_projections_onto_a_point():
    w = torch.randn(4)
    for operator in (prox.simplex(0.0), prox.l1_ball(0.0), prox.l2_ball(0.0), prox.box(0.0, 0.0)):
        assert not operator(w).any()


def test_trees_and_settings_by_leaf():
    params = {"b": torch.tensor(3.0), "w": torch.tensor([3.0, -4.0])}
    hparams = {"b": 0.0, "w": torch.tensor([1.0, 2.0])}
    shrunk = prox.l1(lambda h: h)(params, hparams, 0.5)
    assert torch.equal(shrunk["b"], params["b"])
    assert torch.equal(shrunk["w"], torch.tensor([2.5, -3.0]))

    by_leaf = prox.l2_ball(2.5)(params)
    torch.testing.assert_close(by_leaf, {"b": torch.tensor(2.5), "w": torch.tensor([1.5, -2.0])})
    as_one = prox.joint(prox.l2_ball(2.5))(params)
    norm = 34**0.5
    torch.testing.assert_close(as_one, {k: v * 2.5 / norm for k, v in params.items()})

    mixed = prox.blocks({"b": prox.identity(), "w": prox.non_negative()})(params)
    assert torch.equal(mixed["b"], params["b"])
    assert torch.equal(mixed["w"], torch.tensor([3.0, 0.0]))
    by_prefix = prox.blocks((prox.box(0.0, 1.0), prox.identity()))((params, params))
    assert torch.equal(by_prefix[0]["w"], torch.tensor([1.0, 0.0]))
    assert by_prefix[1]["w"] is params["w"]


def test_mixed_dtypes_are_kept():
    tree = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2)}
    for operator in (prox.l1(torch.tensor(0.1)), prox.joint(prox.simplex())):
        moved = operator(tree)
        assert (moved["a"].dtype, moved["b"].dtype) == (torch.float64, torch.float32)


def test_infinite_bounds_are_none():
    assert torch.equal(
        prox.box(-torch.inf, 0.0)(torch.tensor([-9.0, 9.0])), torch.tensor([-9.0, 0])
    )


ERRORS = {
    "negative weight": (lambda: prox.l1(-1.0), ValueError, "prox.l1: weight is -1.0; expected"),
    "text": (lambda: prox.l1("big"), TypeError, "prox.l1: weight is 'big' of type str; expected"),
    "order of bounds": (
        lambda: prox.box(1.0, 0.0),
        ValueError,
        "prox.box: got lower=1.0, upper=0.0; expected lower <= upper",
    ),
    "dim": (
        lambda: prox.simplex(dim=1.0),
        TypeError,
        "prox.simplex: dim is 1.0 of type float; expected an int",
    ),
    "no such dimension": (
        lambda: prox.l2_ball(dim=1)({"w": torch.ones(2)}),
        ValueError,
        r"prox.l2_ball: params\['w'\] has shape \(2,\) and no dimension 1. .*hf.prox.blocks",
    ),
    "no matrix": (
        lambda: prox.nuclear_norm()([torch.ones(2)]),
        ValueError,
        r"prox.nuclear_norm: params\[0\] has shape \(2,\) and no dimension -2",
    ),
    "weight within a vector": (
        lambda: prox.group_lasso(torch.ones(2), dim=1)(torch.ones(3, 2)),
        ValueError,
        r"weight has shape \(2,\) for params, of shape \(3, 2\); expected one value for each",
    ),
    "no hparams": (
        lambda: prox.l1(lambda h: h)(torch.ones(2)),
        TypeError,
        r"prox.l1: weight is a function of hparams, but hparams is None. Write prox\(params, hp",
    ),
    "columns of a matrix": (
        lambda: prox.affine_set(torch.ones(2, 3))({"w": torch.ones(4)}),
        ValueError,
        r"matrix has shape \(2, 3\) for params\['w'\], of shape \(4,\); expected \(m, 4\), for vec",
    ),
    "right-hand side": (
        lambda: prox.affine_set(torch.ones(2, 4), torch.ones(3))(torch.ones(4)),
        ValueError,
        r"vector has shape \(3,\) for params, of shape \(4,\); expected \(m,\) = \(2,\), as",
    ),
    "marginals": (
        lambda: prox.transport(torch.ones(3))(torch.ones(2, 3)),
        ValueError,
        r"prox.transport: rows has shape \(3,\) for params, .* expected \(2,\), or one number",
    ),
    "offset within a vector": (
        lambda: prox.hyperplane(1.0, torch.ones(3))(torch.ones(3)),
        ValueError,
        r"prox.hyperplane: offset has shape \(3,\) for params",
    ),
    "no projections": (prox.intersection, TypeError, "got no projections; expected one at least"),
    "lr": (
        lambda: prox.l1()(torch.ones(2), None, "fast"),
        TypeError,
        "prox.l1: lr is 'fast' of type str; expected a number or a 0-d tensor",
    ),
    "integers": (
        lambda: prox.l1()({"w": torch.ones(2, dtype=torch.int64)}),
        TypeError,
        r"params\['w'\] has dtype torch.int64; expected a floating-point tensor",
    ),
    "structure of settings": (
        lambda: prox.l1({"v": 1.0})({"w": torch.ones(2)}),
        ValueError,
        r"prox.l1: weight: no name fits the parameter 'w'; got \['v'\]",
    ),
    "structure of blocks": (
        lambda: prox.blocks({"v": prox.l1()})({"w": torch.ones(2)}),
        ValueError,
        "prox.blocks has another structure than params: got .*'v'.*, expected .*'w'",
    ),
    "no operator": (
        lambda: prox.blocks({"v": 1.0}),
        TypeError,
        r"prox.blocks: prox is 1.0 of type float; expected an operator \(params, hparams, lr\)",
    ),
    "not called": (
        lambda: hf.proximal_gradient_map(lambda w, h: w.sum(), prox.l1, 0.1),
        TypeError,
        r"proximal_gradient_map: prox is the function hf.prox.l1; .* Call it: hf.prox.l1\(...\)",
    ),
    "no loss": (
        lambda: hf.proximal_gradient_map(1.0, prox.l1(), 0.1),
        TypeError,
        r"loss is 1.0 of type float; expected a function \(params, hparams, \*args\) -> scalar",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_type(call, error, text):
    with pytest.raises(error, match=text):
        call()


def leaves(tree: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)
