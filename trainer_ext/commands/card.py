"""``hf-precond card DIR``: curves, figures and a baseline in a run's model card."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer_ext.commands.output import JsonOption, print_json
from trainer_ext.training_card import IMAGE, Metadata, add_training_section

FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="A run's output_dir.")]
BaselineOption = Annotated[
    str | None, typer.Option(help="output_dir of a run to compare with, AdamW's for example.")
]
LicenseOption = Annotated[
    str | None, typer.Option("--license", help="License of the weights, as apache-2.0.")
]
LanguageOption = Annotated[list[str] | None, typer.Option(help="Code of a language, as en.")]
DatasetOption = Annotated[
    list[str] | None, typer.Option(help="Name of the data; the final metrics are said to be of it.")
]
TaskOption = Annotated[
    str | None, typer.Option(help="The Hub's task, as text-generation; default: the card's own.")
]


def card_command(
    folder: FolderArgument,
    baseline: BaselineOption = None,
    license_name: LicenseOption = None,
    language: LanguageOption = None,
    dataset: DatasetOption = None,
    task: TaskOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put curves and figures of a finished run into its model card, beside those of a baseline."""
    metadata = Metadata(license=license_name, language=language, datasets=dataset, task=task)
    card = add_training_section(folder, baseline, metadata)
    if as_json:
        print_json({"card": str(card), "image": str(card.with_name(IMAGE))})
    else:
        print(f"{card}, {card.with_name(IMAGE)}")
