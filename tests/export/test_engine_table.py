"""docs/runners.md's table of engines is what the recorded builds say."""

from engine_table import BEGIN, DOCS, END, RUNNERS_BUCKETS, records, table

from tiltscope.engine.runtime.tensorrt_step import BUCKETS


def test_the_table_is_what_the_recorded_builds_say():
    written = DOCS.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(records())


def test_no_recorded_build_warned_and_every_one_is_for_all_targets_and_many_batches():
    """emoji64's as the runner builds them; of the other architectures it is enough that they build."""
    rows = records()
    for row in rows:
        assert row["warnings"] == []
        assert row["targets"] == ["SM80", "SM86", "SM89", "SM120"]
        profiles = (row["profiles"], row.get("largest_batch", BUCKETS[-1]))
        assert profiles == (7, 64) if row["bundle"] == "emoji64" else profiles >= (2, 8)
        assert row["layers"] > 100


def test_every_architecture_is_in_a_recorded_build():
    """The guided graph holds both networks."""
    built = {row["bundle"] for row in records() if row["graph"] == "guided" and row["dtype"] == "float32"}
    assert built == {"emoji64", "tiny", "energydps", "latent"}


def test_the_buckets_are_the_runners():
    assert RUNNERS_BUCKETS == BUCKETS
