"""Every optimizer says whom to cite."""

from __future__ import annotations

import re

import pytest

from hf_precond import list_optimizers
from trainer_ext.citations import bibtex


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_has_well_formed_entries(name: str) -> None:
    text = bibtex(name)
    assert text.count("{") == text.count("}") > 0
    for entry in re.split(r"\n\n(?=@)", text):
        kind, key = re.fullmatch(r"@(\w+)\{(\w+),.*", entry.splitlines()[0]).groups()  # type: ignore[union-attr]
        year = re.search(r"year = \{(\d{4})\}", entry)
        assert kind in ("inproceedings", "article", "misc")
        assert year is not None
        assert year[1] in key
        assert re.search(r"title = \{.+\}", entry)
        assert re.search(r"author = \{[^{}]*, ", entry) or "author = {" in entry


def test_optimizers_of_others_have_none() -> None:
    assert bibtex("adamw_torch") == ""
