"""Modules as pure functions: values, derivatives, buffers, purity, and the texts of errors."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import hyperfunc as hf
from hyperfunc import implicit_diff
from hyperfunc.modules import FunctionalModule, assign_grads, functional, module_map

TASKS, BATCH = 3, 4

pytestmark = [
    # torch's forward mode compiles its rules by a deprecated function when first used.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # vmap of weight_norm, GRUCell, ... runs task by task, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


# Modules ------------------------------------------------------------------------------------------


class TiedEmbedding(nn.Module):
    """The output layer is the embedding, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(tokens))))


class Table(nn.Module):
    """A table of positions and a mask of another dtype, as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("positions", torch.arange(3.0).sin())
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.linear(x + self.positions), x)


class Ema(nn.Module):
    """An exponential average of its inputs, written in place or by assignment."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        new = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if not self.in_place:
            self.mean = new
        else:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return torch.tanh(x * self.weight) - self.mean


class Residual(nn.Module):
    """A cell z, x -> z, a contraction."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = norm or nn.Identity()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(0.3 * self.linear(z) + x))


class Gru(nn.Module):
    """The GRU cell, with the state first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.cell(x, z)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mT


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def frozen_first() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


def parametrized() -> nn.Module:
    net = nn.Linear(3, 3)
    parametrize.register_parametrization(net, "weight", Symmetric())
    return net


def pruned() -> nn.Module:
    net = mlp()
    prune.random_unstructured(net[0], "weight", amount=0.5)
    return net


def old_weight_norm() -> nn.Module:
    # The hook leaves a computed tensor on the module, as any use of weight_norm before 2.0 did.
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(3, 2))


def warmed(net: nn.Module, *shape: int) -> nn.Module:
    """With buffers that are not the initial ones."""
    for _ in range(3):
        net(torch.randn(*shape) + 0.5)
    return net


def conv2d(norm: nn.Module) -> nn.Module:
    return warmed(nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Tanh(), nn.Flatten()), 4, 2, 3, 3)


def conv1d(norm: nn.Module) -> nn.Module:
    return warmed(nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Tanh(), nn.Flatten()), 4, 2, 3)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3,)
    tokens: bool = False


IMAGE, SERIES = (2, 3, 3), (2, 3)
CASES = {
    "linear": Case(lambda: nn.Linear(3, 2)),
    "mlp": Case(mlp),
    "no_parameters": Case(nn.Tanh),
    "batch_norm_2d": Case(lambda: conv2d(nn.BatchNorm2d(4)), IMAGE),
    "batch_norm_2d_eval": Case(lambda: conv2d(nn.BatchNorm2d(4)).eval(), IMAGE),
    "batch_norm_1d": Case(lambda: conv1d(nn.BatchNorm1d(4)), SERIES),
    "batch_norm_1d_eval": Case(lambda: conv1d(nn.BatchNorm1d(4)).eval(), SERIES),
    "batch_norm_cumulative": Case(lambda: conv2d(nn.BatchNorm2d(4, momentum=None)), IMAGE),
    "batch_norm_no_affine": Case(lambda: conv2d(nn.BatchNorm2d(4, affine=False)), IMAGE),
    "batch_norm_no_statistics": Case(
        lambda: conv2d(nn.BatchNorm2d(4, track_running_stats=False)), IMAGE
    ),
    "instance_norm": Case(
        lambda: conv2d(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGE
    ),
    "instance_norm_eval": Case(
        lambda: conv2d(nn.InstanceNorm2d(4, track_running_stats=True)).eval(), IMAGE
    ),
    "group_norm": Case(lambda: conv2d(nn.GroupNorm(2, 4)), IMAGE),
    "layer_norm": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))),
    "dropout_eval": Case(lambda: nn.Sequential(mlp(), nn.Dropout()).eval()),
    "tied_embedding": Case(TiedEmbedding, (2,), tokens=True),
    "weight_norm": Case(lambda: parametrizations.weight_norm(nn.Linear(3, 2))),
    "weight_norm_whole": Case(
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 2, 2), dim=None), IMAGE
    ),
    "weight_norm_bias": Case(lambda: parametrizations.weight_norm(nn.Linear(3, 2), "bias")),
    "weight_norm_hook": Case(old_weight_norm),
    "spectral_norm": Case(lambda: warmed(parametrizations.spectral_norm(nn.Linear(3, 2)), 4, 3)),
    "spectral_norm_conv": Case(
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 2), n_power_iterations=2), IMAGE
    ),
    "spectral_norm_eval": Case(lambda: parametrizations.spectral_norm(nn.Linear(3, 2)).eval()),
    "orthogonal": Case(lambda: parametrizations.orthogonal(nn.Linear(3, 2))),
    "parametrized": Case(parametrized),
    "pruned": Case(pruned),
    "table": Case(Table),
    "ema": Case(lambda: Ema(in_place=False)),
    "frozen_first": Case(frozen_first),
    "shared_layer": Case(lambda: (lambda a: nn.Sequential(a, nn.Tanh(), a))(nn.Linear(3, 3))),
}
STATEFUL = [
    "batch_norm_2d",
    "batch_norm_2d_eval",
    "batch_norm_1d",
    "batch_norm_cumulative",
    "batch_norm_no_affine",
    "instance_norm",
    "spectral_norm",
    "spectral_norm_conv",
    "ema",
    "table",
]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def inputs(case: Case, *batch: int) -> Tensor:
    shape = (*batch, BATCH, *case.shape)
    return torch.randint(5, shape) if case.tokens else torch.randn(shape)


