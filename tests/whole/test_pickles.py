"""Every public object, and what it makes, is pickled and copied; twins give the same numbers."""

import copy
import importlib
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import optree
import pytest
import torch
from torch import Tensor, nn

import hyperfunc as hf
from hyperfunc import linear_solvers
from hyperfunc.transforms._methods import METHODS
from tests.whole.test_hostile import F64, A, H, fixed_point, inner_loss, outer_loss, start

TASKS = torch.stack([H, 2 * H])


def solve(h: Tensor, A: Tensor) -> Tensor:
    return torch.linalg.solve(A, h)


@hf.hypergrad(outer_loss=outer_loss, inner_loss=inner_loss)
def decorated(h: Tensor, A: Tensor) -> Tensor:
    return torch.linalg.solve(A, h)


@hf.checkpoint
def decorated_block(h: Tensor) -> Tensor:
    return torch.tanh(h)


@hf.from_numpy
def decorated_by_numpy(h: Any) -> Any:
    return h * h


def rate_of_step(h: Tensor, step: Tensor) -> Tensor:
    return 0.1 / (1 + step)


def scaled_tasks(h: Tensor, tasks: Tensor) -> Tensor:
    return tasks * h


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)
        self.norm = nn.BatchNorm1d(3, dtype=F64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.linear(z) + self.norm(x))

    @hf.checkpoint
    def block(self, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z))


CELL = Cell()
SOLVER = hf.iterate(fixed_point, 60, init=start)
ALL_METHODS = {name: method() for name, method in METHODS.items()} | {
    "fixed_point": hf.FixedPoint(step_size=0.5),
    "neumann": hf.Neumann(step_size=0.5),
    "anderson": hf.AndersonFixedPoint(step_size=0.5),
    "pipelined_cg": hf.PipelinedCG(),
    "jacobi": hf.CG(preconditioner=hf.JacobiPreconditioner()),
    "nystrom_cg": hf.CG(preconditioner=hf.NystromPreconditioner(rank=2)),
    "damped": hf.Damped(hf.CG(), 0.1),
    "fallback": hf.Fallback(hf.CG(), hf.GMRES()),
    "blockwise": hf.Blockwise(hf.CG(), "leaves"),
}
KEYWORDS: Any = {"outer_loss": outer_loss, "inner_loss": inner_loss}


def square(output: Tensor, *args: Any) -> Tensor:
    return output**2


# What is done with an object, to compare it with its twin.


def itself(value: Any) -> Any:
    return value


def text(value: Any) -> Any:
    return str(value), repr(value)


def call(fn: Any) -> Any:
    return fn(H, A)


def decorate(decorator: Any) -> Any:
    return decorator(solve)(H, A)


def differentiate(method: Any) -> Any:
    return hf.hypergrad(SOLVER, method=method, **KEYWORDS)(H, A)


def project(prox: Any) -> Any:
    return prox(A - 0.3, None, 0.5)


def optimize(optimizer: Any) -> Any:
    return optimizer.update({"w": 0.1 * H}, optimizer.init({"w": H}), {"w": H}, None)


def loop_once(loop: Any) -> Any:
    state = loop.init(H, H)
    return loop.update(state._replace(adjoint=H), (A,), (A,))


def loop_by_index(loop: Any) -> Any:
    state = loop.init(H, H)
    return loop.update(state._replace(adjoint=H), (A,), (A,), 0, 1)


def loop_of(width: int) -> Callable[[Any], Any]:
    return lambda loop: loop.update(loop.init(H, H), (torch.stack([A] * width),), (A,))


loop_in_two = loop_of(21)


def cell_loss(cell: Any, h: Tensor, x: Tensor) -> Tensor:
    return ((cell.linear(x) - h) ** 2).mean()


def loop_of_module(loop: Any) -> Any:
    params = {"linear.weight": A[:3, :3].clone(), "linear.bias": H[:3].clone()}
    return loop.update(loop.init(params, H[:3]), (A[:3, :3],), (A[:3, :3],))


