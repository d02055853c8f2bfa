#!/usr/bin/env python
"""Plans memory, work and traffic of optimizers on a mesh of ranks; needs neither weights nor ranks.

    scripts/plan_memory.py --preset llama-350m --ranks 8 --parallel fsdp2 --optims soap kfac
    scripts/plan_memory.py --model_type llama --set hidden_size=4096 num_hidden_layers=32 \\
        --ranks 64 --parallel fsdp2 --optims shared_basis_adam:rank=16 soap:sharding=owner
    scripts/plan_memory.py --config FOLDER/config.json --ranks 1024 --parallel hsdp --replicas 4

State is counted exactly, for every rank. Temporaries and traffic are those of the rank with the
most state, whose steps are run on the meta device, one after the other until everything that is
done at intervals has had its turns: of temporaries the most at once, of traffic the mean. What
libraries take inside a call (workspace of a decomposition, buffers of a collective) is not seen, so
temporaries are an estimate. AdamW is torch's fused one, without temporaries.

Operations are those of the same steps: two for each multiplication of a matrix product, textbook
counts for decompositions, one for each element and elementwise function.

Bytes sent are what leaves a rank in a ring: 2 (W-1)/W of what it gives to an all-reduce, (W-1)/W of
what it gives to a reduce-scatter or all-to-all, W-1 times its own part of an all-gather. Forward
and backward send gradients under DDP; under FSDP2 weights twice and gradients once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from trainer_ext.arguments import parse_optim_args
from trainer_ext.data.presets import PRESETS, override_config, preset_config
from trainer_ext.memory_plan import PARALLEL, Mesh
from trainer_ext.plan_report import format_report, plan_result
from trainer_ext.provenance import provenance
from trainer_ext.reports import write_json
from trainer_ext.training_script import one_line_errors

DTYPES = ("float32", "bfloat16")
SHARDING = ("auto", "replicated", "owner", "blocks")


def main(argv: Sequence[str] | None = None) -> int:
    """Plans, prints the tables and writes the JSON file."""
    args = parse_arguments(argv)
    with one_line_errors():
        model = meta_model(load_config(args), getattr(torch, args.dtype))
        mesh = Mesh(
            ranks=args.ranks,
            parallel=args.parallel,
            replicas=args.replicas,
            positions=args.positions,
            device=args.device,
        )
        optimizers = []
        for label in args.optims:
            name, _, text = label.partition(":")
            options = {"sharding": args.sharding, **parse_optim_args(name, text).options}
            optimizers.append((name, text, options))
        result = {**provenance(__file__, args), **plan_result(model, mesh, optimizers)}
    print(format_report(result))
    if args.output is not None:
        write_json(args.output, result)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", choices=tuple(PRESETS))
    model.add_argument("--config", type=Path, help="a config.json, or the folder it is in")
    model.add_argument("--model_type", help="llama, gpt2, ..., with its default sizes")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--ranks", type=int, default=1, help="number of all ranks")
    parser.add_argument("--parallel", choices=PARALLEL, default="ddp")
    parser.add_argument("--replicas", type=int, default=1, help="of the rows, in hsdp")
    parser.add_argument("--positions", type=int, default=4096, help="tokens of a rank and step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the ranks")
    parser.add_argument(
        "--optims",
        nargs="+",
        default=["shared_basis_adam"],
        metavar="NAME[:OPTIONS]",
        help="names with options as in optim_args: soap:sharding=owner,max_dim=8192",
    )
    parser.add_argument("--sharding", choices=SHARDING, default="auto", help="where none is given")
    parser.add_argument("--output", type=Path, help="JSON file, for example results/plan_7b.json")
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> PretrainedConfig:
    """The configuration that is asked for.

    Raises:
        ValueError: no such file or model type, or changes that do not fit.
    """
    if args.preset is not None:
        config = preset_config(args.preset)
    elif args.config is not None:
        config = read_config(args.config)
    elif args.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[args.model_type]()
    else:
        raise ValueError(f"model_type={args.model_type!r} is not a model type of transformers")
    if args.set:
        override_config(config, ",".join(args.set))
    return config


def read_config(path: Path) -> PretrainedConfig:
    """The configuration in a file.

    Raises:
        ValueError: there is none, or it is of no known model type.
    """
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"config {str(path)!r} does not exist")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"config {str(path)!r} has no model_type of transformers")
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


if __name__ == "__main__":
    sys.exit(main())
