"""Minibatches as inputs: from loaders, lists and iterators, and as indices."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hyperfunc as hf

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


class Augmented(Dataset):
    """Draws noise for each sample it gives."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": X[index] + torch.rand(2), "y": int(Y[index])}


def test_loaders_lists_and_iterators_are_stacked():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True)
    batches = list(loader)
    expected = [torch.stack(column) for column in zip(*batches, strict=True)]
    for each in (loader, batches, iter(batches), (batch for batch in loader)):
        got = hf.stack_batches(each)
        assert all(map(torch.equal, got, expected))
    twice = hf.stack_batches(loader, num_steps=5)
    assert torch.equal(twice[1], torch.stack([batches[i % 2][1] for i in range(5)]))
    arrays = hf.stack_batches([{"x": np.ones(3), "n": 2}, {"x": np.zeros(3), "n": 4}])
    assert arrays["x"].dtype == torch.float64
    assert arrays["n"].tolist() == [2, 4]


def test_what_is_random_in_a_loader_is_drawn_once():
    loader = DataLoader(Augmented(), batch_size=5, shuffle=True)
    torch.manual_seed(0)
    inputs = hf.stack_batches(loader, num_steps=6)
    assert [sorted(inputs["y"][i : i + 2].flatten().tolist()) for i in (0, 2, 4)] == [
        list(range(10))
    ] * 3
    assert not torch.equal(inputs["y"][:2], inputs["y"][2:4])

    def loss(w, h, batch):
        noise = torch.rand(())  # replayed too
        return ((batch["x"] @ w - batch["y"]) ** 2 * h.exp()).mean() * noise

    solver = hf.minimize(loss, hf.optim.sgd(1e-3), 6, init=lambda h: torch.zeros(2), inputs=inputs)
    results = []
    for method in ("reverse_unroll", hf.Reverse("sqrt")):
        torch.manual_seed(1)
        results.append(hf.hypergrad(solver, lambda w, h: w.sum(), method=method)(torch.zeros(())))
    torch.testing.assert_close(*results)


def test_indices_go_through_epochs_without_repetition():
    generator = torch.Generator().manual_seed(0)
    indices = hf.batch_indices(10, 3, 7, generator=generator)
    assert indices.shape == (7, 3)
    for epoch in indices.split(3):
        assert len(set(epoch.flatten().tolist())) == epoch.numel()
    assert not torch.equal(indices[:3], indices[3:6])
    again = hf.batch_indices(10, 3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(indices, again)

    def by_index(w, h, X, index):
        return ((X[index] @ w - h) ** 2).mean()

    def by_batch(w, h, X, batch):
        return ((batch @ w - h) ** 2).mean()

    solvers = [
        hf.minimize(loss, hf.optim.sgd(1e-3), 7, init=lambda h, X: torch.zeros(2), inputs=inputs)
        for loss, inputs in ((by_index, indices), (by_batch, hf.stack_batches(X[indices].unbind())))
    ]
    fns = [hf.hypergrad(solver, lambda w, h, X: w.sum(), method="reverse") for solver in solvers]
    h = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(*(torch.func.vmap(fn, in_dims=(0, None))(h, X) for fn in fns))


def start(h):
    return torch.zeros(2)


LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)
ERRORS = [
    (
        lambda: hf.minimize(abs, hf.optim.sgd(), 4, init=start, inputs=LOADER),
        TypeError,
        r"inputs is .* of type DataLoader; .* Write inputs=hf.stack_batches\(..., num_steps=4\)",
    ),
    (
        lambda: hf.minimize(abs, hf.optim.sgd(), 5, init=start, inputs=[(X, Y)] * 5),
        ValueError,
        r"inputs\[0\]\[0\] has shape \(10, 2\); .* list of batches write inputs=hf.stack_batches",
    ),
    (
        lambda: hf.stack_batches(LOADER),
        ValueError,
        r"batch 2 is .*\[\(2, 2\), \(2,\)\], but batch 0 is .*DataLoader\(..., drop_last=True\)",
    ),
    (lambda: hf.stack_batches([]), ValueError, "got 0 batches; expected at least 1"),
    (lambda: hf.stack_batches([], 3), ValueError, "got 0 batches; expected 3"),
    (lambda: hf.stack_batches(iter([X]), 3), ValueError, "got 1 batches; expected 3"),
    (lambda: hf.stack_batches(X), TypeError, "batches is of type Tensor; expected a DataLoader"),
    (lambda: hf.stack_batches([{"a": "b"}]), TypeError, r"batch\['a'\] is of type str"),
    (lambda: hf.stack_batches(LOADER, 0), ValueError, "num_steps is 0; expected an integer >= 1"),
    (lambda: hf.batch_indices(3, 4, 5), ValueError, "batch_size is 4; expected at most num_samp"),
    (lambda: hf.batch_indices(3, 1.5, 5), TypeError, "batch_size is 1.5; expected an integer"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors_say_what_was_got_and_what_to_type(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
