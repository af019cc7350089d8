"""Hypergradients in PyTorch, in the style of torch.func."""

from hyperfunc._results import RESULTS, Solution, SolveStats

__all__ = ["RESULTS", "Solution", "SolveStats"]
