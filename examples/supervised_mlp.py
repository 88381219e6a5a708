"""The Hessian of a small classifier over ragged batches: `python examples/supervised_mlp.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hesscope as hs

INPUTS, CLASSES, BATCH_SIZES = 16, 4, (64, 64, 50, 7)


def clusters() -> list[tuple[Tensor, Tensor]]:
    """Batches of unequal sizes: noisy points around one centre for each class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, INPUTS, generator=generator)
    batches = []
    for size in BATCH_SIZES:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        batches.append((centres[labels] + 1.5 * torch.randn(size, INPUTS, generator=generator), labels))
    return batches


def trained(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Two hidden layers after a short training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for step in range(300):
        inputs, labels = batches[step % len(batches)]
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def main(output_dir: Path) -> None:
    batches = clusters()
    problem = hs.supervised(trained(batches), batches)
    H = hs.hessian(problem)
    print(f"{H.shape[0]} weights, {problem.N} examples in batches of {problem.counts}, loss {problem.risk():.3f} nats")

    pairs = hs.eigs(H, k=6, which="LA")
    print(pairs.summary())
    trace = hs.trace(H, budget=100)
    print(trace.summary())
    print(
        f"these 6 of {H.shape[0]} eigenvalues make up {float(pairs.eigenvalues.sum()) / trace.estimate:.0%} of the trace"
    )

    output_dir.mkdir(parents=True, exist_ok=True)
    print("drawn:", hs.density(H, probes=20, steps=40).plot(output_dir / "density.png"))


if __name__ == "__main__":
    main(Path("runs/supervised-mlp"))
