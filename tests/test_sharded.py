"""FSDP2: shards of the parameters on several processes, which together take the steps of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("this torch has no FSDP2 under its present name", allow_module_level=True)

from reliability import accelerated, killed, resharded
from reliability.processes import all_of, in_processes
from reliability.sharded import MANY, alone, messages_of, replaced, shards_of_columns, steps_of
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from benchmarks.shards import message_bytes
from library.automagic_cameamp import Automagic_CameAMP
from library.cameamp.parameters import names_of

PLAIN, CONTEXTUAL = "Automagic_CameAMP", "Automagic_CameAMP_COptim"
ALL = (PLAIN, "Automagic_CameAMP8bit", CONTEXTUAL, "Automagic_CameAMP_COptim8bit")
ON_WINDOWS = sys.platform == "win32"
STEPS = 16  # Early until step 6, warm-up until step 12.

SAVED_AT = 6
# What is saved in each layout: every optimizer in the early phase, with 20 steps of warm-up, or at the end, with 4. One
# layout has the optimizer early and the other has it at the end.
CASES = {
    "nested": [(name, (20, 4)[number % 2]) for number, name in enumerate(ALL)],
    "flat": [(name, (4, 20)[number % 2]) for number, name in enumerate(ALL)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: str(tmp_path_factory.mktemp(kind)) for kind in (*CASES, "accelerate", "killed", "in place")}


@pytest.fixture(scope="module")
def two(folders):
    """What each of two processes found."""
    works = {"steps": (steps_of, ((2,), (PLAIN, CONTEXTUAL), STEPS)), "messages": (messages_of, (ALL[::3],))}
    works |= {"gathered": (resharded.gathered, (ALL, 3)), "cut up": (resharded.cut_up, (ALL, 3))}
    works |= {"columns": (shards_of_columns, ()), "replaced": (replaced, ()), "coded": (coded, ())}
    works |= {"in other formats": (resharded.in_other_formats, ())}
    works |= {f"uncoded, {fused}": (resharded.uncoded_by_one, (fused,)) for fused in (False, True)}
    works |= {"whole into shards": (resharded.whole_into_shards, ())}
    works |= {"loaded uncoded": (resharded.loaded_uncoded_by_one, ())}
    works |= {"in place": (resharded.in_place, (folders["in place"], PLAIN))}
    for layout in CASES:
        folder = folders[layout]
        works[f"{layout} saved"] = resharded.save, (folder, CASES[layout], layout == "flat", SAVED_AT)
        works[f"{layout} loaded"] = resharded.load, (folder, CASES[layout], layout == "flat", SAVED_AT)
    for name in (PLAIN, ALL[3]):
        works[f"{name} traces"] = resharded.leave_no_trace, (name,)
    for name in ALL[:2]:
        works[f"{name} refused"] = resharded.refuse, (name,)
    works |= {"accelerate saved": (accelerated.saved, (folders["accelerate"],))}
    works |= {"accelerate loaded": (accelerated.loaded, (folders["accelerate"],)), "stops": (accelerated.stops, ())}
    return [dict(zip(works, found)) for found in in_processes(2, all_of, list(works.values()))]


@pytest.fixture(scope="module")
def before_it_died(folders):
    """What there was when two processes saved, one of which was killed while they saved again."""
    return {} if ON_WINDOWS else killed.kill(Path(folders["killed"]), "states half done")


@pytest.fixture(scope="module")
def three(two, before_it_died, folders):
    """What each of three processes found, which have uneven shards, and empty ones; the second takes the rules."""
    works = {"steps": (steps_of, ((3,), (PLAIN, CONTEXTUAL), STEPS, False, [1])), "coded": (coded, (True, [1]))}
    if before_it_died:
        works |= {"left": (killed.left, (folders["killed"],))}
    for layout in CASES:
        folder = folders[layout]
        works[f"{layout} loaded"] = resharded.load, (folder, CASES[layout], layout == "flat", SAVED_AT)
    works |= {"accelerate loaded": (accelerated.loaded, (folders["accelerate"],))}
    return [dict(zip(works, found)) for found in in_processes(3, all_of, list(works.values()))]


@pytest.fixture(scope="module")
def one(two, folders, tmp_path_factory):
    """What this process finds alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('one')}/r", rank=0, world_size=1)
    try:
        return [
            {
                f"{layout} loaded": resharded.load(0, folders[layout], CASES[layout], layout == "flat", SAVED_AT)
                for layout in CASES
            }
        ]
    finally:
        dist.destroy_process_group()


