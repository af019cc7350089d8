"""Bad input: what was got, what was expected, what to type, and which leaf it is about."""

import collections
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

import hyperfunc as hf

NAN = float("nan")
H = torch.tensor([1.0, 2.0])
TREE = {"fc1": {"weight": torch.ones(2, 3), "bias": torch.ones(())}, "fc2": [torch.ones(2)]}


def solver(h: Any, *args: Any) -> Tensor:
    return H.clone()


def outer_loss(w: Any, h: Any, *args: Any) -> Tensor:
    return (w**2).sum()


def inner_loss(w: Any, h: Any, *args: Any) -> Tensor:
    return ((w - h) ** 2).sum()


def make(**changes: Any) -> Any:
    """The transform of the functions above, but for those that are given."""
    keywords = {
        "inner_solver": solver,
        "outer_loss": outer_loss,
        "inner_loss": inner_loss,
    } | changes
    return hf.hypergrad(**{k: v for k, v in keywords.items() if v is not None})


def tree_of(leaf: Any) -> Any:
    """A tree like `TREE` with another leaf for the first weight."""
    return {"fc1": {"weight": leaf, "bias": torch.ones(())}, "fc2": [torch.ones(2)]}


def on_tree(**changes: Any) -> Any:
    keywords: Any = {
        "inner_solver": lambda h: tree_of(torch.ones(2, 3)),
        "outer_loss": lambda w, h: w["fc1"]["weight"].sum(),
        "inner_loss": None,
    }
    return make(**(keywords | changes))


Case = tuple[Callable[[], Any], type[Exception], str]

CONSTRUCTION: dict[str, Case] = {
    "no condition": (
        lambda: make(inner_loss=None),
        ValueError,
        "method CG(maxiter=1000, ...) needs to know what the inner solution satisfies; got none of "
        "fixed_point=, inner_loss=, optimality=. Pass one of them",
    ),
    "two conditions": (
        lambda: make(fixed_point=inner_loss),
        ValueError,
        "got fixed_point= and inner_loss=; expected one of fixed_point=, inner_loss=, optimality=",
    ),
    "three conditions": (
        lambda: make(fixed_point=inner_loss, optimality=inner_loss),
        ValueError,
        "got fixed_point= and inner_loss= and optimality=; expected one of",
    ),
    "a condition that is no function": (
        lambda: make(inner_loss=3),
        TypeError,
        "inner_loss=3 is not callable; expected a function of (params, hparams, *args)",
    ),
    "no outer loss": (
        lambda: make(outer_loss=None),
        TypeError,
        "hypergrad: outer_loss is None; expected a function of (params, hparams, *args). Write "
        "hypergrad(inner_solver, outer_loss, ...) or, as a decorator, @hypergrad(outer_loss=..., ",
    ),
    "an unknown keyword": (
        lambda: make(inner_los=inner_loss),
        TypeError,
        "hypergrad got the keyword argument 'inner_los', which it does not know; expected some of "
        "inner_solver, outer_loss, has_aux, fixed_point, inner_loss, optimality, method, throw, ",
    ),
    "a keyword of another transform": (
        lambda: make(inner_solver=None, error_bound=True),
        TypeError,
        "hypergrad got the keyword argument 'error_bound', which it does not know; expected",
    ),
    "a solver that is no function": (
        lambda: make(inner_solver=torch.ones(2)),
        TypeError,
        "the inner solver is <tensor of shape (2,) and dtype torch.float32>; "
        "expected a function (hparams, *args) -> params",
    ),
    "a decorated thing that is no function": (
        lambda: make(inner_solver=None)(3),
        TypeError,
        "the inner solver is 3; expected a function (hparams, *args) -> params",
    ),
    "a class for a method": (
        lambda: make(method=hf.NormalCG),
        TypeError,
        "method=NormalCG is a class; expected an object. Write method=hf.NormalCG()",
    ),
    "another class": (lambda: make(method=int), TypeError, "method=<class 'int'> is not a method"),
    "no method": (
        lambda: hf.hypergrad(solver, outer_loss, inner_loss=inner_loss, method=None),
        TypeError,
        "method=None is not a method; expected one of 'cg', 'normal_cg', ... or an object such as "
        "hf.CG(maxiter=20)",
    ),
    "an instance for implicit_diff": (
        lambda: hf.implicit_diff(solver, inner_loss=inner_loss, method=3),
        TypeError,
        "method=3 is not a method",
    ),
    "implicit_diff without a condition": (
        lambda: hf.implicit_diff(solver, method="dense"),
        ValueError,
        "method Dense() needs to know what the inner solution satisfies; got none of",
    ),
}

