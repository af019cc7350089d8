"""Private names of torch, each under a name of ours with a line that says what for.

Those of ``torch.nn`` are in ``layers``, and what compiling alone needs is in ``_compile``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.utils import _pytree

from hyperfunc._types import Leaves

# The stack of active torch.func transforms. An entry tells its .key(), one of those three, and its
# .level(), 1 for the outermost. Most names are torch's functions themselves, with no call between,
# as they are called for each product.
GRAD = _functorch.TransformType.Grad
JVP = _functorch.TransformType.Jvp
VMAP = _functorch.TransformType.Vmap
DIFFERENTIATING = (GRAD, JVP)
# All entries, the outermost first, or None.
active_transforms = _functorch.get_interpreter_stack
# The last of them, or None.
innermost_transform = _functorch.peek_interpreter_stack
# Contexts in which the innermost one, or none of them, is active.
outside_innermost = pyfunctorch.temporarily_pop_interpreter_stack
outside_all = pyfunctorch.temporarily_clear_interpreter_stack


def vmap_size(vmap: Any) -> int:
    """The batch size of an entry that is a vmap."""
    return _functorch.CVmapInterpreterPtr(vmap).batchSize()


def vmap_randomness(vmap: Any) -> str:
    """The randomness of an entry that is a vmap: error, same or different."""
    return _functorch.CVmapInterpreterPtr(vmap).randomness().name.lower()


# What a tensor of a transform is: the level of the transform (below 1 for an ordinary tensor), the
# tensor below it, and where that has the batch dimension.
is_wrapped = _functorch.is_functorch_wrapped_tensor
is_batched = _functorch.is_batchedtensor
level_of = _functorch.maybe_get_level
unwrapped = _functorch.get_unwrapped
batch_dim = _functorch.maybe_get_bdim
# A tensor with a dimension of its own taken for the batch of a level.
with_batch_dim = _functorch._add_batch_dim
# What a tensor of a transform that is over has become.
unwrap_if_over = _functorch.unwrap_if_dead


def forward_mode_active() -> bool:
    """Whether ``torch.autograd.forward_ad`` is at some level, by itself or for ``jvp``."""
    return forward_ad._current_level >= 0


# A context that switches forward mode on or off.
forward_mode_enabled = forward_ad._set_fwd_grad_enabled


# Whether hooks may pack what autograd saves, which torch.func refuses.
saved_tensors_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


def trace() -> Any:
    """What ``make_fx`` records into, or None; a loop that is kept has traces of its own."""
    if torch.compiler.is_dynamo_compiling():  # which cannot follow the question
        return None
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)


def is_traced() -> bool:
    """Whether ``make_fx`` records what is computed."""
    return trace() is not None


def is_exporting() -> bool:
    """Whether ``torch.export`` records what is computed; older versions of torch do not tell."""
    asked = getattr(torch.compiler, "is_exporting", None)
    return bool(asked and asked())


def is_recorded() -> bool:
    """Whether ``torch.jit`` or a mode of any kind records what is computed."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


def next_sequence_number() -> int:
    """The number that the next node of a graph gets in this thread."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def sequence_number(node: Any) -> int:
    """That of a node; the ends of a graph have the largest one."""
    number: int = node._sequence_nr()
    return number


@functools.lru_cache(maxsize=1)
def references_if_unheld() -> int:
    """What ``sys.getrefcount`` says of the variable of a graph that nothing but the graph holds."""
    with outside_all(), torch.inference_mode(False), torch.enable_grad():
        node = torch.zeros((), device="cpu", requires_grad=True).neg().grad_fn
    assert node is not None
    leaf = node.next_functions[0][0].variable  # type: ignore[union-attr]
    return sys.getrefcount(leaf)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another one."""
    return tensor._is_view()


def copy_on_write(tensor: Tensor) -> Tensor:
    """A copy that shares memory until one of the two is written to, where torch can do that.

    It cannot for memory that is not its own, such as that of NumPy or of a file.
    """
    if tensor.device.type in ("cpu", "cuda") and tensor.layout is torch.strided:
        try:
            return torch._lazy_clone(tensor)
        except (AttributeError, RuntimeError):
            pass
    return tensor.clone()


def add_to_all(x: Leaves, y: Leaves, alpha: float) -> None:
    """Write ``x + alpha y`` over all tensors of x in one call."""
    torch._foreach_add_(x, y, alpha=alpha)


# The leaves of what torch takes for a tree, as vmap does, and their replacement.
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
