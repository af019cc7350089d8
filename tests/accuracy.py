"""Print the largest errors against the closed forms, in float64: a row a transform.

    python tests/accuracy.py

The errors are those of tests/_torch/test_derivatives.py: absolute where the number is below 1, and
relative above, over all problems of tests/problems.py and all methods that suit each.
"""

import torch
from problems import PROBLEMS, Flat, Problem
from torch import Tensor

from tests._torch.test_derivatives import BATCHED_SECOND, FIRST, SECOND


def error(problem: Problem, method: str, row: str) -> float:
    compute, expect = TABLE[row]
    actual: Tensor = compute(Flat(problem, problem.methods(torch.float64)[method]))
    expected = expect(problem)
    return ((actual - expected).abs() / expected.abs().clamp_min(1)).max().item()


TABLE = {**FIRST, **SECOND, **BATCHED_SECOND}

if __name__ == "__main__":
    total = (0.0, "", "")
    for row in TABLE:
        worst = max(
            (error(problem, method, row), method, problem.name)
            for problem in PROBLEMS
            for method in problem.methods(torch.float64)
        )
        total = max(total, worst)
        print(f"{row:27s}{worst[0]:9.1e}   {worst[1]} on {worst[2]}")
    print(f"{'all':27s}{total[0]:9.1e}   {total[1]} on {total[2]}")
