"""What a compiled program does, read from its text: products, memory traffic and communication.

XLA's own cost analysis counts the body of a loop once. Here an operation counts as often as it runs: a loop's trip
count is the one that XLA knows, or the bound in the loop's condition; a loop whose bound is data counts once. `turn`
counts one iteration of the decoding loop, a step. Of a conditional, the branch with fewer operations counts: the other
one is for draws that overflow a static size.

All counts are of one device. FLOPs are those of products alone. Bytes are those that fused operations read and write
in main memory: what TPUs keep in their vector memory (a layout in a memory space, "S(1)") costs nothing, of a slice
only the slice is read, and an update in place writes the update.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Operations without a memory access of their own: names for parts of others' results, the ends of asynchronous
# operations, which count where they start, and those whose bodies are counted.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
         "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-update")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0}
_TYPE = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_METADATA = re.compile(r"=\{\n.*\n\}\}")  # of a Pallas kernel, on lines of its own
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+)\s?\(.*\{$")


@dataclass(frozen=True)
class Shape:
    """An array: element type, dimensions, and whether it lives in main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype[:3]) or 0)
        return math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line: its name, result (the arrays of a tuple), operation, operands' names, and the rest of the line.

    Attributes:
      value: what stands between the parentheses: the value of a constant, the number of a parameter.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    value: str
    attributes: str

    def callee(self, key: str) -> str | None:
        """The name of the computation that an attribute names."""
        match = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return match[1] if match else None


@dataclass
class Computation:
    """Instructions by name, in order; the last is the result."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(reversed(self.instructions.values()))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass(frozen=True)
class Collective:
    """Communications of one kind and size.

    Attributes:
      kind: of COLLECTIVES.
      bytes: the whole payload on one device: what it holds before a reduction, or after a gathering.
      group: devices that take part.
      dtype: of its largest array.
    """

    kind: str
    bytes: int
    group: int
    dtype: str

    @property
    def sent(self) -> float:
        """Bytes that a device must send, however the network is used well."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclass
class Cost:
    """What one device does in one run of a program.

    Attributes:
      flops: of products.
      wide_flops: the part of them that has a float32 operand, for which a matrix unit takes several passes.
      bytes: read and written in main memory.
      launches: of kernels, on a GPU that does not collect them in command buffers.
      collectives: how often each runs.
    """

    flops: float = 0.0
    wide_flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    collectives: Counter[Collective] = field(default_factory=Counter)

    def add(self, other: Cost, times: int = 1) -> None:
        self.flops += times * other.flops
        self.wide_flops += times * other.wide_flops
        self.bytes += times * other.bytes
        self.launches += times * other.launches
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count

    @property
    def sent(self) -> float:
        """Bytes sent to other devices."""
        return sum(count * collective.sent for collective, count in self.collectives.items())


def cost(text: str) -> Cost:
    """The cost of a program, from the text of its compiled form."""
    counter, entry = _counter_of(text)
    return counter.computation(entry)


def turn(text: str) -> Cost:
    """The cost of one iteration of a program's loop (the largest if there are several); of the whole program without
    one."""
    counter, entry = _counter_of(text)
    turns = [counter.computation(_callee(op, "body")) for op in counter.computations[entry].instructions.values()
             if op.opcode == "while"]
    return max(turns or [counter.computation(entry)], key=lambda turn: turn.flops)


def unbounded(text: str) -> list[str]:
    """The loops of a program without a known trip count. On a GPU the host waits in each of their iterations."""
    counter, _ = _counter_of(text)
    return [op.name for computation in counter.computations.values() for op in computation.instructions.values()
            if op.opcode == "while" and counter.trips(op) is None]


def _counter_of(text: str) -> tuple[_Counter, str]:
    """A counter for a program, and the name of the computation that it begins with."""
    computations, entry = parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    return _Counter(computations, int(partitions[1]) if partitions else 1), entry


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one it begins with."""
    computations: dict[str, Computation] = {}
    entry = ""
    current = Computation()
    for line in _METADATA.sub("={}}", text).splitlines():
        if match := _INSTRUCTION.match(line):
            instruction = _parse_instruction(match[1], line[match.end():])
            current.instructions[instruction.name] = instruction
        elif match := _COMPUTATION.match(line):
            current = computations[match[2]] = Computation()
            entry = match[2] if match[1] else entry
    return computations, entry


def _parse_instruction(name: str, rest: str) -> Instruction:
    kind = _parenthesis(rest) if rest.startswith("(") else rest[:rest.index(" ")]
    call = rest[len(kind):].lstrip()
    opcode = call[:call.index("(")]
    operands = _parenthesis(call[len(opcode):])
    return Instruction(name, _parse_shapes(kind), opcode, tuple(re.findall(r"%([\w.-]+)", operands)),
                       operands[1:-1], call[len(opcode) + len(operands):])


def _parenthesis(text: str) -> str:
    """The parenthesis that text begins with, up to its end."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index + 1]
    return text


