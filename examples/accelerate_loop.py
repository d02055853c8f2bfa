"""A loop of one's own with Accelerate: accumulation, clipping, a schedule, checkpoints."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from trainer_ext import build_optimizer


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optim", default="two_sided_basis")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--checkpoint", help="folder to save to at the end")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    # Counting up from a random start: something that can be learned.
    tokens = (torch.randint(64, (256, 1)) + torch.arange(32)) % 64
    batches = DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)
    optimizer = build_optimizer(model, args.optim, lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)

    step, loss = 0, torch.tensor(0.0)
    while step < args.steps:
        for (batch,) in batches:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step % 10 == 0:
                    accelerator.print(f"step {step} loss {loss.item():.3f}")
            if step == args.steps:
                break
    if args.checkpoint:
        accelerator.save_state(args.checkpoint)
    return loss.item()


if __name__ == "__main__":
    main()
