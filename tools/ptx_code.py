"""PTX text, parsed: instructions, labels, and what a launch must know. Refuses what ptx_executor.py could not run."""

import re

from ptx_meaning import CONTROL, Instruction, meaning_of
from ptx_memory import PTXError

_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)(?:\s+(.*?))?;")
_SCOPED = re.compile(r"\{\s*\.reg \.b\d+ (\w+);\s*([^;]*;)\s*\}")
_ARGUMENT = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Kernel:
    """PTX text, parsed; every instruction known, or PTXError."""

    def __init__(self, ptx: str) -> None:
        self.threads = int(_find(r"\.reqntid (\d+)", ptx))
        self.params = re.findall(r"\.param \.\w+ (?:\.ptr[^\n]*? )?(\w+_param_\d+)", ptx)
        body = re.search(r"\n\{(.*?)\n\}", ptx[ptx.index(".reqntid") :], re.S)
        if body is None:
            raise PTXError("no body found")
        self.widths = {name: int(bits) // 8 for bits, name in re.findall(r"\.reg \.b(\d+)\s+%([a-z]+)<", body[1])}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body[1].splitlines():
            self._read(re.sub(r"//.*", "", line).strip())
        self.assigned = {
            name
            for each in self.code
            for name in re.findall(r"%\w+", each.args[0] if each.args else "")
            if each.op[0] not in ("st", "bra", "bar", "ret")
        }

    def _read(self, line: str) -> None:
        if line.endswith(":"):
            self.labels[line[:-1]] = len(self.code)
            return
        if scoped := _SCOPED.fullmatch(line):  # a register of the line's own is one that nobody reads
            line = re.sub(rf"\b{scoped[1]}\b", "_", scoped[2])
        if not line or line[0] == "." or line in ("{", "}"):
            return
        found = _LINE.fullmatch(line)
        if found is None:
            raise PTXError(f"not understood: {line}")
        negated, guard, op, rest = found.groups()
        each = Instruction(line, guard, negated == "!", tuple(op.split(".")), tuple(_ARGUMENT.findall(rest or "")))
        if each.op[0] not in CONTROL:
            meaning_of(each)
        self.code.append(each)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise PTXError(f"{pattern} not found")
    return found[1]