def _parse_shapes(kind: str) -> tuple[Shape, ...]:
    return tuple(Shape(dtype, tuple(map(int, dims.split(","))) if dims else (), not re.search(r"S\([1-9]", layout))
                 for dtype, dims, layout in _TYPE.findall(kind))


class _Counter:
    """Counts computations, each once, however often it is called. `op` is an instruction, `within` the computation
    that it stands in."""

    def __init__(self, computations: dict[str, Computation], devices: int) -> None:
        self.computations, self.devices = computations, devices
        self.known: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        if name not in self.known:
            total = Cost()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                total.add(self.instruction(computation, instruction))
            self.known[name] = total
        return self.known[name]

    def instruction(self, within: Computation, op: Instruction) -> Cost:
        total = Cost()
        if op.opcode == "while":
            total.add(self.computation(_callee(op, "body")), self.trips(op) or 1)
        elif op.opcode == "conditional":
            called = re.findall(r"branch_computations={[^}]*}|(?:true|false)_computation=%[\w.-]+", op.attributes)
            branches = map(self.computation, re.findall(r"%([\w.-]+)", " ".join(called)))
            total.add(min(branches, key=lambda branch: branch.flops))
        elif op.opcode in ("call", "async-start"):
            total.add(self.computation(op.callee("to_apply") or _callee(op, "calls")))
        else:
            if op.opcode == "fusion":
                inside = self.computation(_callee(op, "calls"))
                total.add(dataclasses.replace(inside, bytes=0.0, launches=0))
            elif op.opcode in ("dot", "convolution"):
                total.flops = float(_product(within, op))
                if any(shape.dtype == "f32" for source in within.operands(op) for shape in source.shapes):
                    total.wide_flops = total.flops
            elif op.opcode == "custom-call":
                total.flops = float(_kernel(within, op))
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                total.collectives[self.collective(within, op, kind)] += 1
            total.bytes = float(self.traffic(within, op))
            total.launches = int(op.opcode not in _FREE and not op.opcode.endswith("-done"))
        return total

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop's body runs; None if that is data. Counters begin at 0."""
        if match := re.search(r'known_trip_count\D*(\d+)', loop.attributes):
            return int(match[1])
        condition = self.computations[_callee(loop, "condition")]
        comparison = condition.root
        if comparison.opcode == "fusion":
            comparison = self.computations[_callee(comparison, "calls")].root
        if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes:
            return None
        counter, bound = self.sides(condition, comparison)
        if bound is None or counter is None or not bound.value.isdigit():
            return None
        match = re.search(r"index=(\d+)", counter.attributes)
        return -(-int(bound.value) // (self.step(loop, int(match[1])) if match else 1))

    def sides(self, condition: Computation, comparison: Instruction) -> list[Instruction | None]:
        """The two sides of a condition's comparison, which may be fused."""
        if condition.root is comparison:
            return [condition.instructions.get(name) for name in comparison.operands]
        inner = self.computations[_callee(condition.root, "calls")]
        sides = [inner.instructions[name] for name in comparison.operands]
        return [condition.instructions.get(condition.root.operands[int(side.value)])
                if side.opcode == "parameter" else side for side in sides]

    def step(self, loop: Instruction, index: int) -> int:
        """By how much an iteration raises the counter at an index of the loop's carry."""
        body = self.computations[_callee(loop, "body")]
        counter = body.instructions.get(body.root.operands[index])
        if counter is None or counter.opcode != "add":
            return 1
        constants = [op.value for op in body.operands(counter) if op.opcode == "constant"]
        return int(constants[0]) if constants else 1

    def collective(self, within: Computation, op: Instruction, kind: str) -> Collective:
        shapes = [shape for source in within.operands(op) for shape in source.shapes]
        group = _group_size(op.attributes, self.devices)
        size = sum(shape.bytes for shape in shapes) * (group if kind == "all-gather" else 1)
        largest = max(shapes, key=lambda shape: shape.bytes)
        # TPUs scatter a reduction by a fusion of the two.
        scattered = kind == "all-reduce" and any(
            user.opcode in ("dynamic-slice", "slice") and op.name in user.operands
            for user in within.instructions.values())
        return Collective("reduce-scatter" if scattered else kind, size, group, largest.dtype)

    def traffic(self, within: Computation, op: Instruction) -> int:
        """Bytes of main memory that an instruction reads and writes."""
        if op.opcode in _FREE or op.opcode.endswith("-done"):
            return 0
        if op.opcode in ("copy-start", "slice-start"):
            source = within.operands(op)[0].shapes[0]
            result = op.shapes[0 if op.opcode == "copy-start" else 1]  # (copy, source, ...) or (source, slice, ...)
            return result.bytes * (result.main + source.main)
        if op.opcode.endswith("-start"):
            return sum(_main_bytes(source.shapes) for source in within.operands(op))
        if op.opcode != "fusion":
            return self.bytes_written(within, op) + sum(
                self.bytes_read(within, op, number) for number in range(len(op.operands)))
        inner = self.computations[_callee(op, "calls")]
        total = sum(_main_bytes(source.shapes, self.bytes_read_in_fusion(inner, _parameter(inner, number)))
                    for number, source in enumerate(within.operands(op)))
        roots = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
        for root, shape in zip(roots, op.shapes, strict=False):
            total += self.bytes_written_in_fusion(inner, root) if shape.main else 0
        return total

    def bytes_read(self, within: Computation, op: Instruction, number: int) -> int:
        """Bytes that an unfused instruction reads of one operand."""
        source = within.instructions.get(op.operands[number])
        return 0 if source is None else _main_bytes(source.shapes, _bytes_of_part(within, op, number))

    def bytes_read_in_fusion(self, inner: Computation, source: Instruction) -> int | None:
        """Bytes that a fusion reads of a parameter; None: all of it."""
        total = 0
        for user in inner.instructions.values():
            if source.name not in user.operands:
                continue
            number = user.operands.index(source.name)
            if user.opcode == "fusion" and not self.only_renames(user):
                deeper = self.computations[_callee(user, "calls")]
                part = self.bytes_read_in_fusion(deeper, _parameter(deeper, number))
            elif user.opcode in ("bitcast", "fusion"):  # the same under another name
                part = None if user is inner.root else self.bytes_read_in_fusion(inner, user)
            else:
                part = _bytes_of_part(inner, user, number)
            if part is None:
                return None
            total += part
        return total

    def only_renames(self, fusion: Instruction) -> bool:
        """Whether a fusion only gives its operand another shape."""
        inner = self.computations[_callee(fusion, "calls")]
        return all(op.opcode in ("parameter", "bitcast") for op in inner.instructions.values())

    def bytes_written(self, within: Computation, op: Instruction) -> int:
        if op.opcode == "dynamic-update-slice":
            return _main_bytes(op.shapes, sum(shape.bytes for shape in within.operands(op)[1].shapes))
        in_place = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.attributes)
        kept = {int(number) for number in re.findall(r"\{(\d+)\}:", in_place[1])} if in_place else set()
        return _main_bytes(tuple(shape for number, shape in enumerate(op.shapes) if number not in kept))

    def bytes_written_in_fusion(self, inner: Computation, root: Instruction) -> int:
        """Bytes of one result of a fusion: of an update in place, the update."""
        while root.opcode in ("bitcast", "convert", "copy") and inner.operands(root):
            root = inner.operands(root)[0]
        if root.opcode == "fusion":
            deeper = self.computations[_callee(root, "calls")]
            return self.bytes_written_in_fusion(deeper, deeper.root)
        update = inner.operands(root)[1] if root.opcode == "dynamic-update-slice" else root
        return sum(shape.bytes for shape in update.shapes)