def coded(rank, sharded=True, by_rules=()):
    """Train matrices that are large enough for their momenta to be coded; the rate is held, so that it follows none."""
    fused = False if rank in by_rules else "auto"
    return resharded.trained(rank, CONTEXTUAL, 2 * STEPS, sharded, adaptation_rate=1e-3, fused=fused)


@pytest.fixture(scope="module")
def coded_alone():
    return in_processes(1, coded, False)[0]


@pytest.fixture(params=[2, 3])
def several(request):
    return request.getfixturevalue("two" if request.param == 2 else "three")


@pytest.mark.parametrize("name", [PLAIN, CONTEXTUAL])
def test_shards_take_the_steps_of_one_process(several, name):
    expected, _ = alone(name, STEPS)
    for process in several:
        for p, weight in process["steps"][name]["weights"].items():
            assert torch.allclose(weight, expected[p], rtol=2e-6, atol=2e-7), p


def test_coded_momenta_of_shards_are_those_of_one_process(several, coded_alone):
    """To within codes: some are of rows that a process has alone."""
    way = resharded.distance(coded_alone["weights"], resharded.model_of().state_dict())
    for process in several:
        assert resharded.distance(process["coded"]["weights"], coded_alone["weights"]) <= 0.003 * way


def test_all_processes_have_the_same_right_factors_to_the_bit(several):
    """Also where some of them take kernels and one the rules."""
    first, *others = [process["coded"]["right factors"] for process in several]
    assert any(factor.any() for factor in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_momenta_in_other_formats_are_converted(two):
    """Of which all processes make averages of low rank together; that of an update or two is nearly of rank 1."""
    first, second = (process["in other formats"] for process in two)
    assert first["ranks"][0] != first["ranks"][1]
    assert first["error"] <= 0.05
    assert first["counts"] == second["counts"] == [2] * len(first["counts"])
    assert all(torch.equal(a, b) for a, b in zip(first["right factors"], second["right factors"], strict=True))


def test_a_process_that_alone_fails_to_code_keeps_none_waiting(two):
    for process in two:
        for fused in (False, True):
            losses, error = process[f"uncoded, {fused}"]
            assert len(losses) == 8
            assert losses == pytest.approx(two[0]["uncoded, False"][0], rel=0.05)
            # What is saved has to be parts of a whole.
            start = "parameter 0 '0.weight' of shape (130, 64): 1 of 2 processes cannot code its states, and say why"
            assert error.startswith(start)


def test_a_process_that_alone_fails_to_code_what_it_loads_keeps_none_waiting(two):
    first, second = (process["loaded uncoded"] for process in two)
    assert len(first) == 6
    assert first == second
    assert max(first) < 100


def test_whole_states_are_cut_into_shards_also_where_one_process_has_all(two):
    for before, after in (process["whole into shards"] for process in two):
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            assert a.any()
            error = torch.linalg.vector_norm(b - a) / torch.linalg.vector_norm(a)
            assert error <= 0.05, (number, error)


def test_all_processes_take_the_same_multiplier_to_the_bit(several):
    _, optimizer = alone(CONTEXTUAL, STEPS)
    first, *others = [process["steps"][CONTEXTUAL] for process in several]
    # Samples are remembered in bfloat16, which rounds the same numbers, less one bit, to others now and then.
    assert first["multiplier"] == pytest.approx(optimizer.c_optim.compute_contextual_lr_multiplier(), rel=1e-3)
    assert first["history"] == pytest.approx(optimizer.c_optim.gradient_history, abs=1e-3)
    for other in others:
        assert other["multiplier"] == first["multiplier"]
        assert other["history"] == first["history"]


@pytest.mark.parametrize("name", [PLAIN, CONTEXTUAL])
def test_states_are_sharded_as_their_parameters_are(several, name):
    _, optimizer = alone(name, STEPS)
    total = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    assert all(process["steps"][name]["all sharded"] for process in several)
    assert sum(process["steps"][name]["bytes"] for process in several) == total


@pytest.mark.parametrize("name", [PLAIN, CONTEXTUAL])
def test_rates_can_be_read_of_shards_and_of_empty_ones(several, name):
    _, optimizer = alone(name, STEPS)
    for process in several:
        assert len(process["steps"][name]["rates"]) == 2
        assert all(0 < rate < 1e-2 for rate in process["steps"][name]["rates"])
        for p, mask in process["steps"][name]["masks"].items():
            expected = optimizer.get_lr_mask(next(q for q, known in names_of(optimizer._groups).items() if known == p))
            assert torch.allclose(mask, expected)


@pytest.mark.parametrize("name", ALL[::3])
def test_messages_of_a_step_are_few_whatever_the_number_of_tensors(two, name):
    """And as long as the document computes them for models that no machine here could hold."""
    for process in two:
        early, later = process["messages"][name]
        assert set(early["kinds"]) == set(later["kinds"]) == {"c10d.allreduce_"}
        assert sum(early["kinds"].values()) == 4
        assert sum(later["kinds"].values()) == 2
        assert early["bytes"] == message_bytes(MANY, 4, early=True, name=name, step=2)
        assert later["bytes"] == message_bytes(MANY, 4, early=False, name=name, step=5)


def test_parameters_replaced_by_shards_keep_their_names(two):
    for process in two:
        names, factors = process["replaced"]
        assert factors == [f"{where}lora_{which}.weight" for where in ("", "more.") for which in ("down", "up")]
        assert names[0] == "inner.weight"
        assert len(names) == len(set(names)) == 14


# What is refused -----------------------------------------------------------------------------------------------------


def test_shards_of_columns_are_refused(two):
    for process in two:
        assert process["columns"].startswith("a parameter of shape (4, 6) is placed as (Shard(dim=1),); supported: one")


def optimizer_and_params():
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    return Automagic_CameAMP(params), params


@pytest.mark.parametrize("shape", [(4, 3), (12,)], ids=str)
def test_deepspeed_is_refused_by_its_name_if_it_has_put_a_vector_in_the_place_of_parameters(shape):
    optimizer = Automagic_CameAMP([torch.nn.Parameter(torch.ones(shape)) for _ in range(2)])
    flat = torch.nn.Parameter(torch.ones(24))
    flat.grad = torch.ones(24)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="group 0 has 1 vectors for its 2 parameters; DeepSpeed ZeRO flattens"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(24))


