"""Functions of flat tensors compiled by ``torch.compile``, under ``vmap`` too.

A function is traced at the level of torch's operators, with whatever transforms and derivatives it
takes inside, once for each signature; what is compiled is that trace. Under ``vmap`` the batched
function is what is traced and compiled, and it runs outside of the level.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hyperfunc._compile.comparison import difference
from hyperfunc._engine import trees
from hyperfunc._engine.shown import show
from hyperfunc._torch import internals, loops, tracking
from hyperfunc._torch.captured import captured_values
from hyperfunc._torch.indexing import RowsByIndex
from hyperfunc._types import Leaves

DEFAULT_BACKEND = "inductor"

# Values that are used twice are written to memory once, where by default those made of few others
# are computed anew at each use: of params, all steps before would be.
_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 1}

# Operations that add or put values into places of a tensor. With that option inductor (2.13) reads
# such a tensor before the values are in it.
_SCATTERS = ("scatter", "index", "col2im", "pool", "embedding_dense", "upsample", "grid_sampler")

# Operations whose result Inductor takes for a copy of the first operand, laid out as it is.
_WRITES_TO_EXPANDED = ("index_add", "index_copy", "index_fill", "index_put", "diagonal_scatter")

# Signatures after which something seems to change that was not meant to.
_MANY = 16

# Held while something is compiled or what torch.compile made runs: torch keeps one note for all
# threads that it is tracing, and refuses such functions meanwhile.
_ONE_THREAD = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Backend:
    """What ``torch.compile`` is asked for: a backend, or a mode or options of the default one."""

    name: str = DEFAULT_BACKEND
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, graph: torch.fx.GraphModule, operands: Leaves) -> Callable[..., Any]:
        if self.name == "eager":
            return graph.forward
        if self.is_direct(operands):
            return self._compile_directly(graph, operands)
        compiled = torch.compile(
            graph.forward,
            fullgraph=True,
            dynamic=False,
            backend=self.name,
            mode=self.mode,
            options=dict(self.options) or None,
        )
        return _copying(compiled) if self.captures_cuda_graphs else compiled

    def _compile_directly(
        self, graph: torch.fx.GraphModule, operands: Leaves
    ) -> Callable[..., Any]:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import

        for part in _parts(graph):
            for node in part.graph.nodes:  # fake tensors of many modes, which inductor mistakes
                node.meta.pop("val", None)
        fakes = FakeTensorMode(shape_env=ShapeEnv())  # without an environment nothing is cached
        example: Any = [fakes.from_tensor(_like(leaf), static_shapes=True) for leaf in operands]
        options = {} if any(map(_scatters, _parts(graph))) else dict(_OPTIONS)
        if loops.supported():
            options["cpp_wrapper"] = not loops.may_be_empty(graph)
            options["unsafe_marked_cacheable_functions"] = loops.cacheable()
        options |= dict(self.options)
        compiled: Callable[..., Any] = torch._inductor.compile(graph, example, options=options)
        return compiled

    def is_direct(self, operands: Sequence[Any]) -> bool:
        """Whether the default backend is called without guards, which the signature stands for."""
        return (
            self.name == DEFAULT_BACKEND
            and self.mode is None
            and not self.captures_cuda_graphs
            and all(type(leaf) is Tensor and leaf.device.type == "cpu" for leaf in operands)
        )

    def keeps_loops(self, operands: Sequence[Any]) -> bool:
        """Whether it compiles loops as loops."""
        return loops.supported() and (self.name == "eager" or self.is_direct(operands))

    @property
    def captures_cuda_graphs(self) -> bool:
        """Whether results lie in memory that the next call writes to."""
        asked = torch._inductor.list_mode_options().get(self.mode or "", {}) | dict(self.options)
        return bool(asked.get("triton.cudagraphs"))


class Variables:
    """What functions close over, at some time: equal to itself alone."""


class Compiler:
    """Compiles the functions of one transform or solver, for each state of their variables."""

    def __init__(self, backend: Backend, name: str, functions: tuple[Any, ...]) -> None:
        self.backend = backend
        self.name = name
        self.functions = functions
        self.entries: dict[Hashable, _Entry] = {}
        self._variables: dict[Hashable, Variables] = {}
        self._names: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiler, (self.backend, self.name, self.functions)  # which compiles anew

    def applies(self, tensors: Sequence[Any]) -> bool:
        """`applies`, where this torch compiles loops or the backend is not asked to."""
        if self.backend.is_direct(tensors) and not loops.supported():
            oldest = ".".join(map(str, loops.OLDEST))
            warnings.warn(
                f"compile: torch {torch.__version__} cannot compile loops, so {self.name} runs "
                f"uncompiled. Install torch {oldest} or later, or leave compile out",
                stacklevel=2,
            )
            return False
        return applies(tensors)

    def read(self) -> Variables:
        values, self._names = captured_values(self.functions, self._names)
        return self._variables.setdefault(values, Variables())

    def call(
        self, fn: Callable[..., Any], key: Hashable, variables: Variables, operands: Leaves
    ) -> Any:
        """``fn(*operands)``, a tree, by compiled code; ``key`` tells apart what operands do not."""
        try:
            hash(key)
        except TypeError as error:
            raise ValueError(
                f"compile: args of {self.name} hold a value that is neither a tensor nor hashable "
                f"({error}), so that it cannot be told when it changes. Leave it out of args, "
                f"or write torch.as_tensor(...) around an array"
            ) from error
        frames: list[trees.Frame] = []
        grad_mode = torch.is_grad_enabled()  # in which tensors that require grad are refused

        def flat(*operands: Tensor) -> Leaves:
            with torch.set_grad_enabled(grad_mode):
                tensors, frame = trees.partition(fn(*operands))
            frames[:] = [frame]
            return tensors

        call = _Call(self, flat, (key, variables, grad_mode), frames)
        if tracking.transforms_active():
            outputs = _outside(call, operands)
        else:
            outputs = self.run(call, operands)
        return frames[0].fill(outputs)

    def run(self, call: _Call, operands: Leaves) -> Leaves:
        operands = tracking.detach(operands)
        signature = (call.key, _circumstances(operands), tuple(map(_describe, operands)))
        entry = self.entries.get(signature)
        if entry is not None and entry.is_direct:
            call.frames[:] = [entry.frame]
            with torch.no_grad():
                return tuple(entry.compiled(*operands))
        with _ONE_THREAD, torch.no_grad():
            entry = self.entries.get(signature)
            if entry is not None:
                call.frames[:] = [entry.frame]
                return tuple(entry.compiled(*operands))
            graph = self._trace(call.fn, operands)
            try:
                compiled = self.backend(graph, operands)
                outputs = tuple(compiled(*operands))
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise RuntimeError(
                    f"compile: the backend {self.backend.name!r} of torch.compile failed on "
                    f"{self.name}: {type(error).__name__}: {reason} ... Leave compile out, or "
                    f"name another backend"
                ) from error
            self._compare(call, outputs, operands, graph)
            if len(self.entries) == _MANY:
                warnings.warn(
                    f"compile: {self.name} is compiled for the {_MANY + 1}th time, as shapes, "
                    f"constants or closed-over tensors change between calls. Pass tensors that "
                    f"change in *args",
                    stacklevel=2,
                )
            direct = self.backend.is_direct(operands)
            self.entries[signature] = _Entry(compiled, direct, *call.frames)
        return outputs

    def _trace(self, fn: Callable[..., Leaves], operands: Leaves) -> torch.fx.GraphModule:
        try:
            keeps = self.backend.keeps_loops(operands)
            with RowsByIndex(), loops.kept() if keeps else contextlib.nullcontext():
                graph = make_fx(fn)(*operands)
        except RuntimeError as error:
            if "tracing tensor" not in str(error) and "data-dependent" not in str(error).lower():
                raise
            raise ValueError(
                f"compile: {self.name} cannot be compiled, as its course depends on the values of "
                f"tensors: an if or .item() on a tensor, or a solver of your own that chooses as "
                f"it goes. Tolerances need the default backend on a CPU; else write "
                f"rtol=0, atol=0 for a fixed number of steps, or leave compile out"
            ) from error
        for node in itertools.chain.from_iterable(part.graph.nodes for part in _parts(graph)):
            if _draws(node):
                raise ValueError(
                    f"compile: {self.name} cannot be compiled, as it draws random numbers "
                    f"({node.target}), which compiled code draws differently. Draw them outside "
                    f"and pass them in *args, or leave compile out"
                )
        for part in _parts(graph):
            _spell_out_scaled_sums(part)
            _lay_out_expanded(part)
            part.graph.eliminate_dead_code()
            part.recompile()
        loops.sink_views(graph)
        return graph

    def _compare(
        self, call: _Call, outputs: Leaves, operands: Leaves, graph: torch.fx.GraphModule
    ) -> None:
        paths = call.frames[0].paths("output")
        found = difference(
            outputs,
            call.fn(*operands),
            call.fn,
            operands,
            levels=call.levels,
            dtypes=[dtype for part in _parts(graph) for dtype in _low_precision(part)],
            paths=paths if loops.has_loops(graph) else None,
        )
        if found is None:
            return
        path = paths[found.position]
        tasks = f", for {found.wrong} of {found.tasks} tasks" if call.levels else ""
        raise RuntimeError(
            f"compile: what {self.backend.name!r} compiled of {self.name} gives other numbers than "
            f"uncompiled code{tasks}: {path} is off by {found.gap:.1e} where its "
            f"largest entry is {found.size:.1e}, more than perturbed arguments explain. Leave "
            f"compile out, or name another backend"
        )


def _like(leaf: Tensor) -> Tensor:
    """A tensor like one, in memory of its own: loops refuse operands that share theirs."""
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _draws(node: torch.fx.Node) -> bool:
    """Whether a node draws random numbers, as attention does with dropout alone."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == "dropout_p":
            named = node.kwargs.get("dropout_p", argument.default_value)
            return bool((node.args[i] if i < len(node.args) else named) != 0)
    return True


