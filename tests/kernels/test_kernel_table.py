"""docs/kernels.md's table of what the kernels take is what they take."""

import pytest
from kernel_builds import TARGETS, guided_step_variant, usage_of
from kernel_table import BEGIN, DOCS, END, rows, table


def written() -> str:
    return DOCS.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def test_the_table_lists_the_guided_step_as_it_compiles_for_one_target():
    usage = usage_of(guided_step_variant(), TARGETS[3])
    (line,) = (each for each in written().splitlines() if each.startswith("| `guided_step (fp32)`"))
    assert f"| {usage.registers} |" in line
    assert f"| {usage.stack} + {usage.local} | {usage.shared} | {usage.wide[0]} + {usage.wide[1]} |" in line


@pytest.mark.slow
def test_the_whole_table_is_what_would_be_written():
    assert written() == table()
    assert rows(guided_step_variant()) in written()
