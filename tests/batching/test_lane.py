"""Which samples of a lane advance next: full batches first, room given away where it costs nothing, nobody waits for long."""

from collections import Counter

import pytest

from tiltscope.engine.batching.lane import PATIENCE, Lane
from tiltscope.engine.sampler.plan import GraphKind

G, U = GraphKind.GUIDED, GraphKind.UNGUIDED


class Waiting:
    """A live sample, as far as the choice looks at it."""

    def __init__(self, kind: GraphKind) -> None:
        self.kind = kind


def lane(guided: int, unguided: int, *, one_graph: bool = True) -> Lane:
    made = Lane.__new__(Lane)
    made.capacity, made.batch = 8, None
    made.live = [*(Waiting(U) for _ in range(unguided)), *(Waiting(G) for _ in range(guided))]
    made._passed, made._one_graph = {}, one_graph
    return made


def chosen(of: Lane) -> Counter:
    return Counter(sample.kind for sample in of._choose())


@pytest.mark.parametrize(
    ("guided", "unguided", "expected"),
    [
        (8, 5, {G: 8}),  # a full batch before one that is not
        (5, 8, {U: 8}),
        (11, 0, {G: 8}),
        (0, 3, {U: 3}),
        (5, 3, {G: 5, U: 3}),  # all of them fit: the guided call has to be made anyway
        (1, 2, {G: 1, U: 2}),
        (7, 2, {G: 7, U: 1}),  # two rows in .3 of a tick are fewer than eight in a whole one
        (6, 5, {U: 5}),  # five are more, and then as many more guided ones fill the next batch
    ],
)
def test_the_next_batch_is_the_one_that_gets_most_done(guided, unguided, expected):
    assert chosen(lane(guided, unguided)) == expected


def test_no_batch_mixes_what_two_graphs_draw():
    apart = lane(5, 3, one_graph=False)
    assert [chosen(apart) for _ in range(PATIENCE)] == [{U: 3}] * PATIENCE
    # Passed over so often, the dearer graph has its turn.
    assert chosen(apart) == {G: 5}


def test_two_full_batches_take_turns():
    both = lane(8, 8)
    kinds = [next(iter(chosen(both))) for _ in range(6)]
    assert kinds in ([G, U] * 3, [U, G] * 3)


def test_a_few_that_never_fill_a_batch_are_passed_over_patience_times_at_most():
    busy = lane(8, 1)
    kinds = [next(iter(chosen(busy))) for _ in range(3 * (PATIENCE + 1))]
    assert kinds == ([G] * PATIENCE + [U]) * 3


def test_who_advanced_last_stays_together():
    of = lane(12, 0)
    first = of._choose()
    of.batch = type("Batch", (), {"samples": first})()
    of.live = of.live[::-1]
    assert set(of._choose()) == set(first)
