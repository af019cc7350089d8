"""The derivative rules where they are used: when the mode is on, and hypergradients through it."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, jvp, vmap

import hyperfunc as hf
from hyperfunc._torch import derivative_rules
from hyperfunc._torch.derivative_rules import _mode
from tests._torch import torch_faults
from tests._torch.test_derivative_rules import CASES
from tests.cells import thinned

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

D = torch.float64
FUSED = "NativeLayerNormBackward0"


def depth() -> int:
    return int(torch._C._len_torch_function_stack())


def rule_of_layer_norm() -> Any:
    result: Any = F.layer_norm(torch.randn(2, 4, requires_grad=True), (4,))
    return result.grad_fn.name()


def in_mode(fn: Callable[..., Any]) -> Any:
    with derivative_rules.active() as record:
        result = fn()
    assert record.uses_rows
    return result


def test_the_mode_is_on_once_and_off_after_errors() -> None:
    with derivative_rules.active(), derivative_rules.active():
        assert depth() == 1
    with pytest.raises(ZeroDivisionError), derivative_rules.active():
        raise ZeroDivisionError
    assert depth() == 0


def test_other_threads_keep_the_rules_of_torch() -> None:
    names: list[str] = []
    with derivative_rules.active():
        thread = threading.Thread(target=lambda: names.append(rule_of_layer_norm()))
        thread.start()
        thread.join()
        assert rule_of_layer_norm() != FUSED
    assert names == [FUSED]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: F.layer_norm(x, (3,)),
        lambda x: F.rms_norm(x, (3,)),
        lambda x: F.group_norm(x, 3),
        lambda x: F.glu(x[:, :3]),
        lambda x: F.scaled_dot_product_attention(x[0], x, x),
    ],
)
def test_errors_are_those_of_torch(wrong: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError) as expected:
        wrong(x)
    with pytest.raises(RuntimeError) as actual, derivative_rules.active():
        wrong(x)
    assert str(actual.value) == str(expected.value)


def test_the_number_of_derivatives_decides() -> None:
    for order, is_fused in ((1, True), (2, True), (3, False), (0, False)):
        with derivative_rules.active(order=order):
            assert (rule_of_layer_norm() == FUSED) is is_fused
    with derivative_rules.active(order=1), derivative_rules.active(order=2):
        assert rule_of_layer_norm() != FUSED
    x = torch.randn(1, 2, 4, requires_grad=True)
    with derivative_rules.active(order=1):
        result: Any = vmap(lambda t: F.layer_norm(t, (4,)))(x)
    assert result.grad_fn.name() != FUSED


@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "forward", hf.CG(), "dense"])
def test_a_loss_that_takes_gradients_itself(method: Any) -> None:
    """One derivative more than hyperfunc counts: the third one of layer_norm."""
    torch.manual_seed(1)
    x, w0 = torch.randn(4, 3, dtype=D), torch.randn(3, 3, dtype=D)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        value = F.layer_norm(x @ w, (3,)).sin().sum() * h
        (slope,) = torch.autograd.grad(value, w, create_graph=True)
        return value + slope.square().sum() + 30 * (w - w0).square().sum()

    solved = method not in ("reverse_unroll", "reverse", "forward")
    steps, tolerance = (2000, {"rtol": 1e-14}) if solved else (3, {})
    sgd = hf.optim.sgd(lr=0.01)
    solver = hf.minimize(inner, sgd, steps, init=lambda h: w0, **tolerance)

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return (w * w0.sin()).sum()

    h = torch.tensor(0.3, dtype=D)
    actual = hf.hypergrad(solver, outer, method=method)(h)
    expected = (outer(solver(h + 1e-5), h) - outer(solver(h - 1e-5), h)) / 2e-5
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-8)


def test_a_watch_leaves_out_the_mode_where_nothing_needs_it() -> None:
    watch, seen = derivative_rules.Watch(), []

    def step(x: Tensor) -> Tensor:
        seen.append(depth())
        return x.tanh()

    for _ in range(3):
        watch.run(step, torch.ones(2))
    with derivative_rules.active():
        watch.run(step, torch.ones(2))
        assert depth() == 1
    assert seen == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "large",
    [
        lambda x: x[0] > 2,
        lambda x: len(x[x > 2]) > 0,
        lambda x: x.sum().item() > 4,
        lambda x: torch.equal(x > 2, torch.tensor([True, True])),
        lambda x: max(x.tolist()) > 2,
        lambda x: x.detach().numpy()[0] > 2,
    ],
)
def test_a_watch_does_not_trust_a_course_that_depends_on_values(large: Any) -> None:
    watch, x = derivative_rules.Watch(), torch.tensor([0.5, 0.5], requires_grad=True)
    names = []
    for _ in range(4):
        x = watch.run(lambda x: F.layer_norm(x, (2,)) if large(x) else x + 1, x)
        names.append(x.grad_fn.name())  # type: ignore[union-attr]
    assert FUSED not in names
    assert names[:2] == ["AddBackward0"] * 2 != names[2:]


def test_what_reads_values_is_known() -> None:
    """What torch itself tags as depending on values."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    packets = (getattr(torch.ops.aten, name, None) for name in dir(torch.ops.aten))
    names = {
        packet.__name__
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
        and any(tags & set(getattr(packet, o).tags) for o in packet.overloads())
        and (hasattr(torch, packet.__name__) or hasattr(Tensor, packet.__name__))
    }
    assert names <= _mode._VALUES