def stacked(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p + 0.2 * torch.randn(TASKS, *p.shape) for name, p in params.items()}


def nth(tree: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: t[i] for name, t in tree.items()}


def reference(
    module: nn.Module, params: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradient of its weighted sum, and buffers after, by torch.nn and autograd alone."""
    net = fresh(module)
    named = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in params.items():
            named[name].copy_(value)
    output = net(x)
    leaves = [named[name] for name in params]
    grads = torch.autograd.grad(weighted(output), leaves, allow_unused=True) if leaves else ()
    return output.detach(), dict(zip(params, grads, strict=True)), dict(net.named_buffers())


def fresh(module: nn.Module) -> nn.Module:
    """A copy, also of modules on which a hook left a computed tensor."""
    tensors = [t for layer in module.modules() for t in vars(layer).values()]
    memo = {id(t): t.detach() for t in tensors if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(module, memo)


def weighted(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1.0, 2.0, output.numel()).view_as(output)).sum()


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that a call could change."""
    found: dict[str, Any] = {}
    for prefix, layer in module.named_modules():
        found[f"{prefix}:training"] = layer.training
        found[f"{prefix}:attributes"] = list(vars(layer))
        for kind in ("_parameters", "_buffers"):
            for name, tensor in vars(layer)[kind].items():
                if tensor is not None:
                    where = f"{prefix}.{name}"
                    found[where] = (id(tensor), tensor._version, tensor.tolist())
                    found[f"{where}:grad"] = (tensor.requires_grad, tensor.grad, tensor.grad_fn)
    return found


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# functional: values and derivatives ---------------------------------------------------------------


def test_call_is_the_modules_call(case: Case) -> None:
    module, x = case.make(), inputs(case)
    apply, params = functional(module)
    other = nth(stacked(params), 0)
    for values in (params, other):
        close(apply(values, x), reference(module, values, x)[0])
        close(apply(values, x), reference(module, values, x)[0])  # nothing was kept


def test_gradient_is_autograds(case: Case) -> None:
    module, x = case.make(), inputs(case)
    apply, params = functional(module)
    expected = reference(module, params, x)[1]
    close(grad(lambda p: weighted(apply(p, x)))(params), expected)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    if leaves:
        weighted(apply(leaves, x)).backward()
    close({name: p.grad for name, p in leaves.items()}, expected)


def test_vmap_over_inputs(case: Case) -> None:
    module, x = case.make(), inputs(case, TASKS)
    apply, params = functional(module)
    out = vmap(apply, in_dims=(None, 0))(params, x)
    close(out, torch.stack([reference(module, params, x[i])[0] for i in range(TASKS)]))


def test_vmap_over_stacked_params(case: Case) -> None:
    module, x = case.make(), inputs(case)
    apply, params = functional(module)
    if params:
        many = stacked(params)
        out = vmap(apply, in_dims=(0, None))(many, x)
        close(out, torch.stack([reference(module, nth(many, i), x)[0] for i in range(TASKS)]))


def test_vmap_of_grad(case: Case) -> None:
    module, x = case.make(), inputs(case, TASKS)
    apply, params = functional(module)
    many = stacked(params)
    grads = vmap(grad(lambda p, x: weighted(apply(p, x))), in_dims=(0 if params else None, 0))(
        many, x
    )
    for i in range(TASKS):
        close(nth(grads, i), reference(module, nth(many, i), x[i])[1])


def test_jacobians(case: Case) -> None:
    module, x = case.make(), inputs(case)
    apply, params = functional(module)
    if not params:
        return
    rows = jacrev(apply)(params, x)
    expected = reference(module, params, x)[1]
    output = apply(params, x)
    weights = torch.linspace(-1.0, 2.0, output.numel()).view_as(output)
    close({n: torch.tensordot(weights, j, weights.ndim) for n, j in rows.items()}, expected)
    tangents = {n: torch.randn_like(p) for n, p in params.items()}
    slope = jvp(lambda p: weighted(apply(p, x)), (params,), (tangents,))[1]
    close(slope, sum((tangents[n] * g).sum() for n, g in expected.items()))


@pytest.mark.parametrize("mode", ["batch", "frozen", "update"])
def test_nothing_changes_the_module(case: Case, mode: Any) -> None:
    module, x = case.make(), inputs(case, TASKS)
    before = fingerprint(module)
    apply, params = functional(module, buffers=mode)
    copies = {name: p.clone() for name, p in params.items()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out = apply(p, x)
        return weighted(out[0] if mode == "update" else out)

    first = vmap(grad(loss), in_dims=(None, 0))(params, x)
    second = vmap(grad(loss), in_dims=(None, 0))(params, x)
    assert fingerprint(module) == before
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(params, copies, rtol=0, atol=0)
    assert not any(p.requires_grad for p in params.values())


def test_training_the_module_later_changes_nothing() -> None:
    module = nn.Sequential(frozen_first(), nn.BatchNorm1d(2))
    module.register_buffer("unused", torch.zeros(1))
    module[1].eval()
    x = torch.randn(BATCH, 3)
    apply, params = functional(module)
    before, kept = apply(params, x), {n: p.clone() for n, p in params.items()}
    module.train()
    module(x)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    torch.testing.assert_close(apply(params, x), before, rtol=0, atol=0)
    torch.testing.assert_close(params, kept, rtol=0, atol=0)
    for p in params.values():
        p.zero_()
    assert all(p.any() for p in module.parameters())


def test_a_frozen_base_is_not_copied_until_it_is_written_to() -> None:
    """By hf.functional, by calls and derivatives of it, and by what is done with the module."""
    is_shared = torch._C._is_cow_tensor
    module, x = frozen_first(), torch.randn(BATCH, 3)
    # memory that is not torch's own is copied at once
    module[0].bias = nn.Parameter(torch.from_numpy(module[0].bias.numpy(force=True)), False)
    weight, bias = module[0].weight, module[0].bias
    kept = weight.clone(), bias.clone()
    apply, params = functional(module)

    def loss(w: Any, h: Tensor) -> Tensor:
        return (apply(w, x) ** 2).mean() * h.exp()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), 3, init=lambda h: params)
    for method in ("reverse", "reverse_unroll", "forward", "cg"):
        vmap(hf.hypergrad(solver, loss, method=method))(torch.zeros(2))
    base = dict(apply._module.named_parameters())
    assert is_shared(weight)
    assert is_shared(base["0.weight"])
    before = apply(params, x)
    weight.data.mul_(2)  # which torch does not count as a change
    bias.data.mul_(2)
    close(apply(params, x), before)
    with torch.no_grad():
        base["0.weight"].zero_()
    close(weight, 2 * kept[0])
    close(bias, 2 * kept[1])
    close(copy.deepcopy(apply)(params, x), apply(params, x))