METHOD_NAMES = {
    "CG": "'cg'",
    "CG_normaleq": "'normal_cg'",
    "normal-cg": "'normal_cg'",
    "neuman": "'neumann'",
    "gmers": "'gmres'",
    "ReverseUnroll": "'reverse_unroll' or 'reverse'",
    "Neumann series": "'neumann'",
    "fixedpoint": "'fixed_point'",
    "Dense": "'dense'",
    "FOMAML": "'first_order'",
    "imaml": "'cg'",
}


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_near_names_are_suggested(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{name}'. Did you mean ") as error:
        make(method=name)
    suggestion = re.search(
        r"Did you mean (.*)\? Known methods: 'cg', 'normal_cg', ", str(error.value)
    )
    assert suggestion
    for expected in METHOD_NAMES[name].split(" or "):
        assert expected in suggestion[1].split(" or ")


@pytest.mark.parametrize(
    "name", ["", "xyz", "conjugate_gradient", "backpropagation through the weather"]
)
def test_far_names_are_not(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^unknown method '{name}'\. Known methods: 'cg', "):
        make(method=name)


CALLS: dict[str, Case] = {
    # What goes in
    "hparams a number": (
        lambda: make()({"lr": {"first": 0.1}}),
        TypeError,
        "hparams['lr']['first'] is 0.1 of type float; expected a floating-point tensor. Write "
        "torch.tensor(...) around a number",
    ),
    "hparams the parameters of a module": (
        lambda: make()(torch.nn.PReLU().parameters()),
        TypeError,
        "hparams is ...of type generator; expected a floating-point tensor. ...write apply, params "
        "= hf.functional(module)",
    ),
    "hparams a module": (
        lambda: make()({"net": torch.nn.Identity()}),
        TypeError,
        "hparams['net'] is Identity() of type Identity; expected a floating-point tensor. Pass its "
        "parameters: apply, params = hf.functional(module)",
    ),
    "hparams an object": (
        lambda: make()([H, types.SimpleNamespace(reg=H)]),
        TypeError,
        "hparams[1] is SimpleNamespace(...) of type SimpleNamespace; "
        "expected a floating-point tensor. If it holds tensors, register its class by "
        "optree.register_pytree_node(..., namespace='h",
    ),
    "hparams integers": (
        lambda: make()([torch.ones(2), torch.arange(2)]),
        TypeError,
        "hparams[1] has dtype torch.int64; expected a floating-point tensor. Convert it (.float() "
        "or .double()) or pass it through *args",
    ),
    "hparams boolean": (lambda: make()(H > 0), TypeError, "hparams has dtype torch.bool; expected"),
    "hparams complex": (
        lambda: make()({"a": H + 0j}),
        TypeError,
        "hparams['a'] has complex dtype torch.complex64; hypergradients are defined here for real "
        "tensors. Use torch.view_as_real",
    ),
    "hparams sparse": (
        lambda: make()({"a": H.to_sparse()}),
        TypeError,
        "hparams['a'] has layout torch.sparse_coo; expected a dense (strided) tensor. Call "
        ".to_dense()",
    ),
    "hparams empty": (
        lambda: make()({"a": [], "b": None}),
        ValueError,
        "hparams is an empty tree ({'a': [], 'b': None}); expected at least one floating-point",
    ),
    "hparams None": (lambda: make()(None), ValueError, "hparams is an empty tree (None)"),
    "hparams a generator": (
        lambda: make()(t for t in [H]),
        TypeError,
        "hparams is <generator object ...> of type generator; expected a floating-point tensor",
    ),
    "arguments a generator": (
        lambda: make()(H, {"parameters": (t for t in [H])}),
        TypeError,
        "(hparams, *args)[1]['parameters'] is <generator object ...>, which the first function to "
        "read it would use up. Pass list(...) of it",
    ),
    "arguments a map": (
        lambda: hf.implicit_diff(solver, inner_loss=inner_loss)(H, map(float, [1])),
        TypeError,
        "(hparams, *args)[1] is <map object ...>, which the first function to read it would use",
    ),
    "a keyword": (
        lambda: make()(H, X=H),
        TypeError,
        "hypergrad(solver, method=CG(...)) got the keyword argument 'X'; pass hparams and *args by "
        "position",
    ),
    "a start for implicit_diff": (
        lambda: hf.implicit_diff(solver, inner_loss=inner_loss)(H, adjoint_init=H),
        TypeError,
        "implicit_diff(solver, method=CG(...)) got the keyword argument 'adjoint_init'; pass",
    ),
    "a start of another structure": (
        lambda: make()(H, adjoint_init={"a": H}),
        ValueError,
        "adjoint_init has another structure than params: got PyTreeSpec({'a': *}...), expected "
        "PyTreeSpec(*...)",
    ),
    "a start of another shape": (
        lambda: make()(H, adjoint_init=torch.ones(3)),
        ValueError,
        "adjoint_init: the leaf for params has shape (3,), expected (2,)",
    ),
    "a start of another dtype": (
        lambda: make()(H, adjoint_init=H.double()),
        ValueError,
        "adjoint_init: the leaf for params has dtype torch.float64, expected torch.float32: write "
        ".to(torch.float32)",
    ),
    "a start on another device": (
        lambda: make()(H, adjoint_init=H.to("meta")),
        ValueError,
        "adjoint_init: the leaf for params is on meta, expected cpu: write .to('cpu')",
    ),
    "a start that is a number": (
        lambda: make()(H, adjoint_init=1.0),
        ValueError,
        "adjoint_init: the leaf for params is 1.0 of type float, expected a tensor",
    ),
    # What the inner solver does, and returns
    "solver writes to hparams": (
        lambda: make(inner_solver=lambda h: h["a"][1].add_(1.0))({"a": [H, H.clone()]}),
        ValueError,
        "the inner solver wrote to hparams['a'][1] in place; expected it to leave its arguments as "
        "they are. Start from a copy: hparams['a'][1].clone()$",
    ),
    "solver returns None": (
        lambda: make(inner_solver=lambda h: None)(H),
        TypeError,
        "the inner solver returned None; expected the tree of inner parameters. Is its return "
        "statement missing?",
    ),
    "solver returns a number": (
        lambda: make(inner_solver=lambda h: {"w": [1.5]})(H),
        TypeError,
        "params['w'][0] is 1.5 of type float; expected a floating-point tensor",
    ),
    "solver returns an array": (
        lambda: make(inner_solver=lambda h: h.numpy())(H),
        TypeError,
        "params is <array of shape (2,) and dtype float32> of type ndarray; "
        "expected a floating-point tensor. Write torch.as_tensor(...) around it, or decorate an "
        "inner solver that computes in NumPy with @hf.from_numpy",
    ),
    "solver returns an estimator": (
        lambda: make(inner_solver=hf.from_numpy(lambda h: types.SimpleNamespace(coef_=h)))(H),
        TypeError,
        "params is ... of type SimpleNamespace; ...Return its coef_ and intercept_, and "
        "decorate the solver with @hf.from_numpy",
    ),
    "solver returns integers": (
        lambda: make(inner_solver=lambda h: {"w": torch.ones(2, dtype=torch.long)})(H),
        TypeError,
        "params['w'] has dtype torch.int64; expected a floating-point tensor",
    ),
    "solver returns an empty tree": (
        lambda: make(inner_solver=lambda h: [])(H),
        ValueError,
        "params is an empty tree ([]); expected at least one floating-point tensor",
    ),
    "solver returns a complex tensor": (
        lambda: make(inner_solver=lambda h: [h * 1j])(H),
        TypeError,
        "params[0] has complex dtype torch.complex64",
    ),
    "solver returns a sparse tensor": (
        lambda: make(inner_solver=lambda h: h.to_sparse())(H),
        TypeError,
        "params has layout torch.sparse_coo; expected a dense",
    ),
    "solver returns NaN": (
        lambda: on_tree(inner_solver=lambda h: tree_of(h * NAN), inner_loss=inner_loss)(H),
        hf.HypergradError,
        "the inner solver returned non-finite values (NaN or Inf) in params['fc1']['weight']. "
        "Lower its step size, check the data, or pass throw=False",
    ),
    "solver returns Inf": (
        lambda: hf.implicit_diff(lambda h: h / 0, inner_loss=inner_loss)(H),
        hf.HypergradError,
        "the inner solver returned non-finite values (NaN or Inf) in params.",
    ),
    "solver returns NaN for some tasks": (
        lambda: vmap(make(inner_solver=lambda h: {"a": h, "b": h.log()}))(
            torch.tensor([[1.0, 1], [-1, 1], [1, 1], [2, -3]])
        ),
        hf.HypergradError,
        "the inner solver returned non-finite values (NaN or Inf) in params['b'] for 2 of 4 tasks "
        "(index 1, 3).",
    ),
    # What the conditions return
    **{
        f"{kind} returns {what}": (
            lambda kind=kind, value=value: on_tree(**{kind: lambda w, h: value})(H),
            ValueError,
            f"the output of {kind}{text}",
        )
        for kind in ("fixed_point", "optimality")
        for what, value, text in [
            ("None", None, " has another structure than params: got PyTreeSpec(None...), expected"),
            (
                "a bare tensor",
                H,
                " has another structure than params: got PyTreeSpec(*...), expect",
            ),
            (
                "a namedtuple",
                collections.namedtuple("P", "fc1 fc2")(TREE["fc1"], TREE["fc2"]),
                " has another structure than params: got PyTreeSpec(P(fc1=...), expected",
            ),
            (
                "a number in a leaf",
                tree_of(0.5),
                ": the leaf for params['fc1']['weight'] is 0.5 of type float, expected a tensor",
            ),
            (
                "another shape",
                tree_of(torch.ones(3, 2)),
                ": the leaf for params['fc1']['weight'] has shape (3, 2), expected (2, 3)",
            ),
            (
                "a shape that broadcasts",
                tree_of(torch.ones(())),
                ": the leaf for params['fc1']['weight'] has shape (), expected (2, 3)",
            ),
            (
                "another dtype",
                tree_of(torch.ones(2, 3).double()),
                ": the leaf for params['fc1']['weight'] has dtype torch.float64, expected "
                "torch.float32: write .to(torch.float32)",
            ),
            (
                "another device",
                tree_of(torch.ones(2, 3, device="meta")),
                ": the leaf for params['fc1']['weight'] is on meta, expected cpu: write .to('cpu')",
            ),
        ]
    },
    "inner_loss returns a vector": (
        lambda: make(inner_loss=lambda w, h: w - h)(H),
        ValueError,
        "inner_loss returned a tensor of shape (2,); expected a scalar. Reduce it with .sum() or "
        ".mean()",
    ),
    "inner_loss returns one entry": (
        lambda: make(inner_loss=lambda w, h: (w - h).sum().reshape(1))(H),
        ValueError,
        "inner_loss returned a tensor of shape (1,); expected a scalar",
    ),
    "inner_loss returns None": (
        lambda: make(inner_loss=lambda w, h: None)(H),
        TypeError,
        "inner_loss returned NoneType; expected a scalar tensor",
    ),
    "inner_loss returns a pair": (
        lambda: make(inner_loss=lambda w, h: (w.sum(), w))(H),
        TypeError,
        "inner_loss returned tuple; expected a scalar tensor alone. ...trace=True",
    ),
    "inner_loss returns an integer": (
        lambda: make(inner_loss=lambda w, h: torch.tensor(1))(H),
        TypeError,
        "inner_loss returned a scalar of dtype torch.int64; expected a floating-point scalar",
    ),
    # What the outer loss returns
    "outer_loss returns a vector": (
        lambda: make(outer_loss=lambda w, h: w)(H),
        ValueError,
        "outer_loss returned a tensor of shape (2,); expected a scalar. Reduce it with .sum() or",
    ),
    "outer_loss returns a number": (
        lambda: make(outer_loss=lambda w, h: w.sum().item())(H),
        TypeError,
        "outer_loss returned float; expected a scalar tensor",
    ),
    "outer_loss returns an integer": (
        lambda: make(outer_loss=lambda w, h: w.argmax())(H),
        TypeError,
        "outer_loss returned a scalar of dtype torch.int64; expected a floating-point scalar",
    ),
    "outer_loss returns a complex number": (
        lambda: make(outer_loss=lambda w, h: w.sum() * 1j)(H),
        TypeError,
        "outer_loss returned a scalar of dtype torch.complex64; expected a floating-point scalar",
    ),
    "aux without has_aux": (
        lambda: make(outer_loss=lambda w, h: (w.sum(), w))(H),
        TypeError,
        "outer_loss returned tuple; expected a scalar tensor. For an outer loss that returns "
        "(value, aux), pass has_aux=True",
    ),
    **{
        f"has_aux and {what}": (
            lambda value=value: make(outer_loss=value, has_aux=True)(H),
            TypeError,
            f"outer_loss returned {kind}; expected a tuple (scalar, aux), since has_aux=True",
        )
        for what, value, kind in [
            ("a scalar", lambda w, h: w.sum(), "Tensor"),
            ("three values", lambda w, h: (w.sum(), w, w), "tuple"),
            ("a list", lambda w, h: [w.sum(), w], "list"),
        ]
    },
    "has_aux and the wrong order": (
        lambda: make(outer_loss=lambda w, h: (w, w.sum()), has_aux=True)(H),
        ValueError,
        "outer_loss returned a tensor of shape (2,); expected a scalar",
    ),
    # What the linear solve finds
    "an indefinite operator": (
        lambda: make(inner_loss=lambda w, h: -inner_loss(w, h), method=hf.CG(maxiter=3))(H),
        hf.HypergradError,
        "the linear solve with CG(maxiter=3, ...) failed: the recurrence broke down: the operator "
        "is not what the method assumes (CG needs a symmetric positive definite one",
    ),
    "an indefinite operator without hparams": (
        lambda: make(inner_loss=lambda w, h: -(w**2).sum())(H),
        ValueError,
        "no derivative reaches hparams: inner_loss computes nothing from them. ",
    ),
    "a non-symmetric operator": (
        lambda: make(
            inner_loss=None, optimality=lambda w, h: torch.stack([w[0] + w[1], w[1] - w[0]]) - h
        )(H),
        hf.HypergradError,
        "the linear solve with CG(maxiter=1000, ...) failed: the recurrence broke down",
    ),
    "no contraction": (
        lambda: make(method="fixed_point", inner_loss=lambda w, h: 5 * inner_loss(w, h))(H),
        hf.HypergradError,
        "the linear solve with FixedPoint(...) failed: the residual grew instead of shrinking: the "
        "iteration is not a contraction here, or the operator is nearly singular (use a smaller "
        "step_size, a method that needs no contraction: NormalCG, ",
    ),
    "a singular operator": (
        lambda: make(method="dense", inner_loss=lambda w, h: w.sum() * h.sum())(H),
        hf.HypergradError,
        "the linear solve with Dense() failed: the recurrence broke down",
    ),
    "NaN in the operator": (
        lambda: make(inner_loss=lambda w, h: (NAN * (w - h) ** 2).sum())(H),
        hf.HypergradError,
        "the linear solve with CG(...) failed: non-finite values (NaN or Inf) appeared. Pass "
        "throw=False to get the result codes instead",
    ),
    "NaN in the outer gradient": (
        lambda: make(outer_loss=lambda w, h: (w * NAN).sum())(H),
        hf.HypergradError,
        "the linear solve with CG(...) failed: non-finite values",
    ),
    "NaN in the direct gradient": (
        lambda: make(
            outer_loss=lambda w, h: w.sum() + (h["b"] * NAN).sum(),
            inner_loss=lambda w, h: inner_loss(w, h["a"]),
        )({"a": H, "b": H}),
        hf.HypergradError,
        "...hparams['b']",
    ),
}


TRANSFORMS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "plain": lambda call: call(),
    "vmap": lambda call: vmap(lambda x: (call(), x)[1])(torch.zeros(2)),
    "grad": lambda call: grad(lambda x: (call(), x)[1])(torch.zeros(())),
    "vmap of grad": lambda call: vmap(grad(lambda x: (call(), x)[1]))(torch.zeros(2)),
    "no_grad": lambda call: torch.no_grad()(call)(),
}


def check(case: Case, transform: Callable[[Callable[[], Any]], Any]) -> None:
    """The texts begin as the table says, where ``...`` is any text and ``$`` the end."""
    call, kind, text = case
    pattern = ".*?".join(re.escape(part) for part in text.removesuffix("$").split("..."))
    with pytest.raises(kind, match="^" + pattern + ("$" if text.endswith("$") else "")) as error:
        transform(call)
    assert type(error.value) is kind


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_bad_construction(name: str) -> None:
    check(CONSTRUCTION[name], TRANSFORMS["plain"])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_bad_calls(name: str, transform: str) -> None:
    check(CALLS[name], TRANSFORMS[transform])


def test_stacked_starts_are_to_be_mapped_over() -> None:
    """What vmap does not do for keywords."""
    fn = hf.hypergrad_and_solution(solver, outer_loss, inner_loss=inner_loss)
    hparams = torch.stack([H, 2 * H])
    grads, solution = vmap(fn)(hparams)
    with pytest.raises(
        ValueError,
        match=r"^adjoint_init: the leaf for params has shape \(2, 2\), expected \(2,\). If it is "
        r"stacked: vmap maps no keywords, so write vmap\(lambda h, start: fn\(h, adjoint_init=",
    ):
        vmap(fn)(hparams, adjoint_init=solution.adjoint)
    again, warm = vmap(lambda h, start: fn(h, adjoint_init=start))(hparams, solution.adjoint)
    torch.testing.assert_close(again, grads)
    assert warm.stats.num_steps.tolist() == [0, 0]


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "requires grad": lambda fn: fn(H.clone().requires_grad_()),
    "vmap": lambda fn: vmap(fn)(torch.stack([H, H])),
    "nested vmap": lambda fn: vmap(vmap(fn))(torch.stack([H, H]).reshape(1, 2, 2)),
    "grad": lambda fn: grad(lambda h: outer_loss(fn(h), h))(H.clone()),
    "vmap of grad": lambda fn: vmap(grad(lambda h: outer_loss(fn(h), h)))(torch.stack([H, H])),
    "grad of vmap": lambda fn: grad(lambda h: vmap(fn)(h).sum())(torch.stack([H, H])),
    "jacfwd": lambda fn: jacfwd(fn)(H.clone()),
    "hessian": lambda fn: hessian(fn)(H.clone()),
}


