"""Whatever is registered has a class, a configuration file, and its place in the documents."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_precond
from hf_precond import list_optimizers, option_specs
from hf_precond.named import NamedOptimizer
from trainer_ext.arguments import parse_optim_args
from trainer_ext.config_file import read_yaml_mapping

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", list_optimizers())
def test_has_one_exported_class(name: str) -> None:
    (found,) = [cls for cls in NamedOptimizer.__subclasses__() if cls.registry_name == name]
    assert getattr(hf_precond, found.__name__) is found
    assert found.__name__ in hf_precond.__all__


@pytest.mark.parametrize("name", list_optimizers())
def test_has_a_configuration_with_valid_options(name: str) -> None:
    content = read_yaml_mapping(ROOT / "configs" / "lm" / f"{name}.yaml")
    assert content["optim"] == name
    parse_optim_args(name, content["optim_args"])


@pytest.mark.parametrize("name", list_optimizers())
@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", "docs/optimizers.md"])
def test_is_documented(name: str, document: str) -> None:
    assert f"`{name}`" in (ROOT / document).read_text()


@pytest.mark.parametrize("name", list_optimizers())
def test_the_page_names_every_option_of_its_own(name: str) -> None:
    pages = ("optimizers", "shared_basis", "two_sided_basis")
    text = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in pages)
    own = [key for key, spec in option_specs(name).items() if spec.section == "algorithm"]
    assert [key for key in own if f"`{key}`" not in text] == []
