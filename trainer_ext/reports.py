"""What a measuring script leaves behind: its figures as JSON, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Curve = list[tuple[float, float]]
"""A loss by step, or by second, ascending."""


def write_json(path: Path, result: Result) -> None:
    """Writes figures, and makes the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The runs of a file of JSON lines; a last line without its end is a killed writer's, left out.

    Raises:
        ValueError: a whole line that is no JSON object.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == len(lines) and not line.endswith("\n")):
            continue
        try:
            records.append(dict(json.loads(line)))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {str(path)!r} is no JSON object: {error}"
            ) from error
    return records


def steps_to_reach(curve: Curve, loss: float) -> float | None:
    """The first step (or second) at which the curve, joined by straight lines, is at `loss`.

    >>> steps_to_reach([(100, 5.0), (200, 4.0)], 4.5)
    150.0
    """
    previous: tuple[float, float] | None = None
    for step, value in curve:
        if value <= loss:
            if previous is None:
                return float(step)
            last_step, last_value = previous
            share = (last_value - loss) / (last_value - value)
            return last_step + share * (step - last_step)
        previous = (step, value)
    return None


def show_report(
    result: Result, text: str, plot: Callable[[Result, Path], None], stem: Path | None
) -> None:
    """Prints the tables; with a stem writes STEM.json, STEM.md and STEM.png too, and says so.

    Args:
        text: the tables in Markdown.
        plot: draws a result as a PNG file.
    """
    print(text)
    if stem is None:
        return
    json_path, markdown, image = (Path(f"{stem}.{end}") for end in ("json", "md", "png"))
    write_json(json_path, result)
    markdown.write_text(text + "\n", encoding="utf-8")
    plot(result, image)
    print(f"\nwritten: {json_path}, {markdown}, {image}")
