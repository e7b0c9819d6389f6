"""States on their way between memory and a block of float32 numbers: read where they are, or decoded and encoded.

A block is some hundreds of neighbouring elements of one tensor, few enough to stay in the first cache. Formats and
exactness are those of `storage/`; the same numbers give the same codes.
"""

from __future__ import annotations

import numpy

from ....storage.blockwise import Tables
from ..table import ABSENT, ADDRESS, BFLOAT16, BOOL, EVEN, FLOAT, FLOAT32, KIND, PACKED, ROOT, SCALE
from .jit import as_bits, as_float, bytes_at, exact, floats, halves, prefetch
from .lanes import LANES

_f = numpy.float32
_u = numpy.uint32

_LARGEST_BFLOAT16 = _f(3.3895314e38)
_LARGEST_FLOAT16 = _f(65504.0)


# bitsandbytes' maps as one piece of memory, at an address: for each of two, signed and root, 256 values and 256
# midpoints, as in `storage.blockwise.Tables`; then for each the first codes of all 65,536 patterns.
_VALUES, _MIDPOINTS, _FIRST = 0, 512, 4096


def joined_maps(signed: Tables, root: Tables) -> numpy.ndarray:
    """The maps of codes as kernels read them."""
    tables = (signed.values, root.values, signed.midpoints, root.midpoints, signed.first, root.first)
    return numpy.concatenate([table.numpy().view(numpy.uint8) for table in tables])


@exact
def _values(maps, kind):
    return floats(maps, _VALUES + 256 * (kind == ROOT), 256)


@exact
def _midpoints(maps, kind):
    return floats(maps, _MIDPOINTS + 256 * (kind == ROOT), 256)


@exact
def _first_codes(maps, kind):
    return bytes_at(maps, _FIRST + 65536 * (kind == ROOT), 65536)


# Gradients and weights ------------------------------------------------------------------------------------------


@exact
def bytes_of(kind):
    """What a number takes, in one of the three floating-point formats."""
    return 4 if kind == FLOAT32 else 2


@exact
def load_floats(address, kind, start, count, room):
    """Numbers of any of the three floating-point formats: in place if they are float32, else converted into `room`.

    What is no whole sixteens is in `room` too, which is filled up with zeros.
    """
    if kind == FLOAT32:
        return _in_place(floats(address, start, count), room)
    out = room[:count]
    fill_up(room, count)
    if kind == BFLOAT16:
        _from_bfloat16(halves(address, start, count), out)
    else:
        _from_float16(halves(address, start, count), out)
    return out


@exact
def _in_place(x, room):
    """An array, or if it is no whole sixteens a copy that is filled up to them."""
    count = len(x)
    if count % LANES == 0:
        return x
    for i in range(count):
        room[i] = x[i]
    fill_up(room, count)
    return room[:count]


