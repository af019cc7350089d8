"""Arguments that are True or False: anything else is refused where it is given, by name."""

import functools
import re

import pytest
import torch

import hyperfunc as hf
from hyperfunc.fixed_point_solvers import Anderson, Broyden, Newton, Picard


def inner_loss(w, h):
    return ((w - h) ** 2).sum()


LAYER = hf.EquilibriumLayer(torch.nn.Identity())
START = {"init": lambda *_: torch.zeros(2)}
MINIMIZE = functools.partial(hf.minimize, inner_loss, hf.optim.sgd(0.1), 2, **START)
INNER = functools.partial(Picard().inner_solver, lambda z, h: z / 2, **START)
SOLVE = (lambda z, h: z / 2, torch.zeros(2), torch.ones(2))
FLAGS = {
    (function.__name__, name): (function, args, name)
    for function, args, names in (
        (hf.hypergrad, (inner_loss, inner_loss), "has_aux throw solver_has_aux"),
        (hf.hypergrad_and_value, (inner_loss, inner_loss), "has_aux throw solver_has_aux"),
        (hf.hypergrad_and_solution, (inner_loss, inner_loss), "has_aux throw solver_has_aux"),
        (hf.implicit_diff, (inner_loss,), "has_aux throw"),
        (hf.batch_indices, (4, 2, 1), "shuffle"),
        (hf.functional, (torch.nn.Identity(),), "include_frozen"),
        (hf.assign_grads, (torch.ones(2), torch.ones(2)), "add"),
        (hf.EquilibriumLayer, (torch.nn.Identity(),), "throw throw_backward"),
        (hf.ErrorBound, (), "sharpen"),
        (hf.CG, (), "check_symmetry"),
        (hf.Blockwise, (hf.CG(),), "check_blocks"),
        *((solver, (), "throw") for solver in (Picard, Anderson, Broyden, Newton)),
        (hf.optim.sgd, (0.1,), "nesterov maximize"),
        (hf.optim.adam, (0.1,), "amsgrad maximize decoupled_weight_decay"),
        (hf.optim.adamw, (0.1,), "amsgrad maximize"),
        (hf.optim.rmsprop, (0.1,), "centered maximize"),
        (hf.optim.adagrad, (0.1,), "maximize"),
    )
    for name in names.split()
} | {
    ("forward", "return_stats"): (LAYER, (torch.ones(2),), "return_stats"),
    ("forward", "return_trace"): (LAYER, (torch.ones(2),), "return_trace"),
    ("solve", "return_trace"): (Picard(), SOLVE, "return_trace"),
    ("inner_solver", "has_aux"): (INNER, (), "has_aux"),
    ("minimize", "has_aux"): (MINIMIZE, (), "has_aux"),
    ("minimize", "trace"): (MINIMIZE, (), "trace"),
}


@pytest.mark.parametrize(("function", "args", "name"), FLAGS.values(), ids=map("-".join, FLAGS))
def test_a_flag_is_true_or_false(function, args, name):
    for flag in (torch.tensor([True, False]), torch.tensor(True), "no", None, 1):
        if flag is None and name.startswith("throw"):
            continue  # which some of them know
        expected = f"{name} is .* of type {type(flag).__name__}; expected True or False"
        with pytest.raises(TypeError, match=expected) as caught:
            function(*args, **{name: flag})
        assert (f"Write {name}=bool(...)" in str(caught.value)) == isinstance(flag, torch.Tensor)
    with pytest.raises(TypeError, match=re.escape(f"{name}=bool(...), outside of any torch.func")):
        torch.func.vmap(lambda flag: function(*args, **{name: flag}))(torch.ones(2) > 0)