# functional: buffers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATEFUL)
def test_updated_buffers_are_those_of_training(name: str) -> None:
    module, x = CASES[name].make(), inputs(CASES[name])
    apply, params = functional(module, buffers="update")
    output, buffers = apply(params, x)
    expected = reference(module, params, x)
    close(output, expected[0])
    close(buffers, expected[2])


@pytest.mark.parametrize("name", [*STATEFUL, "ema_in_place"])
@pytest.mark.parametrize("over", ["inputs", "params", "both", "nested"])
def test_updated_buffers_per_task(name: str, over: str) -> None:
    case = CASES.get(name, Case(lambda: Ema(in_place=True)))
    module = case.make()
    apply, params = functional(module, buffers="update")
    many, x = stacked(params), inputs(case, TASKS)
    if over == "inputs":
        buffers = vmap(apply, in_dims=(None, 0))(params, x)[1]
        pairs = [(params, x[i]) for i in range(TASKS)]
    elif over == "params":
        buffers = vmap(apply, in_dims=(0, None))(many, x[0])[1]
        pairs = [(nth(many, i), x[0]) for i in range(TASKS)]
    elif over == "both":
        buffers = vmap(apply)(many, x)[1]
        pairs = [(nth(many, i), x[i]) for i in range(TASKS)]
    else:
        nested = vmap(vmap(apply, in_dims=(None, 0)), in_dims=(0, None))(many, x)[1]
        buffers = {n: b.flatten(0, 1) for n, b in nested.items()}
        pairs = [(nth(many, i), x[j]) for i in range(TASKS) for j in range(TASKS)]
    for i, (p, task) in enumerate(pairs):
        close(nth(buffers, i), reference(module, p, task)[2])


@pytest.mark.parametrize("name", [*STATEFUL, "ema_in_place"])
def test_buffers_are_carried_from_step_to_step(name: str) -> None:
    case = CASES.get(name, Case(lambda: Ema(in_place=True)))
    module = case.make()
    apply, params = functional(module, buffers="update")
    steps = [inputs(case, TASKS) for _ in range(3)]
    buffers = {n: b.expand(TASKS, *b.shape) for n, b in apply.buffers.items()}
    step = vmap(lambda x, b: apply(params, x, buffers=b))
    for x in steps:
        output, buffers = step(x, buffers)
    for i in range(TASKS):
        net = fresh(module)
        for x in steps:
            expected = net(x[i])
        close(output[i], expected.detach())
        close(nth(buffers, i), dict(net.named_buffers()))


