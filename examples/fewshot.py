"""What the few-shot examples share: images, tasks, a network, baselines and the course of a run.

A task asks to tell a few character classes apart, given a few labelled drawings of each (the
support set); it is scored on further drawings of the same classes (the query set). The classes of
training, validation and test are disjoint: the test classes belong to scripts never seen before.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

SIZE = 28  # images are SIZE x SIZE


class Split(NamedTuple):
    """Some classes: bytes of shape (classes, drawings, SIZE, SIZE), ink 255, and what they are."""

    images: Tensor
    names: list[str]
    source: str


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split


class Tasks(NamedTuple):
    """A batch of tasks; every tensor has the task as its first dimension."""

    support_x: Tensor  # (tasks, ways * shots, 1, SIZE, SIZE) in [0, 1]
    support_y: Tensor  # (tasks, ways * shots)
    query_x: Tensor
    query_y: Tensor


# --- Images -----------------------------------------------------------------------------------

TRAIN_SCRIPTS = ("Latin", "Armenian", "Digit")  # first words of the names of code points
TEST_SCRIPTS = ("Greek", "Cyrillic", "Georgian")
LOOKALIKE = 0.85  # classes are alike whose images correlate by more, on average over the faces
WARPS = 2  # drawings of a class in each face


def load_glyphs() -> Data:
    """Letters and digits in the twelve DejaVu faces that matplotlib brings, randomly warped.

    Of classes that look alike (Latin A, Greek Alpha, Cyrillic A) only the first is kept. Every
    fifth class of the training scripts is held out for validation.
    """
    paths = sorted(glob.glob(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuS*.ttf")))
    paths = [path for path in paths if "Display" not in path]
    common = set.intersection(*(set(FT2Font(path).get_charmap()) for path in paths))
    faces = [ImageFont.truetype(path, 64, layout_engine=ImageFont.Layout.BASIC) for path in paths]
    letters = [
        (script, chr(code))
        for script in TRAIN_SCRIPTS + TEST_SCRIPTS
        for code in range(ord("0"), 0x1100)  # up to the end of the Georgian block
        if code in common
        and unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo", "Nd")
        and unicodedata.name(chr(code)).startswith(script.upper())
    ]
    glyphs = torch.stack(
        [torch.stack([_rasterise(letter, face) for face in faces]) for _, letter in letters]
    )
    kept = distinct(glyphs)
    generator = torch.Generator().manual_seed(0)
    drawings = torch.stack([_warp(glyphs[index], generator) for index in kept])
    scripts, names = zip(*(letters[index] for index in kept), strict=True)
    source = [i for i, script in enumerate(scripts) if script in TRAIN_SCRIPTS]
    rows = (
        [i for n, i in enumerate(source) if n % 5],
        source[::5],
        [i for i, script in enumerate(scripts) if script not in TRAIN_SCRIPTS],
    )
    return Data(
        *(
            Split(
                drawings[r], [names[i] for i in r], ", ".join(dict.fromkeys(scripts[i] for i in r))
            )
            for r in rows
        )
    )


def distinct(glyphs: Tensor, limit: float = LOOKALIKE) -> list[int]:
    """The classes that look like no earlier one, from images of shape (classes, faces, h, w)."""
    coarse = F.avg_pool2d(glyphs, 4).flatten(2)
    coarse = F.normalize(coarse - coarse.mean(-1, keepdim=True), dim=-1)
    likeness = torch.einsum("afp,bfp->ab", coarse, coarse) / glyphs.shape[1]
    kept: list[int] = []
    for index, row in enumerate(likeness):
        if not kept or row[kept].max() <= limit:
            kept.append(index)
    return kept


def load_omniglot(root: str | os.PathLike[str]) -> Data:
    """Omniglot as published: a folder of its zips or of what they hold, or one zip.

    Alphabets are kept whole. If the set called "evaluation" is there, its alphabets are the test;
    otherwise the last quarter of all alphabets by name is. Of the others the last (an eighth of
    all) are for validation, and the rest is for training, where every character turned by 90, 180
    and 270 degrees counts as a further class.
    """
    alphabets: dict[str, dict[str, dict[str, Tensor]]] = {}
    evaluation = set()
    for path, content in _omniglot_files(Path(root)):
        # The two small sets share some alphabets: the same file twice is one drawing.
        characters = alphabets.setdefault(path[-3], {})
        characters.setdefault(path[-2], {})[path[-1]] = _shrink(content)
        if any("evaluation" in part for part in path[:-3]):
            evaluation.add(path[-3])
    names = sorted(set(alphabets) - evaluation)
    held_out = sorted(evaluation) or [names.pop() for _ in range(_share(alphabets, 4))][::-1]
    validation = [names.pop() for _ in range(_share(alphabets, 8)) if names][::-1]
    if not names:
        raise ValueError(
            f"{root} holds the alphabets {sorted(alphabets)}; expected at least three, for "
            f"training, validation and test"
        )

    def split(chosen: list[str], turns: int = 1) -> Split:
        classes = {
            f"{alphabet} {character}": torch.stack([files[name] for name in sorted(files)])
            for alphabet in chosen
            for character, files in sorted(alphabets[alphabet].items())
        }
        drawings = min(map(len, classes.values()))
        images = torch.stack([images[:drawings] for images in classes.values()])
        images = torch.cat([images.rot90(turn, (2, 3)) for turn in range(turns)])
        return Split(images, list(classes) * turns, ", ".join(chosen))

    return Data(split(names, turns=4), split(validation), split(held_out))


# --- Tasks and the network --------------------------------------------------------------------


def sample_tasks(
    split: Split, count: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> Tasks:
    """Draw tasks: for each, ``ways`` classes, and ``shots + queries`` drawings of each class."""
    classes, drawings = split.images.shape[:2]
    chosen = torch.rand(count, classes, generator=generator).argsort(1)[:, :ways, None]
    order = torch.rand(count, ways, drawings, generator=generator).argsort(2)
    images = split.images[chosen, order[..., : shots + queries]].unsqueeze(3) / 255
    labels = torch.arange(ways, device=images.device)[:, None].expand(images.shape[:3])
    return Tasks(
        images[:, :, :shots].flatten(1, 2),
        labels[:, :, :shots].flatten(1),
        images[:, :, shots:].flatten(1, 2),
        labels[:, :, shots:].flatten(1),
    )


WEIGHT_STD = 0.7
FEATURE_NORM = 6.0


class ConvNet(nn.Module):
    """Three strided convolutions, each normalised, and a linear head that starts at zero.

    The normalisation makes the scale of the convolution weights immaterial to the output; weights
    of order 1 make the loss flat in them, so that one step size and one regulariser suit all
    layers. The features have a fixed norm, which sets the curvature in the head.
    """

    def __init__(self, ways: int, generator: torch.Generator, channels: int = 32) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
            for inputs in (1, channels, channels)
        )
        self.head = nn.Linear(4 * channels, ways)
        for parameter in self.convs.parameters():
            nn.init.normal_(parameter, std=WEIGHT_STD, generator=generator)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2)
        for conv in self.convs:
            x = F.relu(F.group_norm(conv(x), 1))
        features = F.layer_norm(x.flatten(1), (self.head.in_features,))
        return self.head(features * (FEATURE_NORM / math.sqrt(self.head.in_features)))


def nearest_pixels(tasks: Tasks) -> Tensor:
    """The label of the support image that is nearest in Euclidean distance, for every query."""
    distances = torch.cdist(tasks.query_x.flatten(2), tasks.support_x.flatten(2))
    return tasks.support_y.gather(1, distances.argmin(-1))


def accuracy(predict: Callable[[Tasks], Tensor], tasks: Tasks, chunk: int = 25) -> Tensor:
    """The share of queries that are labelled rightly, for every task."""
    chunks = (Tasks(*parts) for parts in zip(*(t.split(chunk) for t in tasks), strict=True))
    return torch.cat([(predict(part) == part.query_y).float().mean(1).cpu() for part in chunks])


# --- The command line -------------------------------------------------------------------------


def argument_parser(description: str, out: str) -> argparse.ArgumentParser:
    """The options that the few-shot examples share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("glyphs", "omniglot"), default="glyphs", help="where drawings are from")
    add("--root", type=Path, help="with --data omniglot: the folder with its zips")
    add("--ways", type=positive(int), default=5, help="classes in a task")
    add("--shots", type=positive(int), default=1, help="labelled drawings of each class")
    add("--queries", type=positive(int), default=15, help="drawings of each class to label")
    add("--inner-steps", type=positive(int), default=6, help="gradient steps that adapt to a task")
    add("--inner-lr", type=positive(float), default=0.15, help="size of these steps")
    add("--meta-lr", type=positive(float), default=0.02, help="first step size of Adam; falls to 0")
    add("--tasks", type=positive(int), default=8, help="training tasks in an iteration")
    add("--iterations", type=positive(int), default=1000, help="meta-updates")
    add("--test-tasks", type=positive(int), default=600, help="tasks with unseen test classes")
    add("--seed", type=int, default=0, help="of the initialisation and of the training tasks")
    add("--device", default="cpu", help="such as cpu or cuda")
    add(
        "--threads", type=positive(int), default=1, help="of the CPU; few tasks gain little by more"
    )
    add("--out", type=Path, default=Path(out), help="folder for checkpoint, numbers and picture")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser


