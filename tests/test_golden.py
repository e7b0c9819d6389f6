"""States written long ago load into the optimizers of today, and lead to the same bits."""

from __future__ import annotations

import pytest
import torch
from golden_states import FILE, NAMES, STARTS, go_on, machine, optimizer_of, parameters

from library.cameamp.checkpoint.layout import group_checksum

GOLDEN = torch.load(FILE, weights_only=True)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", NAMES)
def test_old_states_go_on_as_they_did(name, start):
    case = GOLDEN["cases"][f"{name} {start}"]
    for p, expected, before in zip(go_on(name, start, case), case["after"], case["weights"]):
        assert not torch.equal(expected, before)
        if GOLDEN["machine"] == machine():
            assert torch.equal(p, expected)
        else:  # Other processors and versions add in another order, which 8-bit codes and bfloat16 amplify.
            assert torch.allclose(p.float(), expected.float(), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_loaded_is_saved_again(name, start):
    case = GOLDEN["cases"][f"{name} {start}"]
    params = parameters()
    optimizer = optimizer_of(name, params)
    optimizer.load_state_dict(case["optimizer"])
    again = optimizer.state_dict()
    saved = case["optimizer"]
    assert again["magic_version"] == saved["magic_version"] == 3
    for group, expected in zip(again["param_groups"], saved["param_groups"]):
        assert group["state_checksums"] == expected["state_checksums"]
        since = {option: group[option] for option in ("factored",)}  # What it does not know.
        if "c_optim_context" in expected:
            context = expected["c_optim_context"]
            square = group["c_optim_context"]["alignment_square"]
            assert square == context["alignment"].square()
            since["c_optim_context"] = {**context, "alignment_square": square}
        assert group["group_checksum"] == group_checksum({**expected, **since})
    for key, state in saved["state"].items():
        assert set(again["state"][key]) == set(state)
        for name_of_state, value in state.items():
            if torch.is_tensor(value) and name_of_state != "row_scaling":
                assert torch.equal(again["state"][key][name_of_state], value)
