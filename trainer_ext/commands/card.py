"""``hf-precond card DIR``: curves, figures and a baseline in a run's model card."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer_ext.commands.output import JsonOption, print_json
from trainer_ext.training_card import IMAGE, add_training_section

FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="A run's output_dir.")]
BaselineOption = Annotated[
    str | None, typer.Option(help="output_dir of a run to compare with, AdamW's for example.")
]


def card_command(
    folder: FolderArgument, baseline: BaselineOption = None, as_json: JsonOption = False
) -> None:
    """Put curves and figures of a finished run into its model card, beside those of a baseline."""
    card = add_training_section(folder, baseline)
    if as_json:
        print_json({"card": str(card), "image": str(card.with_name(IMAGE))})
    else:
        print(f"{card}, {card.with_name(IMAGE)}")
