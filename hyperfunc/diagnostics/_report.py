"""What `check_hypergrad` reports: numbers, the causes of a failure, and what to do about them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.results import RESULTS, HypergradError
from hyperfunc._types import TensorTree
from hyperfunc.diagnostics._diagnose import Diagnosis

ADVICE = {
    "solver_not_converged": (
        "the params that the inner solver returned do not satisfy the condition, or are not "
        "finite. Give it more steps, or use an iterative method such as method='reverse_unroll', "
        "which is right for the params that were reached"
    ),
    "condition_mismatch": (
        "the inner solver solves another problem than the one that fixed_point, inner_loss or "
        "optimality states. Pass the function that it solves, with every term and every "
        "hyperparameter"
    ),
    "linear_solve": (
        "the adjoint does not solve its linear system. Raise maxiter or lower rtol, or take "
        "another method: see hf.diagnose"
    ),
    "curvature": (
        "hf.composed takes the Gauss-Newton matrix for the Hessian; error_bound=True bounds what "
        "that costs. For the Hessian itself write the loss as one function, loss(model(params)), "
        "with method='cg', 'gmres' or 'normal_cg'"
    ),
    "damping": (
        "the adjoint solves the damped system, not the system itself. Lower the damping of "
        "hf.Damped, or leave it out"
    ),
    "assumption_broken": (
        "the method assumes what does not hold here: symmetry, positive curvature, contraction, "
        "that late steps alone matter, or that steps are the identity. Use the method that "
        "hf.diagnose recommends, or method='auto'"
    ),
    "dependence_lost": (
        "a function ignores or detaches what it depends on (.detach(), .item(), torch.no_grad(), a "
        "stale tensor that it closes over in place of hparams, a hyperparameter that it leaves out "
        "or forgets in one of its terms)"
    ),
    "route": (
        "several tasks at a time (vmap), compiled code or one more derivative give other numbers "
        "than one task at a time. An operation has a wrong rule for it: a vmap or a derivative of "
        "your own, or one of torch. Write the operation by others, or take tasks one by one: "
        "hf.task_map(fn, in_dims, chunk_size=1)"
    ),
    "inconclusive": (
        "the finite differences are too noisy to judge by. Is the inner solver random (dropout, "
        "minibatches)? Then call torch.manual_seed(0) first in it, so that each run draws the "
        "same (under vmap with randomness='same'). Or is it stopped by a loose tolerance? Then fix "
        "its number of steps. Is the residual of the inner problem large, or has it kinks (ReLU)? "
        "Then take more inner steps or a smaller rate first. In float32 use float64; or pass a "
        "larger rtol"
    ),
}


class Causes(NamedTuple):
    """Which ingredients are off: bool tensors, all false if the check passed."""

    solver_not_converged: Tensor
    condition_mismatch: Tensor
    linear_solve: Tensor
    curvature: Tensor
    damping: Tensor
    assumption_broken: Tensor
    dependence_lost: Tensor
    route: Tensor
    inconclusive: Tensor


Causes.__doc__ = f"{Causes.__doc__}\n\nAttributes:\n" + "".join(
    f"    {name}: {text}.\n" for name, text in ADVICE.items()
)


class HypergradCheck(NamedTuple):
    """What `hyperfunc.check_hypergrad` found: a tree of numbers; its ``str`` is a table.

    A column holds the derivatives along each direction, in float64; what was left out is ``()``.

    Attributes:
        hypergradient: by the method, a tree like hparams.
        by_method: its products with the directions.
        by_dense: by the implicit formula with a direct solve, at the same params; with the Hessian,
            for a loss made by `composed` too.
        by_unrolling: by differentiating the inner solver.
        by_differences: by finite differences through the inner solver.
        difference_errors: the estimated errors of these.
        tolerance: the gaps between method and differences that are allowed.
        inner_residual: the norm of the condition's residual at the returned params.
        newton_distance: how far a Newton step on the condition goes from there, relative to the
            norm of the params.
        linear_residual: of the linear solve, ``||b - A^T u|| / ||b||``, with the same ``A``.
        result: int64, its code of `hyperfunc.RESULTS`.
        causes: what is wrong, as bools.
        lost: a tree like hparams of bools: where a dependence on hparams was found to be lost.
        routes: a dictionary of the routes that were tried: how far the hypergradient by each is
            from that of one task at a time, relative to its largest entry. A vmap that was not
            asked for, and raises, is left out.
        operations: a dictionary from the name of an operation that is wrong by such a route, if
            one was found, to how far it is.
        diagnosis: what `hyperfunc.diagnose` finds at the returned params.

    Example:
        >>> report = hf.check_hypergrad(
        ...     lambda h: h,
        ...     lambda w, h: (w**2).sum(),
        ...     torch.ones(2),
        ...     inner_loss=lambda w, h: ((w - h) ** 2).sum(),
        ... )
        >>> report.raise_if_failed()
        >>> print(report)
        passed...
    """

    hypergradient: TensorTree
    by_method: Tensor
    by_dense: Any
    by_unrolling: Any
    by_differences: Tensor
    difference_errors: Tensor
    tolerance: Tensor
    inner_residual: Any
    newton_distance: Any
    linear_residual: Any
    result: Any
    causes: Causes
    lost: TensorTree
    routes: dict[str, Tensor]
    operations: dict[str, Tensor]
    diagnosis: Diagnosis | tuple[()]

    @property
    def passed(self) -> bool:
        """Whether no cause of a wrong hypergradient was found."""
        return not any(bool(cause) for cause in self.causes)

    def raise_if_failed(self) -> None:
        """Raise a `hyperfunc.HypergradError` with the causes and the table, if there are any."""
        if not self.passed:
            raise HypergradError(f"check_hypergrad: {self}")

    def __str__(self) -> str:
        lines = ["passed" if self.passed else "failed"]
        causes = self.causes._asdict()
        if not isinstance(self.by_unrolling, Tensor):  # of a black box more steps are seldom known
            names = ("condition_mismatch", "solver_not_converged")
            causes = {name: causes[name] for name in names} | causes
        for name, cause in causes.items():
            if bool(cause):
                lines.append(f"- {name.replace('_', ' ')}: {ADVICE[name]}{self._details(name)}")
        columns = {
            "method": self.by_method,
            "dense": self.by_dense,
            "unrolled": self.by_unrolling,
            "differences": self.by_differences,
            "± error": self.difference_errors,
            "allowed gap": self.tolerance,
        }
        shown = {name: column for name, column in columns.items() if isinstance(column, Tensor)}
        lines.append("direction" + "".join(f"{name:>15}" for name in shown))
        for i, row in enumerate(zip(*shown.values(), strict=True), 1):
            lines.append(f"{i:>9}" + "".join(f"{float(entry):>15.6e}" for entry in row))
        if isinstance(self.inner_residual, Tensor):
            lines.append(
                f"inner residual {float(self.inner_residual):.2e}, "
                f"Newton step {float(self.newton_distance):.2e} of the params"
            )
        if isinstance(self.linear_residual, Tensor):
            name = outcome(self.result).name
            lines.append(f"linear residual {float(self.linear_residual):.2e} ({name})")
        if self.routes:
            gaps = (f"{route} {float(found):.2e}" for route, found in self.routes.items())
            lines.append(f"against one task at a time: {', '.join(gaps)}")
        if not isinstance(self.by_dense, Tensor):
            lines.append("left out: dense (too many inner parameters, or no condition)")
        if not isinstance(self.by_unrolling, Tensor):
            lines.append("left out: unrolled (the inner solver cannot be differentiated)")
        return "\n".join(lines)

    def _details(self, name: str) -> str:
        facts = self.diagnosis
        if name == "route":
            return f". It is {', '.join(self.operations) or 'one that was not found'}"
        if name in ("curvature", "damping"):
            return f". The linear system is off by {float(self.linear_residual):.2g} of its size"
        if name in ("linear_solve", "assumption_broken") and isinstance(self.result, Tensor):
            text = f". The solve reported: {outcome(self.result).message}"
            if name == "assumption_broken" and isinstance(facts, Diagnosis):
                text += (
                    f". Asymmetry {float(facts.asymmetry.value):.2g}, smallest curvature "
                    f"{float(facts.eig_min.value):.3g}, largest {float(facts.eig_max.value):.3g}, "
                    f"spectral radius of I - s A {float(facts.spectral_radius.value):.3g} for s = "
                    f"{float(facts.step_size):.3g}"
                )
            return text
        if name == "dependence_lost":
            leaves, spec = trees.flatten(self.lost)
            paths = trees.paths(spec, "hparams")
            lost = [path for path, leaf in zip(paths, leaves, strict=True) if bool(leaf)]
            return f". It concerns {', '.join(lost)}" if lost else ". It concerns params"
        return ""


def outcome(result: Tensor) -> RESULTS:
    return next(code for code in RESULTS if code == int(result))
