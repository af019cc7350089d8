"""States of an outer loop on disk: whole or not at all, on any number of ranks."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hyperfunc as hf
from tests import ranks
from tests.ranks import OLD, DTensor, Shard, distribute_tensor, mesh_of

F64 = torch.float64


def _state(mesh: Any, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight, scale = (torch.randn(*n, generator=generator, dtype=F64) for n in ((7, 3), (4,)))
    if mesh is not None:
        weight = distribute_tensor(weight, mesh, [Shard(0)] * mesh.ndim)
    return {
        "hparams": {"weight": weight, "scale": scale.float()},
        "optimizer": hf.optim.adam(lr=0.1).init({"weight": weight}),
        "rng": generator.get_state(),
        "data": (seed, 0.5 * seed, "train", True),
    }


def _equal(state: Any, expected: Any) -> None:
    leaves, others = (optree.tree_leaves(tree) for tree in (state, expected))
    for leaf, other in zip(leaves, others, strict=True):
        leaf, other = (t.full_tensor() if isinstance(t, DTensor) else t for t in (leaf, other))
        assert torch.equal(leaf, other) if isinstance(leaf, Tensor) else leaf == other


def _save_and_load(folder: Path, background: bool) -> None:
    mesh, group = mesh_of(2), dist.new_group(backend="gloo")
    save, load = hf.distributed.save_state, hf.distributed.load_state
    like = _state(mesh, 9)
    assert load(like, folder) is None
    for step in (1, 2, 3, 3):
        state = _state(mesh, step)
        future = save(state, folder, step, background=background, group=group)
        state["hparams"]["scale"].zero_()  # a copy is written
        future.result()
    dist.barrier()
    (folder / ".step-00000004.partial").mkdir(exist_ok=True)  # what a killed run leaves
    loaded, step = load(like, folder)
    assert step == 3
    assert loaded["hparams"]["weight"].placements == (Shard(0),)
    if background:
        _equal(loaded, _state(mesh, 3))
    _equal(load(like, folder, step=2)[0]["optimizer"], _state(mesh, 2)["optimizer"])
    _equal(like, _state(mesh, 9))


@pytest.mark.parametrize("background", [False, True])
def test_states_are_loaded_on_other_numbers_of_ranks(
    pair: ranks.Ranks, tmp_path: Path, background: bool
) -> None:
    pair.run(_save_and_load, tmp_path, background)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", ".step-00000004.partial", "step-00000002", "step-00000003"]
    loaded = hf.distributed.load_state(_state(None, 0), tmp_path)
    assert loaded is not None
    state, step = loaded
    assert step == 3
    if background:
        _equal(state, _state(None, 3))
    hf.distributed.save_state(state, tmp_path / "one", 7, keep=1)
    pair.run(_load_on_two, tmp_path / "one", state["hparams"]["weight"].numpy())


def _load_on_two(folder: Path, weight: Any) -> None:
    state, step = hf.distributed.load_state(_state(mesh_of(2, 1), 0), folder)
    assert step == 7
    assert (state["hparams"]["weight"].full_tensor().numpy() == weight).all()


OPTIMIZERS: dict[str, Any] = {
    "adam": functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "without a state": functools.partial(torch.optim.SGD, lr=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.1, centered=True),
}


def _fresh(name: str) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Parameters, some of them sharded where there are ranks, and an optimizer without steps."""
    w, scale = torch.linspace(-1, 1, 5, dtype=F64), torch.tensor(2.0, dtype=F64)
    if dist.is_initialized():
        w = distribute_tensor(w, mesh_of(2), [Shard(0)])
    params = {"w": w.requires_grad_(), "scale": scale.requires_grad_()}
    return params, OPTIMIZERS[name](list(params.values()), foreach=False)


