"""From ``torch.nn`` modules to pure functions, and from gradients back to ``.grad``."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias, cast, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hyperfunc._engine.checks import check_flags
from hyperfunc._engine.shown import show
from hyperfunc._engine.trees import check_like, flatten, flatten_floating
from hyperfunc._torch import derivative_rules
from hyperfunc._torch.batching import mapped_zero
from hyperfunc._torch.checkpointing import computed_once
from hyperfunc._torch.internals import copy_on_write, is_wrapped, tree_leaves
from hyperfunc._torch.layers import is_compiled, needs_rules, use_values
from hyperfunc._torch.tensordicts import is_tensordict
from hyperfunc._torch.tracking import (
    STATE,
    foreign_leaves,
    is_tracked,
    transforms_active,
    variables_of_others,
)
from hyperfunc._torch.unsupported import refuse_unmappable
from hyperfunc._types import TensorTree

# Classes of torch.distributed.fsdp, which takes a moment to import.
_GATHERING = ("FSDPModule", "FullyShardedDataParallel")

BufferMode: TypeAlias = Literal["batch", "frozen", "update"]


def functional(
    module: nn.Module, *, buffers: BufferMode = "batch", include_frozen: bool = False
) -> tuple[FunctionalModule, dict[str, Tensor]]:
    r"""Turn a module into a pure function of its parameters.

    ``apply(params, *inputs)`` is what ``module(*inputs)`` would return if the module held
    ``params``: a function that ``torch.func`` can differentiate and map, over the inputs and over
    stacked parameters alike. The module is copied once, here, with the mode of each layer, training
    or evaluation: nothing done with the result changes it, and nothing done later to the module
    changes the result. What is not put into ``params``, such as a frozen base beside a trainable
    adapter, takes no memory until it is written to: copies share it, where it is torch's own. (A
    NumPy array that was made of a parameter before writes to both.)

    A normalisation layer in training mode computes, from the mean :math:`\mu_B` and the variance
    :math:`\sigma_B^2` of the :math:`n` values of a channel in its batch,

    .. math::
        y = \gamma \, (x - \mu_B) / \sqrt{\sigma_B^2 + \epsilon} + \beta, \qquad
        m \leftarrow (1 - \rho) \, m + \rho \, \mu_B, \qquad
        v \leftarrow (1 - \rho) \, v + \rho \, \tfrac{n}{n - 1} \sigma_B^2,

    and one in evaluation mode puts the running statistics :math:`m, v` in place of
    :math:`\mu_B, \sigma_B^2`. A pure function does not assign to buffers :math:`m, v`: ``buffers``
    says what happens instead.

    - ``"batch"``: a layer in training mode uses the statistics of its batch. What ``forward``
      writes to a buffer is dropped.
    - ``"frozen"``: every normalisation layer uses its running statistics :math:`m, v`, whatever
      its mode: those of the module, as constants, or those that a call is given. Other layers,
      such as Dropout, stay in their modes.
    - ``"update"``: as "batch", but ``apply`` returns ``(output, new_buffers)``: by name, the
      buffers that the module would hold after the call; under ``vmap``, those of each task.
      Derivatives flow out of them, so that statistics gathered in inner steps may be used by an
      outer loss; a counter among them is an integer, which inner solvers carry along. In a
      training loop of your own, where nothing differentiates through the steps, ``.detach()`` them
      after each, or they keep the graphs of all.

    All other buffers (tables, masks) are constants. Spectral normalisation in training mode takes
    its power iteration steps from the stored vectors (none if "frozen"), and no derivative goes
    through them. A forward of your own that writes to a buffer in place (``self.m.mul_(0.9)``)
    works under ``vmap`` with "update"; written as ``self.m = 0.9 * self.m``, with all three.
    Layers that draw random numbers need ``vmap(..., randomness="different")`` or ``"same"``.

    Args:
        module: any ``nn.Module`` without wrappers such as DataParallel; parametrisations, hooks and
            tied weights work. Compile not the module, but what is differentiated, by ``compile`` of
            `hypergrad` or `minimize`: ``torch.compile(apply)`` has no second derivative. Parameters
            may be DTensors, also those of a tensor-parallel plan, but not of ``fully_shard``.
        buffers: what becomes of the buffers.
        include_frozen: also put the floating-point parameters with ``requires_grad=False`` into
            ``params``. Without it they are constants of ``apply``.

    Returns:
        The pair ``(apply, params)``. ``params`` maps each parameter's name to a detached copy of
        it; tied weights appear once, under their first name, and stay tied. For ``apply`` see
        `FunctionalModule`.

    Raises:
        TypeError: if ``module`` is not a module, or is a wrapper, or cannot be copied.
        ValueError: if ``buffers`` is not one of the three, or a lazy layer has not run yet.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> apply, params = hf.functional(net)
        >>> sorted(params)
        ['0.bias', '0.weight', '1.bias', '1.weight']
        >>> tasks = torch.randn(5, 8, 3)  # five tasks of eight rows
        >>> torch.func.vmap(apply, in_dims=(None, 0))(params, tasks).shape
        torch.Size([5, 8, 4])

        >>> apply, params = hf.functional(net, buffers="update")
        >>> output, buffers = torch.func.vmap(apply, in_dims=(None, 0))(params, tasks)
        >>> buffers["1.running_mean"].shape
        torch.Size([5, 4])
        >>> net[1].num_batches_tracked  # the module has not noticed
        tensor(0)

    Ioffe and Szegedy, "Batch normalization", 2015; Miyato et al., "Spectral normalization", 2018.
    """
    check_flags("functional", include_frozen=include_frozen)
    _check_module(module)
    if buffers not in get_args(BufferMode):
        raise ValueError(
            f"functional(module, buffers={show(buffers)}): expected one of "
            f"{', '.join(map(repr, get_args(BufferMode)))}"
        )
    chosen = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or (include_frozen and parameter.is_floating_point())
    }
    params = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    return FunctionalModule(_private_copy(module, chosen), tuple(chosen), buffers), params


def module_map(
    cell: nn.Module, *, buffers: Literal["batch", "frozen"] = "batch"
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    r"""Turn a module from states to states into a fixed-point map with its parameters as hparams.

    For a cell :math:`z \mapsto \mathrm{cell}_\theta(z, x)`, the map is
    :math:`\phi(z, \theta, x) = \mathrm{cell}_\theta(z, x)`: the solution
    :math:`z^* = \phi(z^*, \theta, x)` is the ``params``, the weights :math:`\theta` are the
    ``hparams``, and the inputs :math:`x` are the ``*args``.

    The map must be deterministic to have a fixed point: put cells with Dropout in evaluation mode.

    Args:
        cell: a module whose ``forward(state, *inputs)`` returns a tree like ``state``.
        buffers: "batch" or "frozen", as in `functional`.

    Returns:
        The pair ``(fixed_point, weights)``: ``fixed_point(state, weights, *inputs) -> state``, and
        the detached parameters by name.

    Raises:
        TypeError: as `functional`.
        ValueError: as `functional`, and for ``buffers="update"``: a map that is iterated has no
            single update.

    Example:
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 3)
        ...
        ...     def forward(self, z, x):
        ...         return torch.tanh(0.5 * self.linear(z) + x)
        >>> fixed_point, weights = hf.module_map(Cell())
        >>> z, x = torch.zeros(3), torch.ones(3)
        >>> for _ in range(50):
        ...     z = fixed_point(z, weights, x)
        >>> torch.allclose(z, fixed_point(z, weights, x))
        True

    Bai, Kolter and Koltun, "Deep equilibrium models", 2019.
    """
    if cast(str, buffers) == "update":
        raise ValueError(
            "module_map(cell, buffers='update'): a fixed-point map returns a state and nothing "
            "else. Solve with buffers='batch' or 'frozen', then call the apply of "
            "functional(cell, buffers='update') once, at the solution"
        )
    apply, weights = functional(cell, buffers=buffers)
    return _ModuleMap(apply), weights


def assign_grads(
    tree_or_module: TensorTree | nn.Module, grads: TensorTree, add: bool = False
) -> None:
    r"""Write gradients into ``.grad``, where the optimisers of ``torch.optim`` look for them.

    Sets :math:`\mathtt{leaf.grad} \leftarrow g`, or :math:`\mathtt{leaf.grad} + g` with ``add``, to
    detached copies. A tensor that occurs in several places of the tree gets the sum of its
    gradients. All is checked before anything is written.

    Args:
        tree_or_module: a tree of the leaf tensors that the optimiser holds, or a module.
        grads: for a tree, one of the same structure. For a module, a dictionary from the names of
            its trainable parameters, as `functional` names them; frozen ones may be added.
        add: add to a ``.grad`` that is already there instead of replacing it.

    Raises:
        TypeError: if a leaf is not a floating-point tensor, or the gradients of a module are not a
            dictionary.
        ValueError: if structures, names, shapes, dtypes or devices differ, a leaf was computed from
            other tensors (autograd keeps no ``.grad`` for it), or a gradient belongs to a
            ``torch.func`` transform that is still running.

    Example:
        >>> hparams = {"log_reg": torch.zeros(2)}
        >>> optimizer = torch.optim.SGD(hparams.values(), lr=0.1)
        >>> hf.assign_grads(hparams, {"log_reg": torch.ones(2)})
        >>> optimizer.step()
        >>> hparams["log_reg"]
        tensor([-0.1000, -0.1000])
    """
    check_flags("assign_grads", add=add)
    if isinstance(tree_or_module, nn.Module) and not is_tensordict(tree_or_module):
        root = "module"
        tree, grads = _named_targets(tree_or_module, grads)
        if not tree:
            return
    else:
        root, tree = "tree", cast(TensorTree, tree_or_module)
    targets, spec = flatten_floating(tree, root)
    values, values_spec = flatten(grads)
    check_like(values, values_spec, targets, spec, "assign_grads: grads", root)
    if not all(target.is_leaf for target in targets):
        raise ValueError(
            f"assign_grads: {root} holds a tensor that was computed from others, which keeps no "
            f".grad. Pass the tensors that the optimiser holds"
        )
    if any(is_wrapped(value) for value in values):
        raise ValueError(
            "assign_grads: grads belong to a torch.func transform that is still running. Return "
            "them from the transformed function, and assign what the transform returns"
        )
    totals: dict[int, Tensor] = {}
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            before = totals.get(id(target), target.grad if add else None)
            totals[id(target)] = value.detach().clone() if before is None else before + value
    for target in targets:
        target.grad = totals[id(target)]


@final
class FunctionalModule:
    """The pure function of a module that `functional` makes: ``apply(params, *inputs)``.

    ``apply.buffers`` is a copy of the buffers that it holds. A call takes others in their place by
    the keyword ``buffers``, such as an earlier call returned: so running statistics are carried
    from step to step, or from adaptation ("update") to evaluation ("frozen"). To map them write
    ``vmap(lambda params, buffers, x: apply(params, x, buffers=buffers))``. All other keywords go to
    the module. One object serves one thread at a time; make further ones with `copy.deepcopy`.

    Example:
        >>> net = torch.nn.BatchNorm1d(2, affine=False)
        >>> adapt, params = hf.functional(net, buffers="update")
        >>> evaluate, _ = hf.functional(net, buffers="frozen")
        >>> buffers = adapt.buffers
        >>> for _ in range(100):
        ...     _, buffers = adapt(params, torch.tensor([[1.0, 2.0], [3.0, 6.0]]), buffers=buffers)
        >>> evaluate(params, torch.tensor([[2.0, 4.0]]), buffers=buffers).abs() < 1e-3
        tensor([[True, True]])
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], mode: BufferMode) -> None:
        self._name, self._mode = type(module).__name__, mode
        self._buffers = dict(module.named_buffers())
        self._stateful = {
            name for name in self._buffers if module.get_submodule(name.rpartition(".")[0]).training
        }
        for layer in module.modules():
            use_values(layer, mode)
        self._module, self._layers = module, tuple(module.modules())
        self._needs_rules = any(map(needs_rules, self._layers))
        tensors: dict[str, Tensor] = dict(module.named_parameters())
        self._shapes = {name: tensors[name].shape for name in names}
        tensors.update(self._buffers)
        # A tied tensor has one name in params and is put in under all that it has in the module.
        first = {id(tensor): name for name, tensor in tensors.items()}
        self._aliases = {
            alias: first[id(tensor)]
            for named in (module.named_parameters, module.named_buffers)
            for alias, tensor in named(remove_duplicate=False)
            if first[id(tensor)] in self._shapes or first[id(tensor)] in self._buffers
        }

    @property
    def buffers(self) -> dict[str, Tensor]:
        """A copy of the buffers that a call uses when it is given none."""
        return {name: buffer.clone() for name, buffer in self._buffers.items()}

    def __call__(
        self,
        params: Mapping[str, Tensor],
        /,
        *inputs: Any,
        buffers: Mapping[str, Tensor] | None = None,
        **keywords: Any,
    ) -> Any:
        """What the module returns for these inputs if it holds these parameters."""
        self._check(params, "params", self._shapes)
        given = buffers is not None
        if buffers is None:
            buffers = self._buffers
        else:
            shapes = {name: buffer.shape for name, buffer in self._buffers.items()}
            self._check(buffers, "buffers", shapes)
        tensors = {**params, **self._fresh(buffers, given, (params, inputs, keywords))}
        values = {alias: tensors[name] for alias, name in self._aliases.items()}
        attributes = [vars(layer).copy() for layer in self._layers]
        try:
            rules = self._rules(values, (inputs, keywords))
            with computed_once(values, inputs, keywords), rules:
                output = torch.func.functional_call(
                    self._module, values, inputs, keywords, tie_weights=False
                )
        except RuntimeError as error:
            refuse_unmappable(f"{self._name}: its forward", error)
            raise
        finally:
            # What forward keeps on a layer (a cache, a hidden state) must not reach the next call.
            for layer, before in zip(self._layers, attributes, strict=True):
                object.__setattr__(layer, "__dict__", before)
        self._check_graph(output, (params, buffers, inputs, keywords))
        if self._mode != "update":
            return output
        return output, {name: values[name] for name in self._buffers}

    def __repr__(self) -> str:
        return f"<functional({self._name}, buffers={self._mode!r}), {len(self._shapes)} parameters>"

    def _carries_state(self, values: Mapping[str, Tensor]) -> bool:
        """Whether derivatives may flow in or out of the buffers, for which torch has no rules."""
        if self._mode == "update":
            return torch.is_grad_enabled()
        return any(values[name].requires_grad for name in self._buffers.keys() & values.keys())

    def _rules(self, values: Mapping[str, Tensor], inputs: Any) -> AbstractContextManager[Any]:
        """The derivative rules, where a second derivative or a vmap of the forward may be meant."""
        if transforms_active():
            return derivative_rules.active()
        variables = variables_of_others((*values.values(), *tree_leaves(inputs)))
        if not variables and not self._needs_rules and not self._carries_state(values):
            return nullcontext()
        # with a leaf of the user's, a function that we differentiate may do so itself
        own = any(variable.is_leaf for variable in variables)
        return derivative_rules.active(order=math.inf if own else 0)

    def _fresh(
        self, buffers: Mapping[str, Tensor], given: bool, arguments: Any
    ) -> dict[str, Tensor]:
        """Copies of the buffers that forward may write to, mapped under vmap where they must be."""
        zero = None
        if self._mode == "update" and self._stateful and transforms_active():
            zero = mapped_zero((arguments, dict(buffers)))
        fresh = {
            name: buffer.clone()
            if zero is None or name not in self._stateful
            else buffer + zero.to(device=buffer.device, dtype=buffer.dtype)
            for name, buffer in buffers.items()
        }
        for name, buffer in fresh.items():
            updated = self._mode == "update" and name in self._stateful
            if updated or not given:
                setattr(buffer, STATE, updated)
        return fresh

    def _check(self, given: Any, what: str, shapes: Mapping[str, torch.Size]) -> None:
        """Raise unless a dictionary has these names and shapes."""
        if not isinstance(given, Mapping):
            raise TypeError(
                f"apply: {what} is of type {type(given).__name__}; expected a dictionary of "
                f"tensors. Call apply(params, *inputs), with the params of functional(module)"
            )
        if given.keys() != shapes.keys():
            raise ValueError(
                f"apply: {what} has other names than {self._name}: "
                f"{_compare_names(given.keys(), shapes.keys())}"
            )
        with derivative_rules.inactive():  # they look at each attribute that is read
            if all(getattr(given[name], "shape", None) == shape for name, shape in shapes.items()):
                return
        for name, shape in shapes.items():
            if not isinstance(given[name], Tensor):
                raise TypeError(
                    f"apply: {what}[{name!r}] is of type {type(given[name]).__name__}; "
                    f"expected a tensor"
                )
            if given[name].shape != shape:
                raise ValueError(
                    f"apply: {what}[{name!r}] has shape {tuple(given[name].shape)}, expected "
                    f"{tuple(shape)}. If it is stacked, map over it: {_MAPPED[what]}"
                )

    def _check_graph(self, output: Any, arguments: Any) -> None:
        """Raise if the output depends on a parameter of a module instead of on params."""
        if transforms_active() or is_tracked(tree_leaves(arguments)):
            return
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, nn.Parameter) for leaf in foreign_leaves(outputs, ())):
            raise RuntimeError(
                f"{self._name}: its forward uses a trainable parameter that it does not reach by "
                f"its registered name (but by a list or a closure), so apply cannot put params in "
                f"its place. Read it as self.name of the layer that registers it, or make it a "
                f"constant by requires_grad_(False)"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _ModuleMap:
    """``(state, weights, *inputs) -> state`` of a cell."""

    apply: FunctionalModule

    def __call__(self, state: TensorTree, weights: dict[str, Tensor], /, *inputs: Any) -> Any:
        return self.apply(weights, state, *inputs)


_MAPPED = {
    "params": "torch.func.vmap(apply)",
    "buffers": "torch.func.vmap(lambda params, buffers, x: apply(params, x, buffers=buffers))",
}


def _check_module(module: Any) -> None:
    """Raise unless a module can be copied and called with other tensors in place of its own."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"functional(module): got {show(module)} of type {type(module).__name__}; expected a "
            f"torch.nn.Module. A function of (params, *inputs) needs no conversion"
        )
    for name, layer in module.named_modules():
        where = f"functional(module): {name or 'module'} is a {type(layer).__name__}"
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TypeError(f"{where}; pass the module inside it (its .module)")
        if any(base.__name__ in _GATHERING for base in type(layer).__mro__):
            raise TypeError(
                f"{where}, whose hooks gather the parameters that it holds, not those it is called "
                f"with. Pass the module before it was sharded, and shard its parameters: "
                f"params = {{name: torch.distributed.tensor.distribute_tensor(p, mesh, [Shard(0)]) "
                f"for name, p in params.items()}}. Modules whose parameters are DTensors, such as "
                f"made by parallelize_module, can be passed as they are. First-order loops call "
                f"the module itself: hf.bilevel.module_loop"
            )
        if is_compiled(layer):
            raise TypeError(
                f"{where}, made by torch.compile; pass the module that was compiled. To compile, "
                f"write hf.hypergrad(..., compile=True) or hf.minimize(..., compile=True); "
                f"torch.compile(apply) has first derivatives alone"
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(f"{where}; pass the module before torch.jit.script or trace")
    for kind in ("parameter", "buffer"):
        for name, tensor in getattr(module, f"named_{kind}s")():
            if is_lazy(tensor):
                raise ValueError(
                    f"functional(module): {kind} {name!r} has no shape yet, as its layer is lazy. "
                    f"Run the module once on example inputs first: module(*inputs)"
                )


def _private_copy(module: nn.Module, chosen: Mapping[str, nn.Parameter]) -> nn.Module:
    """A copy of the module, with NaN for the chosen parameters.

    It shares the memory of the others, until one of the two is written to.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.full_like(p.new_empty(()), torch.nan).expand(p.shape))
        for p in chosen.values()
    }
    for p in module.parameters():
        if type(p) is nn.Parameter and type(p.data) is Tensor and not p.is_inference():
            memo.setdefault(id(p), nn.Parameter(copy_on_write(p.detach()), requires_grad=False))
    for layer in module.modules():
        for tensor in (*vars(layer).values(), *layer.buffers(recurse=False)):
            # Hooks (weight_norm, pruning) leave computed tensors, which copy.deepcopy refuses.
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"functional(module): {type(module).__name__} could not be copied ({error}). It must "
            f"work with copy.deepcopy: keep locks, files and generators out of it and its hooks"
        ) from error


def _named_targets(module: nn.Module, grads: Any) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """The parameters that gradients are written to, and the gradients, both by name."""
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"assign_grads(module, grads): grads is of type {type(grads).__name__}; expected a "
            f"dictionary from the names of the module's parameters to tensors"
        )
    targets = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or name in grads
    }
    if grads.keys() != targets.keys():
        raise ValueError(
            f"assign_grads(module, grads): grads has other names than the parameters of "
            f"{type(module).__name__}: {_compare_names(grads.keys(), targets.keys())}"
        )
    return targets, dict(grads)


def _compare_names(given: Any, expected: Any) -> str:
    """Which names are missing and which are not known."""
    missing, unknown = sorted(expected - given), sorted(given - expected, key=str)
    kinds = {"missing": missing, "not known": unknown}
    parts = [f"{kind} {', '.join(map(repr, names))}" for kind, names in kinds.items() if names]
    return "; ".join(parts) + f" (expected {', '.join(map(repr, sorted(expected))) or 'none'})"
