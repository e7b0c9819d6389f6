"""The passes of a step over parts of tensors. Of tensors that are cut, every pass but the last one only reads.

What a pass sums over a tensor goes to `sums`, a row for each part of it, and is added up in their order, so that a
result does not depend on how many threads there are. What follows from the sums goes to `facts`, a row for each
tensor. The states of such tensors are read, and decoded, anew in each pass: that is cheaper than to keep what lies in
between. A tensor that one thread steps is small enough to keep its scaled gradient, and its update after that.

Of a shard, the sums of all processes are added up before anything is concluded from them.
"""

from __future__ import annotations

import math

import numpy

from ....techniques import orthograd, tam
from ..table import FOUR_BITS, LOW_RANK, STATE_NUMBERS
from . import loops
from . import momenta as multiscale
from .codes import (
    bytes_of,
    copy_bytes,
    fetch_state,
    fill_up,
    load_floats,
    load_signs,
    load_state,
    noise_stream,
    store_signs,
    store_state,
    store_weights,
)
from .jit import (
    bytes_at,
    entry,
    floats,
    inlined,
    jit,
    plain_bytes,
    plain_doubles,
    plain_floats,
    plain_numbers,
    prefetch,
)
from .lanes import LANES

_f = numpy.float32

_MASK = STATE_NUMBERS["lr_mask"]
_EXP_AVG = STATE_NUMBERS["exp_avg"]
_EXP_AVG_RES = STATE_NUMBERS["exp_avg_res"]
_EXP_AVG_SQ = STATE_NUMBERS["exp_avg_sq"]
_S = STATE_NUMBERS["s"]
_POLARITY = STATE_NUMBERS["last_polarity"]

# Elements that are worked on at a time: a dozen such arrays fit into a first cache.
SHORT = 4096

# Such arrays: decoded states have the numbers of `table.STATE_NUMBERS`; then follow others.
G, SG, DRIVE, NORMS, RATES, WEIGHTS_ROOM, ROOMS = range(len(STATE_NUMBERS), len(STATE_NUMBERS) + 7)

# How many elements ahead states and weights are fetched from memory that are read where they are.
FETCHED_AHEAD = 512

# The columns of `sums`, of which four from FOUND on are those of `measure` ...
SQUARE, ALONG, WEIGHTS, UPDATE, AGREEING, EFFECT, FOUND = range(7)
PRODUCTS = FOUND + 4
# ... and those of `facts`.
FACTOR, SHARE_ALONG, LENGTHENING, CAUTIOUS, STRENGTH, FACTS = range(6)

# The passes over a tensor that several threads share.
MEASURED, SCALED, COLUMN_NORMS, UPDATES, AGREEMENTS, ROW_NORMS, WRITTEN = range(7)

_SMALLEST_COLUMN_NORM = _f(tam.SMALLEST_NORM)
_SMALLEST_WEIGHT_NORM = orthograd.SMALLEST_NORM
# Of an update that lies along the weights but for less than this share of it, what is left is rounding error.
_SMALLEST_REST = 1e-6


# The first pass over gradients ----------------------------------------------------------------------------------


@entry
def measure(parts, first, last, table, with_deviations, every, found, sample, memory):
    """Sum up the gradients of some parts.

    Args:
        parts: (parts, 3): tensor, first element, end.
        first, last: which of them.
        table: a row for each tensor.
        with_deviations: whether squared deviations are asked for.
        every: distance between the elements that the context sees; 0 for none.
        found: (parts, 4): sum of |g|, how many are not 0, how many are unusable, and the squared deviations of |g| from
            the part's mean.
        sample: the address of the elements that the context sees.
        memory: (ROOMS, SHORT), to compute in.
    """
    parts, found = plain_numbers(parts), plain_doubles(found)
    rooms = plain_floats(memory)
    for number in range(first, last):
        row = table[parts[number, 0]]
        begin, end = parts[number, 1], parts[number, 2]
        loops.fill(found[number], 0.0)
        for start in range(begin, end, SHORT):
            g = load_floats(row.grad, row.grad_kind, start, min(SHORT, end - start), rooms[G])
            _note(loops.measure(g), g, row, begin, start, with_deviations, every, found[number], sample)


@inlined
def _note(block, g, row, begin, start, with_deviations, every, found, sample):
    """Add what is found of a block, from `start` on, to what is found of a part that begins at `begin`."""
    before, count = start - begin, len(g)
    if with_deviations:
        mean = block.total / count
        shift = mean - found[0] / max(before, 1)
        found[3] += loops.squared_deviations(g, mean)
        found[3] += shift * shift * before * count / (before + count)  # Chan's rule
    found[0] += block.total
    found[1] += block.nonzero
    found[2] += block.unusable
    if every:
        loops.sample_gradient(g, row.first + start, every, _sample_of(row, every, sample))