def _scatters(part: torch.fx.GraphModule) -> bool:
    names = (str(node.target) for node in part.graph.nodes if node.op == "call_function")
    return any(scatter in name for name in names for scatter in _SCATTERS)


def applies(tensors: Sequence[Any]) -> bool:
    """Whether compiled code can stand in: no derivative is asked for, and nothing traces this."""
    tracing = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return not (
        torch.compiler.is_compiling() or tracing is not None or tracking.is_tracked(tensors)
    )


def check_backend(value: bool | str | Mapping[str, Any]) -> Backend | None:
    """What a ``compile=`` argument stands for, or None for no compilation."""
    if value is False:
        return None
    if value is True:
        return Backend()
    if isinstance(value, Mapping):
        known = torch._inductor.list_options()
        for name in value:
            if name not in known:
                raise ValueError(
                    f"compile holds {name!r}, which is no option of torch.compile's default "
                    f"backend; torch._inductor.list_options() lists them"
                )
        return Backend(options=tuple(value.items()))
    modes = sorted(set(torch._inductor.list_mode_options()) - {"default"})
    if isinstance(value, str) and value in modes:
        return Backend(mode=value)
    if isinstance(value, str) and value in torch.compiler.list_backends(exclude_tags=None):
        return Backend(value)
    raise ValueError(
        f"compile is {show(value)}; expected True, False, the name of a backend of torch.compile "
        f"({', '.join(torch.compiler.list_backends())}), a mode of it ({', '.join(modes)}), or a "
        f"dictionary of its options"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """A compiled function of flat tensors, and what its results are put into."""

    compiled: Callable[..., Any]
    is_direct: bool
    frame: trees.Frame


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A function that is to be compiled for given operands, below some levels of vmap."""

    compiler: Compiler
    fn: Callable[..., Leaves]
    key: Hashable
    frames: list[trees.Frame]
    levels: int = 0


def _outside(call: _Call, operands: Leaves) -> Leaves:
    """Leave the levels of vmap one by one, and run the compiled batched function there."""
    vmap: Any = internals.innermost_transform()
    if vmap is None:
        outputs = call.compiler.run(call, operands)
        # expanded results too, which would make another signature of what follows
        return tuple(
            leaf.clone() if internals.is_view(leaf) or 0 in leaf.stride() else leaf
            for leaf in outputs
        )
    level = vmap.level()
    dims = tuple(
        internals.batch_dim(leaf) if internals.level_of(leaf) == level else None
        for leaf in operands
    )
    mapped = any(dim is not None for dim in dims)
    if mapped:
        pairs = zip(operands, dims, strict=True)
        operands = tuple(leaf if dim is None else internals.unwrapped(leaf) for leaf, dim in pairs)
        randomness = internals.vmap_randomness(vmap)
        call = dataclasses.replace(
            call,
            fn=torch.func.vmap(call.fn, dims, randomness=randomness),
            key=(call.key, dims, internals.vmap_size(vmap), randomness),
            levels=call.levels + 1,
        )
    with internals.outside_innermost():
        outputs = _outside(call, operands)
    if not mapped:
        return outputs
    return tuple(internals.with_batch_dim(leaf, 0, level) for leaf in outputs)


def _parts(graph: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """A trace, and the parts of the loops in it."""
    return [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]


def _lay_out_expanded(graph: torch.fx.GraphModule) -> None:
    """Copy what is expanded before it is written into, as Inductor writes to it as it is.

    Entries that share their memory get the sum, or the last, of what each of them should have
    (torch 2.13).
    """
    for node in list(graph.graph.nodes):
        packet = str(getattr(node.target, "overloadpacket", "")).removeprefix("aten.")
        if packet not in _WRITES_TO_EXPANDED:  # in place they write to what is shared by right
            continue
        source, value = node.args[0], node.args[0].meta.get("val")
        if isinstance(value, Tensor) and 0 in value.stride():
            with graph.graph.inserting_before(node):
                copy = graph.graph.call_function(
                    torch.ops.aten.clone.default,
                    (source,),
                    {"memory_format": torch.contiguous_format},
                )
            node.replace_input_with(source, copy)


def _spell_out_scaled_sums(graph: torch.fx.GraphModule) -> None:
    """Write ``add(x, y, alpha)`` as ``x + alpha y``: Inductor forgets the factor (torch 2.13)."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        alpha = node.kwargs.get("alpha", 1)
        if node.target not in (aten.add.Tensor, aten.add_.Tensor) or alpha == 1:
            continue
        x, y = node.args
        with graph.graph.inserting_before(node):
            scaled = graph.graph.call_function(aten.mul.Tensor, (y, alpha))
        scaled.meta = dict(y.meta) if isinstance(y, torch.fx.Node) else {}
        node.args, node.kwargs = (x, scaled), {}


def _copying(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: tuple(output.clone() for output in function(*operands))


def _low_precision(graph: torch.fx.GraphModule) -> list[torch.dtype]:
    """The dtypes of half precision that a graph casts to."""
    dtypes = {
        value
        for node in graph.graph.nodes
        for value in (*node.args, *node.kwargs.values())
        if isinstance(value, torch.dtype)
    }
    return [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]


def _describe(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, type(tensor)


def _circumstances(operands: Leaves) -> Hashable:
    kinds = sorted({"cpu", *(tensor.device.type for tensor in operands)} - {"meta"})
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    return autocast, torch.get_default_dtype(), deterministic, torch.get_num_threads()