def run_layer(layer: Any) -> Any:
    grads = torch.autograd.grad(layer(TASKS).square().sum(), [*layer.parameters()])
    return layer.state_dict(), grads


def map_state(pair: Any) -> Any:
    return pair[0](TASKS, pair[1], TASKS)


def apply_functional(pair: Any) -> Any:
    return pair[0](pair[1], TASKS, TASKS)


def solve_fixed_point(solver: Any) -> Any:
    inner_solver = solver.inner_solver(fixed_point, init=start)
    again = pickle.loads(pickle.dumps(inner_solver))
    return solver(fixed_point, H, H, A), inner_solver(H, A), again(H, A)


def multiply(operator: Any) -> Any:
    return operator.mv((H,)), operator.T.mv((H,))


Case = tuple[Callable[[], Any], Callable[[Any], Any]]


def transforms(name: str) -> list[Case]:
    """What a transform makes of a solver, with each method, and of keywords alone."""
    transform = getattr(hf, name)
    keywords = {k: v for k, v in KEYWORDS.items() if (name, k) != ("implicit_diff", "outer_loss")}
    return [
        *(
            (lambda m=m: transform(SOLVER, method=m, **keywords), call)
            for m in ALL_METHODS.values()
        ),
        (lambda: transform(solve, **keywords), call),
        (lambda: transform(**keywords), decorate),
        (lambda: transform(method=hf.GMRES(), throw=False, **keywords), decorate),
    ]


def methods(*names: str) -> list[Case]:
    return [(lambda name=name: ALL_METHODS[name], differentiate) for name in names]


def optimizers(make: Callable[[], Any]) -> list[Case]:
    return [(make, optimize), (lambda: make().init({"w": [H]}), itself)]


def solution(**keywords: Any) -> Any:
    return hf.hypergrad_and_solution(solve, **KEYWORDS, **keywords)(H, A)[1]


def check() -> Any:
    return hf.check_hypergrad(solve, outer_loss, H, A, inner_loss=inner_loss)


def diagnosis() -> Any:
    return hf.diagnose(H, H, A, inner_loss=inner_loss)


RATES: Any = {"inner_lr": hf.bilevel.power_decay(0.3, 0.5), "outer_lr": 0.1}
SABA: Any = {"num_inner_batches": 2, "num_outer_batches": 2, **RATES}
MEHA: Any = {"adjoint_lr": 0.5, **RATES}

