"""model_cards/: what the script renders from the results, and valid."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard

from tests.scripts.conftest import load_script

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_model_cards")


def test_committed_cards_are_what_the_results_say(script: ModuleType) -> None:
    committed = {path.name: path.read_text() for path in (REPOSITORY / "model_cards").glob("*.md")}
    assert committed == script.cards(), "run scripts/make_model_cards.py"


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "model_cards").glob("*.md")), ids=lambda path: path.stem
)
def test_a_card_is_valid_and_its_links_lead_somewhere(path: Path) -> None:
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert card.data.tags[0] == "hf-precond"
    assert card.data.eval_results[0].metric_type == "loss"
    assert {result.metric_type for result in card.data.eval_results} == set(card.data.metrics)
    assert "license" not in card.data.to_dict()  # nobody has licensed weights that are not there
    for target in re.findall(r"\]\(([^)]+)\)", card.text):
        assert (path.parent / target).is_file(), target


def test_writing_needs_no_argument(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--output", str(tmp_path / "cards")]) == 0
    assert len(list((tmp_path / "cards").glob("*.md"))) == len(script.cards())
