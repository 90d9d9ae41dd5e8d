"""Changes to a net's graph that the compiler does not make itself, as edits of its MLIR text.

Each edit of the top dialect (EDITS) was measured in the compiler's own cycles and leaves every output bit as it was
on the simulator; tests/unit/test_compiling.py shows both. One MLIR operation is one line.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r'^\s*(%\d+)(?::\d+)? = "(\w+\.\w+)"\(([^)]*)\)(.*)$')
_VALUE = re.compile(r"%\d+(?:#\d+)?")


class Operation(NamedTuple):
    """One line: its number, the operation's name, such as top.Add, the operands, and what follows them."""

    line: int
    name: str
    operands: list[str]
    attributes: str


_NONE = Operation(-1, "", [], "")


class Graph:
    """The operations of an MLIR text by the value that they define: `graph["%7"]`, empty where nothing here does."""

    def __init__(self, mlir: str):
        self.lines = mlir.split("\n")
        found = ((number, _LINE.match(line)) for number, line in enumerate(self.lines))
        self.operations = {m[1]: Operation(at, m[2], _VALUE.findall(m[3]), m[4]) for at, m in found if m}

    def __getitem__(self, value: str) -> Operation:
        return self.operations.get(value.split("#")[0], _NONE)

    def uses(self, value: str) -> int:
        """How often a value (or any result of its operation) is an operand or returned."""
        pattern = re.compile(re.escape(value.split("#")[0]) + r"(?!\d)")
        return sum(len(pattern.findall(line)) for line in self.lines) - 1

    def text(self) -> str:
        return "\n".join(self.lines)


def merge_cache(mlir: str) -> str:
    """Mark the concatenations of past and new row `only_merge`: placed side by side in memory, not copied.

    mlir: a block_cache in the top dialect. A concatenation qualifies if it has two operands, runs along axis 1,
    its first operand is an input of the net that nothing else uses, and it is no output of the net itself.
    """
    graph = Graph(mlir)
    returned = set(_VALUE.findall("".join(line for line in graph.lines if line.lstrip().startswith("return "))))
    for value, (number, name, operands, rest) in graph.operations.items():
        if name == "top.Concat" and len(operands) == 2 and "{axis = 1 : si32," in rest and value not in returned:
            if graph[operands[0]].name == "top.Input" and graph.uses(operands[0]) == 1:
                graph.lines[number] = graph.lines[number].replace("only_merge = false", "only_merge = true")
    return graph.text()


# As the one-click converter writes it, which gives the same bits as the operations it replaces.
_ROPE = (
    '{add_round_mode = "HalfAwayFromZero", add_saturation = true, add_shift = 0 : si32, force_f32 = false, '
    'is_permute_optimize = false, mul1_round_mode = "HalfAwayFromZero", mul1_saturation = true, '
    'mul1_shift = 0 : si32, mul2_round_mode = "HalfAwayFromZero", mul2_saturation = true, mul2_shift = 0 : si32, '
    'rope_mode = "contiguous_halves"}'
)


def fuse_rotation(mlir: str) -> str:
    """Replace each rotary embedding x * cos + concat(-upper half of x, lower half of x) * sin by one top.Rope.

    mlir: a block in the top dialect. The halves may be slices of the last axis, or a split of x reshaped to two rows
    (Qwen's rearrange and unbind). The splitting pass for several devices wants the long form.
    """
    graph = Graph(mlir)
    for value, (number, name, operands, _) in list(graph.operations.items()):
        if name == "top.Add" and (found := _match_rotation(graph, operands)):
            x, cos, sin = found
            location = re.search(r"loc\(.*\)$", graph.lines[number])
            types = "(tensor<*xf32>, tensor<*xf32>, tensor<*xf32>) -> tensor<*xf32>"
            graph.lines[number] = f'    {value} = "top.Rope"({x}, {sin}, {cos}) {_ROPE} : {types} {location[0]}'
    return mlir if graph.text() == mlir else _without_dead(graph.text())


def _match_rotation(graph: Graph, operands: list[str]) -> tuple[str, str, str] | None:
    """(x, cos, sin) where the operands of an addition are the two products of a rotation."""
    match [graph[value] for value in operands]:
        case [[_, "top.Mul", [x, cos], _], [_, "top.Mul", [turned, sin], _]]:
            match graph[turned]:
                case [_, "top.Concat", [negated, lower], _]:
                    match graph[negated]:
                        case [_, "top.MulConst", [upper], attributes] if "const_val = -1.0" in attributes:
                            if (_half(graph, upper), _half(graph, lower)) == ((x, 1), (x, 0)):
                                return x, cos, sin
    return None


def _half(graph: Graph, value: str) -> tuple[str, int] | None:
    """(x, 0 or 1) where a value is the lower or upper half of x along its last axis."""
    _, name, operands, attributes = graph[value]
    if name == "top.Slice":
        lists = re.findall(r"(offset|steps) = \[([^\]]*)\]", attributes)
        numbers = {key: [int(number) for number in text.split(",")] for key, text in lists}
        *others, last = numbers["offset"]
        return None if any(others) or set(numbers["steps"]) != {1} else (operands[0], int(last > 0))
    if name == "top.Squeeze":
        part = operands[0]
        reshaped = graph[part].operands[0] if graph[part].name == "top.Split" else ""
        if graph[reshaped].name == "top.Reshape":
            return graph[reshaped].operands[0], int(part.split("#")[1])
    return None


def _without_dead(mlir: str) -> str:
    while True:
        graph = Graph(mlir)
        dead = {
            number
            for value, (number, name, _, _) in graph.operations.items()
            if name not in ("top.Input", "top.None") and graph.uses(value) == 0
        }
        if not dead:
            return mlir
        mlir = "\n".join(line for number, line in enumerate(graph.lines) if number not in dead)


EDITS = {"merge_cache": merge_cache, "fuse_rotation": fuse_rotation}

_PROJECTIONS = ("tpu.MatMul", "tpu.A16MatMul")


def order_projections(mlir: str) -> str:
    """Put the projections of query, key and value into this order, which the compiler's splitting pass takes for
    granted: it finds them as the users of the norm before them, by position.

    Where the order is another (c_attn is cut in three from its end) the pass takes one for the other and aborts with
    `Invalid index!`. mlir: the tpu dialect, just before that pass. Text without fused attention is returned as it is.
    """
    graph = Graph(mlir)
    attention = [operation for operation in graph.operations.values() if operation.name == "tpu.FAttention"]
    if len(attention) != 1:
        return mlir

    def projection(value: str) -> Operation | None:
        _, name, operands, _ = operation = graph[value]
        if name in _PROJECTIONS:
            return operation
        if not operands:
            return None
        # A cache comes first in its concatenation.
        cached = name == "tpu.Concat" and graph[operands[0]].name == "top.Input"
        return projection(operands[-1] if cached else operands[0])

    projections = [projection(value) for value in attention[0].operands[:3]]
    if None in projections:
        return mlir
    groups = []
    for line, _, operands, _ in projections:
        weights = {graph[value].line for value in operands[1:] if graph[value].name == "top.Weight"}
        groups.append([*sorted(weights), line])
    places = sorted(place for group in groups for place in group)
    moved = [graph.lines[place] for group in groups for place in group]
    for place, line in zip(places, moved, strict=True):
        graph.lines[place] = line
    return graph.text()


_GROUP = re.compile(r"q_group_size = (\d+)")


def pair_groups(mlir: str) -> str:
    """Name twice the group size where int8 weights will be cut along their groups; `unpair_groups` takes that back.

    The compiler's splitting pass reckons there with 4-bit weights, two of which share a byte: it cuts a matrix of K
    columns as if it had 2 K, and aborts (`offset + length <= shape[axis]`) on the scales, of which it then takes twice
    too many. With groups of twice the size the cut comes out right, in the weights and in the scales.
    mlir: the tpu dialect, just before that pass. What follows a norm is cut between its rows, which is right as it is.
    """
    graph = Graph(mlir)
    for number, name, operands, rest in graph.operations.values():
        if name == "tpu.A16MatMul" and "weight_bits = 8" in rest and not _follows_norm(graph, operands[0]):
            graph.lines[number] = _GROUP.sub(lambda match: f"q_group_size = {2 * int(match[1])}", graph.lines[number])
    return graph.text()


def unpair_groups(mlir: str) -> str:
    """Give int8 weights the group size that the shape of their scales says. mlir: just after the splitting pass."""
    lines = mlir.split("\n")
    for number, line in enumerate(lines):
        if '"tpu.A16MatMul"' in line and "weight_bits = 8" in line:
            weight_and_scale = re.search(r"tensor<\d+x(\d+)x[us]i8>, tensor<\d+x(\d+)x\w+>", line)
            columns, groups = map(int, weight_and_scale.groups())
            lines[number] = _GROUP.sub(f"q_group_size = {columns // groups}", line)
    return "\n".join(lines)


def _follows_norm(graph: Graph, value: str) -> bool:
    while graph[value].name in ("tpu.Cast", "tpu.Reshape"):
        value = graph[value].operands[0]
    return graph[value].name == "tpu.RMSNorm"