@pytest.mark.parametrize("name", STATEFUL)
def test_updated_buffers_as_aux_of_a_gradient(name: str) -> None:
    module, x = CASES[name].make(), inputs(CASES[name], TASKS)
    apply, params = functional(module, buffers="update")

    def loss(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output, buffers = apply(p, x)
        return weighted(output), buffers

    grads, buffers = vmap(grad(loss, has_aux=True), in_dims=(None, 0))(params, x)
    for i in range(TASKS):
        _, expected, after = reference(module, params, x[i])
        close(nth(grads, i), expected)
        close(nth(buffers, i), after)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_frozen_statistics_are_those_of_evaluation(norm: Any) -> None:
    module = conv2d(nn.Sequential(norm(4, track_running_stats=True), nn.Dropout(0.5)))
    x = torch.randn(BATCH, *IMAGE)
    apply, params = functional(module, buffers="frozen")
    net = copy.deepcopy(module)
    net[1][0].eval()  # and only the norm: Dropout stays on
    torch.manual_seed(3)
    expected = net(x).detach()
    torch.manual_seed(3)
    close(apply(params, x), expected)
    assert (expected == 0).any()
    batch = functional(module)[0](params, x)
    assert not torch.allclose(batch[batch != 0].mean(), expected[expected != 0].mean())


@pytest.mark.parametrize("mode", ["batch", "frozen", "update"])
def test_writing_in_place_to_a_buffer_is_not_remembered(mode: Any) -> None:
    module, x = Ema(in_place=True), torch.randn(BATCH, 3)
    apply, params = functional(module, buffers=mode)
    for _ in range(2):
        result = apply(params, x)
        close(result[0] if mode == "update" else result, reference(module, params, x)[0])
    given = apply.buffers
    apply(params, x, buffers=given)
    close(given, dict(module.named_buffers()))


def test_frozen_spectral_norm_takes_no_step() -> None:
    module = parametrizations.spectral_norm(nn.Linear(3, 2))
    x = torch.randn(BATCH, 3)
    apply, params = functional(module, buffers="frozen")
    params = nth(stacked(params), 0)
    net = copy.deepcopy(module).eval()
    close(apply(params, x), reference(net, params, x)[0])


def test_statistics_go_from_adaptation_to_evaluation() -> None:
    module, x = conv2d(nn.BatchNorm2d(4)), torch.randn(TASKS, BATCH, *IMAGE)
    adapt, params = functional(module, buffers="update")
    evaluate, _ = functional(module, buffers="frozen")
    buffers = vmap(adapt, in_dims=(None, 0))(params, x)[1]
    out = vmap(lambda x, b: evaluate(params, x, buffers=b))(x, buffers)
    for i in range(TASKS):
        net = copy.deepcopy(module)
        net(x[i])
        close(out[i], net.eval()(x[i]).detach())
    net.load_state_dict({**params, **nth(buffers, 0)})  # the names are those of state_dict


def test_state_is_on_the_modules_device(device: torch.device) -> None:
    module = conv2d(nn.BatchNorm2d(4, momentum=None)).to(device)
    apply, params = functional(module, buffers="update")
    x = torch.randn(TASKS, BATCH, *IMAGE, device=device)
    _, buffers = vmap(apply, in_dims=(None, 0))(params, x)
    module(x[0])
    torch.testing.assert_close(nth(buffers, 0), dict(module.named_buffers()))


def test_buffers_handed_out_are_copies() -> None:
    module = conv2d(nn.BatchNorm2d(4)).eval()
    apply, params = functional(module, buffers="update")
    x = torch.randn(BATCH, *IMAGE)
    output, buffers = apply(params, x)
    for tensor in (*buffers.values(), *apply.buffers.values()):
        tensor.add_(5)
    torch.testing.assert_close(apply(params, x)[0], output, rtol=0, atol=0)


def test_float16_inputs_update_float32_statistics() -> None:
    module = nn.BatchNorm1d(3, momentum=None, dtype=torch.float32)
    x = torch.randn(BATCH, 3).half()
    apply, params = functional(module, buffers="update")
    _, buffers = apply(params, x)
    module(x)
    torch.testing.assert_close(buffers, dict(module.named_buffers()))


# functional: parameters ---------------------------------------------------------------------------


def test_a_module_without_trainable_parameters_is_named() -> None:
    apply, params = functional(nn.Linear(4, 6).requires_grad_(False))
    solver = hf.minimize(
        lambda p, h: apply(p, torch.ones(4)).sum() * h, hf.optim.sgd(0.1), 2, init=lambda h: params
    )
    with pytest.raises(ValueError, match=r"requires_grad_\(\) first, or write include_frozen=True"):
        solver(torch.tensor(1.0))


def test_float16_names_eps() -> None:
    def loss(w: Tensor, h: Tensor) -> Tensor:
        return (w[0] + w[1] * torch.relu(w[2] - 9) - 2) ** 2  # two gradients are zero

    h = torch.tensor(0.1, dtype=torch.float16)
    start = torch.full((3,), 0.5, dtype=torch.float16)
    for eps, fails in ((1e-8, True), (1e-3, False)):
        optimizer = hf.optim.adam(lr=lambda h: h, eps=eps)
        solver = hf.minimize(loss, optimizer, 3, init=lambda h: start)
        fn = hf.hypergrad(solver, lambda w, h: (w**2).sum(), method="reverse")
        if fails:
            with pytest.raises(hf.HypergradError, match=r"float16 .* take eps=1e-3 or more"):
                fn(h)
        else:
            assert float(fn(h)) == pytest.approx(4.76, rel=1e-2)


def test_frozen_parameters_are_constants_or_params() -> None:
    module = frozen_first()
    assert list(functional(module)[1]) == ["2.weight", "2.bias"]
    apply, params = functional(module, include_frozen=True)
    assert list(params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(BATCH, 3)
    close(apply(params, x), module(x).detach())
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    assert not apply(zero, x).any()


def test_tied_weights_stay_tied() -> None:
    module = TiedEmbedding()
    apply, params = functional(module)
    assert sorted(params) == ["embed.weight", "hidden.bias", "hidden.weight"]
    zero = {**params, "embed.weight": torch.zeros_like(params["embed.weight"])}
    assert not apply(zero, torch.arange(5)).any()


def test_memory_format_and_dtype_are_kept() -> None:
    module = nn.Conv2d(2, 4, 3, dtype=torch.float32).to(memory_format=torch.channels_last)
    _, params = functional(module)
    assert params["weight"].dtype == torch.float32
    assert params["weight"].is_contiguous(memory_format=torch.channels_last)


def test_keyword_inputs_go_to_the_module() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    module, x = Scaled(3, 2), torch.randn(BATCH, 3)
    apply, params = functional(module)
    close(apply(params, x, scale=2.0), 2 * module(x).detach())


def test_outputs_may_be_trees() -> None:
    module, x = nn.LSTM(3, 2), torch.randn(5, BATCH, 3)
    apply, params = functional(module)
    for _ in range(2):
        close(apply(params, x), tuple(map(detached, module(x))))
    grads = grad(lambda p: weighted(apply(p, x)[0]))(params)
    expected = torch.autograd.grad(weighted(module(x)[0]), list(module.parameters()))
    close(list(grads.values()), list(expected))


def detached(tree: Any) -> Any:
    return tree.detach() if isinstance(tree, Tensor) else tuple(map(detached, tree))


def test_what_forward_keeps_on_a_layer_is_forgotten() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = self.weight.exp()
            return x * self.cache

    module = Cached()
    apply, params = functional(module)
    x, twice = torch.randn(3), {"weight": 2 * params["weight"]}
    grad(lambda p: apply(p, x).sum())(params)
    close(apply(twice, x), x * twice["weight"].exp())
    assert module.cache is None


def test_functional_inside_a_transform() -> None:
    module, x = conv2d(nn.BatchNorm2d(4)), torch.randn(TASKS, BATCH, *IMAGE)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return weighted(functional(module, buffers="update")[0](p, x)[0])

    params = functional(module)[1]
    grads = vmap(grad(loss), in_dims=(None, 0))(params, x)
    close(nth(grads, 1), reference(module, params, x[1])[1])


def test_sparse_inputs_with_updated_buffers() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return self.norm(adjacency @ x)

    adjacency, x = torch.eye(BATCH).to_sparse(), torch.randn(TASKS, BATCH, 3)
    apply, params = functional(Graph(), buffers="update")
    _, buffers = vmap(lambda x: apply(params, adjacency.to_dense(), x))(x)
    _, once = apply(params, adjacency, x[0])
    close(nth(buffers, 0), once)


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch.compile of 2.4 cannot trace vars()")
@pytest.mark.parametrize("mode", ["batch", "frozen", "update"])
def test_apply_compiles_without_graph_breaks(mode: Any) -> None:
    module, x = conv2d(nn.BatchNorm2d(4)), torch.randn(BATCH, *IMAGE)
    apply, params = functional(module, buffers=mode)
    compiled = torch.compile(apply, fullgraph=True, backend="eager")
    for values in (params, nth(stacked(params), 0)):
        close(compiled(values, x), apply(values, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by dynamo
@pytest.mark.parametrize("method", ["reverse_unroll", "forward", "cg"])
def test_code_of_torch_compile_that_lacks_a_derivative_is_named(method: str) -> None:
    plain, params = functional(nn.Linear(2, 2))
    apply = torch.compile(plain, backend="aot_eager")

    def loss(w: Any, h: Tensor) -> Tensor:
        return (torch.tanh(apply(w, torch.ones(2))) ** 2).sum() * h.exp()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), 2, init=lambda h: params)
    with pytest.raises(RuntimeError, match=r"torch\.compile made, .*minimize\(\.\.\., compile=T"):
        hf.hypergrad(solver, loss, method=method)(torch.tensor(0.0))


def test_apply_is_copied_and_pickled() -> None:
    for name in ("batch_norm_cumulative", "mlp"):
        module, x = CASES[name].make(), inputs(CASES[name])
        apply, params = functional(module, buffers="update")
        expected = apply(params, x)
        close(copy.deepcopy(apply)(params, x), expected)
        close(pickle.loads(pickle.dumps(apply))(params, x), expected)
    assert repr(apply) == "<functional(Sequential, buffers='update'), 4 parameters>"
    assert isinstance(apply, FunctionalModule)


def test_module_compiled_in_place_is_copied_uncompiled() -> None:
    module, x = mlp(), torch.randn(BATCH, 3)
    expected = module(x).detach()
    module.compile(backend="eager")
    apply, params = functional(module)
    close(apply(params, x), expected)


# functional: random numbers -----------------------------------------------------------------------


def test_dropout_under_vmap() -> None:
    apply, params = functional(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)))
    x = torch.randn(1, BATCH, 3).expand(TASKS, BATCH, 3)
    with pytest.raises(RuntimeError, match=r'torch\.func\.vmap\(\.\.\., randomness="different"\)'):
        vmap(apply, in_dims=(None, 0))(params, x)
    with pytest.raises(RuntimeError, match=r'randomness="same"'):
        vmap(grad(lambda p, x: apply(p, x).sum()), in_dims=(None, 0))(params, x)
    same = vmap(apply, in_dims=(None, 0), randomness="same")(params, x)
    assert torch.equal(same[0], same[1])
    other = vmap(apply, in_dims=(None, 0), randomness="different")(params, x)
    assert not torch.equal(other[0] == 0, other[1] == 0)


