"""Reads the output of ptxas and LLVM for a kernel: registers, spills, instructions, loops, and the
instructions between two accesses of memory.

`cuobjdump` and `nvdisasm` come with the triton package; for AMD the assembly is read itself.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_LINE = re.compile(r'//## File "(.*)", line (\d+)')
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_TO_LABEL = re.compile(r"`\((\.L_x?_?\w+)\)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_FILE = re.compile(r'^\.file\s+(\d+)\s.*?"([^"]*\.py)"')
_AMD_LOC = re.compile(r"^\.loc\s+(\d+)\s+(\d+)")
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.[a-z]+\d+)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction, of NVIDIA's SASS or of AMD's assembly (numbered from 0 there).

    `jump` is the address that a branch goes to, `always` whether a branch or an exit is taken
    regardless of a predicate, `line` the file's name and the line of the source that it is from.
    """

    address: int
    opcode: str
    jump: int | None = None
    always: bool = False
    line: tuple[str, int] = ("", 0)

    @property
    def writes(self) -> bool:
        """Whether it writes to global memory."""
        return self.opcode.startswith(("STG.", "ATOMG", "REDG", "RED.")) or _is_amd_access(
            self.opcode, ("store", "atomic")
        )

    @property
    def reads(self) -> bool:
        """Whether it reads global memory."""
        return self.opcode.startswith(("LDG.", "ATOMG")) or _is_amd_access(
            self.opcode, ("load", "atomic")
        )

    @property
    def is_barrier(self) -> bool:
        """Whether all threads of a program wait for each other here."""
        return self.opcode.startswith(("BAR.SYNC", "BAR.RED", "s_barrier"))

    @property
    def loaded(self) -> int:
        """Bytes that a thread reads from global memory."""
        return _width(self.opcode) if self.opcode.startswith(("LDG.", "LDGSTS.")) else 0

    @property
    def stored(self) -> int:
        """Bytes that a thread writes to global memory."""
        return _width(self.opcode) if self.opcode.startswith("STG.") else 0


def _is_amd_access(opcode: str, kinds: tuple[str, ...]) -> bool:
    return opcode.startswith(tuple(f"{m}_{k}" for m in ("buffer", "global", "flat") for k in kinds))


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in parts:
            return size
    return 4


@dataclass(frozen=True)
class Code:
    """A compiled kernel. `stack` is local memory in bytes per thread: spilled registers.

    `error` is the message of the compiler where it failed.
    """

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    ptx_widths: tuple[tuple[str, int], ...] = ()
    instructions: tuple[Instruction, ...] = ()
    error: str = ""

    @cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """The bodies of the innermost loops, in the order of the code."""
        backward = [
            (i.jump, i.address)
            for i in self.instructions
            if i.jump is not None and i.jump < i.address
        ]
        whole = {first: max(b for a, b in backward if a == first) for first, _ in backward}
        inner = [
            (first, last)
            for first, last in whole.items()
            if not any(first < a and b <= last for a, b in whole.items())
        ]
        return [
            tuple(i for i in self.instructions if first <= i.address <= last)
            for first, last in sorted(inner)
        ]

    def count(self, prefix: str) -> int:
        """Instructions whose opcode begins so."""
        return count(self.instructions, prefix)


def count(instructions: Iterable[Instruction], prefix: str) -> int:
    """Instructions whose opcode begins so."""
    return sum(i.opcode.startswith(prefix) for i in instructions)


def wide_bytes(instructions: Iterable[Instruction]) -> int:
    """Bytes that a thread reads from global memory 16 at a time."""
    return sum(i.loaded for i in instructions if i.loaded == 16)


def without_barrier(
    instructions: tuple[Instruction, ...],
    first: Callable[[Instruction], bool],
    then: Callable[[Instruction], bool],
) -> list[Instruction]:
    """The `then` instructions that some way through the code leads to from a `first` one without a
    barrier. Where there are none of one kind, an AssertionError."""
    starts = [number for number, i in enumerate(instructions) if first(i)]
    assert starts, "nothing to come first"
    assert any(map(then, instructions)), "nothing to come then"
    place = {i.address: number for number, i in enumerate(instructions)}

    def next_of(number: int) -> list[int]:
        here = instructions[number]
        jump = [] if here.jump is None else [place[here.jump]]
        falls = not here.always and number + 1 < len(instructions)
        return [*jump, number + 1] if falls else jump

    reached: set[int] = set()
    waiting = [after for number in starts for after in next_of(number)]
    while waiting:
        number = waiting.pop()
        if number not in reached and not instructions[number].is_barrier:
            reached.add(number)
            waiting += next_of(number)
    return [instructions[number] for number in sorted(reached) if then(instructions[number])]


@dataclass(frozen=True)
class Cost:
    """The cost of one element for a thread."""

    instructions: float
    exponentials: float
    stores_wide: bool