@entry
def total_measures(parts, found, totals):
    """Add up what `measure` found of each tensor: (tensors, 4)."""
    for number in range(len(parts)):
        tensor = parts[number, 0]
        before, more = totals[tensor], found[number]
        start, size = parts[number, 1], parts[number, 2] - parts[number, 1]
        if start > 0:
            shift = more[0] / size - before[0] / start
            before[3] += shift * shift * start * size / (start + size)
        for column in range(4):
            before[column] += more[column]


# Parts of the update, of one block ------------------------------------------------------------------------------


@jit
def block_length(row):
    """How many elements are worked on at a time: whole blocks of a code."""
    return max(SHORT // row.block, 1) * row.block if row.block else SHORT


@jit
def next_count(row, start, end):
    """How many elements a block has from a place on: whole sixteens, or the fewer in which a tensor ends.

    Of states that are coded it is whole blocks of the code, whatever they are.
    """
    rest = end - start
    if row.block == 0 and rest >= LANES:
        rest = rest // LANES * LANES
    return min(block_length(row), rest)


@jit
def _scaling(k, factor):
    return loops.Scaling(k.share, k.came, k.rate2, k.eps1, k.clip_bound, factor)


@jit
def _following(k):
    return loops.Following(k.early, k.eps1, k.momentum_rate, k.beta1, k.rate3, k.eps2, k.correction, k.gradient_share)


@jit
def _scaled_gradient(row, k, start, count, factor, out, rooms):
    """The scaled gradient of a block, in `out`, and its sum of squares; no state changes."""
    g = load_floats(row.grad, row.grad_kind, start, count, rooms[G])
    exp_avg_sq = g
    if k.came:
        exp_avg_sq = load_state(row.states[_EXP_AVG_SQ], row.block, start, count, k.maps, rooms[_EXP_AVG_SQ])
    square = loops.scale_gradient(g, exp_avg_sq, _scaling(k, factor), out)
    return out[:count], square


@jit
def _known_gradient(row, k, start, count, kept, rooms):
    """The scaled gradient of a block, as if its factor were 1; from `kept` if it is there, see `sum_scaled`."""
    if kept != 0:
        return floats(kept, start, count)
    return _scaled_gradient(row, k, start, count, _f(1.0), rooms[SG], rooms)[0]


@jit
def _drive(row, own, low_ranks, k, factor, spacings, sg, start, write, unpacked, rooms):
    """The weighted mean of the momenta, which drives in place of the scaled gradient, factor * sg."""
    drive = rooms[DRIVE, : len(sg)]
    rates, shares = floats(k.rates, 0, len(own)), floats(k.shares, 0, len(own))
    multiscale.drive(
        own, low_ranks, row.numel, row.span, rates, shares, spacings, k.turning_point, sg, factor, start, write,
        unpacked, rooms[RATES], drive,
    )  # fmt: skip
    return drive


@jit
def _given(row, own, low_ranks, k, facts, spacings, norms, start, count, write, unpacked, kept, rooms):
    """What the update of a block is computed from; with `write`, the momenta are updated."""
    is_known = k.driven or kept != 0
    sg = rooms[SG, :count]
    if is_known:
        sg = _known_gradient(row, k, start, count, kept, rooms)
    drive = sg
    if k.driven:
        drive = _drive(row, own, low_ranks, k, _f(facts[FACTOR]), spacings, sg, start, write, unpacked, rooms)
        fill_up(rooms[DRIVE], count)
    g = load_floats(row.grad, row.grad_kind, start, count, rooms[G])
    states = row.states
    exp_avg = load_state(states[_EXP_AVG], row.block, start, count, k.maps, rooms[_EXP_AVG])
    exp_avg_res = load_state(states[_EXP_AVG_RES], row.block, start, count, k.maps, rooms[_EXP_AVG_RES])
    exp_avg_sq, s, each = g, exp_avg, rooms[NORMS, :count]
    if k.came and (write or not is_known):
        exp_avg_sq = load_state(states[_EXP_AVG_SQ], row.block, start, count, k.maps, rooms[_EXP_AVG_SQ])
    if k.early:
        s = load_state(states[_S], row.block, start, count, k.maps, rooms[_S])
        if count % LANES != 0:
            last = count // LANES * LANES
            loops.fill(rooms[NORMS, last : last + LANES], _f(1.0))  # They are divided by.
        _repeat(norms, start, each)
    return loops.Given(g, exp_avg_sq, exp_avg, exp_avg_res, s, sg, drive, each, is_known, k.driven)


@inlined
def _repeat(columns, start, out):
    """A row of one value a column, as many times over as a block has rows, from where the block starts in its row."""
    width = len(columns)
    if width == 1:
        loops.fill(out, columns[0])
        return
    if width % LANES == 0:
        loops.repeat(columns, start % width, out)
        return
    done = 0
    while done < len(out):
        column = (start + done) % width
        many = min(width - column, len(out) - done)
        loops.copy(columns[column : column + many], out[done : done + many])
        done += many


@inlined
def _fetch_gradient(row, start, end):
    """Begin to fetch what a block's scaled gradient is made of, while another block is worked on."""
    count = min(block_length(row), end - start)
    if count > 0:
        prefetch(row.grad + bytes_of(row.grad_kind) * start, bytes_of(row.grad_kind) * count)
        fetch_state(row.states[_EXP_AVG_SQ], start, count)


@inlined
def _fetch_rest(row, start, end):
    """Likewise the weights and the other states."""
    count = min(block_length(row), end - start)
    if count > 0:
        prefetch(row.weight + bytes_of(row.weight_kind) * start, bytes_of(row.weight_kind) * count)
        fetch_state(row.states[_EXP_AVG], start, count)
        fetch_state(row.states[_EXP_AVG_RES], start, count)
        fetch_state(row.states[_MASK], start, count)
        fetch_state(row.states[_S], start, count)


# The passes over a part -----------------------------------------------------------------------------------------


@inlined
def sum_scaled(row, own, begin, end, k, sums, kept, shown, rooms):
    """Second pass: the squares of the gradient over the root of the new second moment, and what momenta need.

    The scaled gradient stays at the address `kept` for the other passes, as if its factor were 1; if it is 0, nowhere.
    It is copied to the address `shown` unless that is 0: beyond `kept`, there is room for more.
    """
    ahead = FETCHED_AHEAD if row.block == 0 else 0
    start = begin
    while start < end:
        count = next_count(row, start, end)
        if row.block != 0:
            _fetch_gradient(row, start + count, end)
        if k.driven or kept != 0:
            out = floats(kept, start, count) if kept != 0 else rooms[SG, :count]
            sg, square = _scaled_gradient(row, k, start, count, _f(1.0), out, rooms)
            sums[SQUARE] += square
            if k.driven:
                multiscale.sum_products(own, row.span, floats(k.rates, 0, len(own)), sg, start, sums[PRODUCTS:])
            if shown != 0:
                loops.copy(sg, floats(shown, start, count))
        elif k.came:
            g = load_floats(row.grad, row.grad_kind, start, count, rooms[G])
            old = load_state(row.states[_EXP_AVG_SQ], row.block, start, count, k.maps, rooms[_EXP_AVG_SQ])
            sums[SQUARE] += loops.sum_scaled(g, old, _scaling(k, _f(1.0)), ahead)
        start += count


@inlined
def measure_ahead(row, own, begin, end, k, sums, rooms):
    """First pass and second in one, so that memory is read once: as if AGR left gradients as they are.

    A gradient g is taken for 1 / (1 - |g| / S) of what it will be, so the sum of squares is too large by at most twice
    |g| / S of each element's part of it; S times a bound of this goes to `sums[EFFECT]`.
    """
    ahead = FETCHED_AHEAD if row.block == 0 else 0
    start = begin
    while start < end:
        count = next_count(row, start, end)
        if row.block != 0:
            _fetch_gradient(row, start + count, end)
        g = load_floats(row.grad, row.grad_kind, start, count, rooms[G])
        before = sums[SQUARE]
        if k.driven:
            found = loops.measure(g)
            sum_scaled(row, own, start, start + count, k, sums, numpy.int64(0), numpy.int64(0), rooms)
        else:
            old = load_state(row.states[_EXP_AVG_SQ], row.block, start, count, k.maps, rooms[_EXP_AVG_SQ])
            found, square = loops.measure_and_sum(g, old, _scaling(k, _f(1.0)), ahead)
            sums[SQUARE] += square
        _note(found, g, row, begin, start, k.decays, k.every, sums[FOUND:PRODUCTS], k.grad_sample)
        sums[EFFECT] += 2.0 * found.largest * (sums[SQUARE] - before)
        start += count


@inlined
def conclude_scaled(row, own, k, sums, facts, spacings):
    """CAME's bound on the root mean square: the factor of the scaled gradient."""
    square = sums[SQUARE]
    excess = math.sqrt(square / row.whole_numel) / k.clip_threshold if k.came else 0.0
    facts[FACTOR] = 1.0 / max(excess, 1.0)
    if k.driven:
        rates = floats(k.rates, 0, len(own))
        multiscale.new_spacings(own, row.whole_numel, rates, sums[PRODUCTS:], square, facts[FACTOR], spacings)


@inlined
def sum_columns(row, own, low_ranks, begin, end, k, facts, spacings, of_momentum, of_drive, kept, rooms):
    """Early: the squares of each column of the momentum and of its drive."""
    read_only, nowhere, factor = numpy.bool_(False), numpy.int64(0), _f(facts[FACTOR])
    start = begin
    while start < end:
        count = next_count(row, start, end)
        sg = _known_gradient(row, k, start, count, kept, rooms)
        drive = sg
        if k.driven:
            drive = _drive(row, own, low_ranks, k, factor, spacings, sg, start, read_only, nowhere, rooms)
            loops.keep_where_gradient(drive, sg)
        exp_avg = load_state(row.states[_EXP_AVG], row.block, start, count, k.maps, rooms[_EXP_AVG])
        _add_to_columns(exp_avg, start, of_momentum)
        _add_to_columns(drive, start, of_drive)
        start += count
    if not k.driven and factor != 1:
        loops.scale(of_drive, factor * factor)


@jit
def _add_to_columns(x, start, out):
    width = len(out)
    if width == 1:
        out[0] += loops.sum_of_squares(x)
        return
    if width % LANES == 0:
        loops.add_squares_by_column(x, start % width, out)
        return
    done = 0
    while done < len(x):
        column = (start + done) % width
        many = min(width - column, len(x) - done)
        loops.add_squares(x[done : done + many], out[column : column + many])
        done += many


@jit
def conclude_columns(of_momentum, of_drive, out):
    """The product of the two norms of each column."""
    for i in range(len(out)):
        first = max(_f(math.sqrt(of_momentum[i])), _SMALLEST_COLUMN_NORM)
        out[i] = first * max(_f(math.sqrt(of_drive[i])), _SMALLEST_COLUMN_NORM)


@inlined
def sum_update(row, own, low_ranks, begin, end, k, facts, spacings, norms, sums, rooms):
    """Early: what OrthoGrad needs of the update and the weights. Later: how much of the update is cautious."""
    scaling, following = _scaling(k, _f(facts[FACTOR])), _following(k)
    read_only, nowhere = numpy.bool_(False), numpy.int64(0)
    start = begin
    while start < end:
        count = next_count(row, start, end)
        given = _given(row, own, low_ranks, k, facts, spacings, norms, start, count, read_only, nowhere, nowhere, rooms)
        p = load_floats(row.weight, row.weight_kind, start, count, rooms[WEIGHTS_ROOM])
        if k.early:
            along, weights, update = loops.products(given, p, scaling, following)
            sums[ALONG] += along
            sums[WEIGHTS] += weights
            sums[UPDATE] += update
        else:
            sums[AGREEING] += loops.count_agreement(given, p, scaling, following, _f(0.0), _f(1.0))
        start += count


@inlined
def advance(row, own, low_ranks, begin, end, k, facts, spacings, norms, sums, kept, rooms):
    """`sum_update` of a whole tensor, with all new states written but the mask; `kept` becomes the update."""
    stream = numpy.uint32(noise_stream(row.position, k.step) + numpy.uint32(row.first))
    scaling, following = _scaling(k, _f(facts[FACTOR])), _following(k)
    writes, nowhere = numpy.bool_(True), numpy.int64(0)
    ahead = FETCHED_AHEAD if row.block == 0 else 0
    start = begin
    while start < end:
        count = next_count(row, start, end)
        if row.block != 0:
            _fetch_rest(row, start + count, end)
        given = _given(row, own, low_ranks, k, facts, spacings, norms, start, count, writes, nowhere, kept, rooms)
        if k.every:
            _show_gradient(row, k, given.sg, scaling.factor, start)
        p = load_floats(row.weight, row.weight_kind, start, count, rooms[WEIGHTS_ROOM])
        found = loops.advance(given, p, scaling, following, given.sg, ahead)
        _store_advanced(row, k, given, start, stream)
        sums[ALONG] += found.up
        sums[WEIGHTS] += found.pp
        sums[UPDATE] += found.uu
        sums[AGREEING] += found.agreeing
        start += count


@jit
def _store_advanced(row, k, given, start, stream):
    """Write down the new states of a block that lead to its update."""
    states = row.states
    if k.came:
        store_state(given.exp_avg_sq, states[_EXP_AVG_SQ], row.block, start, k.maps, stream)
    store_state(given.exp_avg, states[_EXP_AVG], row.block, start, k.maps, stream)
    store_state(given.exp_avg_res, states[_EXP_AVG_RES], row.block, start, k.maps, stream)
    if k.early:
        store_state(given.s, states[_S], row.block, start, k.maps, stream)


@inlined
def conclude_update(row, k, sums, facts):
    """OrthoGrad's two factors: of the weights in what is taken off, and of what is left."""
    facts[SHARE_ALONG], facts[LENGTHENING] = 0.0, 1.0
    if k.early and row.whole_numel > 1 and math.sqrt(sums[WEIGHTS]) > _SMALLEST_WEIGHT_NORM:
        size = math.sqrt(sums[UPDATE])
        rest = math.sqrt(max(sums[UPDATE] - sums[ALONG] * sums[ALONG] / sums[WEIGHTS], 0.0))
        facts[SHARE_ALONG] = sums[ALONG] / sums[WEIGHTS]
        facts[LENGTHENING] = size / max(rest, _SMALLEST_REST * size, k.eps3)
    conclude_agreement(row, sums, facts)


@inlined
def conclude_agreement(row, sums, facts):
    """Cautious: the factor of the elements that are kept."""
    facts[CAUTIOUS] = row.whole_numel / (sums[AGREEING] + 1.0)


@inlined
def sum_agreement(row, own, low_ranks, begin, end, k, facts, spacings, norms, sums, rooms):
    """Early and cautious: how much of the update without its part along the weights is cautious."""
    scaling, following = _scaling(k, _f(facts[FACTOR])), _following(k)
    along, lengthening = _f(facts[SHARE_ALONG]), _f(facts[LENGTHENING])
    read_only, nowhere = numpy.bool_(False), numpy.int64(0)
    start = begin
    while start < end:
        count = next_count(row, start, end)
        given = _given(row, own, low_ranks, k, facts, spacings, norms, start, count, read_only, nowhere, nowhere, rooms)
        p = load_floats(row.weight, row.weight_kind, start, count, rooms[WEIGHTS_ROOM])
        sums[AGREEING] += loops.count_agreement(given, p, scaling, following, along, lengthening)
        start += count


@inlined
def count_agreeing(row, end, k, facts, sums, kept, rooms):
    """`sum_agreement` of a whole tensor, whose update `advance` has left in `kept`."""
    scaling, along, lengthening = _scaling(k, _f(1.0)), _f(facts[SHARE_ALONG]), _f(facts[LENGTHENING])
    start = numpy.int64(0)
    while start < end:
        count = next_count(row, start, end)
        g = load_floats(row.grad, row.grad_kind, start, count, rooms[G])
        p = load_floats(row.weight, row.weight_kind, start, count, rooms[WEIGHTS_ROOM])
        sums[AGREEING] += loops.count_agreeing(g, p, floats(kept, start, count), scaling, along, lengthening)
        start += count


@inlined
def scale_rows(row, begin, end, softening, out, rooms):
    """ALLoRA: the factor of each row from one on, up to another; some whole rows at a time if they are short."""
    columns = row.columns
    many = max(1, SHORT // columns)
    for first in range(begin, end, many):
        last = min(first + many, end)
        if columns <= SHORT:
            p = load_floats(row.weight, row.weight_kind, first * columns, (last - first) * columns, rooms[G])
            loops.row_squares(p, columns, out[first:last])
            continue
        square = _f(0.0)
        for start in range(first * columns, last * columns, SHORT):
            count = min(SHORT, last * columns - start)
            square += loops.sum_of_squares(load_floats(row.weight, row.weight_kind, start, count, rooms[G]))
        out[first] = square
    loops.row_factors(out[begin:end], softening)


@inlined
def write(row, own, low_ranks, begin, end, k, facts, spacings, norms, row_factors, unpacked, kept, rooms, signs):
    """The last pass: new states and weights.

    Args:
        row: the tensor's row of the table.
        own: its momenta.
        begin, end: the part.
        k: one of `settings.SETTINGS`.
        facts: what the other passes concluded of the tensor.
        spacings: between the levels of its new momenta.
        norms: early, of each column.
        row_factors: ALLoRA's, of each row.
        unpacked: addresses of a byte an element for signs, and for levels of momenta; 0 if one thread has all that is
            packed together.
        kept: the address of the scaled gradient, if `sum_scaled` has kept it; or of the update, if `advance` has.
        rooms: memory for blocks.
        signs: memory for the bytes of two blocks.
    """
    stream = numpy.uint32(noise_stream(row.position, k.step) + numpy.uint32(row.first))
    states = row.states
    scaling, following = _scaling(k, _f(facts[FACTOR])), _following(k)
    decay = k.weight_decay * _f(facts[STRENGTH]) if k.decays else _f(0.0)
    is_advanced, writes = _is_advanced(k, kept), numpy.bool_(True)
    moving = loops.Moving(
        _f(facts[SHARE_ALONG]), _f(facts[LENGTHENING]), k.cautious, _f(facts[CAUTIOUS]), decay, k.warmup,
        k.has_polarity, k.lr_bump, k.min_lr, k.max_lr, k.multiplier, k.every != 0,
    )  # fmt: skip
    ahead = FETCHED_AHEAD if row.block == 0 else 0
    start = begin
    while start < end:
        count = next_count(row, start, end)
        if row.block != 0 and not is_advanced:
            _fetch_rest(row, start + count, end)
        p = load_floats(row.weight, row.weight_kind, start, count, rooms[WEIGHTS_ROOM])
        mask = load_state(states[_MASK], row.block, start, count, k.maps, rooms[_MASK])
        now, before = signs[0][:count], signs[1][:count]
        if k.warmup and k.has_polarity:
            before = load_signs(states[_POLARITY], row.span, start, count, signs[1])
        rates = rooms[RATES, :count]
        if is_advanced:
            _fill_rates(rates, row, k, start, row_factors)
            g, update = load_floats(row.grad, row.grad_kind, start, count, rooms[G]), floats(kept, start, count)
            loops.move(p, mask, now, g, update, before, rates, scaling, moving, ahead)
        else:
            given = _given(
                row, own, low_ranks, k, facts, spacings, norms, start, count, writes, unpacked[1], kept, rooms
            )
            _fill_rates(rates, row, k, start, row_factors)  # Not before: the momenta use this memory.
            loops.take_step(p, mask, now, given, before, rates, scaling, following, moving, ahead)
            _store_advanced(row, k, given, start, stream)
            if k.every:
                _show_gradient(row, k, given.sg, scaling.factor if given.is_known else _f(1.0), start)
        if k.every:
            loops.sample(rates, _f(1.0), row.first + start, k.every, _sample_of(row, k.every, k.change_sample))
        store_weights(p, row.weight, row.weight_kind, start, stream)
        if k.warmup:
            _store_signs(row, start, now, unpacked[0])
            if k.has_polarity:
                store_state(mask, states[_MASK], row.block, start, k.maps, stream)
        start += count


@jit
def _is_advanced(k, kept):
    """Whether `kept` is the update, and the states that lead to it are written."""
    return kept != 0 and (k.early or k.cautious)


@jit
def _show_gradient(row, k, sg, factor, start):
    """Give the context what it sees of a block's scaled gradient, factor * sg."""
    loops.sample(sg, factor, row.first + start, k.every, _sample_of(row, k.every, k.grad_sample))


@inlined
def _fill_rates(rates, row, k, start, row_factors):
    """A block filled with what the mask of each element is multiplied by."""
    if k.row_scaled:
        _fill_rows(rates, start, row.columns, row_factors, k.scheduler)
    else:
        loops.fill(rates, k.scheduler)


@inlined
def _store_signs(row, start, now, unpacked):
    """Write the signs of a block, where several threads share a tensor a byte each."""
    if unpacked != 0:
        copy_bytes(now, bytes_at(unpacked, start, len(now)))
    else:
        store_signs(now, row.states[_POLARITY], row.span, start)


@jit
def _sample_of(row, every, address):
    """Where every n-th element of a tensor goes, from the whole tensor's first one on; of a shard they begin later."""
    return floats(address, row.sample, -(-(row.first + row.numel) // every))


@inlined
def _fill_rows(out, start, columns, factors, common):
    """A block filled with the factor of each row, times a common one; it may begin and end within a row."""
    count = len(out)
    row = start // columns
    head = min((row + 1) * columns - start, count)
    loops.fill(out[:head], factors[row] * common)
    whole = (count - head) // columns
    end = head + whole * columns
    loops.fill_rows(out[head:end], columns, factors[row + 1 : row + 1 + whole], common)
    if end < count:
        loops.fill(out[end:], factors[row + 1 + whole] * common)


# A whole tensor -------------------------------------------------------------------------------------------------


@jit
def follow_low_rank(row, momentum, rate, k, factor, kept, rooms):
    """Update one momentum of low rank: one subspace iteration, whose two products see the gradient in two sweeps."""
    factors, probe, left = multiscale.begin_low_rank(momentum, rate, k.step)
    begin, end = numpy.int64(0), row.numel
    start = begin
    while start < end:
        count = next_count(row, start, end)
        sg = _known_gradient(row, k, start, count, kept, rooms)
        multiscale.probe_gradient(momentum, rate * factor, sg, start, probe, left)
        start += count
    right = multiscale.begin_right(momentum, factors, left)
    start = begin
    while start < end:
        count = next_count(row, start, end)
        sg = _known_gradient(row, k, start, count, kept, rooms)
        multiscale.project_gradient(momentum, rate * factor, sg, start, left, right)
        start += count
    multiscale.finish_low_rank(momentum, left, right)


@inlined
def follow_low_ranks(row, own, k, facts, kept, rooms):
    """Update the momenta of low rank that are due, not those of shards."""
    for j in range(len(own)):
        rate = floats(k.rates, j, 1)[0]
        if own[j].kind == LOW_RANK and rate != 0:
            follow_low_rank(row, own[j], rate, k, _f(facts[FACTOR]), kept, rooms)


@entry
def step_whole(
    tensors, first, last, table, momenta, factors, settings, facts, spacings, unpacked, memory, signs, widths, scaled
):  # fmt: skip
    """The whole step of some tensors, one after the other, each small enough to stay in a cache meanwhile.

    Args:
        tensors: numbers of tensors.
        first, last: which of them.
        unpacked: two zeros; see `write`.
        memory: (ROOMS, length of the longest block), to compute in.
        signs: (2, length of the longest block), likewise.
        widths: memory for a number for each column twice, and for each row.
        scaled: memory for the scaled gradient of the largest, and for a block more.
    """
    k, facts, spacings, unpacked = settings[0], plain_doubles(facts), plain_doubles(spacings), plain_numbers(unpacked)
    rooms, signs = plain_floats(memory), plain_bytes(signs)
    widths, scaled = plain_floats(widths), plain_floats(scaled)
    # Where it is used in one pass more, making it again costs as much as keeping it.
    is_kept = k.driven or k.early or k.cautious
    own_sums = numpy.empty(PRODUCTS + 2 * momenta.shape[1], dtype=numpy.float64)
    sums = plain_doubles(own_sums)
    for number in range(first, last):
        tensor = tensors[number]
        row, own, low_ranks, its_facts = table[tensor], momenta[tensor], factors[tensor], facts[tensor]
        # Not the literal 0, for which everything would be compiled once more.
        its_spacings, begin, end = spacings[tensor], numpy.int64(0), row.numel
        kept = numpy.int64(scaled.ctypes.data if is_kept else 0)
        loops.fill(sums, 0.0)
        sum_scaled(row, own, begin, end, k, sums, kept, numpy.int64(0), rooms)
        conclude_scaled(row, own, k, sums, its_facts, its_spacings)
        if k.driven:
            follow_low_ranks(row, own, k, its_facts, kept, rooms)
        norms, of_drive = widths[: row.columns], widths[row.columns : 2 * row.columns]
        if k.early:
            loops.fill(norms, _f(0.0))
            loops.fill(of_drive, _f(0.0))
            sum_columns(row, own, low_ranks, begin, end, k, its_facts, its_spacings, norms, of_drive, kept, rooms)
            conclude_columns(norms, of_drive, norms)
        if _is_advanced(k, kept):
            advance(row, own, low_ranks, begin, end, k, its_facts, its_spacings, norms, sums, kept, rooms)
            conclude_update(row, k, sums, its_facts)
            if k.early and k.cautious:
                count_agreeing(row, end, k, its_facts, sums, kept, rooms)
                conclude_agreement(row, sums, its_facts)
        row_factors = widths[2 * row.columns : 2 * row.columns + row.rows]
        if k.row_scaled:
            scale_rows(row, begin, row.rows, k.softening, row_factors, rooms)
        write(
            row, own, low_ranks, begin, end, k, its_facts, its_spacings, norms, row_factors, unpacked, kept, rooms,
            signs,
        )  # fmt: skip
        if k.driven:
            multiscale.finish_scales(own, floats(k.rates, 0, len(own)), its_spacings)


# Tensors of one shape that several threads share ----------------------------------------------------------------


def stages(early: bool, cautious: bool, row_scaled: bool) -> list[int]:
    """The passes that a step takes over such tensors, in their order, after the one over gradients."""
    wanted = {
        SCALED: True,
        COLUMN_NORMS: early,
        UPDATES: early or cautious,
        AGREEMENTS: early and cautious,
        ROW_NORMS: row_scaled,
        WRITTEN: True,
    }
    return [stage for stage, is_wanted in wanted.items() if is_wanted]


@entry
def step_parts(
    stage,
    parts,
    first,
    last,
    table,
    momenta,
    factors,
    settings,
    facts,
    spacings,
    sums,
    columns,
    norms,
    row_factors,
    unpacked,
    shown,
    memory,
    signs,
):  # fmt: skip
    """One pass over some parts of the tensors, of `stages`; what all parts sum is concluded in between.

    `shown` has an address for each tensor, as of `sum_scaled`; the others are as of `step_whole` and `write`.
    """
    parts, k = plain_numbers(parts), settings[0]
    facts, spacings, sums = plain_doubles(facts), plain_doubles(spacings), plain_doubles(sums)
    columns, norms, row_factors = plain_floats(columns), plain_floats(norms), plain_floats(row_factors)
    unpacked, shown = plain_numbers(unpacked), plain_numbers(shown)
    rooms, signs = plain_floats(memory), plain_bytes(signs)
    nothing = numpy.int64(0)
    for number in range(first, last):
        tensor, begin, end = parts[number, 0], parts[number, 1], parts[number, 2]
        row, own, low_ranks = table[tensor], momenta[tensor], factors[tensor]
        its_facts, its_spacings, its_norms, total = facts[tensor], spacings[tensor], norms[tensor], sums[number]
        if stage == MEASURED:
            measure_ahead(row, own, begin, end, k, total, rooms)
        elif stage == SCALED:
            sum_scaled(row, own, begin, end, k, total, nothing, shown[tensor], rooms)
        elif stage == COLUMN_NORMS:
            of_momentum, of_drive = columns[number, 0], columns[number, 1]
            sum_columns(
                row, own, low_ranks, begin, end, k, its_facts, its_spacings, of_momentum, of_drive, nothing, rooms
            )
        elif stage == UPDATES:
            sum_update(row, own, low_ranks, begin, end, k, its_facts, its_spacings, its_norms, total, rooms)
        elif stage == AGREEMENTS:
            sum_agreement(row, own, low_ranks, begin, end, k, its_facts, its_spacings, its_norms, total, rooms)
        elif stage == ROW_NORMS:
            # A row is of the part that it begins in.
            begin, end = -(-begin // row.columns), -(-end // row.columns)
            scale_rows(row, begin, end, k.softening, row_factors[tensor], rooms)
        else:
            write(
                row, own, low_ranks, begin, end, k, its_facts, its_spacings, its_norms, row_factors[tensor],
                unpacked[tensor], nothing, rooms, signs,
            )  # fmt: skip


@entry
def conclude(stage, table, momenta, settings, facts, spacings, sums, columns, norms, unpacked, memory):
    """What follows from the sums over each tensor, before the next pass."""
    k, facts, spacings, sums = settings[0], plain_doubles(facts), plain_doubles(spacings), plain_doubles(sums)
    columns, norms, unpacked = plain_floats(columns), plain_floats(norms), plain_numbers(unpacked)
    rooms = plain_floats(memory)
    for tensor in range(len(table)):
        row, own, total, its_facts = table[tensor], momenta[tensor], sums[tensor], facts[tensor]
        if stage == SCALED:
            conclude_scaled(row, own, k, total, its_facts, spacings[tensor])
            if k.driven:
                follow_low_ranks(row, own, k, its_facts, numpy.int64(0), rooms)
        elif stage == COLUMN_NORMS:
            conclude_columns(columns[tensor, 0], columns[tensor, 1], norms[tensor])
        elif stage == UPDATES:
            conclude_update(row, k, total, its_facts)
        elif stage == AGREEMENTS:
            conclude_agreement(row, total, its_facts)
        elif stage == WRITTEN:
            _pack(row, own, k, spacings[tensor], unpacked[tensor])


@inlined
def _pack(row, own, k, spacings, unpacked):
    """Write down what could not be written part by part."""
    if k.warmup and unpacked[0] != 0:
        store_signs(bytes_at(unpacked[0], 0, row.numel), row.states[_POLARITY], row.span, 0)
    if not k.driven or row.numel == 0:
        return
    rates = floats(k.rates, 0, len(own))
    levels = unpacked[1]
    for j in range(len(own)):
        if levels != 0 and own[j].kind == FOUR_BITS and rates[j] != 0:
            multiscale.pack_levels(levels, own[j].address, row.numel, row.span)
            levels += row.numel
    multiscale.finish_scales(own, rates, spacings)
