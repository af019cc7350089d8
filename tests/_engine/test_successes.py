"""The mean over the tasks that succeeded, against one task at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf

F64 = torch.float64
H = {"a": torch.tensor([1.0, 2.0], dtype=F64), "b": torch.tensor(3.0, dtype=F64)}
# a saddle, a product with Inf, a NaN that only the outer loss has (in the third entry), and others
TASKS = torch.tensor(
    [[1.0, 2, 0], [1, -2, 0], [3, 1, 0], [1, float("inf"), 0], [2, 2, float("nan")], [4, 9, 0]],
    dtype=F64,
)
FAILED = (1, 3, 4)


def _inner_loss(w: Tensor, h: Any, task: Tensor) -> Tensor:
    return (task[:2] * w**2).sum() / 2 - (h["a"] * w).sum() * h["b"]


def _solve(h: Any, task: Tensor) -> Tensor:
    w = h["a"] * h["b"] / task[:2]
    return torch.where(torch.isfinite(task[:2]), w, 1.0)


def _outer_loss(w: Tensor, h: Any, task: Tensor) -> Tensor:
    return (w**3).sum() + task[2] * h["b"]


def _make(method: Any, **keywords: Any) -> Any:
    keywords = {"inner_loss": _inner_loss, "method": method, **keywords}
    return hf.hypergrad_and_solution(_solve, _outer_loss, **keywords)


def _expected(method: Any, tasks: Tensor, h: Any = H) -> Any:
    each = []
    for task in tasks:
        try:
            each.append(_make(method)(h, task)[0])
        except hf.HypergradError:
            continue
    return {name: torch.stack([g[name] for g in each]).mean(0) for name in h}, len(each)


def test_the_mean_is_that_of_the_tasks_that_do_not_raise() -> None:
    fn = _make("cg", throw=False)
    grads, solution = vmap(fn, (None, 0))(H, TASKS)
    assert not torch.isfinite(grads["b"][4])
    assert torch.isfinite(grads["a"][1]).all()  # a number that only its code tells of
    mean, count = hf.mean_over_successes(grads, solution.stats)
    expected, number = _expected("cg", TASKS)
    assert (int(count), count.dtype) == (number, torch.int64)
    assert number == len(TASKS) - len(FAILED)
    torch.testing.assert_close(mean, expected)
    # the step limit is no failure; values may come along; each outer task of a vmap by itself
    fn = _make(hf.CG(maxiter=1), throw=False)

    def mean_of(h: Any, tasks: Tensor) -> Any:
        grads, solution = vmap(fn, (None, 0))(h, tasks)
        return hf.mean_over_successes((grads, solution.value), solution.stats)

    groups = torch.stack([TASKS[:3], TASKS[3:]])
    several = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in H.items()}
    (means, values), counts = vmap(mean_of)(several, groups)
    assert counts.tolist() == [2, 1]
    for index, group in enumerate(groups):
        h = {name: leaf[index] for name, leaf in several.items()}
        expected, _ = _expected(hf.CG(maxiter=1), group, h)
        torch.testing.assert_close({name: leaf[index] for name, leaf in means.items()}, expected)
        torch.testing.assert_close(values[index], mean_of(h, group)[0][1])
    # of a vmap inside of a vmap, and of an iterative method, which has no codes
    grads, solution = vmap(vmap(_make("cg", throw=False), (None, 0)), (None, 0))(H, groups)
    mean, count = hf.mean_over_successes(grads, solution.stats)
    torch.testing.assert_close((mean, int(count)), _expected("cg", TASKS))
    grads, solution = vmap(_make("reverse_unroll", throw=False), (None, 0))(H, TASKS)
    mean, count = hf.mean_over_successes(grads, solution.stats)
    assert int(count) == len(TASKS) - 1
    torch.testing.assert_close((mean, int(count)), _expected("reverse_unroll", TASKS))


def test_derivatives_half_precision_and_layouts() -> None:
    tree = {
        "half": torch.full((4000, 2), 60000.0, dtype=torch.float16),
        "large": torch.full((4000, 2, 3), 1e308, dtype=F64).mT,
        "scalar": torch.arange(4000.0),
    }
    codes = torch.tensor([0, 1, 2, 5] * 1000)
    tree["half"][2] = tree["large"][6, 0, 0] = tree["scalar"][3] = float("nan")
    steps = torch.zeros(4000)
    stats = hf.ChoiceStats(steps, steps, codes, codes)
    mean, count = hf.mean_over_successes({"half": tree["half"]}, stats)
    assert mean["half"].dtype is torch.float16
    assert (mean["half"].tolist(), int(count)) == ([60000.0] * 2, 2000)
    tree["large"].div_(4000)
    mean, count = hf.mean_over_successes(tree, stats)
    assert mean["large"].shape == (3, 2)
    torch.testing.assert_close(mean["large"], torch.full((3, 2), 2.5e304, dtype=F64))
    assert mean["scalar"] == torch.arange(4000.0)[codes < 2].mean()
    leaf = torch.tensor([1.0, float("inf"), 3.0], requires_grad=True)
    mean, _ = hf.mean_over_successes(leaf)
    (grad,) = torch.autograd.grad(mean, leaf)
    assert (mean.item(), grad.tolist()) == (2.0, [0.5, 0.0, 0.5])


def test_no_success_raises_or_counts_zero() -> None:
    grads, solution = vmap(_make("cg", throw=False), (None, 0))(H, TASKS[list(FAILED)])
    with pytest.raises(hf.HypergradError, match=r"none of the tasks succeeded.*broke down"):
        hf.mean_over_successes(grads, solution.stats)
    with pytest.raises(hf.HypergradError, match=r"no entries are finite.*throw=False"):
        hf.mean_over_successes(torch.full((3,), float("nan")))
    with pytest.raises(hf.HypergradError, match="none of the tasks"):
        vmap(hf.mean_over_successes)(torch.tensor([[1.0], [float("nan")]]))
    mean, count = hf.mean_over_successes(grads, solution.stats, throw=False)
    assert (mean["a"].tolist(), mean["b"].item(), int(count)) == ([0, 0], 0, 0)


def test_what_is_no_batch_of_tasks_is_refused() -> None:
    grads, solution = vmap(_make("cg"), (None, 0))(H, TASKS[:1])
    for tree, stats, error, words in (
        (grads, solution, TypeError, r"stats is of type Solution; expected the Solution.stats"),
        ({"a": grads["a"], "b": H["b"]}, solution.stats, ValueError, r"tree\['b'\] has shape \(\)"),
        (H, _make("cg")(H, TASKS[0])[1].stats, ValueError, "one task, without a dimension"),
        ({"a": grads["a"], "b": H["a"]}, (), ValueError, r"tree\['b'\] has shape \(2,\)"),
        (torch.zeros(0, 2), (), ValueError, "there are no tasks"),
        (torch.ones(3, dtype=torch.int64), (), TypeError, "expected a floating-point tensor"),
    ):
        with pytest.raises(error, match=words):
            hf.mean_over_successes(tree, stats)
    with pytest.raises(TypeError, match="positional"):
        hf.mean_over_successes(grads, solution.stats, False)  # type: ignore[misc]
