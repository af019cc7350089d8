"""A sweep over the operations that torch's own tests know, as `tests.whole.sweep` is over modules.

    python -m tests.whole.sweep_operations [NAME ...]

Each operation has a few of torch's sample inputs, scaled by variables. What a mapped hypergradient
is, or the gradient of a mapped loss, is compared with one task at a time. A cell is *raw* where
torch's error comes through: of an argument that torch takes no derivative of, mostly.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.whole import sweep
from tests.whole.sweep_cases import Case, _nothing

ROUTES = ("vmap", "grad of vmap")
ENTRIES, SAMPLES = 60, 2  # at most, of an operation
D = torch.float64


def names() -> list[str]:
    """The operations that have derivatives, by the names of torch's tests."""
    return [op.formatted_name for op in op_db if op.supports_autograd and D in _dtypes(op)]


def run(chosen: Sequence[str]) -> Iterator[sweep.Cell]:
    """The cells of some operations."""
    for op in op_db:
        if op.formatted_name in chosen:
            for case in _cases(op):
                try:
                    yield from sweep.run(case, ["reverse_unroll"], ROUTES)
                except Exception as error:  # the sample itself is not for this: no plain values
                    yield sweep.Cell(case.name, "", "", "left out", str(error).split("\n")[0])


def _dtypes(op: Any) -> Any:
    return op.supported_dtypes("cpu")


def _cases(op: Any) -> Iterator[Case]:
    seen: set[Any] = set()
    for sample in op.sample_inputs("cpu", D, requires_grad=False):
        values, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [
            i for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point()
        ]
        sizes = [values[i].numel() for i in places]
        key = tuple(v.shape if isinstance(v, Tensor) else repr(v) for v in values)
        if not sizes or not min(sizes) or sum(sizes) > ENTRIES or key in seen:
            continue
        seen.add(key)

        def call(
            _: Any, x: Tensor, values: Any = values, places: Any = places, spec: Any = spec
        ) -> Tensor:
            scaled = list(values)
            for i in places:
                scaled[i] = values[i] * (1 + 0.1 * (x if i == places[0] else x.sin().mean()))
            first, args, keywords = tree_unflatten(scaled, spec)
            return _vector(op(first, *args, **keywords))

        shape = tuple(values[places[0]].shape)
        yield Case(f"{op.formatted_name} {len(seen)}", _nothing, (shape,), call)
        if len(seen) == SAMPLES:
            return


def _vector(output: Any) -> Tensor:
    found = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
    real = [torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in found]
    return torch.cat([v.reshape(-1) for v in real if v.is_floating_point()])


def main(argv: Sequence[str]) -> int:
    cells: list[sweep.Cell] = []
    for cell in run(argv or names()):
        if cell.kind in (sweep.RAW, sweep.WRONG):
            print(cell, flush=True)
        cells.append(cell)
    print(sweep.counted(cells))
    return int(any(cell.kind == sweep.WRONG for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