class Tokens(nn.Module):
    """From words to vectors, with attention; the last word is padding."""

    def __init__(self, train: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, F.gelu, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.train(train)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tensor([[False] * 4 + [True]] * 2)
        ids = torch.tensor([[1, 2, 1, 4, 0], [3, 3, 5, 6, 0]])
        result: Tensor = self.encoder(self.embedding(ids) * x[..., :1], src_key_padding_mask=hidden)
        return result[:, :4]


class Sequence(nn.Module):
    def __init__(self, start: bool) -> None:
        super().__init__()
        self.layer, self.start = nn.GRU(3, 2, batch_first=True), start

    def forward(self, x: Tensor) -> Tensor:
        start = x.new_zeros(1, len(x), 2) if self.start else None
        result: Tensor = self.layer(x, start)[0]
        return result


def images() -> nn.Module:
    flat = (nn.Flatten(0, 1), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Unflatten(0, (2, 5)))
    return nn.Sequential(*flat, nn.Tanh())


def norm(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh())


NETS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: norm(nn.LayerNorm(4)),
    "BatchNorm": images,
    "InstanceNorm": lambda: norm(nn.InstanceNorm1d(5, affine=True)),
    "weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh()),
    "GRU": lambda: Sequence(False),
    "GRU from a state": lambda: Sequence(True),
    "Transformer, training": lambda: Tokens(True),
    "Transformer, evaluation": lambda: Tokens(False),
}


def maml(net: nn.Module, method: Any, **keywords: Any) -> Any:
    """A hypergradient with respect to where the net starts, of a few steps for a task."""
    apply, meta = hf.functional(net.to(D))

    def inner(w: Any, h: Any, x: Tensor) -> Tensor:
        return apply(w, x).square().mean()

    def outer(w: Any, h: Any, x: Tensor) -> Tensor:
        return F.mse_loss(apply(w, x.flip(0)).cos().sum((-1, -2)), x[:, 0, 0])

    solver = hf.minimize(inner, hf.optim.sgd(lr=0.1), 2, init=lambda h, *_: h, **keywords)
    return hf.hypergrad(solver, outer, method=method), solver, outer, meta


def slope(value: Callable[[Any], Tensor], at: Any, v: Any) -> Tensor:
    ahead, back = ({k: p + s * v[k] for k, p in at.items()} for s in (1e-5, -1e-5))
    return ((value(ahead) - value(back)) / 2e-5).detach()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*nested")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["reverse_unroll", "reverse"])
