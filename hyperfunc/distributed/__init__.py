"""Past one machine: tasks spread over the ranks of ``torch.distributed``, and states on disk.

Started by ``torchrun``, each rank runs the same program. There are two ways to share the work:

- **Tasks.** `task_parallel` lets each rank adapt its share of the tasks, and adds up their
  hypergradients.
- **Parameters, hyperparameters and data.** Every method takes DTensors in place of tensors; nothing
  from here is needed for it. See `hyperfunc.PipelinedCG` for what a step of a solver sends.

`save_state` and `load_state` keep the state of an outer loop on disk, whole or sharded, so that a
run goes on after a failure, on another number of ranks if need be.

Without a process group, as here, there is one rank:

>>> solve, error = (lambda h, task: h * task), (lambda w, h, task: (w - 1) ** 2)
>>> gradient = hf.hypergrad(solve, error, method="reverse_unroll")
>>> parallel = hf.distributed.task_parallel(torch.func.vmap(gradient, in_dims=(None, 0)))
>>> parallel(torch.tensor(1.0), hf.distributed.local_tasks(torch.tensor([0.0, 1.0, 3.0])))
tensor(4.)
"""

# Here: what is for several processes alone; that vectors may be sharded is seen to in ``_engine``
# and ``_torch/sharding``. May import what stands below the transforms. What ranks tell each other
# goes through ``_ranks``.

from hyperfunc.distributed._state import load_state, save_state
from hyperfunc.distributed._tasks import local_tasks, task_parallel

__all__ = ["load_state", "local_tasks", "save_state", "task_parallel"]
