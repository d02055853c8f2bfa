"""What commands print."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def print_json(content: Any) -> None:
    """Prints one JSON document."""
    print(json.dumps(content, indent=1))