def positive(kind: type) -> Callable[[str], Any]:
    """The type of an option that takes numbers above zero."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if 0 < (value := kind(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive {kind.__name__}")

    return parse


def prepare(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, Data]:
    """Parse the options and load the images they ask for; on an error, say so and exit."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if dist.is_torchelastic_launched() and not dist.is_initialized():  # by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    if args.data == "omniglot" and args.root is None:
        parser.error("--data omniglot needs --root DIR, the folder with Omniglot's zips")
    if args.data == "glyphs" and args.root is not None:
        parser.error("--root is for --data omniglot; the glyphs come with matplotlib")
    if args.resume and not (args.out / CHECKPOINT).exists():
        parser.error(f"--resume: there is no {args.out / CHECKPOINT}; leave out --resume to start")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    try:
        data = load_glyphs() if args.data == "glyphs" else load_omniglot(args.root)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(f"--data {args.data}: {error}")
    for name, split in data._asdict().items():
        classes, drawings = split.images.shape[:2]
        if args.ways > classes:
            parser.error(f"--ways {args.ways}: {name} has only {classes} classes")
        if args.shots + args.queries > drawings:
            parser.error(
                f"--shots {args.shots} --queries {args.queries}: their sum must be at most "
                f"{drawings}, the drawings of a class in {name}"
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; expected a folder to write to")
    return args, Data(*(split._replace(images=split.images.to(args.device)) for split in data))


def is_first_process() -> bool:
    """Whether this is the process that shows and writes what all of them have computed."""
    return not dist.is_initialized() or dist.get_rank() == 0


def in_any_process(flag: bool) -> bool:
    """Whether a flag is set in one of the processes, so that all of them stop with it."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    if dist.get_backend() == "nccl":
        flags = flags.cuda()
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


# --- A run ------------------------------------------------------------------------------------

CHECKPOINT = "checkpoint.pt"
VALIDATION_TASKS = 200
VALIDATIONS = 10  # in a run


class Run:
    """A training run that can be stopped and resumed, and its report.

    All that a run depends on is in its checkpoint (parameters, optimiser, generator, the best
    validation so far), so that a resumed run ends with the same bits as one that was not stopped.

    Args:
        args: the options, from `prepare`.
        data: the images.
        meta: the meta-parameters, updated in place by the training loop.
        predict: ``(meta, tasks) -> labels`` of the queries, after adaptation.
        stateful: objects with ``state_dict`` and ``load_state_dict``: optimiser, schedule.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: Data,
        meta: dict[str, Tensor],
        predict: Callable[[dict[str, Tensor], Tasks], Tensor],
        **stateful: Any,
    ) -> None:
        self.args, self.data, self.meta, self.predict = args, data, meta, predict
        self.stateful = stateful
        self.initial = _clone(meta)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.iteration = 0
        self.seconds = 0.0
        self.recent: list[dict[str, float]] = []  # since the last validation
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"validation": -1.0}
        self.path = args.out / CHECKPOINT
        if args.resume:
            self._load()

    def training(self) -> Iterator[Tasks]:
        """Batches of training tasks; between them, validation, checkpoints and a progress bar."""
        args = self.args
        every = max(1, args.iterations // VALIDATIONS)
        validation = self._sample(self.data.validation, VALIDATION_TASKS, _generator(1))
        bar = tqdm(
            total=args.iterations,
            initial=self.iteration,
            mininterval=0.5,
            unit="it",
            disable=not is_first_process(),
        )
        with _deferred_interrupt() as interrupted, bar:
            while True:
                start = time.perf_counter()
                due = self.iteration % every == 0 or self.iteration == args.iterations
                if due and self.iteration not in (entry["iteration"] for entry in self.history):
                    self._validate(validation)
                if in_any_process(bool(interrupted)) or self.iteration == args.iterations:
                    break
                yield self._sample(self.data.train, args.tasks, self.generator)
                self.iteration += 1
                self.seconds += time.perf_counter() - start
                bar.update()
                bar.set_postfix(_mean(self.recent[-25:]) | {"val": self.history[-1]["validation"]})
        self._save()
        if self.iteration < args.iterations:
            self._exit(f"Stopped after {self.iteration} of {args.iterations} iterations.")

    def record(self, **numbers: Tensor) -> None:
        """Note what the progress bar and the learning curve show of an iteration."""
        self.recent.append({name: number.item() for name, number in numbers.items()})

    def report(self, title: str, name: str) -> None:
        """Score the best meta-parameters and the baselines on test tasks; print, plot and save."""
        if not is_first_process():
            return
        args, test = self.args, self.data.test
        contestants = {
            name: lambda tasks: self.predict(self.best["meta"], tasks),
            "same adaptation, not meta-learned": lambda tasks: self.predict(self.initial, tasks),
            "nearest pixel neighbour": nearest_pixels,
        }
        tasks = self._sample(test, args.test_tasks, _generator(2))
        try:
            scores = {key: accuracy(predict, tasks) for key, predict in contestants.items()}
        except KeyboardInterrupt:
            self._exit("Stopped in the test; the training is complete.")
        results = {
            key: {
                "accuracy": score.mean().item(),
                "interval95": 1.96 * score.std().item() / math.sqrt(len(score)),
            }
            for key, score in scores.items()
        }
        setting = f"{args.ways}-way {args.shots}-shot"
        print(f"\n{title}, {setting}: accuracy on {args.test_tasks} tasks from {test.source}")
        print(f"({len(test.names)} unseen classes), with 95% intervals")
        for key, result in results.items():
            print(f"  {key:36s}{result['accuracy']:7.1%} ± {result['interval95']:.1%}")
        numbers = {
            "settings": self._settings(),
            "classes": {key: len(split.names) for key, split in self.data._asdict().items()},
            "results": results,
            "best_iteration": self.best["iteration"],
            "best_validation": self.best["validation"],
            "history": self.history,
            "training_seconds": self.seconds,
            "torch": torch.__version__,
        }
        (args.out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
        figure = _picture(f"{title}, {setting}", self.history, results, tasks, contestants[name])
        figure.savefig(args.out / "picture.png", dpi=150)
        print(f"{self.seconds:.0f} s of training; numbers and picture are in {args.out}")

    def _sample(self, split: Split, count: int, generator: torch.Generator) -> Tasks:
        args = self.args
        return sample_tasks(split, count, args.ways, args.shots, args.queries, generator)

    def _validate(self, tasks: Tasks) -> None:
        score = accuracy(lambda tasks: self.predict(self.meta, tasks), tasks).mean().item()
        entry = {"iteration": self.iteration, "validation": score} | _mean(self.recent)
        self.history.append(entry)
        self.recent.clear()
        if score > self.best["validation"]:
            self.best = entry | {"meta": _clone(self.meta)}
        self._save()

    def _settings(self) -> dict[str, Any]:
        """The options that the numbers depend on."""
        aside = ("out", "resume", "root", "device", "test_tasks")
        return {key: value for key, value in vars(self.args).items() if key not in aside}

    def _save(self) -> None:
        """Write a checkpoint beside the old one and put it in its place at once."""
        if not is_first_process():
            return
        state = {
            "settings": self._settings(),
            "meta": self.meta,
            "generator": self.generator.get_state(),
            "stateful": {name: item.state_dict() for name, item in self.stateful.items()},
        } | {name: getattr(self, name) for name in _PROGRESS}
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.args.device, weights_only=True)
        theirs, ours = state["settings"], self._settings()
        if theirs != ours:
            differing = [key for key in ours if theirs.get(key) != ours[key]]
            flags = "".join(f" --{key.replace('_', '-')} {theirs.get(key)}" for key in differing)
            raise SystemExit(
                f"--resume: {self.path} was made with{flags}. Give these options, or leave out "
                f"--resume to start anew"
            )
        for name, tensor in state["meta"].items():
            self.meta[name].copy_(tensor)
        self.generator.set_state(state["generator"].cpu())
        for name, item in self.stateful.items():
            item.load_state_dict(state["stateful"][name])
        for name in _PROGRESS:
            setattr(self, name, state[name])

    def _exit(self, message: str) -> None:
        if is_first_process():
            words = [word for word in sys.argv if word != "--resume"]
            launcher = _program("python")
            if dist.is_torchelastic_launched():
                ranks = dist.get_world_size()
                launcher = f"{_program('torchrun')} --standalone --nproc-per-node {ranks}"
            print(f"\n{message} Go on with:\n  {launcher} {shlex.join([*words, '--resume'])}")
        raise SystemExit(130)


_PROGRESS = ("iteration", "seconds", "recent", "history", "best")


# --- Private helpers --------------------------------------------------------------------------


def _rasterise(letter: str, face: ImageFont.FreeTypeFont) -> Tensor:
    """A glyph, centred, its longer side four fifths of an image of twice the final size."""
    left, top, right, bottom = face.getbbox(letter)
    glyph = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), letter, fill=255, font=face)
    glyph = glyph.crop(glyph.getbbox())
    scale = 1.6 * SIZE / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    canvas.paste(
        glyph.resize((width, height), Image.Resampling.BILINEAR),
        (SIZE - width // 2, SIZE - height // 2),
    )
    return torch.from_numpy(np.array(canvas)) / 255


def _warp(glyph: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly turned, sheared, scaled and shifted copies, as bytes at the final size."""
    images = glyph.repeat_interleave(WARPS, 0).unsqueeze(1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, shear = uniform(-0.35, 0.35), uniform(-0.25, 0.25)
    width, height = uniform(0.7, 1.05), uniform(0.7, 1.05)
    # affine_grid takes the map from the new image to the old one.
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    stretch = torch.stack([1 / width, shear, torch.zeros_like(shear), 1 / height], 1)
    shift = torch.stack([uniform(-0.2, 0.2), uniform(-0.2, 0.2)], 1)
    linear = turn.view(-1, 2, 2) @ stretch.view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([linear, shift[..., None]], 2), list(images.shape), False)
    warped = F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), 2)
    return (warped[:, 0] * 255).round().to(torch.uint8)


def _omniglot_files(root: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Path parts and content of every drawing in a folder, the zips in it, or a zip."""
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; expected a folder with Omniglot's zips")
    found = False
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in filter(_is_drawing, archive.namelist()):
                    found = True
                    yield tuple(name.split("/")), archive.read(name)
        elif _is_drawing(path.as_posix()):
            found = True
            yield path.parts, path.read_bytes()
    if not found:
        raise FileNotFoundError(
            f"{root} holds no drawings; expected images_background.zip, or what it holds: "
            f"ALPHABET/characterNN/NNNN_NN.png"
        )


def _is_drawing(path: str) -> bool:
    return re.search(r"[^/]+/character\d+/[^/]+\.png$", path) is not None


def _shrink(content: bytes) -> Tensor:
    """A drawing, black on white, as bytes with ink 255 at the final size."""
    image = Image.open(io.BytesIO(content)).convert("L")
    return 255 - torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BOX)))


