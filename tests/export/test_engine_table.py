"""docs/runners.md's table of engines is what the recorded builds say."""

from engine_table import BEGIN, DOCS, END, records, table


def test_the_table_is_what_the_recorded_builds_say():
    written = DOCS.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(records())


def test_no_recorded_build_warned_and_every_one_is_for_all_targets_and_batches():
    rows = records()
    for row in rows:
        assert row["warnings"] == []
        assert row["targets"] == ["SM80", "SM86", "SM89", "SM120"]
        assert row["profiles"] == 7
        assert row["layers"] > 100
