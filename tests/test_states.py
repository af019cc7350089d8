"""States of an outer loop on disk: whole or not at all, on any number of ranks."""

from __future__ import annotations

import contextlib
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
from tests.ranks import DTensor, Shard, distribute_tensor, mesh_of

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
    assert names == [".step-00000004.partial", "step-00000002", "step-00000003"]
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


def _bad_states(folder: Path) -> list[str]:
    save, load = hf.distributed.save_state, hf.distributed.load_state
    save({"a": torch.ones(3)}, folder, 1)
    rank = dist.get_rank()
    calls = [
        lambda: save({"rng": torch.full((3,), rank)}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, 2, background=True),
        lambda: load({"b": torch.ones(3)}, folder),
        lambda: load({"a": torch.ones(4)}, folder),
        lambda: load({"a": torch.ones(3)}, folder, step=5),
        lambda: save({"g": object}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, -1),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        messages.append(str(error.value))
    return messages


def test_states_that_cannot_be_saved_or_loaded(pair: ranks.Ranks, tmp_path: Path) -> None:
    first, second = pair.run(_bad_states, tmp_path)
    assert first == second
    for message, part in zip(
        first,
        [
            "state['rng'] on rank 1 is not what it is on rank 0",
            'group = torch.distributed.new_group(backend="gloo")',
            "state['b'] was not saved in",
            "state['a'] has shape (4,), but (3,) was saved",
            "no state of step 5; expected one of ['step-00000001']",
            "Put generator.get_state() for a generator",
            "step is -1; expected an integer >= 0",
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
        "PYTHONPATH": str(script.parent.parent),
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
