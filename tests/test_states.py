"""The table of states: what it says is what parameters hold, and what the documents say."""

from __future__ import annotations

import pytest
import torch
from documents import READMES, ROOT, read, tables

import library.automagic_cameamp as family
from benchmarks.cost import tensors_in
from benchmarks.lora_bytes import bytes_of_lora
from library.cameamp.phase import Phase
from library.cameamp.states import DERIVED, EIGHT_BITS, TABLE, THIRTY_TWO_BITS, State, bytes_of, momentum

SHAPES = [(16, 320), (320, 16), (64, 16, 3, 3), (100, 41), (7,), ()]
CLASSES = {
    "Automagic_CameAMP": (THIRTY_TWO_BITS, False),
    "Automagic_CameAMP8bit": (EIGHT_BITS, False),
    "Automagic_CameAMP_COptim": (THIRTY_TWO_BITS, True),
    "Automagic_CameAMP_COptim8bit": (EIGHT_BITS, True),
}


@pytest.mark.parametrize("came", [True, False])
@pytest.mark.parametrize("warmup_steps", [0, 2, 100], ids=["after", "late", "early"])
@pytest.mark.parametrize("name", CLASSES)
def test_bytes_are_those_of_real_states(name, warmup_steps, came):
    precision, contextual = CLASSES[name]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = getattr(family, name)(params, warmup_steps=warmup_steps, came=came)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    config = optimizer.config
    for p in params:
        held = sum(tensor.nbytes for tensor in tensors_in(optimizer.state[p]))
        periods = config.momentum_scales if contextual else ()
        assert held == bytes_of(p.shape, Phase.at(1, warmup_steps), config, precision, periods)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize(("warmup", "most"), [(True, 6.4), (False, 5.2)], ids=["warm-up", "after"])
def test_small_loras_have_small_states(rank, warmup, most):
    """8-bit states and momenta of several scales, with what the blocks of small factors cost."""
    assert bytes_of_lora("Automagic_CameAMP_COptim8bit", "sd15_lora16", rank, warmup) <= most


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_readme_has_the_bytes_of_three_ranks(path):
    written = {cells[0].strip().strip("`"): cells[2].strip() for table in tables(path) for cells in table}
    for name in CLASSES:
        counted = [bytes_of_lora(name, "sd15_lora16", rank, warmup=False) for rank in (4, 16, 64)]
        assert written[name] == ", ".join(f"{number:.2f}" for number in counted)


def test_what_is_saved_is_in_the_table():
    p = torch.nn.Parameter(torch.randn(16, 320))
    optimizer = family.Automagic_CameAMP_COptim8bit([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    rows = [*TABLE, *(momentum(period) for period in optimizer.config.momentum_scales)]
    keys = {"step", *DERIVED} | {row.counter for row in rows if row.counter}
    for row in rows:
        keys |= {row.name, f"{row.name}_q", f"{row.name}_q_scale"}
    assert set(optimizer.state_dict()["state"][0]) <= keys


def test_the_documents_have_the_table():
    def row(state: State) -> list[str]:
        return [f"`{state.name}`", state.holds, state.when]

    every_k = momentum(1)
    names = f"`{every_k.name[:-1]}K`, `{every_k.counter[:-1]}K`"
    expected = [row(state) for state in TABLE]
    expected.append([names, "momentum of every K steps, and how often it was updated", every_k.when])
    written = [
        [cell.strip() for cell in cells]
        for table in tables(ROOT / "docs" / "checkpoint_format.md")
        for cells in table
        if len(cells) == 3
    ]
    assert [cells for cells in written if cells in expected] == expected
    text = read(ROOT / "docs" / "checkpoint_format.md")
    assert all(f"`{name}`" in text for name in DERIVED)


def test_a_new_state_is_a_new_row(monkeypatch):
    """A row more is bound, saved, loaded and counted with no other change."""
    from library.cameamp import groups, states
    from library.cameamp.checkpoint import load

    extra = State("extra", "a state of this test", states._signed)
    for module in (states, groups, load):
        monkeypatch.setattr(module, "TABLE", (*TABLE, extra))
    p = torch.nn.Parameter(torch.randn(16, 320))
    optimizer = family.Automagic_CameAMP8bit([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["extra_q"].shape == p.shape
    held = sum(tensor.nbytes for tensor in tensors_in(optimizer.state[p]))
    assert held == bytes_of(p.shape, Phase.at(1, 500), optimizer.config, EIGHT_BITS)
    other = family.Automagic_CameAMP([torch.nn.Parameter(torch.randn(16, 320))])
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert state["extra"].shape == (16, 320)