def _descend(params: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for leaf in params.values():
            leaf.grad = (2 * leaf**3 - leaf).detach()
        optimizer.step()


def _stop_and_go_on(name: str, folder: Path) -> list[float]:
    """Five steps, of which the last two by a new optimizer that has loaded the state."""
    params, optimizer = _fresh(name)
    _descend(params, optimizer, 3)
    hf.distributed.save_state({"params": params, "optimizer": optimizer}, folder, 3)
    params, optimizer = _fresh(name)
    with torch.no_grad():
        found = hf.distributed.load_state({"params": params, "optimizer": optimizer}, folder)
    assert found is not None
    for key, leaf in params.items():
        leaf.data.copy_(found[0]["params"][key])
    optimizer.load_state_dict(found[0]["optimizer"])
    _descend(params, optimizer, 2)
    return _values(params)


def _values(params: dict[str, Tensor]) -> list[float]:
    full = [t.full_tensor() if isinstance(t, DTensor) else t for t in params.values()]
    return torch.cat([t.detach().reshape(-1) for t in full]).tolist()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_has_taken_no_step_goes_on(
    pair: ranks.Ranks, tmp_path: Path, name: str
) -> None:
    params, optimizer = _fresh(name)
    _descend(params, optimizer, 5)
    expected = _values(params)
    assert _stop_and_go_on(name, tmp_path / "one") == expected
    if not OLD:
        assert pair.run(_stop_and_go_on, name, tmp_path / "two") == [expected] * 2


def _amiss(case: str, folder: Path) -> str:
    """A state that one rank cannot save, or wants otherwise."""
    state: dict[str, Any] = {"a": torch.ones(3), "b": 1}
    rank = dist.get_rank()
    save = functools.partial(hf.distributed.save_state, step=1)
    (folder / "file").touch()
    save(state, folder / "saved")
    like = state | {"a": torch.ones(4) if rank else torch.ones(3)}
    call = {
        "no leaf": lambda: save(state | ({"a": object} if rank else {}), folder / "states"),
        "no folder": lambda: save(state, folder / "file"),
        "other shape": lambda: hf.distributed.load_state(like, folder / "saved"),
    }[case]
    with pytest.raises(hf.HypergradError) as error:
        call()
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == 2  # the group still works
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no leaf", "save_state failed on rank 1 of 2: ValueError: state['a'] is of type type"),
        (
            "no folder",
            "save_state failed on rank 0 of 2: HypergradError: save_state: step 1 was not written",
        ),
        (
            "other shape",
            "load_state failed on rank 1 of 2: ValueError: load_state: state['a'] has ",
        ),
    ],
)
def test_what_one_rank_cannot_save_or_load_ends_the_call_on_all(
    pair: ranks.Ranks, tmp_path: Path, case: str, message: str
) -> None:
    first, second = pair.run(_amiss, case, tmp_path)
    assert first == second
    assert message in first


def _bad_states(folder: Path) -> list[str]:
    save, load = hf.distributed.save_state, hf.distributed.load_state
    save({"a": torch.ones(3)}, folder, 1)
    rank = dist.get_rank()
    calls = [
        lambda: save({"rng": torch.full((3,), rank)}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, 2, background=True),
        lambda: load({"b": torch.ones(3)}, folder),
        lambda: load({"a": torch.ones(4)}, folder),
        lambda: load({"a": torch.ones(3, dtype=F64)}, folder),
        lambda: load({}, folder),
        lambda: load({"a": torch.ones(3)}, folder, step=5),
        lambda: save({"g": object}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, -1),
        lambda: save({"a": torch.ones(3)}, folder, 2, keep=1.0),
    ]
    messages = []
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_states_that_cannot_be_saved_or_loaded(pair: ranks.Ranks, tmp_path: Path) -> None:
    first, second = pair.run(_bad_states, tmp_path)
    assert first == second
    for message, part in zip(
        first,
        [
            "saved once on rank 1 differ from those on rank 0: got state['rng'] with checksum ",
            'group = torch.distributed.new_group(backend="gloo")',
            "state['b'] was not saved in",
            "state['a'] has shape (4,), but (3,) was saved",
            "state['a'] has dtype torch.float64, but torch.float32 was saved",
            "state['a'] was saved in",
            "no state of step 5; expected one of ['step-00000001']",
            "Put generator.get_state() for a generator",
            "step is -1; expected an integer >= 0",
            "save_state: keep is 1.0; expected an integer >= 1",
        ],
        strict=True,
    ):
        assert part in message


def _torchrun(folder: Path, *options: str, num_ranks: int = 2, restarts: int = 0) -> str:
    """Run the outer loop of distributed_loop.py; returns its result."""
    folder.mkdir()
    script = Path(__file__).parent / "distributed_loop.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", f"--max-restarts={restarts}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(script.parents[2]),
        # without it, ranks that start again meet the addresses of those before them
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    process = subprocess.Popen(
        [*command, str(script), str(folder), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return (folder / "result").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("background", [(), ("--background",)])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_ranks_end_with_the_result_of_an_undisturbed_run(
    tmp_path: Path, seed: int, background: tuple[str, ...]
) -> None:
    """Ranks end themselves by SIGKILL at random steps, before the step or while saving."""
    expected = _torchrun(tmp_path / "undisturbed", *background)
    draws = random.Random(seed)
    kills = [f"{draws.randrange(2)}:{draws.randrange(6)}:before", "1:3:saving"]
    kills += [f"{draws.randrange(2)}:{draws.randrange(6)}:saving"]
    folder = tmp_path / "killed"
    assert _torchrun(folder, *background, "--kill", *kills, restarts=len(kills)) == expected
    assert {mark for mark in kills if (folder / mark).exists()} == set(kills)