@pytest.mark.parametrize("call", IN_PLACE)
def test_solvers_that_write_to_hparams(call: str) -> None:
    def writes(h: Tensor) -> Tensor:
        for _ in range(2):
            h -= 0.5 * (h - 1)
        return h

    def copies(h: Tensor) -> Tensor:
        return writes(h.clone())

    keywords: Any = {"optimality": lambda w, h: w - h}
    for make_fn in (
        lambda s: hf.implicit_diff(s, **keywords),
        lambda s: hf.hypergrad(s, outer_loss, **keywords),
    ):
        with pytest.raises(ValueError, match=r"^the inner solver wrote to hparams in place; expec"):
            IN_PLACE[call](make_fn(writes))
        IN_PLACE[call](make_fn(copies))


def test_the_older_vmap_of_autograd() -> None:
    """It gives no access to a value, which any loop that may stop early needs."""
    solution = hf.implicit_diff(solver, inner_loss=inner_loss)
    text = r"^is_grads_batched=True in .* map by an older vmap, .* Use torch.func.jacrev, jacfwd"
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.functional.jacobian(solution, H, vectorize=True)
    torch.testing.assert_close(torch.autograd.functional.jacobian(solution, H), torch.eye(2))


@pytest.mark.parametrize("transform", [hf.hypergrad_and_value, hf.hypergrad_and_solution])
def test_the_other_transforms_have_the_same_errors(transform: Any) -> None:
    with pytest.raises(
        TypeError, match=f"^{transform.__name__}: outer_loss is None; expected a fu"
    ):
        transform(solver, inner_loss=inner_loss)
    with pytest.raises(ValueError, match="got none of fixed_point=, inner_loss=, optimality="):
        transform(solver, outer_loss)
    with pytest.raises(TypeError, match="the inner solver returned None"):
        transform(lambda h: None, outer_loss, inner_loss=inner_loss)(H)


