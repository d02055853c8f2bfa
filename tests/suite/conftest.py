"""Every law runs on every row of the registry, unless the row says in writing why not."""

from __future__ import annotations

import pytest

from hf_precond import list_optimizers, optimizer_info
from tests.relatives import RELATIVES


@pytest.fixture(params=list_optimizers())
def name(request: pytest.FixtureRequest) -> str:
    """A registered name. A law is exempt under its test's name without ``test_``."""
    law = request.node.originalname.removeprefix("test_")
    reason = optimizer_info(request.param).exemptions.get(law)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


# Laws that train for long or in many ways. Where the code is another optimizer's, they are slow.
COSTLY = {
    "test_a_bad_gradient_equals_leaving_the_step_out",
    "test_a_bad_gradient_touches_nothing_in_few_bits",
    "test_descends_on_a_matrix_quadratic",
    "test_descends_on_an_mlp",
    "test_descends_with_weights_of_16_bits",
    "test_every_scale_of_gradients_works_in_float32",
    "test_resumed_equals_uninterrupted_with_rounding",
    "test_small_decays_count_with_stochastic_rounding",
    "test_stacked_equals_per_parameter_in_16_bits",
    "test_state_of_16_bits_trains_like_state_of_32",
}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the costly laws of relatives."""
    for item in items:
        is_costly = isinstance(item, pytest.Function) and item.originalname in COSTLY
        if is_costly and item.callspec.params.get("name") in RELATIVES:
            item.add_marker(pytest.mark.slow)