def _cost(instructions: tuple[Instruction, ...], element_bytes: int) -> Cost:
    elements = wide_bytes(instructions) / element_bytes
    assert elements > 0, "no 16-byte global load here: the accesses were not vectorized"
    stores = [i.stored for i in instructions if i.stored]
    return Cost(
        len(instructions) / elements,
        count(instructions, "MUFU.EX2") / elements,
        not stores or 16 in stores,
    )


def cost_of_one_tile(code: Code, element_bytes: int) -> Cost:
    """The instructions outside loops over the elements a thread holds.

    Those are counted by the 16-byte loads of one sweep over the inputs; `element_bytes` is the size
    of an element of all inputs. Edges, set-up and exchanges are in the numerator. Loops are not:
    they go over the batch's labels, or write the zeros of an ignored row.
    """
    in_loops = {i.address for body in code.loops for i in body}
    straight = tuple(i for i in code.instructions if i.address not in in_loops)
    return _cost(straight, element_bytes)


def cost_of_sweeps(code: Code, element_bytes: int) -> list[Cost]:
    """One cost for each inner loop that reads 16 bytes at a time, in the order of the code."""
    return [_cost(body, element_bytes) for body in code.loops if wide_bytes(body)]


def read_nvidia(cubin: bytes, ptx: str, shared: int, disassemble: bool) -> Code:
    """The resources, and with `disassemble` the instructions, of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", str(path))
        registers, stack, local = (
            int(_find(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL")
        )
        instructions: tuple[Instruction, ...] = ()
        if disassemble or stack or local:
            instructions = parse_sass(_run("nvdisasm", "-c", "-g", str(path)))
    spills = count(instructions, "STL") + count(instructions, "LDL")
    widths = Counter("".join(found) for found in _PTX_ACCESS.findall(ptx))
    return Code(
        registers, stack + local, spills, shared, tuple(sorted(widths.items())), instructions
    )


def read_amd(assembly: str, shared: int, disassemble: bool) -> Code:
    """The resources that the metadata of an AMD kernel's assembly names, and with `disassemble` its
    instructions."""
    numbers = {
        name: int(_find(rf"\.{name}:\s+(\d+)", assembly))
        for name in (
            "vgpr_count",
            "private_segment_fixed_size",
            "vgpr_spill_count",
        )
    }
    # scalar registers spill into lanes of vector registers, not into memory
    spills = numbers["vgpr_spill_count"]
    return Code(
        numbers["vgpr_count"],
        numbers["private_segment_fixed_size"],
        spills,
        shared,
        instructions=parse_amd(assembly) if disassemble else (),
    )


def parse_sass(text: str) -> tuple[Instruction, ...]:
    """The instructions that can run: without the padding after the last exit."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, str, str, tuple[str, int]]] = []
    source = ("", 0)
    for line in text.splitlines():
        label = _LABEL.match(line.strip())
        place = _LINE.search(line)
        instruction = _INSTRUCTION.search(line)
        if label:
            waiting.append(label[1])
        elif place:
            source = (place[1].rsplit("/", 1)[-1], int(place[2]))
        elif instruction:
            address = int(instruction[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            found.append((address, instruction[2] or "", instruction[3], instruction[4], source))
    instructions = []
    for address, predicate, opcode, operands, source in found:
        to = _TO_LABEL.search(operands)
        # other instructions (BSSY, a call's return address) name labels without jumping there
        jump = labels.get(to[1]) if to and opcode.startswith(("BRA", "JMP")) else None
        # a uniform predicate is an operand: BRA UP0, `(.L_x_1)
        plain = opcode.startswith("RET") or not operands.split("`")[0].strip()
        always = opcode.startswith(("BRA", "JMP", "EXIT", "RET")) and plain and not predicate
        if opcode != "NOP" and jump != address:  # what follows the last exit
            instructions.append(Instruction(address, opcode, jump, always, source))
    return tuple(instructions)


def parse_amd(text: str) -> tuple[Instruction, ...]:
    """The instructions of the one kernel in an AMD assembly."""
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    found: list[tuple[str, str, tuple[str, int]]] = []
    source = ("", 0)
    for line in map(str.strip, text.splitlines()):
        label, file, place = (p.match(line) for p in (_AMD_LABEL, _AMD_FILE, _AMD_LOC))
        if label:
            labels[label[1]] = len(found)
        elif file:
            files[file[1]] = file[2].rsplit("/", 1)[-1]
        elif place:
            source = (files.get(place[1], ""), int(place[2]))
        elif re.match(r"[a-z]\w+(\s|$)", line):
            opcode, _, operands = line.partition(" ")
            opcode, _, rest = opcode.partition("\t")
            found.append((opcode, (rest + operands).split(";")[0].strip(), source))
    instructions = []
    for number, (opcode, operands, source) in enumerate(found):
        branches = opcode.startswith(("s_branch", "s_cbranch"))
        instructions.append(
            Instruction(
                number,
                opcode,
                labels[operands] if branches else None,
                opcode in ("s_branch", "s_endpgm"),
                source,
            )
        )
        if branches:
            assert labels[operands] < len(found), "a branch behind the last instruction"
    return tuple(instructions)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in the compiler's output"
    return found[1]


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
