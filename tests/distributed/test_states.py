"""States of an outer loop on disk: whole or not at all, on any number of ranks."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import warnings
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
        lambda: load({"a": 1.0}, folder),
        lambda: save({"a": torch.eye(3).to_sparse()}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, 2 + rank),
        lambda: load({"a": torch.ones(3)}, folder, step=rank),
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
            "state['a'] is a number, but a tensor was saved",
            "Put state['a'].to_dense() for a sparse one",
            "step, keep and background on rank 1 differ from those on rank 0: got (3, 2, False)",
            "step and fallback on rank 1 differ from those on rank 0: got (1, False), expected (0,",
        ],
        strict=True,
    ):
        assert part in message


# What may come of each attack of attacks.py, and how many there are at least.
ATTACKS = {
    "killed at each change of a file": ({"right"}, 7),
    "killed, one of two ranks": ({"right"}, 4),
    "killed, one save after another": ({"right", "none yet"}, 15),
    "one bit flipped": ({"told"}, 60),
    "a file cut, missing, or a folder": ({"told"}, 18),
    "code planted": ({"told"}, 60),
    # what is to be removed last may stay until the next save
    "the disk refuses": ({"told, earlier right", "done, earlier right"}, 18),
    "folders that are none": ({"told"}, 8),
    "another kind of leaf": ({"told"}, 18),
    "filters of warnings": ({"as before"}, 5),
    # threads that save an earlier step after a later one are refused
    "overlapping saves": ({"done", "told", "right"}, 16),
    "a rank dies or hangs": ({"named"}, 1),
}
OUTSIDE = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(OUTSIDE)}


def _attack(*options: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.distributed.attacks", *options]
    process = subprocess.run(command, env=ENVIRONMENT, cwd=OUTSIDE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = map(json.loads, process.stdout.splitlines())
    return {name: counts for name, counts, _ in rows}


@pytest.mark.parametrize("options", [(), pytest.param(("--all",), marks=pytest.mark.slow)])
def test_attacks(options: tuple[str, ...]) -> None:
    """Nothing is lost, nothing is silently wrong, and nothing is run."""
    found = _attack(*options)
    assert found.keys() == ATTACKS.keys()
    for name, (allowed, least) in ATTACKS.items():
        assert found[name].keys() <= allowed | ({"none yet"} if options else set()), name
        assert sum(found[name].values()) >= least, name


def _damage(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}" / "data" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_state_is_named_and_an_earlier_one_is_taken_if_asked(tmp_path: Path) -> None:
    save, load = hf.distributed.save_state, hf.distributed.load_state
    like = {"a": torch.zeros(3)}
    for step in (1, 2, 3):
        save({"a": torch.full((3,), float(step))}, tmp_path, step, keep=3)
    path = _damage(tmp_path, 3)
    with pytest.raises(hf.HypergradError) as error:
        load(like, tmp_path)
    assert f"load_state: {path} is damaged: it has other contents than were" in str(error.value)
    assert "state of step 2 in the same folder is intact: pass step=2, or fal" in str(error.value)
    _damage(tmp_path, 2)
    with pytest.warns(RuntimeWarning, match=r"step-00000003.*The state of step 1 is loaded in its"):
        found = load(like, tmp_path, fallback=True)
    assert found is not None
    assert (found[0]["a"].tolist(), found[1]) == ([1.0] * 3, 1)
    save({"a": torch.full((3,), 20.0)}, tmp_path, 2)  # in place of one, with the other put aside
    found = load(like, tmp_path)
    assert found is not None
    assert (found[0]["a"].tolist(), found[1]) == ([20.0] * 3, 2)
    assert len(list(tmp_path.glob("damaged-step-00000003-*"))) == 1
    for step in (1, 2):
        _damage(tmp_path, step)
    with pytest.raises(
        hf.HypergradError, match=r"step-00000002.*No earlier state in the folder is"
    ):
        load(like, tmp_path, fallback=True)


def test_a_later_state_is_not_left_to_be_taken_for_the_last(tmp_path: Path) -> None:
    save = hf.distributed.save_state
    save({"a": 1}, tmp_path, 5)
    with pytest.raises(hf.HypergradError, match=r"has a state of step 5.*remove what comes after"):
        save({"a": 2}, tmp_path, 4)
    assert hf.distributed.load_state({"a": 0}, tmp_path) == ({"a": 1}, 5)


def test_a_state_of_version_0_1_0_is_loaded_with_a_warning(tmp_path: Path) -> None:
    checkpoint = importlib.import_module("torch.distributed.checkpoint")
    leaves = {"state['a']": torch.ones(3), "state['b']": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(leaves, checkpoint_id=tmp_path / "step-00000001")
    with pytest.warns(RuntimeWarning, match=r"without checksums, by version 0.1.0.*Save it again"):
        found = hf.distributed.load_state({"a": torch.zeros(3), "b": 0.0}, tmp_path)
    assert found is not None
    assert (found[0]["a"].tolist(), found[0]["b"], found[1]) == ([1.0] * 3, 0.5, 1)


def test_one_save_at_a_time_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no file locks of this kind")
    monkeypatch.setattr("hyperfunc.distributed._folder._PATIENCE", 0.1)
    hf.distributed.save_state({"a": 1}, tmp_path, 1)
    with (tmp_path / ".lock").open() as lock:  # as another process would
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(hf.HypergradError, match="another process or thread has been saving in"):
            hf.distributed.save_state({"a": 2}, tmp_path, 2)
    assert hf.distributed.load_state({"a": 0}, tmp_path) == ({"a": 1}, 1)
    hf.distributed.save_state({"a": 3}, tmp_path, 3)


def test_a_failed_save_in_the_background_is_told_once(tmp_path: Path) -> None:
    save = functools.partial(hf.distributed.save_state, {"a": 1}, tmp_path / "states")
    (tmp_path / "states").touch()
    with pytest.raises(hf.HypergradError, match=r"step 1 was not written to .* A file is where"):
        save(1, background=True).result()
    future = save(2, background=True)
    with pytest.raises(hf.HypergradError, match=r"of step 2, has failed.* step 2 was not written"):
        save(3)
    (tmp_path / "states").unlink()
    save(3)
    del future
    assert hf.distributed.load_state({"a": 0}, tmp_path / "states") == ({"a": 1}, 3)
    code = "import hyperfunc as hf; hf.distributed.save_state({'a': 1}, 'file', 7, background=True)"
    (tmp_path / "file").touch()
    process = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
    )
    assert "RuntimeWarning: save_state: step 7 was not saved in the background" in process.stderr


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