# functional: errors -------------------------------------------------------------------------------


class Leaky(nn.Module):
    """Reaches its parameter by a list, past the name it is registered by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.weights = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0]


class Scratch(nn.Module):
    """Writes in place to a tensor that is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.scratch = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.scratch.add_(1)


class Locked(nn.Linear):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.lock = threading.Lock()


def closed_over() -> nn.Module:
    net, other = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    net.register_forward_hook(lambda module, args, out: out * other)
    return net


def half_lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of torch call lazy modules new
        return nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(2))


X = torch.ones(2, 3, dtype=torch.float64)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not a module": (
        lambda: functional(torch.sin),  # type: ignore[arg-type]
        TypeError,
        r"of type builtin_function_or_method; expected a torch\.nn\.Module",
    ),
    "buffers": (
        lambda: functional(mlp(), buffers="train"),  # type: ignore[arg-type]
        ValueError,
        r"buffers='train'\): expected one of 'batch', 'frozen', 'update'",
    ),
    "lazy": (
        lambda: functional(half_lazy()),
        ValueError,
        r"parameter '1\.weight' has no shape yet.* module\(\*inputs\)",
    ),
    "DataParallel": (
        lambda: functional(nn.Sequential(nn.DataParallel(mlp()))),
        TypeError,
        r"0 is a DataParallel; pass the module inside it \(its \.module\)",
    ),
    "compiled": (
        lambda: functional(torch.compile(mlp(), backend="eager")),
        TypeError,
        r"module is a OptimizedModule, made by torch\.compile.* torch\.compile\(apply\)",
    ),
    "uncopyable": (
        lambda: functional(Locked()),
        TypeError,
        r"Locked could not be copied \(cannot pickle '_thread.lock' object\).*keep locks",
    ),
    "params is no dict": (
        lambda: functional(mlp())[0](X),  # type: ignore[arg-type]
        TypeError,
        r"params is of type Tensor; expected a dictionary.*apply\(params, \*inputs\)",
    ),
    "params has other names": (
        lambda: functional(nn.Linear(3, 2))[0]({"weight": X, "wieght": X}, X),
        ValueError,
        r"params has other names than Linear: missing 'bias'; not known 'wieght' "
        r"\(expected 'bias', 'weight'\)",
    ),
    "params holds no tensor": (
        lambda: functional(nn.Linear(3, 2, bias=False))[0]({"weight": 1.0}, X),  # type: ignore
        TypeError,
        r"params\['weight'\] is of type float; expected a tensor",
    ),
    "params is stacked": (
        lambda: functional(nn.Linear(3, 2, bias=False))[0]({"weight": torch.ones(5, 2, 3)}, X),
        ValueError,
        r"params\['weight'\] has shape \(5, 2, 3\), expected \(2, 3\).*torch\.func\.vmap\(apply\)",
    ),
    "buffers has other names": (
        lambda: functional(nn.BatchNorm1d(3, affine=False))[0]({}, X, buffers={}),
        ValueError,
        r"buffers has other names than BatchNorm1d: missing 'num_batches_tracked', 'running_mean'",
    ),
    "buffers is stacked": (
        lambda: (
            lambda apply: apply({}, X, buffers={n: b[None] for n, b in apply.buffers.items()})
        )(functional(nn.BatchNorm1d(3, affine=False))[0]),
        ValueError,
        r"buffers\['running_mean'\] has shape \(1, 3\), expected \(3,\)",
    ),
    "buffer written in place under vmap": (
        lambda: vmap(functional(Ema(in_place=True))[0], in_dims=(None, 0))(
            {"weight": torch.ones(3)}, torch.ones(2, 4, 3)
        ),
        RuntimeError,
        r"Ema: its forward writes in place, under vmap, to a tensor that all tasks share\. If that "
        r'is a buffer, use functional\(module, buffers="update"\).*`self\.buffer = new_value`',
    ),
    "hook spectral_norm under vmap": (
        lambda: (lambda pair: vmap(pair[0])(stacked(pair[1]), torch.ones(TASKS, 4, 3)))(
            functional(nn.utils.spectral_norm(nn.Linear(3, 2)))
        ),
        RuntimeError,
        r"For torch\.nn\.utils\.spectral_norm, take torch\.nn\.utils\.parametrizations\.spectral",
    ),
    "attribute written in place": (
        lambda: (lambda apply: grad(lambda p: apply(p, X[0]).sum())({"weight": X[0]}))(
            functional(Scratch())[0]
        ),
        RuntimeError,
        r"Scratch: its forward writes in place to a tensor attribute.*self\.register_buffer",
    ),
    "parameter reached by a list": (
        lambda: (lambda pair: pair[0](pair[1], X))(functional(Leaky())),
        RuntimeError,
        r"Leaky: its forward uses a trainable parameter that it does not reach by its registered",
    ),
    "parameter reached by a closure": (
        lambda: (lambda pair: pair[0](pair[1], X))(functional(closed_over())),
        RuntimeError,
        r"Linear: its forward uses a trainable parameter .* make it a constant by requires_grad_",
    ),
    "error of the module itself": (
        lambda: (lambda pair: pair[0](pair[1], torch.ones(2, 5)))(functional(nn.Linear(3, 2))),
        RuntimeError,
        r"mat1 and mat2 shapes cannot be multiplied",
    ),
    "module_map update": (
        lambda: module_map(Residual(), buffers="update"),  # type: ignore[arg-type]
        ValueError,
        r"a fixed-point map returns a state and nothing else.*at the solution",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=rf"(?s){text}"):
        call()


