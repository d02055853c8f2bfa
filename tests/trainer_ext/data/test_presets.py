"""Presets build the models their names promise."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from trainer_ext.data.presets import PRESETS, override_config, preset_config


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_fits_the_name(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(name))
    size = name.rpartition("-")[2]
    promised = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    # The names of the 60m to 1b sizes are those of the literature, which rounds generously.
    tolerance = 0.35 if size == "1b" else 0.1
    assert model.num_parameters() == pytest.approx(promised, rel=tolerance)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_without_dropout(name: str) -> None:
    fields = preset_config(name).to_dict()
    rates = {key: value for key, value in fields.items() if key.endswith(("_pdrop", "_dropout"))}
    assert all(value == 0.0 for key, value in rates.items() if key != "summary_first_dropout")


def test_llama_9m_groups_its_queries() -> None:
    config = preset_config("llama-9m")
    assert config.num_key_value_heads < config.num_attention_heads


def test_presets_share_no_state() -> None:
    preset_config("gpt2-7m").n_layer = 99
    assert preset_config("gpt2-7m").n_layer == 4


def test_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="preset='gpt2-7b' must be one of gpt2-7m, llama-9m"):
        preset_config("gpt2-7b")


def test_overrides_keep_the_type_of_the_field() -> None:
    config = GPT2Config()
    override_config(config, "n_layer=2,resid_pdrop=0,activation_function=relu")
    assert (config.n_layer, config.activation_function) == (2, "relu")
    assert isinstance(config.resid_pdrop, float)