# For each public function and class: what it makes, or an instance of it.
MADE: dict[str, list[Case]] = {
    "hypergrad": [
        *transforms("hypergrad"),
        (
            lambda: hf.hypergrad(
                solve, **KEYWORDS, method=hf.CG(maxiter=3, rtol=0), compile="eager"
            ),
            call,
        ),
    ],
    "hypergrad_and_value": transforms("hypergrad_and_value"),
    "hypergrad_and_solution": transforms("hypergrad_and_solution"),
    "implicit_diff": transforms("implicit_diff"),
    "CG": methods("cg", "jacobi"),
    "GMRES": methods("gmres"),
    "AndersonFixedPoint": methods("anderson"),
    "Auto": methods("auto"),
    "BiCGStab": methods("bicgstab"),
    "Blockwise": methods("blockwise"),
    "Damped": methods("damped"),
    "Dense": methods("dense"),
    "Fallback": methods("fallback"),
    "FixedPoint": methods("fixed_point"),
    "FirstOrder": methods("first_order"),
    "ForwardMode": methods("forward"),
    "JacobiPreconditioner": methods("jacobi"),
    "Neumann": methods("neumann"),
    "NormalCG": methods("normal_cg"),
    "Nystrom": methods("nystrom"),
    "NystromPreconditioner": methods("nystrom_cg"),
    "OneStep": methods("one_step"),
    "PipelinedCG": methods("pipelined_cg"),
    "Reverse": methods("reverse"),
    "ReverseUnroll": methods("reverse_unroll"),
    "StochasticAID": methods("stoch_aid"),
    "linear_solvers.LinearOperator": [
        (lambda: linear_solvers.LinearOperator.from_matrix(A + H), multiply)
    ],
    "RESULTS": [(lambda: hf.RESULTS.breakdown, itself), (lambda: hf.RESULTS.breakdown, text)],
    "HypergradError": [(lambda: hf.HypergradError("text"), text)],
    "ConvergenceWarning": [
        (
            lambda: hf.ConvergenceWarning("text", 3, 0.5),
            lambda warning: (str(warning), warning.num_steps, warning.residual_norm),
        )
    ],
    "ChoiceStats": [(lambda: solution(method="auto").stats, itself)],
    "LeastSquares": [(lambda: hf.LeastSquares(), differentiate)],
    "ErrorBound": [(lambda: hf.ErrorBound(contraction=0.9), itself)],
    "HypergradBound": [(lambda: solution(error_bound=True).error_bound, itself)],
    "Solution": [(lambda: solution(error_bound=True), itself)],
    "SolveStats": [(lambda: solution().stats, itself)],
    "SolverAux": [
        (
            lambda: hf.minimize(inner_loss, hf.optim.sgd(0.1), 2, init=start, trace=True)(H, A)[1],
            itself,
        )
    ],
    "check_hypergrad": [(check, text)],
    "HypergradCheck": [(check, text), (check, itself)],
    "diagnostics.Causes": [(lambda: check().causes, itself)],
    "diagnose": [(diagnosis, text)],
    "Diagnosis": [(diagnosis, lambda found: (found, found.advice))],
    "diagnostics.Estimate": [(lambda: diagnosis().eig_min, itself)],
    "diagnostics.Recommendation": [(lambda: diagnosis().recommend(), text)],
    "EquilibriumLayer": [
        (lambda: hf.EquilibriumLayer(CELL), run_layer),
        (
            lambda: hf.EquilibriumLayer(CELL, hf.fixed_point_solvers.Broyden(), "reverse_unroll"),
            run_layer,
        ),
    ],
    "checkpoint": [
        (lambda: hf.checkpoint(outer_loss), lambda fn: torch.func.grad(fn)(H, H, A)),
        (lambda: hf.checkpoint(hf.checkpoint(inner_loss)), lambda fn: fn(H, H, A)),
        (lambda: decorated_block, lambda fn: torch.func.jacrev(fn)(H)),
        (lambda: CELL.block, lambda fn: fn(H)),
    ],
    "task_map": [
        (lambda: hf.task_map(decorated, (0, None)), lambda fn: fn(TASKS, A)),
        (lambda: hf.task_map(decorated, (0, None), 1), lambda fn: fn(TASKS, A)),
    ],
    "distributed.task_parallel": [
        (lambda: hf.distributed.task_parallel(scaled_tasks), lambda fn: fn(H, TASKS)),
        (
            lambda: hf.distributed.task_parallel(scaled_tasks, reduce="sum", chunk_size=1),
            lambda fn: fn(H, TASKS),
        ),
    ],
    "functional": [
        (lambda mode=mode: hf.functional(CELL, buffers=mode), apply_functional)
        for mode in ("batch", "frozen", "update")
    ],
    "module_map": [
        (lambda mode=mode: hf.module_map(CELL, buffers=mode), map_state)
        for mode in ("batch", "frozen")
    ],
    "iterate": [(lambda: SOLVER, call), (lambda: hf.iterate(fixed_point, 9, init=start), call)],
    "minimize": [
        (lambda: hf.minimize(inner_loss, hf.optim.adam(0.1), 5, init=start), call),
        (lambda: hf.minimize(inner_loss, hf.optim.sgd(0.1, momentum=0.9), 5, init=start), call),
    ],
    "gradient_descent_map": [
        (lambda: hf.gradient_descent_map(inner_loss, 0.1), lambda phi: phi(H, H, A))
    ],
    "proximal_gradient_map": [
        (
            lambda: hf.proximal_gradient_map(inner_loss, hf.prox.l1(0.1), 0.1),
            lambda phi: phi(H, H, A),
        )
    ],
    "from_numpy": [
        (lambda: hf.from_numpy(square), lambda fn: fn(H)),
        (lambda: decorated_by_numpy, lambda fn: fn(H)),
    ],
    "stack_batches": [(lambda: hf.stack_batches([H, H]), itself)],
    "batch_indices": [(lambda: hf.batch_indices(4, 2, 2, shuffle=False), itself)],
    "composed": [
        (
            lambda: hf.composed(inner_loss, square),
            lambda loss: loss(H, 2 * H, A),
        ),
    ],
    "proximal": [
        (lambda: hf.proximal(inner_loss, 0.5), lambda loss: loss(H, 2 * H, A)),
        (
            lambda: hf.proximal(inner_loss, 0.5),
            lambda loss: hf.hypergrad(solve, outer_loss, inner_loss=loss)(H, A),
        ),
    ],
    **{
        f"fixed_point_solvers.{solver.__name__}": [(lambda s=solver: s(), solve_fixed_point)]
        for solver in (
            hf.fixed_point_solvers.Picard,
            hf.fixed_point_solvers.Anderson,
            hf.fixed_point_solvers.Broyden,
            hf.fixed_point_solvers.Newton,
        )
    },
    "bilevel.soba": [(lambda: hf.bilevel.soba(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.saba": [(lambda: hf.bilevel.saba(inner_loss, outer_loss, **SABA), loop_by_index)],
    "bilevel.stocbio": [(lambda: hf.bilevel.stocbio(inner_loss, outer_loss, **RATES), loop_in_two)],
    "bilevel.amigo": [(lambda: hf.bilevel.amigo(inner_loss, outer_loss, **RATES), loop_in_two)],
    "bilevel.ma_soba": [(lambda: hf.bilevel.ma_soba(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.srba": [
        (lambda: hf.bilevel.srba(inner_loss, outer_loss, period=2, **RATES), loop_once)
    ],
    "bilevel.fsla": [(lambda: hf.bilevel.fsla(inner_loss, outer_loss, **RATES), loop_of(3))],
    "bilevel.bsa": [(lambda: hf.bilevel.bsa(inner_loss, outer_loss, **RATES), loop_in_two)],
    "bilevel.ttsa": [(lambda: hf.bilevel.ttsa(inner_loss, outer_loss, **RATES), loop_of(12))],
    "bilevel.sustain": [(lambda: hf.bilevel.sustain(inner_loss, outer_loss, **RATES), loop_of(12))],
    "bilevel.mrbo": [(lambda: hf.bilevel.mrbo(inner_loss, outer_loss, **RATES), loop_of(12))],
    "bilevel.vrbo": [
        (lambda: hf.bilevel.vrbo(inner_loss, outer_loss, period=2, **RATES), loop_of(48))
    ],
    "bilevel.pzobo": [(lambda: hf.bilevel.pzobo(inner_loss, outer_loss, **RATES), loop_of(10))],
    "bilevel.truncated": [
        (lambda: hf.bilevel.truncated(inner_loss, outer_loss, **RATES), loop_of(10))
    ],
    "bilevel.f2sa": [(lambda: hf.bilevel.f2sa(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.bome": [(lambda: hf.bilevel.bome(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.pbgd": [(lambda: hf.bilevel.pbgd(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.meha": [(lambda: hf.bilevel.meha(inner_loss, outer_loss, **MEHA), loop_once)],
    "bilevel.sama": [(lambda: hf.bilevel.sama(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.darts": [(lambda: hf.bilevel.darts(inner_loss, outer_loss, **RATES), loop_once)],
    "bilevel.module_loop": [
        (
            lambda: hf.bilevel.module_loop(hf.bilevel.darts, Cell(), cell_loss, cell_loss, **RATES),
            loop_of_module,
        )
    ],
    "bilevel.power_decay": [
        (lambda: hf.bilevel.power_decay(0.5, 0.3), lambda rate: rate(torch.tensor(3)))
    ],
    "bilevel.power_growth": [
        (lambda: hf.bilevel.power_growth(0.5, 0.3), lambda rate: rate(torch.tensor(3)))
    ],
    "bilevel.Loop": [
        (
            lambda: hf.bilevel.Loop(start, inner_loss),
            lambda loop: loop.update(H, loop.init(H, A), A),
        )
    ],
    "bilevel.State": [(lambda: hf.bilevel.saba(inner_loss, outer_loss, **SABA).init(H, H), itself)],
    "bilevel.Memory": [
        (lambda: hf.bilevel.saba(inner_loss, outer_loss, **SABA).init(H, H).memory, itself)
    ],
    "optim.Optimizer": optimizers(lambda: hf.optim.sgd(0.1)),
    "optim.State": optimizers(lambda: hf.optim.adam(0.1)),
    "optim.sgd": optimizers(lambda: hf.optim.sgd(0.1, momentum=0.9)),
    "optim.heavy_ball": optimizers(lambda: hf.optim.heavy_ball(0.1, 0.5)),
    "optim.adam": optimizers(lambda: hf.optim.adam(0.1)),
    "optim.adamw": optimizers(lambda: hf.optim.adamw(0.1)),
    "optim.rmsprop": optimizers(lambda: hf.optim.rmsprop(0.1)),
    "optim.adagrad": optimizers(lambda: hf.optim.adagrad(0.1)),
    "optim.from_torch": optimizers(lambda: hf.optim.from_torch(torch.optim.Adadelta, lr=0.1)),
    "optim.grouped": optimizers(lambda: hf.optim.grouped({"": hf.optim.sgd(0.1)})),
    "optim.by_name": optimizers(lambda: hf.optim.sgd(hf.optim.by_name(len))),
    "optim.clip_grad_norm": optimizers(lambda: hf.optim.clip_grad_norm(hf.optim.sgd(0.1), 0.1)),
    "optim.clip_grad_value": optimizers(lambda: hf.optim.clip_grad_value(hf.optim.sgd(0.1), 0.1)),
    "optim.schedule": optimizers(lambda: hf.optim.sgd(hf.optim.schedule(rate_of_step))),
    "optim.constant": optimizers(lambda: hf.optim.sgd(hf.optim.constant(0.1))),
    "optim.linear": optimizers(lambda: hf.optim.sgd(hf.optim.linear(0.1))),
    "optim.warmup": optimizers(lambda: hf.optim.sgd(hf.optim.warmup(0.1, 3))),
    "optim.cosine": optimizers(lambda: hf.optim.sgd(hf.optim.cosine(0.1, 3))),
    "optim.exponential": optimizers(lambda: hf.optim.sgd(hf.optim.exponential(0.1, 0.9))),
    "optim.polynomial": optimizers(lambda: hf.optim.sgd(hf.optim.polynomial(0.1, 3))),
    "optim.piecewise": optimizers(lambda: hf.optim.sgd(hf.optim.piecewise([0.1, 0.2], [1]))),
    "optim.per_step": optimizers(lambda: hf.optim.sgd(hf.optim.per_step(torch.ones(2)))),
    "optim.check_optimizer": optimizers(
        lambda: hf.optim.check_optimizer(hf.optim.sgd(0.1), "caller")
    ),
    "prox.Prox": [(lambda: hf.prox.Prox("own", own_rule), project)],
    "prox.identity": [(hf.prox.identity, project)],
    "prox.l1": [(lambda: hf.prox.l1(0.2), project)],
    "prox.elastic_net": [(lambda: hf.prox.elastic_net(0.2, 0.1), project)],
    "prox.group_lasso": [(lambda: hf.prox.group_lasso(0.2, dim=1), project)],
    "prox.nuclear_norm": [(lambda: hf.prox.nuclear_norm(0.2), project)],
    "prox.non_negative": [(hf.prox.non_negative, project)],
    "prox.box": [(lambda: hf.prox.box(0.0, 0.5), project)],
    "prox.simplex": [(hf.prox.simplex, project)],
    "prox.l1_ball": [(hf.prox.l1_ball, project)],
    "prox.l2_ball": [(hf.prox.l2_ball, project)],
    "prox.l2_sphere": [(hf.prox.l2_sphere, project)],
    "prox.hyperplane": [(hf.prox.hyperplane, project)],
    "prox.halfspace": [(hf.prox.halfspace, project)],
    "prox.affine_set": [(lambda: hf.prox.affine_set(A[:1], dim=1), project)],
    "prox.box_section": [(hf.prox.box_section, project)],
    "prox.transport": [(hf.prox.transport, project)],
    "prox.chain": [(lambda: hf.prox.chain(hf.prox.l1(0.2), hf.prox.box()), project)],
    "prox.intersection": [
        (lambda: hf.prox.intersection(hf.prox.box(), hf.prox.halfspace()), project)
    ],
    "prox.joint": [(lambda: hf.prox.joint(hf.prox.l2_ball()), project)],
    "prox.blocks": [
        (
            lambda: hf.prox.blocks({"a": hf.prox.l1(0.2), "b": hf.prox.box()}),
            lambda prox: prox({"a": A, "b": H}, None, 0.5),
        )
    ],
}

# What only writes, or returns tensors of a caller's tree, or a `concurrent.futures.Future`.
PLAIN = {"assign_grads", "jacobian_frobenius_squared", "mean_over_successes",
         "distributed.load_state", "distributed.local_tasks",
         "distributed.save_state"}  # fmt: skip


def own_rule(leaf: Tensor, dims: Any, lr: Tensor) -> Tensor:
    return leaf * lr


def public() -> dict[str, Any]:
    """Every object in an ``__all__`` of the library, by its shortest name."""
    found: dict[str, Any] = {name: getattr(hf, name) for name in hf.__all__}
    for module in pkgutil.walk_packages(hf.__path__, "hyperfunc."):
        if "._" in module.name:
            continue
        names = getattr(importlib.import_module(module.name), "__all__", ())
        for name in names:
            value = getattr(importlib.import_module(module.name), name)
            if not any(value is other for other in found.values()):
                found[f"{module.name.removeprefix('hyperfunc.')}.{name}"] = value
    return found


PUBLIC = public()


def test_the_table_has_every_public_function_and_class() -> None:
    makers = {
        name
        for name, value in PUBLIC.items()
        if (inspect.isclass(value) and not inspect.isabstract(value)) or inspect.isfunction(value)
    }
    assert makers == MADE.keys() | PLAIN
    assert not MADE.keys() & PLAIN


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_pickled_and_copied(name: str) -> None:
    value = PUBLIC[name]
    if inspect.ismodule(value):
        return  # which nothing of Python pickles; what they hold is in the list
    for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
        assert twin is value or twin == value


@pytest.mark.parametrize("name", MADE)
def test_what_they_make_is_pickled_and_copied(name: str) -> None:
    for make, use in MADE[name]:
        value = make()
        pickled = pickle.dumps(value)
        deep, shallow = copy.deepcopy(value), copy.copy(value)
        expected, spec = optree.tree_flatten(use(value), namespace="hyperfunc")
        assert expected, name
        for twin in (pickle.loads(pickled), deep, shallow):
            assert type(twin) is type(value)
            if name != "EquilibriumLayer":  # which updates its buffers, as the layer did
                assert repr(twin) == repr(value) or " at 0x" in repr(value)
            got, twin_spec = optree.tree_flatten(use(twin), namespace="hyperfunc")
            assert twin_spec == spec
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def test_decorated_functions_are_pickled_by_name() -> None:
    for fn in (decorated, decorated_block):
        assert pickle.loads(pickle.dumps(fn)) is copy.deepcopy(fn) is copy.copy(fn) is fn
        assert fn.__name__.encode() in pickle.dumps(fn)
    unnamed = [
        hf.hypergrad(lambda h, A: h, outer_loss, inner_loss=inner_loss),
        hf.checkpoint(lambda h: h),
        hf.task_map(lambda h: h),
    ]
    for fn in unnamed:
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(fn)


SCRIPT = """
import cloudpickle, hyperfunc as hf, sys
@hf.hypergrad(outer_loss=lambda w, h: (w**2).sum(), inner_loss=lambda w, h: ((w - h) ** 2).sum())
@hf.from_numpy
def solve(h):
    return h + 0.0
cloudpickle.dump(solve, sys.stdout.buffer)
"""


def test_a_script_sends_its_decorated_functions_to_other_processes(tmp_path: Path) -> None:
    """As joblib does, with which scikit-learn runs folds side by side."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(hf.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    )
    solve = cloudpickle.loads(run.stdout)
    assert torch.allclose(solve(torch.ones(2)), 2 * torch.ones(2))


def test_wrapped_functions_are_functions_still() -> None:
    """With name and text, as methods, and with a repr that says what they are."""
    assert decorated_block.__name__ == "decorated_block"
    assert repr(decorated_block) == "checkpoint(decorated_block)"
    assert repr(hf.task_map(decorated_block)) == "task_map(decorated_block)"
    assert repr(hf.distributed.task_parallel(decorated_block)) == "task_parallel(decorated_block)"
    assert torch.equal(CELL.block(H), torch.tanh(CELL.linear(H)))
    assert torch.equal(Cell.block(CELL, H), CELL.block(H))
    assert list(inspect.signature(hf.checkpoint(outer_loss)).parameters) == ["w", "h", "A"]


def test_optimisers_and_loops_are_compared_by_what_they_are_made_from() -> None:
    for make in (
        lambda lr: hf.optim.sgd(lr, momentum=0.9),
        lambda lr: hf.optim.clip_grad_norm(hf.optim.adamw(lr, amsgrad=True), 1.0),
        lambda lr: hf.optim.from_torch(torch.optim.NAdam, lr=lr),
    ):
        assert make(0.1) == make(0.1) == pickle.loads(pickle.dumps(make(0.1))) != make(0.2)
    assert hf.optim.adam(0.1, weight_decay=0.01) != hf.optim.adamw(0.1)
    loop = hf.bilevel.soba(inner_loss, outer_loss, **RATES)
    assert pickle.loads(pickle.dumps(loop)).update.__self__.steps["outer"] == 0.1


def test_objects_are_read_from_files(tmp_path: Path) -> None:
    """By ``torch.save`` too."""
    path = tmp_path / "fn.pt"
    torch.save({"fn": hf.hypergrad(solve, **KEYWORDS), "method": hf.CG()}, path)
    loaded = torch.load(path, weights_only=False)
    assert torch.equal(loaded["fn"](H, A), decorated(H, A))
    assert loaded["method"] == hf.CG()


def test_what_a_run_saves_is_read_by_torch_load_without_running_code(tmp_path: Path) -> None:
    """Solutions with all fields, and states of optimisers; those of loops are in their tests."""
    fn = hf.hypergrad_and_solution(
        solve, outer_loss, inner_loss=inner_loss, method="cg", error_bound=hf.ErrorBound()
    )
    kept = {"grads": fn(H, A)[0], "solution": fn(H, A)[1]}
    for name in ("adagrad", "adam", "adamw", "rmsprop", "sgd"):
        kept[name] = getattr(hf.optim, name)(lr=0.1).init({"h": H})
    kept["clipped"] = hf.optim.clip_grad_norm(hf.optim.adam(lr=0.1), 1.0).init({"h": H})
    kept["torch"] = hf.optim.from_torch(torch.optim.NAdam, lr=0.1).init({"h": H})
    torch.save(kept, tmp_path / "kept.pt")
    loaded = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert loaded["solution"].error_bound.gamma.uncertainty >= 0
    assert type(loaded["solution"].stats) is hf.SolveStats
    leaves, structure = optree.tree_flatten(kept)
    others, other_structure = optree.tree_flatten(loaded)
    assert structure == other_structure
    assert all(torch.equal(one, other) for one, other in zip(leaves, others, strict=True))