# module_map ---------------------------------------------------------------------------------------

CELLS = {
    "gru": Gru,
    "residual": Residual,
    "layer_norm": lambda: Residual(nn.LayerNorm(3)),
    "batch_norm": lambda: Residual(nn.BatchNorm1d(3)),
    "weight_norm": lambda: Residual(parametrizations.weight_norm(nn.Linear(3, 3))),
}


@pytest.mark.parametrize("name", CELLS)
def test_module_map_is_the_cell(name: str) -> None:
    cell = CELLS[name]()
    before = fingerprint(cell)
    fixed_point, weights = module_map(cell)
    z, x = torch.randn(TASKS, BATCH, 3), torch.randn(TASKS, BATCH, 3)
    expected = [copy.deepcopy(cell)(z[i], x[i]).detach() for i in range(TASKS)]
    close(fixed_point(z[0], weights, x[0]), expected[0])
    assert fingerprint(cell) == before
    assert list(weights) == [n for n, p in cell.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["residual", "batch_norm", "layer_norm"])
def test_module_map_differentiates_by_state_and_weights(name: str) -> None:
    cell = CELLS[name]()
    fixed_point, weights = module_map(cell)
    z, x = torch.randn(TASKS, BATCH, 3), torch.randn(TASKS, BATCH, 3)
    out = vmap(fixed_point, in_dims=(0, None, 0))(z, weights, x)
    by_state, by_weights = vmap(
        grad(lambda z, w, x: weighted(fixed_point(z, w, x)), argnums=(0, 1)), in_dims=(0, None, 0)
    )(z, weights, x)
    for i in range(TASKS):
        net, leaf = copy.deepcopy(cell), z[i].clone().requires_grad_()
        value = net(leaf, x[i])
        expected = torch.autograd.grad(weighted(value), [leaf, *net.parameters()])
        close(out[i], value.detach())
        close([by_state[i], *nth(by_weights, i).values()], list(expected))


