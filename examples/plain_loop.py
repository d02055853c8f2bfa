"""Torch alone: a small network and a preconditioned optimizer."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from hf_precond import create_optimizer


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optim", default="shampoo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    optimizer = create_optimizer(model, args.optim, lr=args.learning_rate)
    loss = torch.tensor(0.0)
    for step in range(1, args.steps + 1):
        x = torch.randn(128, 32)
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
