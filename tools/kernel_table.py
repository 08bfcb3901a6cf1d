"""Writes the table of docs/kernels.md: what every kernel takes on every target, compiled ahead of time, without a device.

python tools/kernel_table.py            writes the part of docs/kernels.md between its marks
python tools/kernel_table.py --check    exits 1 where the file is not what would be written
"""

import sys
from pathlib import Path

import triton
from kernel_builds import TARGETS, Usage, Variant, usage_of, variants

DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- make kernel-table: begin -->", "<!-- end -->"


def rows(variant: Variant) -> str:
    """One row a variant: a cell that is the same on every target is written once."""
    usages = [usage_of(variant, target) for target in TARGETS]

    def cell(read: object) -> str:
        values = [read(usage) for usage in usages]  # type: ignore[operator]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    def stack(usage: Usage) -> str:
        return f"{usage.stack} + {usage.local}"

    cells = (
        f"`{variant.name}`",
        cell(lambda usage: str(usage.registers)),
        cell(stack),
        cell(lambda usage: str(usage.shared)),
        cell(lambda usage: f"{usage.wide[0]} + {usage.wide[1]}"),
        cell(lambda usage: f"{usage.occupancy:.0%}"),
        cell(lambda usage: str(usage.instructions)),
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    order = ", ".join(f"sm_{target}" for target in TARGETS)
    head = (
        f"triton {triton.__version__}; targets in the order {order}; one value where all agree.",
        "",
        "| kernel | registers | stack B + spills | shared B | 128-bit loads + stores | occupancy, bound | instructions |",
        "|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *map(rows, variants())])


def main() -> int:
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return int(made != text)
    DOCS.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