def test_offloaded_shards_are_refused():
    optimizer, params = optimizer_and_params()
    params[1].placements = (torch.distributed.tensor.Shard(0),)
    params[1].device_mesh = type("Mesh", (), {"device_type": "cuda", "ndim": 1})()
    with pytest.raises(
        RuntimeError, match=r"of shape \(4, 3\) is offloaded to cpu; shards must stay on the mesh, cuda"
    ):
        optimizer.step()
    assert len(optimizer.state) == 0


def test_deepspeed_is_refused_by_its_name_if_it_has_marked_parameters():
    optimizer, params = optimizer_and_params()
    params[1].ds_id = 7
    with pytest.raises(RuntimeError, match=r"of shape \(4, 3\) belongs to DeepSpeed; DeepSpeed ZeRO flattens"):
        optimizer.step()
    assert len(optimizer.state) == 0


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("processes", ["one", "two", "three"])
def test_a_checkpoint_fits_any_number_of_processes(processes, layout, two, request):
    """Nothing is lost, strict as torch's reader is; as many processes as before go on bit for bit.

    Others share their codes among other rows: those are made anew, and stand for the same numbers to within a code.
    """
    loaded = request.getfixturevalue(processes)[0][f"{layout} loaded"]
    for name, expected in two[0][f"{layout} saved"].items():
        found = loaded[name]
        assert resharded.differing(expected["then"], found["then"], name.split()[0]) == [], name
        for part in ("then", "end") if processes == "two" else ():
            assert [key for key, value in expected[part].items() if not resharded.same(value, found[part][key])] == []
        assert found["losses"] == pytest.approx(expected["losses"], rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_a_full_state_dict_loads_where_nothing_is_sharded(two, name):
    """The 32-bit states, the multiplier and all histories to the bit; codes are made anew, for larger blocks."""
    saved = two[0]["gathered"][name]
    model, optimizer = resharded.whole_training(name, saved["then"])
    set_optimizer_state_dict(model, optimizer, saved["state_dict"])
    found = resharded.everything(model, optimizer)
    kept = [key for key in saved["then"] if key in found and not resharded.is_code(key)]
    assert len(kept) > (45 if "COptim" in name else 20)
    assert [key for key in kept if not resharded.same(saved["then"][key], found[key])] == []
    assert optimizer.state[model[0].weight]["step"] == 3


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_of_whole_parameters_loads_into_shards(two, name):
    for process in two:
        same = process["cut up"][name]
        assert len(same) > 10
        assert all(same)


@pytest.mark.parametrize("processes", ["two", "three"])
def test_accelerate_saves_and_loads(two, processes, request):
    """In both kinds of state dict, early and after the warm-up; as many processes as before go on bit for bit."""
    loaded = request.getfixturevalue(processes)[0]["accelerate loaded"]
    for case, expected, found in zip(accelerated.CASES, two[0]["accelerate saved"], loaded):
        assert found.keys() == expected.keys()
        if processes == "two":
            assert [key for key in found if not resharded.same(expected[key], found[key])] == [], case
        assert all(torch.allclose(found[key], expected[key], atol=2e-4) for key in found if key.endswith("weight"))


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no such signals")
def test_a_process_that_is_killed_while_saving_leaves_the_state_before(before_it_died, three):
    """Its part is half written; three processes go on from what two have saved before."""
    for process in three:
        assert resharded.differing(before_it_died, process["left"], killed.OPTIMIZER) == []


def test_if_one_process_is_interrupted_all_stop_after_the_same_step(two):
    """Else one would save, and wait for others that are in their next step."""
    assert [process["stops"] for process in two] == [[False, True], [False, True]]


def test_parts_of_two_checkpoints_are_refused(two):
    """As a process leaves them that dies while torch writes over a checkpoint; torch itself says nothing."""
    for process in two:
        assert "its state does not match its checksum" in process["in place"]


@pytest.mark.parametrize("name", [PLAIN, ALL[3]])
def test_the_step_that_makes_states_leaves_no_trace(two, name):
    for process in two:
        found = process[f"{name} traces"]
        assert set(found["steps"]) == {0}
        assert [key for key, value in found["straight"].items() if not resharded.same(value, found["after"][key])] == []


@pytest.mark.parametrize("name", ALL[:2])
def test_all_processes_refuse_what_one_of_them_refuses(two, name):
    first, last = (process[f"{name} refused"] for process in two)
    for messages in (first, last):
        assert "'2.weight'" in messages[0]
        assert "does not match its checksum" in messages[0]
    assert first[1] == "another process refused its part of the checkpoint, and says why"
    assert "has elements that are not finite" in last[1]
