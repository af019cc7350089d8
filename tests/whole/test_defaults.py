"""What is meant where nothing is said: the defaults that the documentation promises."""

import inspect
from typing import Any

import pytest

import hyperfunc as hf
from hyperfunc import bilevel, distributed, fixed_point_solvers, optim

CONDITION = {"fixed_point": None, "inner_loss": None, "optimality": None}
HYPERGRAD = {
    **CONDITION,
    "method": "cg",
    "has_aux": False,
    "throw": True,
    "solver_has_aux": False,
    "compile": False,
}
STEPS = {"inputs": None, "rtol": None, "atol": None, "compile": False}
TWO_LOOPS = {"adjoint_lr": None, "num_inner_steps": 10, "num_adjoint_steps": 10}
MOMENTUM = {
    "adjoint_lr": None,
    "inner_weight": 0.1,
    "outer_weight": 0.1,
    "num_adjoint_steps": 10,
}

KEYWORD_ONLY: dict[Any, dict[str, Any]] = {
    hf.hypergrad: HYPERGRAD,
    hf.hypergrad_and_value: HYPERGRAD,
    hf.hypergrad_and_solution: {**HYPERGRAD, "error_bound": False},
    hf.implicit_diff: {
        **CONDITION,
        "method": "cg",
        "has_aux": False,
        "throw": True,
        "on_backward": None,
    },
    hf.check_hypergrad: {
        **CONDITION,
        "method": "cg",
        "has_aux": False,
        "throw": False,
        "rtol": None,
        "num_directions": 3,
        "max_dense": 500,
        "unroll": True,
        "generator": None,
    },
    hf.diagnose: {**CONDITION, "num_steps": 20, "seed": 0},
    hf.iterate: STEPS,
    hf.minimize: {**STEPS, "init_state": None, "has_aux": False, "trace": False},
    hf.functional: {"buffers": "batch", "include_frozen": False},
    hf.module_map: {"buffers": "batch"},
    hf.task_map: {"randomness": "error"},
    hf.jacobian_frobenius_squared: {"num_probes": 1, "generator": None},
    hf.EquilibriumLayer: {"init": None, "throw": None, "throw_backward": None, "on_backward": None},
    hf.EquilibriumLayer.forward: {"init": None, "return_stats": False, "return_trace": False},
    fixed_point_solvers.Picard.__call__: {"return_trace": False},
    optim.sgd: {"maximize": False},
    optim.adam: {"maximize": False, "decoupled_weight_decay": False},
    optim.adamw: {"maximize": False},
    optim.rmsprop: {"maximize": False},
    optim.adagrad: {"maximize": False},
    optim.from_torch: {"differentiable": False},
    bilevel.soba: {"adjoint_lr": None},
    bilevel.saba: {"adjoint_lr": None},
    bilevel.stocbio: TWO_LOOPS,
    bilevel.amigo: TWO_LOOPS,
    bilevel.ma_soba: {"adjoint_lr": None, "outer_weight": 0.1},
    bilevel.srba: {"adjoint_lr": None},
    bilevel.fsla: {"adjoint_lr": None, "outer_weight": 0.1},
    bilevel.bsa: {**TWO_LOOPS, "seed": 0},
    bilevel.ttsa: {"adjoint_lr": None, "num_adjoint_steps": 10, "seed": 0},
    bilevel.sustain: {**MOMENTUM, "seed": 0},
    bilevel.mrbo: MOMENTUM,
    bilevel.vrbo: {**TWO_LOOPS, "num_inner_steps": 3},
    bilevel.pzobo: {"num_inner_steps": 10, "num_directions": 1, "smoothing": 0.01, "seed": 0},
    bilevel.truncated: {"num_inner_steps": 10},
    bilevel.f2sa: {"adjoint_lr": None, "penalty": None, "num_inner_steps": 1},
    bilevel.bome: {"adjoint_lr": None, "barrier": 0.5, "num_inner_steps": 10},
    bilevel.pbgd: {"adjoint_lr": None, "penalty": 10.0, "num_inner_steps": 10},
    bilevel.meha: {"penalty": None, "proximal": 1.0},
    bilevel.sama: {"inner_lr": None, "inner_optimizer": None},
    bilevel.darts: {"unroll_lr": None},
    distributed.task_parallel: {"group": None, "reduce": "mean", "chunk_size": None},
    distributed.local_tasks: {"group": None},
    distributed.save_state: {"keep": 2, "background": False, "group": None},
    distributed.load_state: {"step": None, "group": None},
}

STOPPING = {"maxiter": 1000, "rtol": None, "atol": 0.0}
PRECONDITIONED = {**STOPPING, "preconditioner": None}
FIELDS: dict[Any, dict[str, Any]] = {
    hf.CG: {**PRECONDITIONED, "check_symmetry": False},
    hf.NormalCG: STOPPING,
    hf.BiCGStab: PRECONDITIONED,
    hf.PipelinedCG: {**PRECONDITIONED, "replace": 50},
    hf.GMRES: {**PRECONDITIONED, "restart": None},
    hf.FixedPoint: {**STOPPING, "step_size": 1.0},
    hf.Neumann: {**STOPPING, "step_size": 1.0},
    hf.AndersonFixedPoint: {**STOPPING, "step_size": 1.0, "memory": 5},
    hf.Auto: {**STOPPING, "num_steps": 10},
    hf.OneStep: {"step_size": 1.0},
    hf.Nystrom: {"rank": None, "rho": 0.01, "seed": 0},
    hf.JacobiPreconditioner: {"num_probes": 10, "seed": 0},
    hf.NystromPreconditioner: {"rank": None, "damping": 0.0, "seed": 0},
    hf.Reverse: {"checkpoint": 1, "last": None, "slots": None},
    hf.ForwardMode: {"chunk_size": None},
    hf.FirstOrder: {"init": None},
    fixed_point_solvers.Picard: {**STOPPING, "step_size": 1.0, "batch_dim": None, "throw": True},
    fixed_point_solvers.Anderson: {**STOPPING, "memory": 5, "step_size": 1.0, "ridge": None},
    fixed_point_solvers.Broyden: {**STOPPING, "memory": 20, "batch_dim": None, "throw": True},
}


@pytest.mark.parametrize("fn", KEYWORD_ONLY, ids=lambda fn: fn.__qualname__)
def test_keyword_only_arguments(fn: Any) -> None:
    parameters = inspect.signature(fn).parameters
    for name, default in KEYWORD_ONLY[fn].items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert parameters[name].default == default, name
        assert type(parameters[name].default) is type(default), name


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_settings(cls: Any) -> None:
    made = cls()
    for name, default in FIELDS[cls].items():
        assert getattr(made, name) == default, name
        assert type(getattr(made, name)) is type(default), name
