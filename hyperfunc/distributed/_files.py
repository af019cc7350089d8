"""The files of one saved state: written, checked, and read without running what is in them.

A state is a folder with ``data``, as ``torch.distributed.checkpoint`` writes it, and
``manifest.json``, which holds the size and SHA-256 of each file of ``data``, and its own. Version
0.1.0 wrote the data alone, and not in a folder of its own.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine.results import HypergradError

_MANIFEST, _DATA, _METADATA = "manifest.json", "data", ".metadata"
_TORCH = "torch.distributed.checkpoint"
# What the description of the data is made of, beside dtypes and paths.
_ALLOWED = {
    f"{_TORCH}.metadata": (
        *("Metadata", "StorageMeta", "MetadataIndex", "ChunkStorageMetadata", "TensorProperties"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_TORCH}.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
}
_PLAIN = (bool, int, float, str)


class Damaged(HypergradError):
    """A file is not as it was written."""


def _checkpoint() -> Any:
    """The module of torch, which takes a moment to import."""
    return importlib.import_module(_TORCH)


def write(
    named: dict[str, Any],
    folder: Path,
    rank: int,
    attempt: Callable[..., Any],
    gather: Callable[[Any], list[Any]],
) -> None:
    """Write a new state, each rank what it holds, and have the disk know of it.

    ``attempt(action, only=None)`` does something on all ranks or one, or raises on all what is
    raised on one; ``gather`` tells all ranks what each has.
    """
    dcp, data = _checkpoint(), folder / _DATA
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = dcp.FileSystemWriter(data)

    def plan() -> Any:
        planner.set_up_planner(named, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    def parts() -> Any:
        mine = planner.finish_plan(writer.prepare_global_plan(global_plans)[rank])
        results = writer.write_data(mine, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        return results, {name: _entry(data / name) for name in names}

    def describe() -> None:
        writer.finish(metadata, [results for results, _ in written])
        entries = {name: entry for _, entries in written for name, entry in entries.items()}
        missing = [name for name in entries if not (data / name).exists()]
        if missing:
            raise HypergradError(
                f"save_state: rank 0 does not see {data / missing[0]}, which another rank has "
                f"written. Pass a folder that all ranks see"
            )
        seal(folder, entries | {_METADATA: _entry(data / _METADATA)})

    plans = gather(attempt(plan))
    global_plans, metadata = attempt(lambda: planner.create_global_plan(plans))
    written = gather(attempt(parts))
    attempt(describe, only=0)


def seal(folder: Path, entries: dict[str, Any] | None = None) -> None:
    """Write the manifest: size and checksum of each file, by default as they are now."""
    if entries is None:
        entries = {path.name: _entry(path) for path in (folder / _DATA).iterdir()}
    with (folder / _MANIFEST).open("w") as file:
        json.dump({"files": entries, "sha256": _of_entries(entries)}, file)
        file.flush()
        os.fsync(file.fileno())
    sync(folder / _DATA)
    sync(folder)


def sync(folder: Path) -> None:
    """Have the disk know of the names in a folder, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_old(folder: Path) -> bool:
    """Whether a state is of version 0.1.0, which wrote no checksums."""
    return not (folder / _DATA).exists() and (folder / _METADATA).exists()


def check(folder: Path, rank: int = 0, size: int = 1) -> Any:
    """The description of a state; raises if it, or a file in this rank's share, is damaged."""
    data = folder if is_old(folder) else folder / _DATA
    try:
        if data != folder:
            _check_manifest(folder, rank, size)
        metadata = _Description(io.BytesIO((data / _METADATA).read_bytes())).load()
        for stored in metadata.storage_data.values():
            path = data / Path(stored.relative_path).name
            if path.stat().st_size < stored.offset + stored.length:
                raise Damaged(f"{path} is damaged: it is shorter than it was written")
    except HypergradError:
        raise
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        kind, what = (Damaged, "is damaged") if missing else (HypergradError, "cannot be read")
        raise kind(f"{folder} {what}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise Damaged(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    return metadata


def read(folder: Path, metadata: Any, into: dict[str, Any]) -> None:
    """Read a state into the tensors and in place of the numbers of a dict."""
    dcp, data = _checkpoint(), folder if is_old(folder) else folder / _DATA
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(into, metadata)
    for item in planner.finish_plan(planner.create_local_plan()).items:
        path, stored = item.dest_index.fqn, metadata.storage_data[item.storage_index]
        value = _read_value(data / Path(stored.relative_path).name, stored)
        described = metadata.state_dict_metadata[path]
        if not isinstance(described, dcp.TensorStorageMetadata):
            if type(value) not in _PLAIN:
                raise Damaged(f"{folder} is damaged: {path} is a {type(value).__name__}")
            into[path] = value
            continue
        if type(value) is not Tensor or value.dtype != described.properties.dtype:
            raise Damaged(f"{folder} is damaged: {path} is not the tensor that was saved")
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            value = value.narrow(dim, start, length)
        planner.resolve_tensor(item).detach().copy_(value)


def _check_manifest(folder: Path, rank: int, size: int) -> None:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["sha256"] == _of_entries(manifest["files"])
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise Damaged(f"{path} is damaged: it has other contents than were written")
    for name in sorted(manifest["files"])[rank::size]:
        got, expected = _entry(folder / _DATA / name), manifest["files"][name]
        if got != expected:
            raise Damaged(
                f"{folder / _DATA / name} is damaged: it has other contents than were written "
                f"({got[0]} bytes, SHA-256 {got[1][:8]}...; expected {expected[0]} and "
                f"{expected[1][:8]}...)"
            )


def _read_value(path: Path, stored: Any) -> Any:
    """What lies at a place in a file: a tensor, a number or a string."""
    with path.open("rb") as file:
        file.seek(stored.offset)
        content = file.read(stored.length)
    # older formats have holes in versions of torch before 2.6, and were never written
    if not content.startswith(b"PK"):
        raise Damaged(f"{path} is damaged: there is no tensor where one was written")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _entry(path: Path) -> list[Any]:
    """Size and checksum of a file."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
            size += len(block)
    return [size, sha.hexdigest()]


def _of_entries(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


class _Description(pickle.Unpickler):
    """Reads what `torch.distributed.checkpoint` writes of its data, and no other classes."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":
            return lambda *parts: "/".join(parts)  # only where it was saved
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise Damaged(f"it holds {module}.{name}, which is none of what is written there")