@exact
def fill_up(room, count):
    """Zeros from `count` elements on to whole sixteens."""
    for i in range(count, min(-(-count // LANES) * LANES, len(room))):
        room[i] = _f(0.0)


@exact
def put_back(x, address, start):
    """Write elements of a float32 tensor, of which `_in_place` made a copy if they are no whole sixteens."""
    if len(x) % LANES != 0:
        out = floats(address, start, len(x))
        for i in range(len(x)):
            out[i] = x[i]


@exact
def _from_bfloat16(source, out):
    for i in range(len(source)):
        out[i] = as_float(_u(source[i]) << _u(16))


@exact
def _from_float16(source, out):
    for i in range(len(source)):
        half = _u(source[i])
        exponent, fraction = half & _u(0x7C00), half & _u(0x3FF)
        # The exponent's bias is 112 higher in float32, and once more so for what is infinite or NaN.
        shift = _u(224 << 23) if exponent == _u(0x7C00) else _u(112 << 23)
        normal = as_float(_u(((exponent | fraction) << _u(13)) + shift))
        size = _f(fraction) * _f(2.0**-24) if exponent == _u(0) else normal
        out[i] = -size if half & _u(0x8000) else size


@exact
def store_weights(weights, address, kind, start, stream):
    """Write weights back, those of 16 bits rounded at random as `rounding.stochastic_round` does.

    Args:
        weights: the new ones, as `load_floats` gave them.
        address, kind, start: where they belong.
        stream: from `noise_stream`.
    """
    if kind == BFLOAT16:
        _round(weights, start, stream, numpy.int32(8), numpy.int32(-118), _LARGEST_BFLOAT16)
        _to_bfloat16(weights, halves(address, start, len(weights)))
    elif kind == FLOAT32:
        put_back(weights, address, start)
    else:
        _round(weights, start, stream, numpy.int32(11), numpy.int32(-13), _LARGEST_FLOAT16)
        _to_float16(weights, halves(address, start, len(weights)))


@exact
def _round(x, start, stream, significand, smallest_exponent, largest):
    """Round x to so many bits, up or down with the probabilities that keep the mean."""
    for i in range(len(x)):
        exponent = numpy.int32((as_bits(x[i]) >> _u(23)) & _u(0xFF)) - numpy.int32(126)
        last = max(exponent, smallest_exponent) - significand
        place = as_float(_u(last + numpy.int32(127)) << _u(23))
        y = numpy.floor(x[i] / place + noise(stream, start + i)) * place
        x[i] = min(max(y, -largest), largest)


@exact
def _to_bfloat16(source, out):
    for i in range(len(source)):
        out[i] = numpy.uint16(as_bits(source[i]) >> _u(16))


@exact
def _to_float16(source, out):
    for i in range(len(source)):
        bits = as_bits(source[i])
        size = abs(source[i])
        normal = _u((bits & _u(0x7FFFFFFF)) - _u(112 << 23)) >> _u(13)
        subnormal = _u(min(size, _f(2.0**-14)) * _f(2.0**24))
        unsigned = subnormal if size < _f(2.0**-14) else normal
        out[i] = numpy.uint16(unsigned | ((bits >> _u(16)) & _u(0x8000)))


# Noise ----------------------------------------------------------------------------------------------------------


@exact
def noise_stream(position, step):
    """What tells the noise of one tensor at one step from all others; as in `rounding.uniform_noise`."""
    return _mix(_u(_u(position) + _u(_u(step) * _u(0x9E3779B1))))


@exact
def noise(stream, element):
    """Noise in [0, 1) for an element."""
    return _f(_mix(_u(stream + _u(element))) & _u(8191)) * _f(2.0**-13)


@exact
def _mix(x):
    x = _u((x ^ (x >> _u(16))) * _u(0x7FEB352D))
    x = _u((x ^ (x >> _u(15))) * _u(0x846CA68B))
    return _u(x ^ (x >> _u(16)))


# States ---------------------------------------------------------------------------------------------------------


@exact
def fetch_state(state, start, count):
    """Begin to fetch some elements of a state, if the tensor has it."""
    if state[KIND] != ABSENT:
        size = 4 if state[KIND] == FLOAT else 1
        prefetch(state[ADDRESS] + size * start, size * count)


@exact
def load_state(state, block, start, count, maps, room):
    """A state of one tensor as float32: in place if it is stored so, else decoded into `room`.

    What is no whole sixteens is in `room` too, which is filled up with zeros.

    Args:
        state: its kind, address and scale, of one tensor.
        block: elements in a block of its code.
        start, count: which elements; whole blocks of the code.
        maps: the address of `joined_maps`.
        room: memory for `count` numbers.
    """
    kind, address = state[KIND], state[ADDRESS]
    if kind == FLOAT:
        return _in_place(floats(address, start, count), room)
    out = room[:count]
    fill_up(room, count)
    codes = bytes_at(address, start, count)
    if kind == EVEN:
        scale = floats(state[SCALE], 0, 2)
        _decode_evenly(codes, scale[0], scale[1], out)
        return out
    scales = floats(state[SCALE], start // block, -(-count // block))  # The last block of a shard may be shorter.
    for i in range(len(scales)):
        part = out[i * block : (i + 1) * block]
        its_codes = codes[i * block : (i + 1) * block]
        if kind == ROOT:
            _decode_root(its_codes, _values(maps, kind), scales[i], part)
        else:
            _decode(its_codes, _values(maps, kind), scales[i], part)
    return out


@exact
def store_state(values, state, block, start, maps, stream):
    """Encode a state, if it is coded; `values` is overwritten then. Arguments as of `load_state`."""
    kind, address = state[KIND], state[ADDRESS]
    count = len(values)
    if kind == FLOAT:
        put_back(values, address, start)
        return
    codes = bytes_at(address, start, count)
    if kind == EVEN:
        scale = floats(state[SCALE], 0, 2)
        _encode_evenly(values, start, stream, scale[0], scale[1], codes)
        return
    scales = floats(state[SCALE], start // block, -(-count // block))  # The last block of a shard may be shorter.
    for i in range(len(scales)):
        part = values[i * block : (i + 1) * block]
        its_codes = codes[i * block : (i + 1) * block]
        if kind == ROOT:
            _root(part)
        scales[i] = largest(part)
        _encode(part, scales[i], _first_codes(maps, kind), _midpoints(maps, kind), its_codes)


@exact
def _decode(codes, values, scale, out):
    for i in range(len(codes)):
        out[i] = values[codes[i]] * scale


@exact
def _decode_root(codes, values, scale, out):
    for i in range(len(codes)):
        root = values[codes[i]] * scale
        out[i] = root * root


@exact
def _root(x):
    for i in range(len(x)):
        x[i] = numpy.sqrt(x[i])


@exact
def largest(x):
    """The largest magnitude of a block."""
    # Of numbers above 0 the larger has the larger bits, and a largest whole number vectorizes.
    bits = _u(0)
    for i in range(len(x)):
        bits = max(bits, _u(as_bits(x[i]) & _u(0x7FFFFFFF)))
    return as_float(bits)


@exact
def _encode(x, scale, first, midpoints, codes):
    """The nearest code of each x / scale: numbers with the same upper 16 bits have at most one midpoint in between."""
    divisor = scale if scale > 0 else _f(1.0)
    for i in range(len(x)):
        x[i] = x[i] / divisor
    for i in range(len(x)):
        code = first[as_bits(x[i]) >> _u(16)]
        codes[i] = code + (x[i] > midpoints[code])


@exact
def _decode_evenly(codes, low, high, out):
    for i in range(len(codes)):
        share = _f(codes[i]) / _f(255.0)
        # As torch.lerp, which goes from the nearer end.
        step = share * (high - low)
        back = (_f(1.0) - share) * (high - low)
        out[i] = low + step if share < _f(0.5) else high - back


@exact
def _encode_evenly(x, start, stream, low, high, codes):
    span = numpy.float64(high) - numpy.float64(low)
    factor = _f(255.0 / span) if span > 0 else _f(0.0)
    for i in range(len(x)):
        code = numpy.floor((x[i] - low) * factor + noise(stream, start + i))
        codes[i] = numpy.uint8(min(max(code, _f(0.0)), _f(255.0)))


# Signs ----------------------------------------------------------------------------------------------------------


@exact
def load_signs(state, length, start, count, room):
    """Yes or no for each element, as bytes: in place if they are stored so, else unpacked into `room`.

    No whole sixteens are in `room` too.

    Args:
        state: its kind and address, of one tensor.
        length: how many elements there is room for.
        start, count: which elements.
        room: memory for `count` bytes.
    """
    address = state[ADDRESS]
    out = room[:count]
    if state[KIND] == BOOL:
        signs = bytes_at(address, start, count)
        if count % LANES == 0:
            return signs
        copy_bytes(signs, out)
        return out
    plane = (length + 7) // 8
    done = 0
    while done < count:
        bit, byte = (start + done) // plane, (start + done) % plane
        many = min(plane - byte, count - done)
        _unpack(bytes_at(address, byte, many), numpy.uint8(bit), out[done : done + many])
        done += many
    return out


@exact
def store_signs(signs, state, length, start):
    """Write signs; those that are packed share bytes with distant elements, so one thread writes all of a tensor."""
    address = state[ADDRESS]
    count = len(signs)
    if state[KIND] != PACKED:
        copy_bytes(signs, bytes_at(address, start, count))
        return
    plane = (length + 7) // 8
    done = 0
    while done < count:
        bit, byte = (start + done) // plane, (start + done) % plane
        many = min(plane - byte, count - done)
        _pack(signs[done : done + many], numpy.uint8(bit), bytes_at(address, byte, many))
        done += many


@exact
def copy_bytes(x, out):
    """Bytes from one place to another."""
    for i in range(len(x)):
        out[i] = x[i]


@exact
def _unpack(packed, bit, out):
    for i in range(len(packed)):
        out[i] = (packed[i] >> bit) & numpy.uint8(1)


@exact
def _pack(signs, bit, packed):
    others = numpy.uint8(255 - (1 << bit))
    for i in range(len(signs)):
        packed[i] = (packed[i] & others) | numpy.uint8(signs[i] << bit)
