"""The ranks of a group, and the little that they tell each other to stay in step."""

from __future__ import annotations

import itertools
import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfunc._engine.results import HypergradError

T = TypeVar("T")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ranks:
    """The ranks of a group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"this process, rank {dist.get_rank()} of all, is not in the group that was "
                f"passed. Make the call on the ranks of the group alone"
            )

    def global_ranks(self) -> list[int]:
        """The ranks of the group as numbered among all."""
        if self.group is None:
            return list(range(self.size))
        return dist.get_process_group_ranks(self.group)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """A few integers of each rank."""
        own = torch.tensor(numbers, dtype=torch.int64)
        if self._alone:
            return [own.tolist()]
        own = own.to(self.device())
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.group)
        return [row.tolist() for row in rows]

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Start a sum over the ranks; the function that is returned waits for it."""
        if self._alone:
            return lambda: values
        values = values.clone()
        work = dist.all_reduce(values, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks, each of which has its own number of them."""
        if self._alone:
            return rows
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padded = sent.new_zeros(max(counts), rows.shape[1])
        padded[: len(sent)] = sent
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded, group=self.group)
        kept = [part[:count] for part, count in zip(received, counts, strict=True)]
        return torch.cat(kept).to(rows.dtype)

    def from_rank(self, rank: int, value: Any) -> Any:
        """An object of one rank, or the same error on all if it cannot be sent."""
        if self._alone:
            return value
        message: list[Any] = [None]
        if rank == self.rank:
            try:
                message = [pickle.dumps(value)]
            except Exception as error:
                message = [f"{type(error).__name__}: {error}"]
        source = self.global_ranks()[rank]
        dist.broadcast_object_list(message, source, group=self.group, device=self.device())
        if isinstance(message[0], str):
            raise TypeError(
                f"task_parallel: a rank without tasks needs to know what fn returns, which cannot "
                f"be pickled ({message[0]}). Return dicts, tuples, and classes of a module"
            )
        return pickle.loads(message[0])

    def gather(self, value: Any) -> list[Any]:
        """An object of each rank."""
        values: list[Any] = [value] * self.size
        if not self._alone:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, name: str, action: Callable[[], T], only: int | None = None) -> T:
        """What an action returns, or the error on all that it raises on one; ``only`` one does it.

        The others get what that one returns.
        """
        result: Any = None
        error = None
        if only in (None, self.rank):
            try:
                result = action()
            except BaseException as problem:
                error = problem
        self.agree(name, error)
        shared: T = result if only is None else self.from_rank(only, result)
        return shared

    def agree(
        self,
        name: str,
        error: BaseException | None,
        numbers: Sequence[int] = (),
        where: Callable[[int, list[list[int]]], str] = lambda rank, rows: "",
        alike: Mapping[str, list[str]] = MappingProxyType({}),
        advice: str = "Make the call alike on all ranks",
    ) -> list[list[int]]:
        """Exchange a few integers, or raise on all ranks what one of them has met.

        An error that is the same everywhere is raised as it is, and so is one by which a rank is to
        end (Ctrl-C, or an exit). All others become a `HypergradError` that names the first rank to
        fail, with what ``where`` adds to it. Without any, the ranks compare what is to be alike.
        """
        text = "" if error is None else f"{type(error).__name__}: {error}"
        sums = [zlib.crc32(repr(lines).encode()) if lines else 0 for lines in alike.values()]
        rows = self.exchange((error is not None, zlib.crc32(text.encode()), *numbers, *sums))
        own = [row[2 : 2 + len(numbers)] for row in rows]
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if not failed:
            columns = list(zip(*rows, strict=True))[2 + len(numbers) :]
            for (what, lines), column in zip(alike.items(), columns, strict=True):
                self._compare(f"{name}: {what}", lines, column, advice)
            return own
        first = failed[0]
        place, cause = where(first, own), self.from_rank(first, text).rstrip(": ")
        everywhere = not place and all(row[:2] == rows[0][:2] for row in rows)
        if error is not None and (everywhere or not isinstance(error, Exception)):
            raise error
        more = f" ({len(failed)} ranks failed, this one first)" if len(failed) > 1 else ""
        raise HypergradError(
            f"{name} failed on rank {first} of {self.size}{place}{more}: {cause}"
        ) from error

    def _compare(self, what: str, lines: list[str], sums: Sequence[int], advice: str) -> None:
        """Raise on all ranks if the checksums of their lines differ; 0 is one without lines."""
        first, *others = [rank for rank, number in enumerate(sums) if number] or [0]
        for rank in others:
            if sums[rank] == sums[first]:
                continue
            theirs, ours = (self.from_rank(number, lines) for number in (rank, first))
            pairs = itertools.zip_longest(theirs, ours, fillvalue="nothing more")
            got, expected = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"{what} on rank {rank} differ from those on rank {first}: got {got}, "
                f"expected {expected}. {advice}"
            )

    def device(self) -> torch.device:
        """Where the group takes small tensors from, whatever is to be computed on."""
        if self._alone:
            return torch.device("cpu")
        config = dist.get_backend_config(self.group)
        kinds = [pair.split(":")[0] for pair in config.split(",")]
        return torch.device("cpu" if "cpu" in kinds else kinds[0])


def fingerprint(value: Any) -> str:
    """A few characters that tell values apart; those of a tensor are computed on its device."""
    if not isinstance(value, Tensor):
        return repr(value)
    numbers = value.detach().resolve_conj()
    numbers = (torch.view_as_real(numbers) if numbers.is_complex() else numbers).reshape(-1)
    if numbers.is_floating_point() and numbers.element_size() > 1:
        numbers = numbers + 0.0  # zeros have one sign
    # integers add up to the same in any order
    bits = numbers.view(_BITS[numbers.element_size()]).to(torch.int64)
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    number = int(((bits ^ (bits >> 7)) * weights).sum())
    return f"checksum {number & (2**64 - 1):016x}"
