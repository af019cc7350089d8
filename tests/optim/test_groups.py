"""Coefficients and optimisers by the names of modules, against the groups of torch.optim."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperfunc as hf

STEPS = 3


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.encoder2 = nn.Linear(4, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder2(self.encoder(x))))


def problem() -> tuple[Net, Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    net = Net()
    apply, params = hf.functional(net)
    return net, apply, params, torch.randn(7, 3)


def trained(optimizer: Any, hparams: Any = None, at: Any = None) -> dict[str, Tensor]:
    _, apply, params, x = at or problem()
    loss = lambda w, h, x: (apply(w, x) ** 2).mean()  # noqa: E731
    return hf.minimize(loss, optimizer, STEPS, init=lambda h, x: params)(hparams, x)


def by_torch(make: Any) -> dict[str, Tensor]:
    net, _, _, x = problem()
    optimizer = make(net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (net(x) ** 2).mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adamax", "NAdam"])
def test_groups_are_those_of_torch(name: str) -> None:
    """Native classes and others: by groups, by names of modules, with a dot or without."""
    kind = getattr(torch.optim, name)
    common = {"weight_decay": 0.1}
    expected = by_torch(
        lambda net: kind(
            [
                {"params": net.encoder.parameters(), "lr": 0.05},
                {"params": net.encoder2.parameters(), "lr": 0.1, "weight_decay": 0.3},
                {"params": net.head.parameters()},
            ],
            lr=0.02,
            **common,
        )
    )
    groups = [
        {"params": ["encoder.0", "encoder.2."], "lr": 0.05},
        {"params": "encoder2", "lr": 0.1, "weight_decay": 0.3},
        {"params": ""},
    ]
    torch.testing.assert_close(
        trained(hf.optim.from_torch(kind, groups=groups, lr=0.02, **common)), expected
    )
    rates = {"encoder.": 0.05, "encoder2.": 0.1, "head.": 0.02}
    decays = {"encoder2": 0.3, "": 0.1}
    by_module = hf.optim.from_torch(kind, lr=rates, weight_decay=decays)
    torch.testing.assert_close(trained(by_module), expected)
    if name in ("SGD", "AdamW"):
        one = getattr(hf.optim, name.lower())
        optimizer = one(
            lr=lambda h: {
                "encoder": h["low"],
                "encoder2.weight": 0.1,
                "encoder2.bias": 0.1,
                "": 0.02,
            },
            weight_decay=hf.optim.by_name(lambda n: 0.3 if n.startswith("encoder2") else 0.1),
        )
        torch.testing.assert_close(trained(optimizer, {"low": torch.tensor(0.05)}), expected)


def test_values_by_name_are_differentiated_and_mapped() -> None:
    at = problem()

    def total(h: Tensor) -> Tensor:
        halving = hf.optim.schedule(lambda h, step: h[1] * 0.5 ** step.double())
        sgd = hf.optim.sgd(lr={"encoder": lambda h: h[0], "": halving}, momentum=0.5)
        nadam = hf.optim.from_torch(torch.optim.NAdam, lr=lambda h: h[1])
        both = hf.optim.grouped({"": sgd, "head": nadam})
        return sum((leaf**2).sum() for leaf in trained(both, h, at).values())

    h = torch.tensor([0.1, 0.2])
    gradient = torch.func.grad(total)(h)
    for index, direction in enumerate(torch.eye(2)):
        step = 1e-5 * direction
        difference = (total(h + step) - total(h - step)) / 2e-5
        torch.testing.assert_close(gradient[index], difference, rtol=1e-6, atol=1e-8)
    hs = torch.stack([h, 2 * h])
    torch.testing.assert_close(torch.func.vmap(total)(hs), torch.stack([total(x) for x in hs]))


def test_names_that_fit_nothing_and_parameters_without_a_name() -> None:
    _, _, params, _ = problem()
    one = hf.optim.sgd(0.1)
    for make in (
        lambda names: hf.optim.sgd(lr=dict.fromkeys(names, 0.1)),
        lambda names: hf.optim.grouped(dict.fromkeys(names, one)),
        lambda names: hf.optim.from_torch(torch.optim.NAdam, lr=dict.fromkeys(names, 0.1)),
    ):
        for names, text in (
            (
                ("encoder", "head"),
                "no name fits the parameter 'encoder2.bias'; got .*'encoder', 'h",
            ),
            (("", "enc"), "the name 'enc' fits no parameter; expected .*'head.weight'"),
        ):
            optimizer = make(names)
            with pytest.raises(ValueError, match=text):
                optimizer.update(params, optimizer.init(params), params)
    for call, text in (
        (lambda: hf.optim.grouped({"a": torch.optim.SGD}), r"groups\['a'\]: got the class"),
        (lambda: hf.optim.grouped([one]), "expected a dictionary from names"),
        (lambda: hf.optim.by_name(0.1), "by_name: fn"),
        (lambda: hf.optim.from_torch(torch.optim.SGD, groups={}), "expected a list of dict"),
        (
            lambda: hf.optim.from_torch(torch.optim.SGD, groups=[{"params": [torch.ones(2)]}]),
            r"groups\[0\] is of type dict without names",
        ),
    ):
        with pytest.raises(TypeError, match=text):
            call()
    with pytest.raises(ValueError, match="'a' is in two groups"):
        hf.optim.from_torch(torch.optim.SGD, groups=[{"params": "a"}, {"params": ["a"]}])
    partly = hf.optim.from_torch(torch.optim.NAdam, lr={"": 0.1}, eps={"encoder": 1e-3})
    with pytest.raises(ValueError, match=r"no name fits the parameter 'encoder2\.bias'"):
        partly.init(params)
    numbered = hf.optim.sgd(lr={0: 0.1})
    with pytest.raises(ValueError, match="another structure than params"):
        numbered.update(params, numbered.init(params), params)
    negative = hf.optim.sgd(lr=lambda h: {"": -1.0})
    with pytest.raises(ValueError, match="number of at least 0"):
        negative.update(params, negative.init(params), params, 0.0)
