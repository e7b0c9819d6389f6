"""Triton kernels as a step launches them, compiled for GPUs that are not there, and what their code says of itself."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from library.cameamp.step import engine
from library.cameamp.step.kernels.gpu.passes import GpuKernels

# Types of arguments, as Triton spells them.
_TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
    torch.int8: "*i8", torch.uint16: "*u16",
}  # fmt: skip
_ALIGNED = 16

# Kernels whose blocks are bytes of several elements.
_ELEMENTS_A_BYTE = {"pack_levels": 2, "keep_levels": 2, "pack_signs": 8}


@dataclass(frozen=True)
class Launch:
    """What one kernel is compiled for, and how it is launched.

    Attributes:
        kernel: the function.
        types: of its arguments that are not constants, in order; with a star those of pointers.
        aligned: which of these are known to be multiples of 16.
        constants: the others, by name.
        warps: of a program.
    """

    kernel: Any
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.fn.__name__)


class Recorder(GpuKernels):
    """Notes what would be launched, and launches nothing: no tensor has the values that it should.

    Attributes:
        recorded: the launches, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Launch, int]] = []

    def launch(self, kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
        if programs == 0:
            return
        self.launches += 1
        types = tuple(
            _TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" if isinstance(a, int) else "fp32"
            for a in arguments
        )
        aligned = tuple(isinstance(a, torch.Tensor) for a in arguments)
        self.recorded.append((Launch(kernel, types, aligned, tuple(constants.items()), warps), programs))


@contextmanager
def launching(kernels: GpuKernels) -> Iterator[None]:
    """All optimizers that ask for kernels take their steps by these ones, wherever their tensors are, unchecked."""
    loaders = dict.fromkeys(("cpu", "cuda"), lambda: kernels)
    with (
        patch.object(engine, "_LOADERS", loaders),
        patch.object(engine, "_AUTOMATIC", loaders.keys()),
        patch.object(kernels, "difference", return_value=""),
    ):
        yield


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread puts into memory because it has too few of them.
        shared: bytes of shared memory of a program.
        read, written: bytes of gradients, weights and states an element of the tensors.
    """

    registers: int
    spilled: int
    shared: int
    read: float
    written: float


def compiled(launch: Launch, capability: int) -> Code:
    """What the code of a kernel says of itself; as of `build`."""
    done = build(launch, capability)
    registers, spilled = _resources(done.asm["cubin"])
    constants = dict(launch.constants)
    block = constants.get("SPAN", constants.get("TALL", 0) * constants.get("WIDE", 0))
    read, written = _traffic(done.asm["ttgir"], block)
    elements = _ELEMENTS_A_BYTE.get(launch.name, 1)
    return Code(registers, spilled, done.metadata.shared, read / elements, written / elements)


def build(launch: Launch, capability: int) -> Any:
    """Compile a kernel for a compute capability, such as 86, or fetch it from Triton's cache.

    Raises:
        ImportError: Triton is not installed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in launch.kernel.arg_names if name not in dict(launch.constants)]
    signature = dict(zip(names, launch.types)) | {name: "constexpr" for name, _ in launch.constants}
    places = {name: (place,) for place, name in enumerate(launch.kernel.arg_names)}
    attributes = {
        places[name]: [["tt.divisibility", _ALIGNED]] for name, aligned in zip(names, launch.aligned) if aligned
    }
    signature = {name: signature[name] for name in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, dict(launch.constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target, {"num_warps": launch.warps, "enable_fp_fusion": False})


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and what it puts into memory because it has too few of them, as the binary says."""
    import triton

    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "kernel.cubin")
        path.write_bytes(binary)
        words = [str(reader), "--dump-resource-usage", str(path)]
        report = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return used["REG"], used["STACK"] + used["LOCAL"]


# Bytes an element -----------------------------------------------------------------------------------------------


def _traffic(code: str, block: int) -> tuple[float, float]:
    """Bytes of gradients, weights and states that a kernel reads and writes for each element of its blocks.

    Counted in Triton's intermediate code, which has one operation for a whole block: loads and stores of as many
    elements as the block has, at addresses that come from the table. What comes from tables of codes, or is shared by
    the elements of a block of codes, is in the caches. Of a state that may be coded or not, what is coded is counted.
    """
    defined: dict[str, str] = {}  # names are used again in other branches
    moved = {"load": 0.0, "store": 0.0}
    for line, coded in _lines(code):
        definition = re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line)
        if definition:
            defined[definition[1]] = definition[2]
        found = re.search(r"tt\.(load|store) (%[\w#]+).*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>", line)
        if found and coded and math.prod(map(int, found[3].split("x"))) == block and _is_element(found[2], defined):
            moved[found[1]] += int(found[4]) / 8
    return moved["load"], moved["store"]


def _lines(code: str) -> Iterator[tuple[str, bool]]:
    """Lines, and whether each is also for states in codes, which is what the second branches of choices are for.

    A choice without a second branch is for momenta: of four bits, whose loads are of bytes, or else in full.
    """
    lines = code.splitlines()
    in_full = [False] * len(lines)
    for start, line in enumerate(lines):
        if "scf.if" not in line:
            continue
        closing = line[: len(line) - len(line.lstrip())] + "}"
        end = next(place for place in range(start + 1, len(lines)) if lines[place].startswith(closing))
        for place in range(start + 1, end):
            in_full[place] |= "else" in lines[end] or "f32>" in lines[place]
    yield from zip(lines, (not full for full in in_full))


def _is_element(pointer: str, defined: dict[str, str]) -> bool:
    """Whether a pointer is an address from the table plus the offsets of elements."""
    line = defined.get(pointer, "")
    while line.startswith("tt.addptr"):
        base, offset = re.findall(r"%[\w#]+", line)[:2]
        if any(block in defined.get(offset, "") for block in ("arith.shrsi", "arith.divsi")):
            return False
        line = defined.get(base, "")
    while line.startswith(("tt.splat", "ttg.convert_layout", "tt.bitcast")):
        line = defined.get(re.findall(r"%[\w#]+", line)[0], "")
        while line.startswith("tt.addptr"):
            line = defined.get(re.findall(r"%[\w#]+", line)[0], "")
    return line.startswith("tt.int_to_ptr")
