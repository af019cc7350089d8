"""The table of derivative rules: one case an operation, every order, every nest.

A newcomer adds a row to CASES. Values are those of torch; first derivatives are checked against
torch or against differences, second and third ones, by each nest, against differences of what is
taken one task at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from hyperfunc._torch import derivative_rules
from hyperfunc._torch.derivative_rules import _mode

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

TASKS = 2
D = torch.float64
Params = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """``fn(x, *params)``, a tensor; x has the data of one task.

    ``gradient`` says what the first derivative is checked against: the values, or torch where what
    it means by a derivative is another thing. ``smooth`` if there is anything in the third one.
    """

    name: str
    fn: Callable[..., Tensor]
    x: tuple[int, ...]
    params: tuple[tuple[int, ...], ...]
    gradient: str = "differences"

    def loss(self, x: Tensor, params: Params) -> Tensor:
        return (1.3 * self.fn(x, *params)).sin().sum()

    def sample(self) -> tuple[Tensor, Params, Params, Params]:
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=g, dtype=D)  # noqa: E731
        params = tuple(draw(*shape) for shape in self.params)
        v, u = (tuple(torch.randn(p.shape, generator=g, dtype=D) for p in params) for _ in "vu")
        return draw(TASKS, *self.x), params, v, u


def linear(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def attend(*, heads: tuple[int, int] = (2, 2), **keywords: Any) -> Callable[..., Tensor]:
    def fn(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = lambda t, n: t.unflatten(-1, (n, -1)).transpose(-2, -3)  # noqa: E731
        query, key, value = split(x @ q, heads[0]), split(x @ k, heads[1]), split(x @ v, heads[1])
        return F.scaled_dot_product_attention(query, key, value, **keywords)

    return fn


def module(layer: nn.Module, *, train: bool = True, output: Any = lambda y: y) -> Any:
    layer = layer.to(D).train(train)
    names = [name for name, _ in layer.named_parameters()]

    def fn(x: Tensor, *params: Tensor) -> Tensor:
        result = output(functional_call(layer, dict(zip(names, params, strict=True)), (x,)))
        assert isinstance(result, Tensor)
        return result

    return fn, tuple(tuple(p.shape) for p in layer.parameters())


class Start(nn.Module):
    """A recurrent layer that starts from a state that is given, or none."""

    def __init__(self, layer: nn.Module, *, packed: bool = False) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = torch.tensor([2, 3])
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.layer(x)[0], padding_value=0.3)[0]
        if isinstance(self.layer, nn.RNNCellBase):
            state = self.layer(x[0])
            state = self.layer(x[1], state)
            return state if isinstance(state, Tensor) else torch.cat(state)
        y, state = self.layer(x)
        y, _ = self.layer(x, state)
        return y


def recurrent(number: int, start: Start) -> "Case":
    fn, shapes = module(start)
    return Case(f"{type(start.layer).__name__} {number}", fn, (3, 2, 2), shapes)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return y


IDS = torch.tensor([[0, 1, 2, 0], [3, 0, 4, 4]])
TRIL = torch.ones(3, 3, dtype=torch.bool).tril()
DEAD = TRIL.clone()
DEAD[1] = False
LABELS = torch.tensor([0, 2, 1, 3, 3])
MANY = torch.tensor([[1, 3, -1, 0]] * 5)
RUNNING = torch.tensor([0.5, 1.0, 1.5, 0.8], dtype=D)
QKV = ((5, 4), (5, 4), (5, 4))


def embed(**keywords: Any) -> Callable[..., Tensor]:
    return lambda x, w: F.embedding(IDS, w, **keywords) * x


def bag(**keywords: Any) -> Callable[..., Tensor]:
    return lambda x, w: F.embedding_bag(IDS, w, **keywords) * x


def loss(fn: Callable[..., Tensor], *args: Any, **keywords: Any) -> Callable[..., Tensor]:
    return lambda x, w: fn(x @ w, *args, **keywords)


def pixels(fn: Callable[..., Tensor], **keywords: Any) -> Callable[..., Tensor]:
    """A loss of scores with classes in the second dimension of three."""
    target = torch.tensor([[0, 3], [2, 1], [1, 1], [3, 0], [0, 2]])
    return lambda x, w: fn((x @ w).unflatten(1, (2, 4)).transpose(1, 2), target, **keywords)


def ctc(x: Tensor, w: Tensor) -> Tensor:
    scores = (x @ w).unflatten(1, (2, 4)).log_softmax(-1)
    targets, lengths = torch.tensor([[1, 1], [2, 0]]), torch.tensor([2, 1])
    return F.ctc_loss(scores, targets, torch.tensor([5, 4]), lengths, reduction="none")


def spread(x: Tensor, w: Tensor) -> Tensor:
    """Bags by offsets, of which one is empty."""
    weights = torch.linspace(0.5, 1.5, 8, dtype=D)
    offsets = torch.tensor([0, 3, 3])
    keywords = {"mode": "sum", "per_sample_weights": weights, "offsets": offsets}
    return F.embedding_bag(IDS.flatten(), w, **keywords) * x


CASES = [
    Case(
        "layer_norm",
        lambda x, w, a, b: F.layer_norm(x @ w, (4,), a, b),
        (3, 5),
        ((5, 4), (4,), (4,)),
    ),
    Case("layer_norm, plain", lambda x, w: torch.layer_norm(x @ w, (3, 4)), (3, 5), ((5, 4),)),
    Case("rms_norm", lambda x, w, a: F.rms_norm(x @ w, (4,), a), (3, 5), ((5, 4), (4,))),
    Case("rms_norm, plain", lambda x, w: torch.rms_norm(x @ w, (3, 4)), (3, 5), ((5, 4),)),
    Case(
        "group_norm",
        lambda x, w, a, b: F.group_norm(x @ w, 2, a, b),
        (2, 4, 3),
        ((3, 3), (4,), (4,)),
    ),
    Case(
        "batch_norm",
        lambda x, w, a, b: F.batch_norm(x @ w, None, None, a, b, training=True),
        (5, 3),
        ((3, 4), (4,), (4,)),
    ),
    Case(
        "batch_norm, images",
        lambda x, w: F.batch_norm(x @ w, None, None, training=True),
        (3, 2, 2, 2),
        ((2, 2),),
    ),
    Case(
        "batch_norm, evaluation",
        lambda x, w, a, b: F.batch_norm(x @ w, RUNNING, RUNNING, a, b),
        (3, 3),
        ((3, 4), (4,), (4,)),
    ),
    Case(
        "instance_norm",
        lambda x, w, a, b: F.instance_norm(x @ w, None, None, a, b),
        (2, 4, 3),
        ((3, 3), (4,), (4,)),
    ),
    Case(
        "instance_norm, evaluation",
        lambda x, w: F.instance_norm(x @ w, RUNNING, RUNNING, use_input_stats=False),
        (2, 4, 3),
        ((3, 3),),
    ),
    *(
        Case(
            f"weight_norm, dim {dim}",
            lambda x, v, g, d=dim: x @ torch._weight_norm(v, g, d),
            (3, 5),
            ((5, 4), shape),
        )
        for dim, shape in ((0, (5, 1)), (1, (1, 4)), (-1, (1,)))
    ),
    *(
        Case(f"attention{name}", attend(**keywords), (3, 5), QKV)
        for name, keywords in (
            ("", {}),
            (", causal", {"is_causal": True}),
            (", boolean mask", {"attn_mask": TRIL}),
            (", boolean mask of a whole row", {"attn_mask": DEAD}),
            (", mask of numbers", {"attn_mask": torch.where(DEAD, 0.3, -torch.inf).to(D)}),
            (", scale", {"scale": 0.3}),
        )
    ),
    Case(
        "attention, grouped queries",
        attend(heads=(4, 2), enable_gqa=True),
        (3, 5),
        ((5, 8), (5, 4), (5, 4)),
    ),
    *(
        Case(f"{name}, {'training' if train else 'evaluation'}", fn, (2, 3, 4), shapes)
        for train in (True, False)
        for name, (fn, shapes) in (
            ("MultiheadAttention", module(SelfAttention(), train=train)),
            (
                "TransformerEncoderLayer",
                module(
                    nn.TransformerEncoderLayer(4, 2, 4, 0.0, F.gelu, batch_first=True), train=train
                ),
            ),
        )
    ),
    Case("embedding, padding row", embed(padding_idx=0), (2, 4, 3), ((5, 3),), "torch"),
    Case(
        "embedding, low level",
        lambda x, w: torch.embedding(w, IDS, 0) * x,
        (2, 4, 3),
        ((5, 3),),
        "torch",
    ),
    Case("embedding, sparse", embed(sparse=True), (2, 4, 3), ((5, 3),)),
    Case("embedding, by frequency", embed(scale_grad_by_freq=True), (2, 4, 3), ((5, 3),), "torch"),
    Case("embedding, max_norm", embed(max_norm=1.0), (2, 4, 3), ((5, 3),)),
    *(
        Case(f"embedding_bag, {mode}", bag(mode=mode, sparse=mode != "max"), (2, 3), ((5, 3),))
        for mode in ("sum", "mean", "max")
    ),
    Case("embedding_bag, padding", bag(padding_idx=0), (2, 3), ((5, 3),)),
    Case("embedding_bag, max_norm", bag(max_norm=1.0), (2, 3), ((5, 3),)),
    Case("embedding_bag, offsets and weights", spread, (3, 3), ((5, 3),)),
    Case("hardsigmoid", lambda x, w: F.hardsigmoid(3 * x @ w), (3, 5), ((5, 4),)),
    Case(
        "hardsigmoid, in place",
        lambda x, w: F.hardsigmoid((3 * x @ w).clone(), inplace=True),
        (3, 5),
        ((5, 4),),
    ),
    Case("glu", lambda x, w: F.glu(x @ w), (3, 5), ((5, 4),)),
    Case("rrelu", lambda x, w: F.rrelu(x @ w), (3, 5), ((5, 4),)),
    *(
        Case(
            f"{fn.__name__}, {reduction}", loss(fn, target, reduction=reduction), (5, 3), ((3, 4),)
        )
        for reduction in ("mean", "sum", "none")
        for fn, target in (
            (F.mse_loss, torch.linspace(-1, 1, 20, dtype=D).reshape(5, 4)),
            (F.huber_loss, torch.linspace(-1, 1, 20, dtype=D).reshape(5, 4)),
            (F.soft_margin_loss, torch.linspace(-1, 1, 20, dtype=D).reshape(5, 4).sign()),
            (F.multi_margin_loss, LABELS),
            (F.multilabel_margin_loss, MANY),
        )
    ),
    Case(
        "huber_loss, delta",
        loss(F.huber_loss, torch.ones(5, 4, dtype=D), delta=0.3),
        (5, 3),
        ((3, 4),),
    ),
    Case(
        "multi_margin_loss, options",
        loss(F.multi_margin_loss, LABELS, p=2, margin=0.7, weight=RUNNING),
        (5, 3),
        ((3, 4),),
    ),
    *(
        Case(
            f"{fn.__name__}, {reduction}",
            pixels(fn, reduction=reduction, weight=RUNNING),
            (5, 3),
            ((3, 8),),
        )
        for reduction in ("mean", "sum", "none")
        for fn in (F.cross_entropy, F.nll_loss)
    ),
    Case(
        "cross_entropy, smoothed, one ignored",
        pixels(F.cross_entropy, label_smoothing=0.1, ignore_index=1),
        (5, 3),
        ((3, 8),),
    ),
    *(
        Case(
            f"gaussian_nll_loss, {reduction}",
            lambda x, w, v, r=reduction: F.gaussian_nll_loss(
                x @ w, x[:, :2].sin(), (x @ v).exp(), full=True, reduction=r
            ),
            (5, 3),
            ((3, 2), shape),
        )
        for reduction, shape in (("mean", (3, 2)), ("sum", (3,)), ("none", (3, 2)))
    ),
    *(
        Case(
            f"linear_cross_entropy, {'chunks' if options else 'whole'}",
            lambda x, w, b, o=options: F.linear_cross_entropy(
                x, w, LABELS, linear_bias=b, options=o
            ),
            (5, 3),
            ((4, 3), (4,)),
        )
        for options in (
            [None, nn.LinearCrossEntropyOptions(allow_retain_graph=True)]
            if hasattr(nn, "LinearCrossEntropyOptions")
            else []
        )
    ),
    Case("ctc_loss", ctc, (5, 3), ((3, 8),)),
    *(
        Case(
            f"conv_transpose{d}d, output padding",
            lambda x, w, b, d=d, padding=padding, fn=fn: fn(x, w, b, (2,) * d, padding, 1, 2),
            (1, 2, *[3] * d),
            ((2, 1, *[2] * d), (2,)),
        )
        for d, padding, fn in (
            (1, 1, F.conv_transpose1d),
            (2, 0, F.conv_transpose2d),
            (3, (0, 1, 0), F.conv_transpose3d),
        )
    ),
    Case(
        "conv_transpose1d, spread out",
        lambda x, w: F.conv_transpose1d(x, w, stride=[1], output_padding=[2], dilation=3),
        (1, 2, 3),
        ((2, 1, 2),),
    ),
    Case("cdist", lambda x, w: torch.cdist(x @ w, x), (4, 3), ((3, 3),)),
    Case("cdist, many rows", lambda x, w: torch.cdist(x @ w, x), (27, 2), ((2, 2),)),
    Case("cdist, p", lambda x, w: torch.cdist(x @ w, x, 3.0), (4, 3), ((3, 3),)),
    Case("pdist", lambda x, w: F.pdist(x @ w), (4, 3), ((3, 3),)),
    *(
        Case(
            f"native_{name}_norm",
            lambda x, w, b, norm=norm: torch.cat([t.flatten() for t in norm(x * w.sin(), w, b)]),
            (4, 2),
            ((2,), (2,)),
        )
        for name, norm in {
            "layer": lambda x, w, b: torch.native_layer_norm(x.T, (4,), w.repeat(2), None, 1e-5),
            "group": lambda x, w, b: torch.native_group_norm(x, w, b, 4, 2, 1, 1, 1e-5),
            "batch": lambda x, w, b: torch.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5),
        }.items()
    ),
    Case("select_scatter", lambda x, w: torch.select_scatter(x, w, 0, -1), (3, 2), ((2,),)),
    Case("its method", lambda x, w: w.square().select_scatter(x, -2, 1), (3,), ((3, 3),)),
    Case(
        "as_strided_scatter",
        lambda x, w: torch.as_strided_scatter(
            x.square().as_strided_scatter(w, (2, 2), (3, 1), 1), w, (2, 2), (1, 3)
        ),
        (3, 3),
        ((2, 2),),
    ),
    *map(
        recurrent,
        range(11),
        (
            Start(nn.RNN(2, 3)),
            Start(nn.RNN(2, 3, nonlinearity="relu")),
            Start(nn.GRU(2, 3, 2, bidirectional=True)),
            Start(nn.LSTM(2, 3)),
            Start(nn.LSTM(2, 3, 2, bidirectional=True, proj_size=2, bias=False)),
            Start(nn.LSTM(2, 3), packed=True),
            Start(nn.GRU(2, 2, 1, bidirectional=True), packed=True),
            Start(nn.RNNCell(2, 3)),
            Start(nn.RNNCell(2, 3, nonlinearity="relu")),
            Start(nn.GRUCell(2, 3)),
            Start(nn.LSTMCell(2, 3, bias=False)),
        ),
    ),
]

Vector = Callable[[Callable[..., Tensor], Tensor, Params, Params], Params]


def plain(fn: Callable[..., Tensor], params: Params, create_graph: bool = True) -> Params:
    grads = torch.autograd.grad(fn(params), params, create_graph=create_graph, allow_unused=True)
    return tuple(
        torch.zeros_like(p) if g is None else g.to_dense()
        for g, p in zip(grads, params, strict=True)
    )


def variables(params: Params) -> Params:
    return tuple(p.clone().requires_grad_() for p in params)


def dot(a: Any, b: Any) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=D))


def moved(params: Params, v: Params, step: float) -> Params:
    return tuple(p + step * d for p, d in zip(params, v, strict=True))


def difference(fn: Callable[[Params], Params], params: Params, v: Params, h: float) -> Params:
    plus, minus = fn(moved(params, v, h)), fn(moved(params, v, -h))
    return tuple((a - b).detach() / (2 * h) for a, b in zip(plus, minus, strict=True))


def product(case: Case, x: Tensor, params: Params, v: Params) -> Params:
    """A product with the Hessian, one task at a time, by autograd twice."""
    q = params if params[0].requires_grad else variables(params)
    grads = plain(lambda p: case.loss(x, p), q)
    return plain(lambda _: dot(grads, v), q)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def of_tasks(fn: Callable[[Tensor], Params], x: Tensor) -> Params:
    return tuple(torch.stack(parts).sum(0) for parts in zip(*map(fn, x), strict=True))


# Nests of a first derivative (of ``loss(x, params)``, for all tasks), as a sum over tasks.
FIRST: dict[str, Callable[..., Any]] = {
    "grad of vmap": lambda f, x, p: grad(lambda p: vmap(f, (0, None))(x, p).sum())(p),
    "vmap of grad": lambda f, x, p: [g.sum(0) for g in vmap(grad(f, 1), (0, None))(x, p)],
    "backward of vmap": lambda f, x, p: plain(
        lambda p: vmap(f, (0, None))(x, p).sum(), variables(p)
    ),
}


def hessian(nest: Any) -> Callable[..., Any]:
    def by_columns(f: Any, x: Tensor, p: Params, v: Params) -> list[Tensor]:
        rows = nest(lambda p: grad(lambda p: vmap(f, (0, None))(x, p).sum())(p))(p)
        return [
            sum(
                (torch.tensordot(b, d, d.ndim) for b, d in zip(row, v, strict=True)),
                torch.zeros(()),
            )
            for row in rows
        ]

    return by_columns


# ... of a product with the Hessian,
SECOND: dict[str, Callable[..., Any]] = {
    "vjp of vmap of grad": lambda f, x, p, v: vjp(lambda p: vmap(grad(f, 1), (0, None))(x, p), p)[
        1
    ](tuple(d.expand(TASKS, *d.shape) for d in v))[0],
    "backward of vmap of grad": lambda f, x, p, v: plain(
        lambda p: dot([g.sum(0) for g in vmap(grad(f, 1), (0, None))(x, p)], v), variables(p)
    ),
    "vmap of vjp of grad": lambda f, x, p, v: [
        g.sum(0) for g in vmap(lambda x: vjp(lambda p: grad(f, 1)(x, p), p)[1](v)[0])(x)
    ],
    "vmap of jvp of grad": lambda f, x, p, v: [
        g.sum(0) for g in vmap(lambda x: jvp(lambda p: grad(f, 1)(x, p), (p,), (v,))[1])(x)
    ],
    "jvp of vmap of grad": lambda f, x, p, v: [
        g.sum(0) for g in jvp(lambda p: vmap(grad(f, 1), (0, None))(x, p), (p,), (v,))[1]
    ],
    "grad of jvp": lambda f, x, p, v: grad(
        lambda p: jvp(lambda p: vmap(f, (0, None))(x, p).sum(), (p,), (v,))[1]
    )(p),
    "jacrev of grad": hessian(jacrev),
    "jacfwd of grad": hessian(jacfwd),
}


def bend(f: Any, x: Tensor, p: Params, v: Params) -> Params:
    return vjp(lambda p: grad(f, 1)(x, p), p)[1](v)[0]


# ... and of the derivative of that.
THIRD: dict[str, Callable[..., Any]] = {
    "vjp of vmap of vjp of grad": lambda f, x, p, v, u: vjp(
        lambda p: vmap(lambda x: bend(f, x, p, v))(x), p
    )[1](tuple(d.expand(TASKS, *d.shape) for d in u))[0],
    "vmap of vjp of vjp of grad": lambda f, x, p, v, u: [
        g.sum(0) for g in vmap(lambda x: vjp(lambda p: bend(f, x, p, v), p)[1](u)[0])(x)
    ],
    "jvp of vjp of grad": lambda f, x, p, v, u: of_tasks(
        lambda x: jvp(lambda p: bend(f, x, p, v), (p,), (u,))[1], x
    ),
}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


def test_value_and_gradient_are_those_of_torch(case: Case) -> None:
    x, params, _, _ = case.sample()
    expected = case.fn(x[0], *(p.clone() for p in params))
    with derivative_rules.active() as record:
        actual = case.fn(x[0], *params)
    assert record.uses_rows
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    with derivative_rules.active():
        gradient = plain(lambda p: case.loss(x[0], p), variables(params))
    if case.gradient == "torch":
        expected_gradient = plain(lambda p: case.loss(x[0], p), variables(params), False)
        close(gradient, expected_gradient, 1e-12)
        return
    for i in range(len(params)):
        v = tuple(
            torch.ones_like(q) if i == j else torch.zeros_like(q) for j, q in enumerate(params)
        )
        with derivative_rules.active():
            (slope,) = difference(lambda q: (case.loss(x[0], q),), params, v, 1e-6)
        torch.testing.assert_close(gradient[i].sum(), slope, rtol=1e-6, atol=1e-7)


def test_every_nest_is_right(case: Case) -> None:
    x, params, v, u = case.sample()
    with derivative_rules.active():
        first = of_tasks(lambda x: plain(lambda p: case.loss(x, p), variables(params)), x)
        second = of_tasks(lambda x: product(case, x, params, v), x)
        third = of_tasks(
            lambda x: plain(lambda p: dot(product(case, x, p, v), u), variables(params)), x
        )
        if case.gradient == "differences":
            one = lambda q, x: plain(lambda p: case.loss(x, p), variables(q))  # noqa: E731
            close(
                second,
                of_tasks(lambda x: difference(lambda q: one(q, x), params, v, 1e-6), x),
                1e-5,
            )
            close(
                third,
                of_tasks(
                    lambda x: difference(lambda q: product(case, x, q, v), params, u, 1e-6), x
                ),
                1e-4,
            )
        for name, nest in FIRST.items():
            close_named(name, nest(case.loss, x, params), first)
        for name, nest in SECOND.items():
            close_named(name, nest(case.loss, x, params, v), second)
        for name, nest in THIRD.items():
            close_named(name, nest(case.loss, x, params, v, u), third)


def close_named(name: str, actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


def test_every_row_has_a_case() -> None:
    used = set()

    class Using(_mode._Rules):
        def __torch_function__(self, func: Any, *args: Any) -> Any:
            used.add(func)
            return super().__torch_function__(func, *args)

    for case in CASES:
        x, params, _, _ = case.sample()
        with Using():
            case.fn(x[0], *params)
    rare = {
        torch._nested_tensor_from_mask_left_aligned,  # asked by TransformerEncoder alone
        *(Tensor.requires_grad_, Tensor.requires_grad.__set__),  # type: ignore[attr-defined]
    }
    assert derivative_rules.rules().keys() - used <= rare
