"""What the suite knows of one optimizer's reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.reference.pipeline import GroupReference

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """A dense algorithm and the option sets worth comparing.

    Attributes:
        build: (all options, (rows, columns) of a group) -> the reference of one group.
        paper: options under which it is compared unless a test says otherwise: the paper's, which
            are well conditioned where the registered defaults need not be.
        option_sets: label -> options of the algorithm itself; those of the stages around it are
            tested for every row.
        tolerances: label of an option set, ``"degenerate"`` or ``"scales"`` -> tolerance where the
            general one cannot hold; the reason stands beside it.
    """

    build: Callable[[Options, tuple[int, int]], GroupReference]
    paper: Options = field(default_factory=dict)
    option_sets: Mapping[str, Options] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