def test_tasks_at_once_are_as_one_by_one(net: str, method: str) -> None:
    torch.manual_seed(0)
    fn, solver, outer, meta = maml(NETS[net](), method)
    x = torch.randn(2, 2, 5, 3, dtype=D)
    v = {k: torch.randn_like(p) for k, p in meta.items()}
    if "Transformer" in net:  # the padding row counts as a constant, and differences move it
        v["embedding.weight"][0] = 0
    one = [fn(meta, task) for task in x]
    along = sum((one[0][k] * v[k]).sum() for k in meta)
    expected = slope(lambda h: outer(solver(h, x[0]), h, x[0]), meta, v)
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-8)
    for batched in (
        vmap(fn, (None, 0))(meta, x),
        hf.task_map(fn, (None, 0), chunk_size=None)(meta, x),
    ):
        for k in meta:
            rows = torch.stack([g[k] for g in one])
            torch.testing.assert_close(batched[k], rows, rtol=1e-9, atol=1e-11)
    h = {k: p.clone().requires_grad_() for k, p in meta.items()}
    vmap(lambda task: outer(solver(h, task), h, task))(x).sum().backward()
    for k, p in h.items():
        torch.testing.assert_close(p.grad, sum(g[k] for g in one), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_compiled_steps_take_the_rules() -> None:
    torch.manual_seed(0)
    x, net = torch.randn(2, 2, 5, 3, dtype=D), NETS["LayerNorm"]()
    fn, _, _, meta = maml(net, "reverse_unroll", compile="aot_eager")
    expected, *_ = maml(net, "reverse_unroll")
    actual = vmap(fn, (None, 0))(meta, x)
    for i in range(2):
        for k, g in expected(meta, x[i]).items():
            torch.testing.assert_close(actual[k][i], g, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "method"),
    thinned([nn.LayerNorm, nn.BatchNorm1d], ["reverse_unroll", "reverse", "forward", "cg"]),
)
def test_the_derivative_of_a_hypergradient(kind: Any, method: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=D), torch.randn(6, dtype=D)
    net = nn.Sequential(nn.Linear(3, 4), kind(4), nn.Tanh(), nn.Linear(4, 1))
    apply, w0 = hf.functional(net.to(D))

    def fit(w: Any, x: Tensor) -> Tensor:
        return F.mse_loss(apply(w, x)[:, 0], y)

    def inner(w: Any, h: Tensor) -> Tensor:
        far: Any = sum((w[k] - w0[k]).square().sum() for k in w0)
        return h.exp() * fit(w, x) + 10 * far

    steps, tolerance = (300, {"rtol": 1e-14}) if method == "cg" else (3, {})
    sgd = hf.optim.sgd(lr=0.03)
    solver = hf.minimize(inner, sgd, steps, init=lambda h: w0, **tolerance)
    fn = hf.hypergrad(solver, lambda w, h: fit(w, x.flip(0)), method=method)
    h, e = torch.tensor(0.3, dtype=D), 1e-4
    expected = (fn(h + e) - fn(h - e)) / (2 * e)
    at = h.clone().requires_grad_()
    for actual in (torch.autograd.grad(fn(at), at)[0], jacrev(fn)(h), jacfwd(fn)(h)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.soft_margin_loss])
def test_forward_mode_over_a_hypergradient(loss: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 12, 3, dtype=D), torch.randn(2, 12, dtype=D).sign()

    def inner(w: Tensor, h: Tensor) -> Tensor:
        value: Tensor = loss(x[0] @ w, y[0]) + h.exp() * w.square().sum()
        return value

    sgd = hf.optim.sgd(lr=0.2)
    solver = hf.minimize(inner, sgd, 2000, init=lambda h: torch.zeros(3, dtype=D), rtol=1e-15)
    fn = hf.hypergrad(solver, lambda w, h: loss(x[1] @ w, y[1]))
    h, e = torch.tensor(-1.0, dtype=D), 1e-4
    actual = jvp(fn, (h,), (torch.ones_like(h),))[1]
    torch.testing.assert_close(actual, (fn(h + e) - fn(h - e)) / (2 * e), rtol=1e-6, atol=1e-8)