def test_module_map_frozen_statistics() -> None:
    cell = Residual(nn.BatchNorm1d(3))
    fixed_point, weights = module_map(cell, buffers="frozen")
    z, x = torch.randn(BATCH, 3), torch.randn(BATCH, 3)
    close(fixed_point(z, weights, x), copy.deepcopy(cell).eval()(z, x).detach())
    assert jacfwd(fixed_point)(z, weights, x).shape == (BATCH, 3, BATCH, 3)


@pytest.mark.parametrize("name", ["residual", "batch_norm"])
def test_the_fixed_point_of_a_cell_is_differentiable(name: str) -> None:
    cell = CELLS[name]()
    fixed_point, weights = module_map(cell)
    x = torch.randn(TASKS, BATCH, 3)

    def iterate(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        z = torch.zeros(BATCH, 3)
        for _ in range(200):
            z = fixed_point(z, weights, x)
        return z

    solve = implicit_diff(iterate, fixed_point=fixed_point, method="dense")
    implicit, unrolled = (
        vmap(grad(lambda w, x, f=f: weighted(f(w, x))), in_dims=(None, 0))(weights, x)
        for f in (solve, iterate)
    )
    torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-11)


# assign_grads -------------------------------------------------------------------------------------


def test_assign_grads_to_a_module_trains_it() -> None:
    module = frozen_first()
    twin = copy.deepcopy(module)
    x = torch.randn(BATCH, 3)
    apply, params = functional(module)
    assign_grads(module, grad(lambda p: weighted(apply(p, x)))(params))
    weighted(twin(x)).backward()
    for (name, ours), (_, theirs) in zip(
        module.named_parameters(), twin.named_parameters(), strict=True
    ):
        close(ours.grad, theirs.grad)
        assert (ours.grad is None) == name.startswith("0.")
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def test_assign_grads_to_frozen_parameters_on_request() -> None:
    module = frozen_first()
    _, params = functional(module, include_frozen=True)
    assign_grads(module, params)
    close({name: p.grad for name, p in module.named_parameters()}, params)