def _program(name: str) -> str:
    """How to call a program that is installed beside this Python."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _share(items: Any, divisor: int) -> int:
    """How many of the items are one part of ``divisor``; at least one."""
    return max(1, round(len(items) / divisor))


def _generator(stream: int) -> torch.Generator:
    """Validation and test tasks are the same in all runs, whatever their seed."""
    return torch.Generator().manual_seed(1_000_000 + stream)


def _clone(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tree.items()}


def _mean(records: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: sum(record[name] for record in records) / len(records)
        for name in (records[0] if records else ())
    }


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C fills the list, for the loop to stop between iterations; again, it stops at once."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


INK, RIGHT, WRONG, QUIET = "#1d2b3a", "#2a9d8f", "#d1495b", "#b8c0c8"


def _picture(
    title: str,
    history: list[dict[str, float]],
    results: dict[str, dict[str, float]],
    tasks: Tasks,
    predict: Callable[[Tasks], Tensor],
) -> Figure:
    """The learning curve beside a few test tasks and what was made of them."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    curve, board = figure.subplots(1, 2, width_ratios=(1, 1.35))
    steps = [entry["iteration"] for entry in history]
    trained = [entry for entry in history if "accuracy" in entry]
    curve.plot(
        [entry["iteration"] for entry in trained],
        [entry["accuracy"] for entry in trained],
        color=QUIET,
        label="training classes",
    )
    curve.plot(
        steps, [entry["validation"] for entry in history], "o-", color=INK, label="held-out classes"
    )
    for (name, result), color in zip(results.items(), (RIGHT, "#e09f3e", WRONG), strict=True):
        level, margin = result["accuracy"], result["interval95"]
        curve.axhspan(level - margin, level + margin, color=color, alpha=0.35, lw=0)
        curve.axhline(level, color=color, ls="--", label=f"unseen scripts: {name} {level:.1%}")
    curve.set(xlabel="meta-updates", ylabel="accuracy", ylim=(0, 1), title=title)
    curve.legend(loc="lower right", fontsize=8)
    curve.spines[["top", "right"]].set_visible(False)
    board.imshow(_board(tasks, predict), interpolation="nearest")
    board.set_axis_off()
    board.set_title(
        "Unseen scripts: a task in each row. Left: the labelled drawings.\n"
        "Right: queries, framed by verdict; a wrong answer shows the class it named",
        fontsize=10,
    )
    return figure


