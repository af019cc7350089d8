"""A sweep over ``torch.nn``: every class, by every route to a hypergradient and every method.

    python -m tests.whole.sweep [--modules LayerNorm ...] [--methods cg ...] [--routes jvp ...]

Each cell is compared with one task at a time in float64, and that with central differences of what
torch alone computes. A cell is *right*, *refused* (an error of hyperfunc's own that says what to
type), *raw* (an error of torch's) or *wrong*. The last two must not occur.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import linecache
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import hyperfunc as hf
from tests.whole.sweep_cases import CASES, Case

D = torch.float64
TASKS = 2
METHODS = ("reverse_unroll", "reverse", "forward", "cg")
RIGHT, REFUSED, RAW, WRONG = KINDS = ("right", "refused", "raw", "wrong")

ROUNDING = 1e-7  # by how much two ways to compute may differ
DIFFERENCES = 1e-5  # and what is differentiated from differences

Tree = dict[str, Tensor]


class _Net(nn.Module):
    """A layer whose results are put into one vector."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer, self.case_call = case.make(), case.call

    def forward(self, *data: Tensor) -> Tensor:
        return _vector(self.case_call(self.layer, *data))


class Problem:
    """A layer in an inner problem, whose solution depends on the start and on a weight of the loss.

    The params are those of the layer, and one that is added to its input. Iterative methods take
    two steps; implicit ones solve a problem that is curved more. Layers that draw numbers draw the
    same ones in each evaluation, so that their losses are functions.
    """

    def __init__(self, case: Case, method: str) -> None:
        self.case, self.name, self.solved = case, method, method == "cg"
        self.pull, self.lr, self.steps = 10.0, 0.05, 2
        self.randomness: Any = "same" if case.random else "error"
        self._draw(0)
        if self.solved:
            self._find_smooth()

    def _find_smooth(self) -> None:
        """Draw until some steps solve the problem, pulled as little as is needed for that."""
        for self.pull in (30.0, 300.0, 3000.0):
            self.lr = 1 / self.pull
            for seed in range(10):
                self._draw(seed)
                if self._converges():
                    return
        raise AssertionError(f"{self.case.name}: no problem with a smooth solution was found")

    def _draw(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        draw: Any = functools.partial(torch.randn, generator=g, dtype=D)
        specs = [[s if callable(s) else functools.partial(_normal, s) for s in self.case.data]]
        tasks = [tuple(spec(g) for spec in row) for row in specs * TASKS]
        self.data = tuple(torch.stack(parts) for parts in zip(*tasks, strict=True))
        torch.manual_seed(seed)
        self.net = _Net(self.case).to(D).train(self.case.train)
        self.apply, start = hf.functional(self.net)
        start = {k: p + 0.1 * draw(p.shape) for k, p in start.items()}
        if self.data[0].is_floating_point():
            start["input"] = 0.3 * draw(self.data[0].shape[1:])
        self.scale = 1.0
        with torch.no_grad():
            copy = {k: p.clone() for k, p in start.items()}
            tasks = [self.output(copy, *self.task(i), plain=True) for i in range(TASKS)]
        self.scale = max(1.0, float(torch.cat(tasks).abs().max()))
        self.hparams = start | {"log": torch.tensor(0.2, dtype=D)}
        self.v = {k: draw(p.shape) for k, p in self.hparams.items()}
        for name, index in self.case.constant:
            self.v["layer." + name][index] = 0

    def _converges(self) -> bool:
        """Whether some steps solve the problem: not at a kink, where there is no derivative."""
        if self.case.oracle != "torch":
            return True
        w = [self.start(self.hparams)] * TASKS
        for self.steps in range(1, 30):
            before = w
            w = [self.step(w[i], self.hparams, self.task(i)) for i in range(TASKS)]
            moved = [(a[k] - b[k]).abs().max() for a, b in zip(w, before, strict=True) for k in a]
            if max(moved) < 1e-14:
                return True
        return False

    def task(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[index] for part in self.data)

    def output(self, w: Tree, *data: Tensor, plain: bool = False) -> Tensor:
        """What the layer returns, of the size of one."""
        rest = {k: p for k, p in w.items() if k != "input"}
        if "input" in w:
            data = (data[0] + w["input"], *data[1:])
        with torch.random.fork_rng(devices=[], enabled=self.case.random):
            if self.case.random:
                torch.manual_seed(3)
            if plain:
                y = functional_call(self.net, rest, data)
            elif self.case.is_function:
                y = _vector(self.case.call(None, *data))
            else:
                y = self.apply(rest, *data)
        return y / self.scale  # type: ignore[no-any-return]

    def inner(self, w: Tree, h: Tree, *data: Tensor, plain: bool = False) -> Tensor:
        y = self.output(w, *data, plain=plain)
        away: Any = sum((w[k] - h[k]).square().sum() for k in w)
        return h["log"].exp() * (1.3 * y + 0.2).sin().mean() + 0.5 * self.pull * away

    def outer(self, w: Tree, h: Tree, *data: Tensor, plain: bool = False) -> Tensor:
        y = self.output(w, *data, plain=plain)
        return (0.8 * y - 0.1).cos().mean() + self.outer_of_params(w, h)

    def outer_of_params(self, w: Tree, h: Tree, *data: Tensor) -> Tensor:
        return sum(0.1 * p.sin().sum() for p in w.values())  # type: ignore[return-value]

    def start(self, h: Tree, *data: Tensor) -> Tree:
        return {k: p for k, p in h.items() if k != "log"}

    @functools.cached_property
    def solver(self) -> Any:
        sgd = hf.optim.sgd(lr=self.lr)
        return hf.minimize(self.inner, sgd, self.steps, init=self.start)

    def step(self, w: Tree, h: Tree, data: tuple[Tensor, ...]) -> Tree:
        """A step of the solver by torch alone, which is right in values and first gradients."""
        w = {k: p.detach().requires_grad_() for k, p in w.items()}
        loss = self.inner(w, h, *data, plain=True)
        grads = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
        return {
            k: p.detach() if g is None else p.detach() - self.lr * g.to_dense()
            for (k, p), g in zip(w.items(), grads, strict=True)
        }

    def value(self, h: Tree, index: int) -> Tensor:
        """The outer loss at the end of the steps for a task."""
        data, plain = self.task(index), self.case.oracle == "torch"
        w = self.start(h) if plain else self.solver(h, *data)
        for _ in range(self.steps if plain else 0):
            w = self.step(w, h, data)
        with torch.no_grad():
            return self.outer(w, h, *data, plain=plain)

    def method(self, fixed: bool = False) -> Any:
        if not self.solved:
            return self.name
        return hf.CG(maxiter=8, rtol=0, atol=0) if fixed else hf.CG(rtol=1e-14)

    @functools.cached_property
    def hypergrad(self) -> Any:
        return hf.hypergrad(self.solver, self.outer, method=self.method())

    def many(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return vmap(fn, (None, *[0] * len(self.data)), randomness=self.randomness)

    def moved(self, step: float) -> Tree:
        return {k: p + step * self.v[k] for k, p in self.hparams.items()}

    def one_by_one(self, fn: Any) -> list[Tree]:
        return [fn(self.hparams, *self.task(i)) for i in range(TASKS)]

    @functools.cached_property
    def rows(self) -> list[Tree]:
        """The hypergradient of each task by itself, if that is right, or by unrolling."""
        return self.one_by_one(self.hypergrad)

    @functools.cached_property
    def bend(self) -> Tree:
        """The derivative of the hypergradient of a task along a direction, by differences."""
        e = 2e-5
        ahead, back = (self.hypergrad(self.moved(s), *self.task(0)) for s in (e, -e))
        return {k: (ahead[k] - back[k]) / (2 * e) for k in self.hparams}


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=D)


def _vector(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.reshape(-1)
    parts = [part for part in output if isinstance(part, Tensor) and part.is_floating_point()]
    return torch.cat([part.reshape(-1) for part in parts])


# A route computes something, and compares it: how much it is off, of what is allowed.


def alone(p: Problem) -> float:
    rows = p.rows
    if p.case.oracle == "none":
        return 0.0
    e, off = 1e-5, []
    for i, row in enumerate(rows):
        slope = (p.value(p.moved(e), i) - p.value(p.moved(-e), i)) / (2 * e)
        parts = torch.stack([(row[k] * p.v[k]).sum() for k in row])
        off.append(_gap(parts.sum(), slope, parts.abs().max()) / DIFFERENCES)
    return max(off)


def by_vmap(p: Problem) -> float:
    return _compare_rows(p, p.many(p.hypergrad)(p.hparams, *p.data))


def by_task_map(p: Problem) -> float:
    dims = (None, *[0] * len(p.data))
    fn = hf.task_map(p.hypergrad, dims, chunk_size=None, randomness=p.randomness)
    return _compare_rows(p, fn(p.hparams, *p.data))


def by_compiling(p: Problem, backend: Any = True) -> float:
    fn = hf.hypergrad(p.solver, p.outer, method=p.method(fixed=True), compile=backend)
    return _compare_rows(p, p.many(fn)(p.hparams, *p.data))


def grad_of_vmap(p: Problem) -> float:
    return _compare_sum(p, grad(functools.partial(_total, p))(p.hparams))


def backward_of_vmap(p: Problem) -> float:
    h = {k: q.clone().requires_grad_() for k, q in p.hparams.items()}
    _total(p, h).backward()
    return _compare_sum(p, {k: q.grad for k, q in h.items() if q.grad is not None})


def jvp_of_hypergradient(p: Problem) -> float:
    fn: Any = lambda h: p.hypergrad(h, *p.task(0))  # noqa: E731
    return _compare_bend(p, jvp(fn, (p.hparams,), (p.v,))[1])


def derivative_of_hypergradient(p: Problem) -> float:
    """Backwards along v: a product with a symmetric matrix, as the other one."""
    h = {k: q.clone().requires_grad_() for k, q in p.hparams.items()}
    row = p.hypergrad(h, *p.task(0))
    value = sum((row[k] * p.v[k]).sum() for k in row)
    grads = torch.autograd.grad(value, list(h.values()))  # type: ignore[arg-type]
    return _compare_bend(p, dict(zip(h, grads, strict=True)))


ROUTES: dict[str, Callable[[Problem], float]] = {
    "one by one": alone,
    "vmap": by_vmap,
    "task_map": by_task_map,
    "grad of vmap": grad_of_vmap,
    "backward of vmap": backward_of_vmap,
    "jvp": jvp_of_hypergradient,
    "derivative": derivative_of_hypergradient,
    "compile": by_compiling,
}


def _total(p: Problem, h: Tree) -> Tensor:
    """The sum over tasks of a loss that the user takes of a differentiable solution, in a vmap."""
    solve = hf.implicit_diff(p.solver, method=p.method())
    # what the user's own transforms see of a function of torch is not hyperfunc's
    outer = p.outer_of_params if p.case.is_function else p.outer
    total: Tensor = p.many(lambda h, *data: outer(solve(h, *data), h, *data))(h, *p.data).sum()
    return total


def _compare_rows(p: Problem, result: Tree) -> float:
    return max(_gap(result[k][i], row[k]) for i, row in enumerate(p.rows) for k in row) / ROUNDING


def _compare_sum(p: Problem, result: Tree) -> float:
    rows = p.rows
    if p.case.is_function:
        rows = p.one_by_one(hf.hypergrad(p.solver, p.outer_of_params, method=p.method()))
    zero = torch.zeros((), dtype=D)
    return max(_gap(result.get(k, zero), sum(row[k] for row in rows)) for k in p.hparams) / ROUNDING  # type: ignore[arg-type]


def _compare_bend(p: Problem, result: Tree) -> float:
    if p.case.oracle == "none":
        return 0.0
    scale = torch.stack([q.abs().max() for q in p.bend.values()]).max()
    return max(_gap(result[k], q, scale) for k, q in p.bend.items()) / DIFFERENCES


def _gap(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    found = (a - b).abs().max() / ((b.abs().max() if scale is None else scale) + 1e-6)
    return float(found.nan_to_num(torch.inf))


@dataclasses.dataclass(frozen=True)
class Cell:
    case: str
    method: str
    route: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind:8} {self.case} | {self.method} | {self.route} | {self.detail}"


_OURS = str(Path(hf.__file__).parent)
# What an error says that tells what to do.
_ADVICE = ("write", "use", "leave", "take", "pass", "call", "give", "put")


def _kind_of(error: Exception) -> str:
    """Whether hyperfunc itself raises an error, which says what to type."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0)
    ours = last.filename.startswith(_OURS) and line.lstrip().startswith("raise ")
    return REFUSED if ours and any(word in str(error).lower() for word in _ADVICE) else RAW


def run(case: Case, methods: Iterable[str], routes: Iterable[str]) -> Iterator[Cell]:
    """The cells of a case."""
    for method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = Problem(case, method)
            for route in routes:
                try:
                    off = ROUTES[route](problem)
                except Exception as error:
                    text = " ".join(str(error).split())
                    yield Cell(case.name, method, route, _kind_of(error), text)
                else:
                    kind = RIGHT if off < 1 else WRONG
                    yield Cell(case.name, method, route, kind, f"{off:.0e} times what is allowed")


def counted(cells: Sequence[Cell]) -> str:
    counts = collections.Counter(cell.kind for cell in cells)
    return f"{len(cells)} cells: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.whole.sweep", description=__doc__)
    parser.add_argument("--modules", nargs="+", help="names such as LayerNorm or F.layer_norm")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    plain = [route for route in ROUTES if route != "compile"]  # which takes seconds a cell
    parser.add_argument("--routes", nargs="+", default=plain, choices=list(ROUTES))
    options = parser.parse_args(argv)
    cells: list[Cell] = []
    for case in CASES:
        if options.modules is None or case.layer in options.modules:
            found = list(run(case, options.methods, options.routes))
            for cell in found:
                if cell.kind != RIGHT:
                    print(cell, flush=True)
            cells += found
    print(counted(cells))
    return int(any(cell.kind in (RAW, WRONG) for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