def _parameter(inner: Computation, number: int) -> Instruction:
    return next(op for op in inner.instructions.values() if (op.opcode, op.value) == ("parameter", str(number)))


def _bytes_of_part(within: Computation, op: Instruction, number: int) -> int | None:
    """Bytes that an operation reads of an operand; None: all of it."""
    if number == 0 and op.opcode in ("dynamic-slice", "slice", "gather"):
        return sum(shape.bytes for shape in op.shapes)
    return 0 if number == 0 and op.opcode == "dynamic-update-slice" else None


def _main_bytes(shapes: tuple[Shape, ...], part: int | None = None) -> int:
    """Bytes of those arrays that are in main memory, or of so much of them as `part` has."""
    whole = sum(shape.bytes for shape in shapes if shape.main)
    return whole if part is None else min(whole, part)


def _callee(op: Instruction, key: str) -> str:
    name = op.callee(key)
    assert name is not None, f"{op.opcode} without {key}"
    return name


def _group_size(attributes: str, devices: int) -> int:
    """Devices in one group of a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    return devices


def _product(within: Computation, op: Instruction) -> int:
    """Floating-point operations of a product or convolution of two arrays."""
    left, right = (source.shapes[0].dims for source in within.operands(op))
    out = op.shapes[0].dims
    if op.opcode == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        axes = [int(axis) for axis in contracting[1].split(",") if axis] if contracting else []
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)", op.attributes.split("}")[0]))
    pairs = 1
    spatial = sorted(set(labels[1]) - {"b", "f"})
    for number, axis in enumerate(spatial):
        def of(name: str, default: str) -> str:
            return window[name].split("x")[number] if name in window else default

        low = int(of("pad", "0_0").split("_")[0])
        place = (np.arange(out[labels[3].index(axis)])[:, None] * int(of("stride", "1")) - low
                 + np.arange(right[labels[2].index(axis)])[None, :] * int(of("rhs_dilate", "1")))
        dilate = int(of("lhs_dilate", "1"))
        size = left[labels[1].index(axis)]
        pairs *= int(((place % dilate == 0) & (place >= 0) & (place // dilate < size)).sum())
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    return 2 * batch * features * right[labels[2].index("i")] * pairs


def _kernel(within: Computation, op: Instruction) -> int:
    """Operations of a library's kernel: of cuBLAS's products; of attention by formula, 4 K for each pair of a query and
    a key, backward 10 K, since it makes the scores again. Of cuDNN's half of the pairs count where it is causal; of
    splash those that eso_jax/model/splash.py says it computes; of our own all slots of the cache. The others make no
    products."""
    text = op.attributes.replace("\\", "")
    target = re.search(r'custom_call_target="([^"]*)"', text)
    if target and (splash := re.search(r"/pairs(\d+)\b.*/splash_mha_(fwd|dkv)", text)):
        *rows, _, size = next(source.shapes[0].dims for source in within.operands(op)
                              if source.shapes[0].dtype in ("bf16", "f32"))
        return (10 if splash[2] == "dkv" else 4) * math.prod(rows) * int(splash[1]) * size
    left = within.operands(op)[0].shapes[0].dims if op.operands else ()
    if target and "/product/pallas_call" in text:
        return 2 * math.prod(op.shapes[0].dims[1:]) * left[-1]  # the first axis: parts of the sum
    if target and "/decode_attention/pallas_call" in text:
        batch, slots, _, heads, size = left
        return 4 * batch * slots * heads * size * within.operands(op)[3].shapes[0].dims[2]
    if target is None or not target[1].startswith(("__cublas$", "__cudnn$fmha")):
        return 0

    def numbers(field: str) -> list[int]:
        values = re.search(rf'"{field}":\s*\[([^\]]*)\]', text)
        return [int(number) for number in re.findall(r"\d+", values[1])] if values else []

    if target[1].startswith("__cublas$"):
        contracted = math.prod(left[axis] for axis in numbers("lhs_contracting_dimensions"))
        return 2 * math.prod(op.shapes[0].dims) * contracted
    batch, heads, queries, keys = numbers("dimensions")
    pairs = queries * (keys + 1) // 2 if re.search(r'"mask_type":\s*"\w*CAUSAL"', text) else queries * keys
    return (10 if "Backward" in target[1] else 4) * batch * heads * pairs * left[-1]


def groups(collectives: Counter[Collective]) -> Iterator[tuple[Collective, int]]:
    """Collectives and how often each runs, those that send most first."""
    yield from sorted(collectives.items(), key=lambda item: -item[1] * item[0].sent)
