"""``task_map``: the results of ``vmap``, whatever the size of the chunks."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hyperfunc as hf

F64 = torch.float64
MODULE = sys.modules["hyperfunc.task_map"]  # not the function of that name
SIZES = ["auto", 1, 2, 100, None]


class Pair(NamedTuple):
    first: Any
    second: Any


def inner_loss(w: dict[str, Tensor], meta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    offset = sum(((w[name] - meta[name]) ** 2).sum() for name in w)
    return ((torch.tanh(x @ w["a"]) + w["b"] - y) ** 2).sum() + offset


def query_loss(w: dict[str, Tensor], meta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (w["a"] ** 3).sum() + w["b"] * y.sum()


def transformed(method: Any = None) -> Any:
    solver = hf.minimize(inner_loss, hf.optim.sgd(0.05), 8, init=lambda meta, x, y: meta)
    return hf.hypergrad_and_solution(solver, query_loss, method=method or hf.CG())


def batch(num_tasks: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tasks, 6, 3, dtype=F64, generator=generator)
    y = torch.randn(6, num_tasks, dtype=F64, generator=generator)
    meta = {"a": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)}
    return {name: leaf.to(device) for name, leaf in meta.items()}, x.to(device), y.to(device)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", SIZES)
@pytest.mark.parametrize("method", [hf.CG(), hf.Reverse(), hf.CG(maxiter=3, rtol=0)])
def test_results_are_those_of_vmap(chunk_size: Any, method: Any, device: torch.device) -> None:
    arguments, dims = batch(5, device), (None, 0, 1)
    fn = transformed(method)
    grads, solution = hf.task_map(fn, dims, chunk_size)(*arguments)
    expected_grads, expected = torch.func.vmap(fn, dims)(*arguments)
    close(grads, expected_grads)
    close(solution, expected)
    assert type(solution) is hf.Solution
    if isinstance(method, hf.CG):
        assert solution.stats.num_steps.tolist() == expected.stats.num_steps.tolist()


@pytest.mark.parametrize("chunk_size", SIZES)
@pytest.mark.parametrize(
    ("in_dims", "expected"),
    [
        (0, lambda a, b, c: a * b + c),
        ((0, 1, -1), lambda a, b, c: a * b.T + c.T),
        ((0, None, 0), lambda a, b, c: a * b[:, None] + c),
    ],
)
def test_any_dimensions(chunk_size: Any, in_dims: Any, expected: Any) -> None:
    a, b, c = torch.arange(48.0).reshape(3, 4, 4).unbind()
    fn = lambda a, b, c: Pair({"sum": a * b + c}, (a.sum(), ()))  # noqa: E731
    got = hf.task_map(fn, in_dims, chunk_size)(a, b, c)
    close(got.second, (a.sum(1), ()))
    reference = torch.func.vmap(lambda *row: fn(*row).first["sum"], in_dims)(a, b, c)
    close(got.first["sum"], reference)
    if in_dims != (0, None, 0):
        close(got.first["sum"], expected(a, b, c))


@pytest.mark.parametrize("chunk_size", SIZES)
def test_trees_and_values_that_are_no_tensors(chunk_size: Any) -> None:
    tree = {"x": torch.ones(3, 2), "name": "data", "none": None}
    mapped = hf.task_map(
        lambda tree, k: tree["x"] * k * len(tree["name"]),
        ({"x": 0, "name": None, "none": None}, None),
        chunk_size,
    )
    close(mapped(tree, 2), torch.full((3, 2), 8.0))


@pytest.mark.parametrize("chunk_size", SIZES)
def test_it_composes(chunk_size: Any, device: torch.device) -> None:
    meta, x, y = batch(3, device)

    def total(fn: Any, b: Tensor) -> Tensor:
        grads, _ = fn({"a": meta["a"], "b": b}, x, y)
        return (grads["a"] ** 2).sum()

    fn, dims = transformed(), (None, 0, 1)
    ours, reference = hf.task_map(fn, dims, chunk_size), torch.func.vmap(fn, dims)
    b = torch.tensor(0.1, dtype=F64, device=device)
    expected = torch.func.grad(lambda b: total(reference, b))(b)
    close(torch.func.grad(lambda b: total(ours, b))(b), expected)
    bs = torch.tensor([0.1, 0.2], dtype=F64, device=device)
    close(
        torch.func.vmap(lambda b: total(ours, b))(bs),
        torch.stack([total(reference, b) for b in bs]),
    )
    tracked = b.clone().requires_grad_()
    close(torch.autograd.grad(total(ours, tracked), tracked)[0], expected)


@pytest.mark.parametrize("chunk_size", SIZES)
def test_random_numbers(chunk_size: Any) -> None:
    x = torch.zeros(5, 3)
    fn = lambda x: x + torch.rand(3)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"random"):
        hf.task_map(fn, 0, chunk_size)(x)
    torch.manual_seed(0)
    same = hf.task_map(fn, 0, chunk_size, randomness="same")(x)
    torch.manual_seed(0)
    close(same, torch.rand(3).expand(5, 3))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(hf.task_map(fn, 0, chunk_size, randomness="different")(x))
    assert torch.equal(*runs)
    assert len(runs[0].unique()) == 15


@pytest.mark.parametrize(
    ("entries", "num_tasks", "threads", "size"),
    [
        (10, 100, 1, 100),
        (2**16, 100, 1, 15),
        (2**16, 96, 1, 16),
        (2**17, 100, 1, 8),
        (2**18, 100, 1, 1),
        (10**6, 100, 1, 1),
        (2**16, 3, 1, 3),
        (2**16, 17, 1, 9),
        (2**16, 100, 2, 25),
        (2**18, 16, 2, 8),
        (2**18, 17, 2, 6),
        (2**18 + 2**16, 16, 2, 6),
        (2**19, 100, 2, 1),
        (2**19, 100, 4, 8),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, entries: int, num_tasks: int, threads: int, size: int
) -> None:
    monkeypatch.setattr(MODULE, "_BUDGET", 2**22)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    leaves = [torch.empty(num_tasks, entries // 4), torch.empty(entries - entries // 4)]
    assert MODULE._best_size(num_tasks, [*leaves, "text"], [0, None, None]) == size
    on_device = [leaf.to("meta") for leaf in leaves]
    assert MODULE._best_size(num_tasks, on_device, [0, None]) == num_tasks


@pytest.mark.parametrize(
    ("cache", "size"),
    [(0, 15), (2**20, 15), (2**25, 15), (2**26, 25), (2**27, 50), (300 * 2**20, 50)],
)
def test_the_rule_follows_the_cache(monkeypatch: pytest.MonkeyPatch, cache: int, size: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(MODULE, "_BUDGET", MODULE._budget(cache))
    tasks, images = torch.empty(100, 2**14, 2, 2), torch.empty(2**14, 2, 2, 1)
    assert MODULE._best_size(100, [tasks], [0]) == size
    assert MODULE._best_size(100, [tasks[:, 0], images], [0, None]) == 15
    assert MODULE._best_size(100, [tasks[..., None]], [0]) == 15


@pytest.mark.parametrize(
    ("text", "size"), [("307200K\n", 300 * 2**20), ("32768K", 2**25), ("unknown", 0), (None, 0)]
)
def test_the_size_of_the_cache(tmp_path: Path, text: str | None, size: int) -> None:
    if text is not None:
        (tmp_path / "size").write_text(text)
    assert MODULE._cache_size(tmp_path) == size


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch.compile of 2.4 cannot trace optree")
def test_within_torch_compile() -> None:
    mapped = torch.compile(hf.task_map(torch.sin), backend="eager", fullgraph=True)
    close(mapped(ONES), ONES.sin())


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hf.task_map(3), TypeError, r"fn is 3 of type int; expected a function"),
        (lambda: hf.task_map(len, 0, 0), ValueError, r"chunk_size is 0; expected 'auto'"),
        (lambda: hf.task_map(len, 0, True), TypeError, r"chunk_size is True"),
        (lambda: hf.task_map(len, 0, "all"), TypeError, r"'all'; expected 'auto', None or an int"),
        (lambda: hf.task_map(len, randomness="x"), ValueError, r"randomness is 'x'"),
        (lambda: hf.task_map(len)(3), ValueError, r"args\[0\] is 3 of type int.*or None"),
        (lambda: hf.task_map(len, 5)(ONES), ValueError, r"args\[0\] has shape \(3, 2\), and in_d"),
        (lambda: hf.task_map(len, (0, 0))(ONES), ValueError, r"does not suit the 1 arguments"),
        (lambda: hf.task_map(len, (None,))(ONES), ValueError, r"None for every argument"),
        (
            lambda: hf.task_map(len)(ONES, ONES[:2]),
            ValueError,
            r"3 in args\[0\], 2 in args\[1\]; expected one number",
        ),
        (lambda: hf.task_map(len)(ONES[:0]), ValueError, r"0 in args\[0\]; expected one"),
        (
            lambda: hf.task_map(lambda x: {"a": 3}, 0, 1)(ONES),
            TypeError,
            r"returned 3 of type int as result\['a'\]; expected a tensor",
        ),
        (
            lambda: hf.task_map(lambda x: {"a": 3}, 0, None)(ONES),
            TypeError,
            r"returned 3 of type int as result\['a'\]; expected a tensor",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Reduced ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", SIZES)
def test_reduced_results_are_means_and_sums_over_the_tasks_that_succeeded(
    chunk_size: Any, device: torch.device
) -> None:
    meta, x, y = batch(5, device)
    dims = (None, 0, 1)
    loss = inner_loss
    solver = hf.minimize(loss, hf.optim.sgd(0.05), 8, init=lambda meta, x, y: meta)
    fn = hf.hypergrad_and_solution(solver, query_loss, method=hf.CG(), throw=False)

    def mapped(meta: Any, x: Tensor, y: Tensor, fn: Any = fn, reduce: Any = "mean") -> Any:
        return hf.task_map(fn, dims, chunk_size, reduce=reduce)(meta, x, y)

    grads, solution = torch.func.vmap(fn, dims)(meta, x, y)
    mean, about = mapped(meta, x, y)
    close(mean, {name: leaf.mean(0) for name, leaf in grads.items()})
    close(about.params, {name: leaf.mean(0) for name, leaf in solution.params.items()})
    close((about.value, about.stats), (solution.value.mean(0), solution.stats))
    close(mapped(meta, x, y, reduce="sum")[0]["a"], grads["a"].sum(0))
    # one task has no solution: its code tells, and without codes a warning does
    x[1] = torch.nan
    kept = [0, 2, 3, 4]
    mean, about = mapped(meta, x, y)
    close(mean, {name: leaf[kept].mean(0) for name, leaf in grads.items()})
    assert (about.stats.result > hf.RESULTS.max_steps).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]
    fn = hf.hypergrad(solver, query_loss, method="reverse", throw=False)
    reference = torch.func.vmap(fn, dims)(meta, x, y)
    with pytest.warns(hf.ConvergenceWarning, match="1 of 5 tasks have entries .* of the sum"):
        total = mapped(meta, x, y, fn, "sum")
    close(total, {name: leaf[kept].sum(0) for name, leaf in reference.items()})
    with pytest.raises(hf.HypergradError, match="all 5 tasks failed"):
        mapped(meta, torch.nan * x, y, fn)


@pytest.mark.parametrize("chunk_size", ["auto", 1, 2, None])
def test_reduced_results_compose(chunk_size: Any) -> None:
    x = torch.linspace(-1, 1, 15, dtype=F64).reshape(5, 3)
    call = hf.task_map(lambda w, x: torch.tanh(w * x), (None, 0), chunk_size, reduce="mean")
    reference = lambda w: torch.tanh(w * x).mean(0)  # noqa: E731
    w = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    close(torch.func.jacrev(lambda w: call(w, x))(w), torch.func.jacrev(reference)(w))
    close(torch.func.jacfwd(lambda w: call(w, x))(w), torch.func.jacrev(reference)(w))
    ws = torch.stack([w, -w])
    close(torch.func.vmap(lambda w: call(w, x))(ws), torch.func.vmap(reference)(ws))
    tracked = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(tracked, x).sum(), tracked)
    close(grad, torch.func.grad(lambda w: reference(w).sum())(w))
    # half precision is summed in float32, and what is no floating-point tensor is stacked
    halves = torch.full((300, 2), 3.0, dtype=torch.float16)
    total, flags = hf.task_map(lambda h: (h + 100, h > 2), 0, chunk_size, reduce="mean")(halves)
    assert total.dtype is torch.float16
    close(total, torch.full((2,), 103.0, dtype=torch.float16))
    assert flags.shape == (300, 2)


def test_what_reduces_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="reduce is 'max'; expected 'mean', 'sum' or None"):
        hf.task_map(torch.sin, reduce="max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no floating-point tensor"):
        hf.task_map(lambda x: x > 0, reduce="sum")(torch.ones(3))