def test_forward_mode_with_a_loss_for_each_word() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 4, dtype=D), torch.randn(4, 6, dtype=D)
    y = torch.randint(0, 6, (3, 5))

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return h * F.cross_entropy((x @ w).transpose(1, 2), y)

    solver = hf.minimize(inner, hf.optim.sgd(lr=0.1), 2, init=lambda h: w)
    h = torch.tensor(1.0, dtype=D)
    forward, reverse = (
        hf.hypergrad(solver, lambda w, h: inner(w, h).sin(), method=method)(h)
        for method in ("forward", "reverse")
    )
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_a_function_that_writes_nothing(kind: Any) -> None:
    torch.manual_seed(0)
    apply, _ = hf.functional(kind(5, 3, max_norm=1.0, dtype=D))
    ids, meta = torch.tensor([[0, 1], [1, 3]]), {"weight": 3 * torch.randn(5, 3, dtype=D)}
    before, target = meta["weight"].clone(), torch.randn(3, dtype=D)
    assert (apply(meta, ids).norm(dim=-1) < 1 + 1e-6).all()

    def inner(w: Any, h: Any, i: Tensor) -> Tensor:
        return (apply(w, i) - target).square().sum()

    def outer(w: Any, h: Any, i: Tensor) -> Tensor:
        return w["weight"].sin().sum()

    solver = hf.minimize(inner, hf.optim.sgd(lr=0.1), 3, init=lambda h, i: h)
    v = {"weight": torch.randn_like(before)}
    expected = slope(lambda h: outer(solver(h, ids), h, ids), meta, v)
    for method in ("reverse_unroll", "reverse"):
        g = hf.hypergrad(solver, outer, method=method)(meta, ids)["weight"]
        torch.testing.assert_close((g * v["weight"]).sum(), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(meta["weight"], before)


def test_the_padding_row_is_a_constant_by_every_route() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 1)).to(D)
    apply, w0 = hf.functional(net)
    w0["0.weight"] = torch.randn(9, 4, dtype=D)
    ids, y = torch.tensor([[0, 1, 2, 0], [3, 0, 4, 4]]), torch.randn(2, 4, 1, dtype=D)

    def outer(w: Any, h: Tensor, i: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(apply(w, i), y)

    def inner(w: Any, h: Tensor, i: Tensor, y: Tensor) -> Tensor:
        return outer(w, h, i, y) + h * sum(p.square().sum() for p in w.values())

    solver = hf.minimize(inner, hf.optim.sgd(lr=0.3), 3, init=lambda h, *_: w0)
    h, results = torch.tensor(0.1, dtype=D), []
    for method in ("reverse_unroll", "reverse", "forward"):
        fn = hf.hypergrad(solver, outer, method=method)
        results += [torch.stack([fn(h, *row) for row in zip(ids, y, strict=True)])]
        results += [vmap(fn, (None, 0, 0))(h, ids, y)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision_is_that_of_torch(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    x, w, q = torch.randn(4, 6).to(dtype), torch.ones(6), torch.randn(1, 1, 4, 6).to(dtype)
    labels = torch.zeros(4, 1, dtype=torch.int64)
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: F.layer_norm(x, (6,), w, w),
        lambda: F.rms_norm(x, (6,)),
        lambda: F.batch_norm(x, None, None, w, w, training=True),
        lambda: F.group_norm(x, 2, w, w),
        lambda: F.mse_loss(x, x + 1),
        lambda: F.mse_loss(x, x.float() + 1),
        lambda: F.huber_loss(x, x + 1),
        lambda: F.soft_margin_loss(x, x),
        lambda: F.cross_entropy(x[..., None], labels),
        lambda: F.scaled_dot_product_attention(q, q, q),
        lambda: F.hardsigmoid(x),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for call in calls:
            torch.testing.assert_close(in_mode(call), call(), rtol=2e-2, atol=2e-2)


def test_autocast_around_normalisation_for_many_tasks() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3)
    for layer in (nn.LayerNorm(4), nn.BatchNorm1d(4)):
        apply, w0 = hf.functional(norm(layer))

        def loss(w: Any, h: Any, x: Tensor, apply: Any = apply) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                value: Tensor = apply(w, x).float().square().mean()
            return value

        solver = hf.minimize(loss, hf.optim.sgd(lr=0.05), 2, init=lambda h, x: h)
        fn = hf.hypergrad(solver, loss, method="reverse_unroll")
        batched = vmap(fn, (None, 0))(w0, x)
        for k in w0:
            rows = torch.stack([fn(w0, task)[k] for task in x])
            torch.testing.assert_close(batched[k], rows, rtol=0.1, atol=2e-2)


def test_dropout_in_attention_draws_the_numbers_of_torch() -> None:
    q = torch.randn(1, 2, 4, 3)

    def call() -> Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    torch.testing.assert_close(in_mode(call), call())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_move_as_in_torch(kind: Any) -> None:
    ours, theirs = (kind(4, affine=True, track_running_stats=True) for _ in range(2))
    for _ in range(2):
        x = torch.randn(3, 4, 5)
        torch.testing.assert_close(in_mode(lambda x=x: ours(x)), theirs(x))  # type: ignore[misc]
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name))
        assert not buffer.requires_grad


def test_what_is_checkpointed_is_computed_again_by_the_same_rules() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=D), torch.randn(5, 3, dtype=D)

    def inner(w: Any, h: Tensor) -> Tensor:
        hidden: Any = torch.utils.checkpoint.checkpoint(
            lambda w: F.scaled_dot_product_attention(x @ w, x, x @ w), w, use_reentrant=False
        )
        return F.mse_loss(hidden, y) + h.exp() * w.square().sum()

    def outer(w: Any, h: Tensor) -> Tensor:
        return (w.sin() * y[:3]).sum()

    start = torch.eye(3, dtype=D)
    solver = hf.minimize(inner, hf.optim.sgd(lr=0.1), 300, init=lambda h: start, rtol=1e-14)
    fn = hf.hypergrad(solver, outer, method="cg")
    h = torch.tensor(0.1, dtype=D)
    expected = (outer(solver(h + 1e-5), h) - outer(solver(h - 1e-5), h)) / 2e-5
    torch.testing.assert_close(fn(h), expected, rtol=1e-6, atol=1e-8)