def _board(tasks: Tasks, predict: Callable[[Tasks], Tensor], rows: int = 8) -> np.ndarray:
    """A picture of test tasks: a support drawing of each class, then queries with verdicts."""
    shown = Tasks(*(tensor[:rows] for tensor in tasks))
    labels = predict(shown).cpu()
    tasks = Tasks(*(tensor.cpu() for tensor in shown))
    ways = int(tasks.support_y.max()) + 1
    shots = tasks.support_y.shape[1] // ways
    queries = tasks.query_y.shape[1] // ways
    # The first query of each class, then the second of each, as far as the row is wide.
    order = [way * queries + query for query in range(queries) for way in range(ways)]
    lines = []
    for row in range(len(tasks.support_y)):
        support = [tasks.support_x[row, way * shots, 0] for way in range(ways)]
        line = [_tile(image, QUIET) for image in support[:10]]
        line.append(np.ones_like(line[0]))
        for query in order[:10]:
            label = int(labels[row, query])
            right = label == int(tasks.query_y[row, query])
            image = tasks.query_x[row, query, 0]
            line.append(_tile(image, RIGHT if right else WRONG, None if right else support[label]))
        lines.append(np.concatenate(line, 1))
    return np.concatenate(lines)


def _tile(image: Tensor, frame: str, corner: Tensor | None = None) -> np.ndarray:
    """A drawing, enlarged and framed, with perhaps a small one in its corner."""
    scale, margin, border = 3, 5, 4
    size = scale * SIZE + 2 * (margin + border)
    tile = np.ones((size, size, 3))
    tile[margin:-margin, margin:-margin] = to_rgb(frame)
    inner = margin + border
    tile[inner:-inner, inner:-inner] = _coloured(
        image.repeat_interleave(scale, 0).repeat_interleave(scale, 1), INK
    )
    if corner is not None:
        tile[-inner - SIZE : -inner, -inner - SIZE : -inner] = _coloured(corner, WRONG)
    return tile


def _coloured(image: Tensor, ink: str) -> np.ndarray:
    """Ink of a colour on white."""
    strength = image.numpy()[..., None]
    return 1 - strength * (1 - np.array(to_rgb(ink)))