def test_signatures_show_all_keywords_and_their_defaults() -> None:
    keywords = {"fixed_point": None, "inner_loss": None, "optimality": None}
    keywords |= {"method": "cg", "throw": True, "products": "reverse"}
    more = {"outer_loss": None, "has_aux": False, "solver_has_aux": False, "compile": False}
    for transform, expected in {
        hf.implicit_diff: keywords | {"has_aux": False, "on_backward": None},
        hf.hypergrad: keywords | more,
        hf.hypergrad_and_value: keywords | more,
        hf.hypergrad_and_solution: keywords | more | {"error_bound": False},
    }.items():
        parameters = inspect.signature(transform).parameters
        shown = {name: parameter.default for name, parameter in parameters.items()}
        assert shown == {"inner_solver": None} | expected


def test_errors_of_the_users_functions_come_through() -> None:
    def failing(*args: Any) -> Any:
        raise KeyError("mine")

    for name in ("inner_solver", "outer_loss", "inner_loss"):
        for transform in TRANSFORMS.values():
            with pytest.raises(KeyError, match="mine"):
                transform(lambda name=name: make(**{name: failing})(H))


def test_without_throw_nothing_raises_and_the_codes_tell() -> None:
    def run(**changes: Any) -> tuple[list[float], str]:
        functions = {"inner_solver": solver, "outer_loss": outer_loss, "inner_loss": inner_loss}
        fn = hf.hypergrad_and_solution(**(functions | changes), throw=False)
        grads, solution = fn(H)
        return grads.tolist(), hf.RESULTS(int(solution.stats.result)).name

    assert run() == ([2.0, 4.0], "success")
    assert run(method=hf.CG(maxiter=0)) == ([0.0, 0.0], "max_steps")
    assert run(inner_loss=lambda w, h: -inner_loss(w, h)) == ([0.0, 0.0], "breakdown")
    for changes in (
        {"inner_solver": lambda h: h * NAN},
        {"outer_loss": lambda w, h: (w * NAN).sum()},
        {"inner_loss": lambda w, h: (NAN * (w - h) ** 2).sum()},
        {"inner_loss": lambda w, h: (NAN * (w - h) ** 2).sum(), "method": "normal_cg"},
        {"inner_loss": lambda w, h: (NAN * (w - h) ** 2).sum(), "method": "fixed_point"},
        {"inner_loss": lambda w, h: (NAN * (w - h) ** 2).sum(), "method": "dense"},
    ):
        grads, result = run(**changes)
        assert result == "nonfinite"
        assert all(g != g for g in grads), "a hypergradient of zeros would look like a result"

    implicit = hf.implicit_diff(lambda h: h * NAN, inner_loss=inner_loss, throw=False)
    assert torch.isnan(implicit(H)).all()


def test_reaching_maxiter_does_not_raise() -> None:
    """A truncated solve is a method of its own; the code tells it from a finished one."""
    spread = torch.tensor([1.0, 10.0])

    def loss(w: Tensor, h: Tensor) -> Tensor:
        return (spread * (w - h) ** 2).sum()

    fn = hf.hypergrad_and_solution(solver, outer_loss, inner_loss=loss, method=hf.CG(maxiter=1))
    assert int(fn(H)[1].stats.result) == hf.RESULTS.max_steps