def test_assign_grads_replaces_adds_and_copies() -> None:
    tree = {"a": torch.zeros(2), "b": [torch.zeros((), requires_grad=True)]}
    grads = {"a": torch.ones(2, requires_grad=True), "b": [torch.tensor(2.0)]}
    assign_grads(tree, grads, add=True)
    assign_grads(tree, grads)
    first = tree["a"].grad
    close(first, torch.ones(2))
    assert not first.requires_grad
    assign_grads(tree, grads, add=True)
    close(tree["a"].grad, 2 * torch.ones(2))
    close(tree["b"][0].grad, torch.tensor(4.0))
    close(first, torch.ones(2))  # adding made a new tensor
    torch.optim.SGD([tree["a"]], lr=1.0).zero_grad(set_to_none=False)
    tree["b"][0].grad.zero_()
    close(grads["a"].detach(), torch.ones(2))
    close(grads["b"][0], torch.tensor(2.0))


def test_assign_grads_sums_over_tied_leaves() -> None:
    leaf = torch.zeros(2)
    for add, total in ((False, 3.0), (True, 6.0)):
        assign_grads([leaf, leaf], [torch.ones(2), 2 * torch.ones(2)], add=add)
        close(leaf.grad, torch.full((2,), total))


def test_assign_grads_keeps_mixed_dtypes_and_layouts() -> None:
    tree = (torch.zeros(2, 3).T, torch.zeros(1, dtype=torch.bfloat16))
    assign_grads(tree, (torch.ones(3, 1).expand(3, 2), torch.ones(1, dtype=torch.bfloat16)))
    tree[0].grad.add_(1)
    close(tree[0].grad, torch.full((3, 2), 2.0))
    assign_grads(nn.Tanh(), {})


NET = nn.Linear(2, 1)
A = {"a": torch.zeros(2), "b": torch.zeros(3)}
WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "structure": (A, {"a": torch.ones(2)}, ValueError, r"grads has another structure than tree"),
    "shape": (
        A,
        {"a": torch.ones(2), "b": torch.ones(1)},
        ValueError,
        r"the leaf for tree\['b'\] has shape \(1,\), expected \(3,\)",
    ),
    "dtype": (
        A,
        {"a": torch.ones(2, dtype=torch.float32), "b": torch.ones(3, dtype=torch.float64)},
        ValueError,
        r"the leaf for tree\['b'\] has dtype torch\.float64, expected torch\.float32",
    ),
    "number": (A, {"a": torch.ones(2), "b": 1.0}, ValueError, r"tree\['b'\] is 1\.0 of type float"),
    "integer": ([torch.zeros(2, dtype=torch.int64)], [torch.ones(2)], TypeError, r"tree\[0\]"),
    "computed": (
        [torch.ones(2, requires_grad=True) * 2],
        [torch.ones(2)],
        ValueError,
        r"computed from others, which keeps no \.grad.*Pass the tensors that the optimiser holds",
    ),
    "names": (
        NET,
        {"weight": torch.ones(1, 2), "bais": torch.ones(1)},
        ValueError,
        r"other names than the parameters of Linear: missing 'bias'; not known 'bais'",
    ),
    "tuple for a module": (NET, (torch.ones(1, 2),), TypeError, r"grads is of type tuple"),
    "module shape": (
        NET,
        {"weight": torch.ones(1, 2), "bias": torch.ones(2)},
        ValueError,
        r"module\['bias'\] has shape \(2,\), expected \(1,\)",
    ),
    "module None": (NET, {"weight": torch.ones(1, 2), "bias": None}, ValueError, r"structure"),
}


@pytest.mark.parametrize("name", WRONG)
def test_assign_grads_refuses_before_writing(name: str) -> None:
    tree, grads, kind, text = WRONG[name]
    torch.set_default_dtype(torch.float32)
    with pytest.raises(kind, match=text):
        assign_grads(tree, grads)
    leaves = list(tree.parameters()) if isinstance(tree, nn.Module) else list(A.values())
    assert all(leaf.grad is None for leaf in leaves)


def test_assign_grads_refuses_inside_a_transform() -> None:
    leaf = torch.zeros(2)

    def write(g: Tensor) -> Tensor:
        assign_grads([leaf], [g])
        return g

    with pytest.raises(ValueError, match="assign what the transform returns"):
        vmap(write)(torch.ones(3, 2))
    assert leaf.grad is None
