"""A loop of one's own with Accelerate: accumulation, clipping, a schedule, checkpoints."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from trainer_ext import build_optimizer


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optim", default="two_sided_basis")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--checkpoints", help="folder for one checkpoint an epoch")
    parser.add_argument("--resume", help="one of them: FOLDER/epoch_1")
    args = parser.parse_args()

    # An order that depends on the epoch alone: a resumed run sees what it would have seen.
    data = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=data)
    set_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    # Counting up from a random start: something that can be learned.
    tokens = (torch.randint(64, (256, 1)) + torch.arange(32)) % 64
    batches = DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)
    optimizer = build_optimizer(model, args.optim, lr=args.learning_rate)
    # Accelerate's schedule steps as often as all processes together.
    steps = args.epochs * len(batches) // accelerator.gradient_accumulation_steps
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
    begin = 0
    if args.resume:
        accelerator.load_state(args.resume)
        begin = int(args.resume.rpartition("_")[2])

    mean = 0.0
    for epoch in range(begin, args.epochs):
        losses = []
        batches.set_epoch(epoch)
        for (batch,) in batches:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        accelerator.print(f"epoch {epoch + 1} loss {mean:.3f}")
        if args.checkpoints:
            accelerator.save_state(f"{args.checkpoints}/epoch_{epoch + 1}")
    accelerator.end_training()
    return mean


if __name__ == "__main__":
    main()