def test_a_fixed_point_with_a_vmap_inside() -> None:
    """A vmap between two derivatives, of which torch's rule for layer_norm knows nothing."""
    torch.manual_seed(0)
    apply, meta = hf.functional(norm(nn.LayerNorm(4)).to(D))
    x = torch.randn(3, 6, 3, dtype=D)

    def inner(w: Any, h: Any, x: Tensor) -> Tensor:
        near: Any = sum((w[k] - h[k]).square().sum() for k in w)
        return apply(w, x).cos().square().mean() + 0.5 * near

    def outer(w: Any, h: Any, x: Tensor) -> Tensor:
        return vmap(apply)(w, x.flip(1)).sin().mean()

    phi = hf.gradient_descent_map(inner, lr=0.1)
    solve = hf.minimize(inner, hf.optim.sgd(lr=0.1), 2000, init=lambda h, _: h, rtol=1e-15)
    w = vmap(solve, (None, 0))(meta, x)
    fn = hf.hypergrad(
        lambda *_: w,
        outer,
        fixed_point=lambda w, h, x: vmap(phi, (0, None, 0))(w, h, x),
        method=hf.GMRES(rtol=1e-14),
    )
    v = {k: torch.randn_like(p) for k, p in meta.items()}
    expected = slope(lambda h: outer(vmap(solve, (None, 0))(h, x), h, x), meta, v)
    actual = sum((g * v[k]).sum() for k, g in fn(meta, x).items())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "cg"])
def test_sparse_gradients_become_dense(kind: Any, method: str) -> None:
    torch.manual_seed(0)
    (sparse, w0), (dense, _) = (
        hf.functional(kind(9, 4, sparse=flag, dtype=D)) for flag in (True, False)
    )
    ids, y = torch.randint(0, 9, (5, 3)), torch.randn(4, dtype=D)

    def hypergradient(apply: Any) -> Tensor:
        def inner(w: Any, h: Tensor) -> Tensor:
            return (apply(w, ids) - y).square().mean() + h.exp() * w["weight"].square().sum()

        def outer(w: Any, h: Tensor) -> Tensor:
            return apply(w, ids).cos().sum()

        steps, tolerance = (300, {"rtol": 1e-14}) if method == "cg" else (3, {})
        sgd = hf.optim.sgd(lr=0.2)
        solver = hf.minimize(inner, sgd, steps, init=lambda h: w0, **tolerance)
        return hf.hypergrad(solver, outer, method=method)(torch.tensor(0.1, dtype=D))

    torch.testing.assert_close(hypergradient(sparse), hypergradient(dense), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4), nn.GroupNorm(1, 4), nn.BatchNorm1d(4)],
    ids=lambda x: type(x).__name__,
)
def test_whole_hessians_of_normalised_nets(layer: nn.Module) -> None:
    """The products with a Hessian's columns are taken in a vmap of their own."""
    torch.manual_seed(0)
    apply, w0 = hf.functional(norm(layer).to(D))
    x, h = torch.randn(10, 3, dtype=D), torch.tensor([0.1, -0.1], dtype=D)

    def inner(w: Any, h: Tensor) -> Tensor:
        far: Any = sum((w[k] - w0[k]).square().sum() for k in w0)
        return h.exp() * (apply(w, x) - 1).square().mean() + 10 * far

    sgd = hf.optim.sgd(lr=0.02)
    solver = hf.minimize(inner, sgd, 300, init=lambda h: w0, rtol=1e-14)
    dense, cg = (
        hf.hypergrad(solver, lambda w, h: apply(w, x).cos().mean(), method=method)
        for method in ("dense", hf.CG(rtol=1e-14))
    )
    expected = torch.stack([cg(value) for value in h])
    torch.testing.assert_close(torch.stack([dense(value) for value in h]), expected)
    torch.testing.assert_close(vmap(dense)(h), expected)


def test_the_report_on_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """It tells right numbers from wrong ones and from errors; our own rules make all right."""
    [case] = [case for case in CASES if case.name == "layer_norm"]
    with derivative_rules.active():
        assert set(torch_faults.report(case)) == {torch_faults.RIGHT}
    off = torch_faults.found(lambda: [torch.ones(2)], (torch.tensor([1.0, 2.0]),))
    assert off == "WRONG by 50.0% of the largest entry"
    assert torch_faults.found(lambda: torch.ones(2) @ torch.ones(3), ()).startswith("RuntimeError")
    torch_faults.main(["--operations", "mse_loss, sum"])
    assert re.search(r"\d+ right, \d+ raised, \d+ wrong\n$", capsys.readouterr().out)
