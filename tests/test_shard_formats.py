"""How the states of shards are stored, and how checkpoints have them; without other processes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shards import SMALLER, over_share
from library.cameamp.phase import Phase
from library.cameamp.rounding import Dither
from library.cameamp.storage.blockwise import Blockwise, block_of_shard
from library.cameamp.storage.low_rank import LowRank
from library.cameamp.storage.low_rank_shards import LowRankOfShard
from library.cameamp.storage.nibbles import Nibbles
from library.cameamp.storage.shards import BitsOfShard, BlockwiseOfShard, NibblesOfShard, Place

CPU = torch.device("cpu")
FAMILY = ("Automagic_CameAMP", "Automagic_CameAMP8bit", "Automagic_CameAMP_COptim", "Automagic_CameAMP_COptim8bit")
# Rows and columns of a shard, and the rows of the largest: rows that share a block, rows of several blocks, a last
# block that is shorter, columns that are odd or one, and nothing.
SHARDS = [(17, 16, 17), (16, 16, 17), (34, 320, 34), (20, 5, 34), (9, 600, 12), (300, 1, 301), (0, 16, 3)]
RATE = 0.1


def dither(n, step):
    return Dither(torch.arange(n, dtype=torch.int32), step)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formats(columns, most_rows):
    block = block_of_shard(columns, 256)
    found = [BlockwiseOfShard(signed, not signed, block, most_rows) for signed in (True, False)]
    return [*found, BitsOfShard(most_rows), NibblesOfShard(most_rows, most_rows * columns * 2)]


def written(code, n, shape, seed=0):
    stored = code.new(n, shape, CPU)
    values = normal(n, *shape, seed=seed)
    if isinstance(code, BitsOfShard):
        values = values > 0
    elif isinstance(code, BlockwiseOfShard) and code.root:
        values = values.abs()
    stored.write(values.clone(), dither(n, 1))
    return stored, values


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "most_rows"), SHARDS)
def test_what_is_saved_row_by_row_says_the_same_and_is_found_again(rows, columns, most_rows, n):
    shape = torch.Size((rows, columns))
    for code in formats(columns, most_rows):
        stored, values = written(code, n, shape)
        error = torch.linalg.vector_norm(stored.read().float() - values.float())
        assert error <= 0.15 * torch.linalg.vector_norm(values.float())
        saved = code.by_row(stored.tensors, shape)
        kinds = code.saved(shape).parts(shape).values()
        assert [tensor.shape[1:] for tensor in saved] == [kind.shape for kind in kinds]
        assert torch.equal(code.saved(shape).over(saved, shape).read(), stored.read())
        if rows:
            found = code.from_rows(saved, shape)
            assert all(torch.equal(tensor, other) for tensor, other in zip(found, stored.tensors)), code


def test_rows_that_were_not_coded_together_are_not_taken_for_it():
    shape, block = torch.Size((32, 16)), block_of_shard(16, 256)
    code = BlockwiseOfShard(True, False, block, 32)
    (upper, _), (lower, _) = (written(code, 1, torch.Size((16, 16)), seed) for seed in (1, 2))
    halves = (code.by_row(half.tensors, torch.Size((16, 16))) for half in (upper, lower))
    together = [torch.cat(pair, dim=1) for pair in zip(*halves)]
    assert code.from_rows(together, shape) is not None
    assert code.from_rows([tensor.roll(1, dims=1) for tensor in together], shape) is None


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 7, 9, 16, 24, 100, 255, 256, 320, 640, 2880, 9000])
def test_blocks_end_between_rows_or_divide_one(columns):
    block = block_of_shard(columns, 256)
    assert block <= 256
    assert block % columns == 0 or columns % block == 0
    assert 2 * block > 256 or columns > 128  # So that scales take no more than twice the least.


@pytest.mark.parametrize(("count", "blocks", "fits"), [(256, 64, True), (256, 128, False), (3, 1, True), (3, 3, False)])
def test_blocks_of_a_checkpoint_have_four_elements_unless_a_row_has_fewer(count, blocks, fits):
    code, shape = Blockwise(True, False, 64), torch.Size((count,))
    tensors = {"_q": torch.zeros(count, dtype=torch.uint8), "_q_scale": torch.ones(blocks)}
    if fits:
        assert code.as_saved(tensors, shape).block == count // blocks
    else:
        with pytest.raises(ValueError, match="into no blocks"):
            code.as_saved(tensors, shape)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    ("folded", "cuts"),
    [
        *((folded, cuts) for folded in [(260, 32), (130, 64)] for cuts in [[130], [44, 88, 130], [65, 130, 130]]),
        *(((65, 128), cuts) for cuts in [[130], [44, 88, 130], [66, 130, 130]]),
    ],
)
def test_averages_of_shards_follow_as_that_of_the_whole(cuts, folded, rank):
    """But for rounding, and codes of the left factor, which each process has in the unit that its own rows ask for.

    Merged rows are those of the whole where shards end between groups of them.
    """
    rows, columns, n = 130, 64, 2
    shape = torch.Size((rows, columns))
    edges = list(zip([0, *cuts], cuts))
    most = max(last - first for first, last in edges)
    pairs = [
        (LowRank(*folded, rank), [LowRankOfShard(folded[1], rank, Place(first, most)) for first, _ in edges]),
        (Nibbles(), [NibblesOfShard(most, rows * columns)] * len(edges)),
    ]
    for plain, of_shards in pairs:
        one = plain.new(n, shape, CPU)
        shapes = [torch.Size((last - first, columns)) for first, last in edges]
        several = [code.new(n, part, CPU) for code, part in zip(of_shards, shapes)]
        for step in range(1, 11):
            raw = normal(n, rows, columns, seed=step)
            raw += 3 * normal(n, rows, 1, seed=100 + step) * normal(n, 1, columns, seed=200 + step)
            factor = torch.tensor([0.7, 0.4])
            target = raw * factor.view(-1, 1, 1)
            one.lerp(target, RATE, dither(n, step))
            raws = [raw[:, first:last] for first, last in edges]
            parts = [state.summands(own, RATE, dither(n, step)) for state, own in zip(several, raws)]
            totals = [sum(part) for part in zip(*parts)]
            for state, (first, last) in zip(several, edges):
                state.knowing(totals, factor).lerp(target[:, first:last].contiguous(), RATE, dither(n, step))
            found = torch.cat([state.read() for state in several], dim=1)
            error = torch.linalg.vector_norm(found - one.read()) / torch.linalg.vector_norm(one.read())
            alike = len(cuts) == 1 or isinstance(plain, Nibbles)
            assert error <= (0.002 if alike and rank == 1 else 0.01 * step), (type(plain).__name__, step)


def followed(columns, shape, cuts, rank=2):
    """The formats and the states of some shards of an average of a parameter of `shape`, after an update."""
    edges = list(zip([0, *cuts], cuts))
    most = max(last - first for first, last in edges)
    formats = [LowRankOfShard(columns, rank, Place(first, most)) for first, _ in edges]
    targets = [normal(2, last - first, shape[1], seed=first) * (1 + first / 30) for first, last in edges]
    states = [code.new(2, target.shape[1:], CPU) for code, target in zip(formats, targets)]
    parts = [state.summands(target, 1.0, dither(2, 1)) for state, target in zip(states, targets)]
    for state, target in zip(states, targets):
        state.knowing([sum(part) for part in zip(*parts)], None).lerp(target, 1.0, dither(2, 1))
    return formats, states


# Columns of the folded matrix, shape, and where shards end: cut, its own, merged at the shards' ends, and across them.
FOLDINGS = [
    (32, (80, 64), (50, 80)), (64, (80, 64), (50, 80)), (20, (80, 5), (48, 80)), (20, (80, 5), (27, 54, 80)),
    (20, (6, 5), (3, 6, 6)), (20, (5, 5), (2, 4, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "shape", "cuts"), FOLDINGS)
def test_low_rank_is_found_again_and_by_other_processes_to_within_a_code(columns, shape, cuts):
    codes, states = followed(columns, shape, cuts)
    parts = [torch.Size((state.rows, shape[1])) for state in states]
    saved = [code.by_row(state.tensors, part) for code, state, part in zip(codes, states, parts)]
    for code, state, rows, part in zip(codes, states, saved, parts):
        kinds = code.saved(part).parts(part).values()
        assert [tensor.shape[1:] for tensor in rows] == [kind.shape for kind in kinds]
        assert all(torch.equal(a, b) for a, b in zip(code.from_rows(rows, part), state.tensors))
        found, expected = code.saved(part).over(rows, part).read(), state.read()
        # Rows that are merged are added up in another order.
        assert torch.equal(found, expected) if columns <= shape[1] else torch.allclose(found, expected, 0, 1e-6)
    whole = torch.Size(shape)
    joined = [torch.cat(each, dim=1) if place != 1 else each[0] for place, each in enumerate(zip(*saved))]
    alone = LowRankOfShard(columns, 2, Place(0, shape[0]))
    found = alone.over(alone.from_rows(joined, whole), whole).read()
    expected = torch.cat([state.read() for state in states], dim=1)
    across = [cut for cut in cuts[:-1] if columns > shape[1] and cut % (columns // shape[1]) and cut < shape[0]]
    kept = torch.ones(shape[0], dtype=torch.bool)
    for cut in across:  # Two processes have the code of such a group, each of its own rows.
        kept[cut - cut % 4 : cut - cut % 4 + 4] = False
    error = torch.linalg.vector_norm((found - expected)[:, kept])
    assert error <= 0.01 * torch.linalg.vector_norm(expected[:, kept])
    assert error > 0 or not kept.any()
    assert torch.linalg.vector_norm(found - expected) <= torch.linalg.vector_norm(expected)


def test_a_row_beyond_its_group_is_refused():
    (code, _), (state, _) = followed(20, (80, 5), (48, 80))
    shape = torch.Size((48, 5))
    tensors = {key: tensor[0] for key, tensor in zip(code.suffixes, code.by_row(state.tensors, shape))}
    assert code.saved(shape).as_saved(tensors, shape) == code.saved(shape)
    too_long = tensors | {"_q_right": torch.zeros(2, 129 * 5, dtype=torch.int8)}
    with pytest.raises(ValueError, match="_q_right: has 645 columns, for 129 rows of the parameter"):
        code.saved(shape).as_saved(too_long, shape)
    tensors["_q"][7, -1] = 4
    with pytest.raises(ValueError, match="_q: has a row beyond the 4 of its group"):
        code.saved(shape).as_saved(tensors, shape)


def test_processes_do_not_make_up_right_factors_by_themselves():
    state = LowRankOfShard(16, 1, Place(0, 8)).new(1, torch.Size((8, 16)), CPU)
    with pytest.raises(NotImplementedError, match="processes must agree on the right factor"):
        state.write(torch.ones(1, 8, 16), dither(1, 1))


@pytest.mark.parametrize("phase", [Phase(True, True), Phase(False, False)], ids=["early", "late"])
@pytest.mark.parametrize("name", FAMILY)
def test_two_processes_have_half_of_the_states_each(name, phase):
    """To within 1 %, of which the right factors of averages, which both have, are most."""
    for model in SMALLER.values():
        assert over_share(model(), 2, name, phase) <= 0.01
