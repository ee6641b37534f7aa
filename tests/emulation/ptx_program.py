"""Reads a kernel out of PTX text: instructions, labels, parameters, shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(RuntimeError):
    """PTX that is not understood: nothing is guessed."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand.

    Attributes:
        kind: ``register``, ``special``, ``number``, ``symbol``, ``address`` or ``vector``.
        text: as written; of an address, its base.
        offset: of an address.
        parts: of a vector.
    """

    kind: str
    text: str
    offset: int = 0
    parts: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        name: the first part of the opcode.
        modifiers: its other parts.
        operands: in order.
        guard: register of the predicate it is executed under, or empty.
        negated: whether the guard is.
        line: of the source, where the compiler was asked for lines, or 0.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str
    negated: bool
    line: int

    @property
    def opcode(self) -> str:
        """As written."""
        return ".".join((self.name, *self.modifiers))


@dataclass(slots=True)
class Program:
    """A kernel.

    Attributes:
        name: mangled.
        parameters: byte offset of each parameter.
        parameter_bytes: of all of them.
        shared: offset of each static shared array; None of the dynamic one.
        shared_bytes: of the static ones.
        local: offset of each local array in a thread's memory.
        local_bytes: of them all.
        widths: bits of the registers of a name without its number; 1 of predicates.
        instructions: in order.
        labels: index of the instruction that a label stands before.
    """

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: dict[str, int | None] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def width(self, register: str) -> int:
        """Bits of a register; 1 of a predicate."""
        return self.widths.get(register) or self.widths[re.sub(r"\d+$", "", register)]


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)")
_ARRAY = re.compile(
    r"(\.extern\s+)?\.(shared|local)\s+\.align\s+(\d+)\s+\.[usbf](\d+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?\s*;"
)
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]$|%laneid$|%warpid$")


def entry_names(text: str) -> list[str]:
    """The mangled names of all kernels of a PTX file."""
    return [match[1] for match in _ENTRY.finditer(text)]


def parse(text: str, name: str) -> Program:
    """Reads the kernel of this mangled name.

    Raises:
        PtxError: there is none, or it has something that is not understood.
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    for entry in _ENTRY.finditer(text):
        if entry[1] == name:
            break
    else:
        raise PtxError(f"no kernel {name} among {entry_names(text)}")
    program = Program(name)
    _read_parameters(program, entry[2])
    body = _braced(text, text.index("{", entry.end()))
    for array in _ARRAY.finditer(text):
        # Arrays outside of the kernel are shared by all of the file's kernels.
        if array[1] or array[5] in body:
            _add_array(program, array)
    _read_body(program, _with_own_registers(body))
    return program


def _read_parameters(program: Program, text: str) -> None:
    end = 0
    for declaration in filter(None, (each.strip() for each in text.split(","))):
        match = re.search(r"(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d+)\]$", declaration)
        if match:
            align, size, name = int(match[1] or 1), int(match[3]), match[2]
        else:
            match = re.search(r"\.[usbf](\d+)\b.*?([\w$]+)$", declaration)
            if match is None:
                raise PtxError(f"parameter: {declaration}")
            align = size = int(match[1]) // 8
            name = match[2]
        end = -(-end // align) * align
        program.parameters[name] = end
        end += size
    program.parameter_bytes = end


def _braced(text: str, start: int) -> str:
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
    raise PtxError("a brace is not closed")


def _with_own_registers(body: str) -> str:
    """Renames the registers of inner scopes, which may be called as others are around them."""
    starts = [match.start() for match in re.finditer(r"{", body)]
    for start in reversed(starts):  # the inner scope before the one around it
        scope = changed = _braced(body, start)
        for declared in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", scope):
            if "<" in declared:
                raise PtxError(f"registers {declared} of an inner scope")
            for name in (each.strip() for each in declared.split(",")):
                whole = rf"(?<![%\w$.]){re.escape(name)}(?![\w$])"
                changed = re.sub(whole, rf"\g<0>${start}_", changed)
        body = body[: start + 1] + changed + body[start + 1 + len(scope) :]
    return body


def _add_array(program: Program, array: re.Match[str]) -> None:
    align, name = int(array[3]), array[5]
    # A single number has no brackets.
    size = int(array[4]) // 8 * int(array[6] or 1)
    if array[1] and not array[6]:
        program.shared[name] = None
    elif array[2] == "shared":
        offset = -(-program.shared_bytes // align) * align
        program.shared[name] = offset
        program.shared_bytes = offset + size
    else:
        offset = -(-program.local_bytes // align) * align
        program.local[name] = offset
        program.local_bytes = offset + size


def _read_body(program: Program, body: str) -> None:
    line = 0
    statement = ""
    for text in body.splitlines():
        location = re.match(r"\s*\.loc\s+\d+\s+(\d+)", text)
        if location:
            line = int(location[1])
            continue
        text = text.strip()
        label = re.match(r"(\$?[\w$]+):\s*(.*)$", text)
        if label and not statement:
            program.labels[label[1]] = len(program.instructions)
            text = label[2]
        # Braces of inline assembly are scopes of their own, those of operands are in a statement.
        if not statement and text in ("{", "}"):
            continue
        statement += f" {text}"
        while ";" in statement:
            first, _, statement = statement.partition(";")
            first = re.sub(r"^[\s{}]+(?=[@.\w%])", "", first).strip()
            if first.startswith(".reg"):
                _add_registers(program, first)
            elif first and not first.startswith((".pragma", ".shared", ".local")):
                program.instructions.append(_instruction(first, line))
        if not statement.strip(" {}"):
            statement = ""


def _add_registers(program: Program, declaration: str) -> None:
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", declaration, re.DOTALL)
    if match is None:
        raise PtxError(declaration)
    width = 1 if match[1] == "pred" else int(match[1][1:])
    for name in match[2].split(","):
        program.widths[re.sub(r"<\d+>", "", name.strip())] = width


def _instruction(text: str, line: int) -> Instruction:
    match = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.DOTALL)
    if match is None:
        raise PtxError(text)
    name, *modifiers = match[3].split(".")
    operands = tuple(_operand(each) for each in _split(match[4]))
    return Instruction(name, tuple(modifiers), operands, match[2] or "", match[1] == "!", line)


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += letter in "{[("
        depth -= letter in "}])"
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        parts = tuple(_operand(each) for each in _split(text.strip("{} ")))
        return Operand("vector", text, parts=parts)
    if text.startswith("["):
        match = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if match is None:
            raise PtxError(f"address {text}")
        return Operand("address", match[1], int(match[2] or "0", 0))
    if _SPECIAL.match(text):
        return Operand("special", text)
    if re.match(r"0[fd][0-9a-fA-F]+$|-?(?:0x[0-9a-fA-F]+|\d+)U?$", text):
        return Operand("number", text)
    if text.startswith(("%", "!%")) or text == "_" or "|" in text:
        return Operand("register", text)
    return Operand("symbol", text)
