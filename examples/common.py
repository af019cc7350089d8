"""What the examples share beside their data: options, tables, pictures and files."""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MAC = sys.platform == "darwin"  # where sizes are told in bytes


def options(
    argv: Sequence[str] | None, doc: str, name: str, **settings: tuple[Any, str]
) -> argparse.Namespace:
    """Parse the command line of an example, and say what the example does.

    A setting is a default and its meaning. The default tells what may be given: a number one of its
    kind, which is positive if the default is; a tuple of words one of them, by default the first; a
    list several numbers. The folder for the results is made here, so that it fails at once.
    """
    title = doc.split("\n")[0]
    parser = argparse.ArgumentParser(
        description=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for key, (default, meaning) in settings.items():
        kind: dict[str, Any] = {"default": default}
        if isinstance(default, tuple):
            kind = {"default": default[0], "choices": default}
        elif isinstance(default, list):
            kind |= {"type": _number(default[0]), "nargs": "+"}
        elif isinstance(default, int | float):
            kind |= {"type": _number(default)}
        parser.add_argument("--" + key.replace("_", "-"), help=meaning, **kind)
    parser.add_argument("--out", type=Path, default=Path("out", name), help="folder for results")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; expected a folder to write to")
    torch.set_num_threads(1)  # the matrices of the examples are small
    print(title)
    return args


def run(main: Callable[[], Any]) -> None:
    """Call the main function of a script; Ctrl-C ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. Nothing was saved; run it again to start anew.")


def table(corner: str, columns: Mapping[str, str], rows: Mapping[str, Iterable[Any]]) -> None:
    """Print a row of values a title; a column is its title and format, and None an empty cell."""
    lines = {
        title: [
            "" if value is None else format(value, spec)
            for value, spec in zip(values, columns.values(), strict=True)
        ]
        for title, values in rows.items()
    }
    first = max(map(len, [corner, *lines]))
    widths = [max(map(len, column)) for column in zip(columns, *lines.values(), strict=True)]
    print()
    for title, cells in {corner: list(columns), **lines}.items():
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join([title.ljust(first), *padded]).rstrip())


def lbfgs(loss: Callable[[Tensor], Tensor], start: Tensor, **settings: Any) -> Tensor:
    """A minimum by L-BFGS of torch.optim with a line search, which nothing differentiates."""
    W = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([W], line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(W)
        value.backward()
        return value

    optimizer.step(closure)
    return W.detach()


def panels(count: int, size: tuple[float, float], **layout: Any) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side."""
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False, **layout)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(
    axis: Axes, values: Mapping[str, Any], style: str = "-", x: Any = None, **settings: Any
) -> None:
    """A line for each title, over its places or over x, with a legend and axis settings."""
    for title, line in values.items():
        axis.plot(range(len(line)) if x is None else x, line, style, label=title)
    axis.set(**settings)
    axis.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def images(
    axis: Axes, rows: Tensor, labels: Sequence[str], colors: Sequence[str], columns: int = 6
) -> None:
    """Square grey images in a grid, each with a coloured label in its corner."""
    side = round(rows.shape[1] ** 0.5)
    tiles = [F.pad(row.view(side, side), (1, 1, 1, 1), value=1.0) for row in rows]
    lines = [torch.cat(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    axis.imshow(torch.cat(lines).numpy(), cmap="gray_r")
    for place, (label, color) in enumerate(zip(labels, colors, strict=True)):
        x, y = (place % columns) * (side + 2) + 1, (place // columns) * (side + 2) + 4
        axis.text(x, y, label, color=color, va="center", weight="bold")
    axis.set(xticks=[], yticks=[])


def save(args: argparse.Namespace, figure: Figure, **results: Any) -> None:
    """Write the results with the settings, and the picture, into the folder that was given."""
    results["settings"] = vars(args)
    (args.out / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    figure.savefig(args.out / "picture.png", dpi=100)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MAC else 1024) / 2**20
    spent = f"{time.process_time():.0f} s of CPU time and {held:.0f} MiB of memory"
    print(f"numbers and picture are in {args.out}; the process took {spent}")


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a function returns, and the seconds of CPU time that the call took."""
    begin = time.process_time()
    result = function(*args)
    return result, time.process_time() - begin


class Meter(TorchDispatchMode):
    """Counts products with matrices of a shape, and the most bytes that new tensors hold."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.products = self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        shapes = [t.shape for t in args if isinstance(t, torch.Tensor)]
        self.products += "mm" in func.__name__ and self.shape in shapes
        for t in output if isinstance(output, tuple | list) else [output]:
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and not hasattr(storage, "seen"):
                storage.seen = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage.nbytes())
        return output

    def release(self, size: int) -> None:
        self.now -= size


def _number(default: float) -> Callable[[str], float]:
    kind, positive = type(default), default > 0

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (positive and value <= 0):
            wanted = f"a positive {kind.__name__}" if positive else kind.__name__
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse
