"""The loops over a chunk's elements.

Where everything vectorises, a chunk is one loop. Otherwise it is cut into tiles, and a tile's values pass from one loop to the
next in arrays that stay in the first-level cache: calls of the C library have loops of their own, since a loop with a call is
not vectorised; so has the drawing of noise. In programs with blocks (:mod:`hbcore.state.blocks`) a block is a tile, and what it
has one number of is a plain variable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from hbcore.engine.backends.cpp.layout import FunctionLayout
from hbcore.engine.backends.cpp.ops import BITS, TYPES, calls, cast, expression
from hbcore.engine.graph.program import DRAW, NOISE, Phase, Program
from hbcore.errors import CompileError
from hbcore.rules.numerics import compute_dtype
from hbcore.state.blocks import AMAX, BLOCK

TILE = 256
"""Elements of a tile that is no block: few enough for every array of a tile to stay in the first-level cache."""

VECTOR, CALLS, BLOCKS = range(3)
"""What a loop is made of: vectorised operations, calls of the C library, or a block's single numbers (then it is no loop)."""

SIMD = "#pragma omp simd"


@dataclass
class Loop:
    """One loop over a tile's elements, or the statements about a block.

    Attributes:
        kind: ``VECTOR``, ``CALLS`` or ``BLOCKS``.
        nodes: what it computes, in order.
    """

    kind: int
    nodes: list[fx.Node] = field(default_factory=list)


def kind_of(node: fx.Node) -> int:
    """The kind of loop that a node belongs in."""
    if node.meta["kind"] == "block":
        return BLOCKS
    return CALLS if calls(node) else VECTOR


def split(body: Iterable[fx.Node]) -> list[Loop]:
    """Sort nodes into loops, in an order in which each finds its operands. The last is a vectorised one, if only for stores."""
    stages: dict[fx.Node, int] = {}
    made: dict[tuple[int, int], Loop] = {}
    for n in body:
        kind = kind_of(n)
        stages[n] = max((stages[a] + (kind_of(a) != kind) for a in n.all_input_nodes if a in stages), default=0)
        made.setdefault((stages[n], kind), Loop(kind)).nodes.append(n)
    ordered = [made[key] for key in sorted(made)]
    return ordered if ordered and ordered[-1].kind == VECTOR else [*ordered, Loop(VECTOR)]


def held(dtype: torch.dtype) -> torch.dtype:
    """How values of ``dtype`` pass from loop to loop: a byte beside floats would keep the loop from being vectorised."""
    return torch.int32 if dtype == torch.bool else dtype


def joined(how: str, total: str, value: str) -> tuple[str, str]:
    """What a reduction starts from, and the expression that adds a value to it."""
    return ("0", f"{total} + {value}") if how == "sum" else ("-INF", f"maximum({value}, {total})")


class Tiles:
    """Writes the loops of one phase.

    Args:
        program: the program.
        phase: the phase.
        layout: the program's.
        identifiers: stored tensor -> its name in the source.
        names: 0-d node -> variable; filled with those that the loops define.
    """

    def __init__(
        self,
        program: Program,
        phase: Phase,
        layout: FunctionLayout,
        identifiers: Mapping[str, str],
        names: dict[fx.Node, str],
    ) -> None:
        self.program, self.phase, self.layout, self.dtypes = program, phase, layout, program.dtypes
        self.identifiers, self.names, self.compute = identifiers, names, compute_dtype(program.dtypes["param"])
        nodes = list(phase.graph.nodes)
        self.results: Sequence[fx.Node] = nodes[-1].args[0]
        self.inputs = dict(zip(nodes, phase.tensors, strict=False))
        self.loops = split(n for n in nodes if n.op == "call_function" and n.meta["kind"] in ("element", "block") and n.users)
        self.blocked = any(n.meta["kind"] == "block" for n in nodes[:-1])
        self.tile = BLOCK if self.blocked else TILE
        drawn = any(name.startswith(NOISE) for name in phase.tensors)
        self.whole = len(self.loops) == 1 and not (self.blocked or drawn or phase.reduces)
        self.at = "i" if self.whole else "tile + j"
        self.kept = self._kept()

    def write(self) -> list[str]:
        """The lines of a chunk: loops, and the chunk's part of each reduction."""
        if self.whole:
            return [SIMD, "for (int64_t i = 0; i < n; ++i) {", *indented(self._elements(self.loops[0])), "}"]
        lines = []
        for i, r in enumerate(self.phase.reduces):
            start, _ = joined(r.how, "", "")
            lines.append(f"{self._accumulated(i)} acc{i}[{self.tile}];")
            lines.append(f"for (int64_t j = 0; j < {self.tile}; ++j) acc{i}[j] = {start};")
        lines += [f"for (int64_t tile = 0; tile < n; tile += {self.tile}) {{", *indented(self._tile()), "}"]
        for i, r in enumerate(self.phase.reduces):
            start, join = joined(r.how, f"total{i}", f"acc{i}[j]")
            lines.append(f"{self._accumulated(i)} total{i} = {start};")
            lines.append(f"for (int64_t j = 0; j < {self.tile}; ++j) total{i} = {join};")
            lines.append(f"partials[{self.layout.reductions.index(r.name)} * n_chunks + chunk] = total{i};")
        return lines

    def _array(self, node: fx.Node) -> str:
        """The declaration of what passes a node's values from one loop to another."""
        return f"{TYPES[held(node.meta['dtype'])]} t_{node.name}[{self.tile}];"

    def _accumulated(self, i: int) -> str:
        r = self.phase.reduces[i]
        return "double" if r.how == "sum" else TYPES[r.dtype]

    def _kept(self) -> dict[fx.Node, None]:
        """The values that pass from one loop to another, in the graph's order."""
        of = {n: loop for loop in self.loops for n in loop.nodes}
        kept = {a for n, loop in of.items() for a in n.all_input_nodes if a in of and of[a] is not loop}
        kept |= {n for n in self._stored() if n in of and of[n] is not self.loops[-1]}
        kept |= {a for n in of if n.target is AMAX for a in n.all_input_nodes}
        return {n: None for n in self.phase.graph.nodes if n in kept and n.meta["kind"] == "element"}

    def _stored(self) -> list[fx.Node]:
        """The values that the last loop writes or reduces."""
        writes = len(self.phase.writes)
        return [*self.results[:writes], *(r.args[0] for r in self.results[writes:])]  # type: ignore[list-item]

    def _tile(self) -> list[str]:
        """The loops of one tile, and before them its noise and its blocks' stored numbers."""
        count = str(self.tile)
        lines = []
        if not self.blocked:
            lines.append(f"const int64_t m = n - tile < {self.tile} ? n - tile : {self.tile};")
            count = "m"
        for node, name in self.inputs.items():
            if node.meta["kind"] == "block":
                lines.append(self._load(node, f"tile / {BLOCK}"))
            elif name.startswith(DRAW):
                own = self.identifiers[name]
                lines.append(f"{TYPES[self.dtypes[name]]} v_{own}[{self.tile}];")
                lines += loop(count, [f"v_{own}[j] = drawn(key_{own}, position + tile + j);"])
        for name in (name for name in self.program.keys_of(self.phase) if not name.startswith(DRAW)):
            own = self.identifiers[name]
            lines.append(f"uint32_t drawn_{own}[{self.tile} + 8];")
            lines.append(f"const uint32_t* w_{own} = element_words(key_{own}, position + tile, {count}, drawn_{own});")
        for part in self.loops:
            first = part is self.loops[0]
            lines += [self._array(n) for n in self.kept if n in part.nodes or (first and n in self.inputs)]
            lines += self._block(part) if part.kind == BLOCKS else loop(count, self._elements(part))
        for name, node in zip(self.phase.writes, self.results, strict=False):
            if node.meta["kind"] == "block":
                lines.append(self._store(name, node, f"tile / {BLOCK}"))
        return lines

    def _block(self, part: Loop) -> list[str]:
        """What is computed once per block."""
        lines = []
        for n in part.nodes:
            if n.target is AMAX:
                [x] = n.all_input_nodes
                if n.meta["dtype"] in BITS or x in self.inputs:
                    raise CompileError(f"the C++ generator does not support {n.target} of {x.meta['dtype']} as it is stored")
                self.names[n] = n.name
                lines.append(f"const {TYPES[n.meta['dtype']]} {n.name} = block_amax(t_{x.name});")
            else:
                lines.append(self._statement(n))
        return lines

    def _elements(self, part: Loop) -> list[str]:
        """The body of a loop: loads, values, and in the last loop what is stored and reduced."""
        last = part is self.loops[-1]
        used = {a for n in part.nodes for a in n.all_input_nodes} | set(self._stored() if last else ())
        lines = []
        for node in (n for n in self.kept if n in used):
            self.names[node] = f"(t_{node.name}[j] != 0)" if node.meta["dtype"] == torch.bool else f"t_{node.name}[j]"
        for node, name in self.inputs.items():
            if name.startswith(DRAW):
                self.names[node] = f"v_{self.identifiers[name]}[j]"
            elif name.startswith(NOISE):
                place = self.program.bits[name]
                word = f"w_{self.identifiers[place.word]}[j]"
                self.names[node] = f"int32_t({word} >> {place.shift} & {(1 << place.width) - 1}u)"
            elif node in used and node.meta["kind"] == "element":
                lines.append(self._load(node, self.at))
        for n in part.nodes:
            lines.append(self._statement(n))
            if n in self.kept:
                lines.append(f"t_{n.name}[j] = {cast(n.name, n.meta['dtype'], held(n.meta['dtype']))};")
        return [*lines, *self._last()] if last else lines

    def _last(self) -> list[str]:
        lines = []
        for name, node in zip(self.phase.writes, self.results, strict=False):
            if node.meta["kind"] != "block":
                lines.append(self._store(name, node, self.at))
        for i, (r, node) in enumerate(zip(self.phase.reduces, self._stored()[len(self.phase.writes) :], strict=True)):
            value = cast(self.names[node], node.meta["dtype"], torch.float64 if r.how == "sum" else r.dtype)
            lines.append(f"acc{i}[j] = {joined(r.how, f'acc{i}[j]', value)[1]};")
        return lines

    def _load(self, node: fx.Node, at: str) -> str:
        own = self.identifiers[self.inputs[node]]
        self.names[node] = f"v_{own}"
        return f"const {TYPES[node.meta['dtype']]} v_{own} = p_{own}[{at}];"

    def _store(self, name: str, node: fx.Node, at: str) -> str:
        return f"p_{self.identifiers[name]}[{at}] = {cast(self.names[node], node.meta['dtype'], self.dtypes[name])};"

    def _statement(self, node: fx.Node) -> str:
        made = expression(node, self.names, self.compute)
        self.names[node] = node.name
        return f"const {TYPES[node.meta['dtype']]} {node.name} = {made};"


def loop(count: str, body: Sequence[str]) -> list[str]:
    """A loop over the elements of a tile."""
    return [SIMD, f"for (int64_t j = 0; j < {count}; ++j) {{", *indented(body), "}"]


def indented(lines: Iterable[str]) -> list[str]:
    """Lines moved to the right by one step."""
    return [f"    {line}" for line in lines]
