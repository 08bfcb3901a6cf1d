"""Give a latent a word where the pictures it fires on share one: enrichment, corrected for all pairs, and confirmed
on pictures not used.

Unit of evidence: a family of pictures (one `group` of the pool), by the largest activation among them.

    p(latent, word) = P(X >= k),  X ~ Hypergeometric(N families, K with the word, n drawn): k of the latent's n
    strongest families have the word
    q = Benjamini-Hochberg over every (latent, word) pair                                     (kept: q <= 0.05 and k
    >= 10 families)
    AUC = P(a(with word) > a(without)) + P(tie)/2 on held-out families                        (kept: >= 3 with the
    word, AUC >= 0.7, one-sided p <= 0.05)

No name is better than a wrong one: a latent with no surviving word stays unnamed. Latents come a block at a time (`Naming.see`),
and only pairs with p <= 0.05 are kept: whatever the others are, they change no q at or below that.
"""

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

NUM_STRONGEST = 20
MAX_Q = 0.05
MIN_FREQUENCY = 5  # families of the training split that have a word at all
MIN_FAMILIES = 10  # half of the strongest: fewer is significant too, and misleading as a name
MIN_HELDOUT = 3
MIN_AUC = 0.7
STOP = {
    *("a", "an", "and", "at", "by", "for", "from", "i", "in", "is", "it", "me", "my", "no", "not", "of", "oh", "ok"),
    *("on", "or", "out", "over", "s", "so", "the", "to", "up", "with", "you", "your"),
}


@dataclass(frozen=True)
class Name:
    """A latent's word, with what speaks for it."""

    word: str
    q: float
    auc: float
    count: int

    @property
    def source(self) -> str:
        found = f"enrichment: word '{self.word}' in {self.count} of {NUM_STRONGEST} strongest"
        return f"{found}, q={self.q:.1e}, held-out AUC {self.auc:.2f}"


def words_of(name: str, keywords: Sequence[str], category: str) -> set[str]:
    """Lower-case words of a picture's name, keywords and category."""
    text = " ".join([name, *keywords, category]).lower()
    return {w for w in re.findall(r"[a-z][a-z'-]*[a-z]", text) if w not in STOP}


def strongest(values: Float[np.ndarray, "num"], num: int) -> Int[np.ndarray, "top"]:
    """The places of the `num` largest values, largest first, the earlier of two equal ones first. No whole sort."""
    if len(values) > num:
        limit = np.partition(values, len(values) - num)[len(values) - num]
        above = np.flatnonzero(values > limit)
        chosen = np.sort(np.concatenate([above, np.flatnonzero(values == limit)[: num - len(above)]]))
    else:
        chosen = np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]


def _log_factorials(n: int) -> NDArray[np.float64]:
    return np.array([math.lgamma(i + 1) for i in range(n + 1)])


def enrichment(
    counts: Int[np.ndarray, "latents words"], totals: Int[np.ndarray, "words"], num_drawn: int, num_all: int
) -> Float[np.ndarray, "latents words"]:
    """P(X >= counts) for X ~ Hypergeometric(num_all, totals, num_drawn)."""
    return _tails(totals, num_drawn, num_all)[counts, np.arange(counts.shape[1])[None]]


def _tails(totals: Int[np.ndarray, "words"], num_drawn: int, num_all: int) -> Float[np.ndarray, "drawn words"]:
    """P(X >= i) for i = 0 .. num_drawn."""
    f = _log_factorials(num_all)

    def log_choose(n: NDArray[np.int64], k: NDArray[np.int64]) -> NDArray[np.float64]:
        ok = (k >= 0) & (k <= n)
        n, k = np.where(ok, n, 0), np.where(ok, k, 0)
        return np.where(ok, f[n] - f[k] - f[n - k], -np.inf)

    drawn = np.arange(num_drawn + 1)[:, None]
    pmf = np.exp(
        log_choose(totals[None], drawn)
        + log_choose(num_all - totals[None], num_drawn - drawn)
        - (f[num_all] - f[num_drawn] - f[num_all - num_drawn])
    )
    return np.minimum(np.cumsum(pmf[::-1], axis=0)[::-1], 1.0)


def benjamini_hochberg(p: Float[np.ndarray, "*dims"], total: int | None = None) -> Float[np.ndarray, "*dims"]:
    """Adjusted p-values of all entries together: q_(i) = min_{j >= i} p_(j) m / j.

    total: m, where p are only the smallest of m; a q is then right wherever it is at most the largest of them.
    """
    flat = p.ravel()
    order = np.argsort(flat)
    scaled = flat[order] * (total or len(flat)) / np.arange(1, len(flat) + 1)
    q = np.empty_like(flat)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q.reshape(p.shape)


def auc(values: Float[np.ndarray, "num"], has: Bool[np.ndarray, "num"]) -> tuple[float, float]:
    """(AUC, one-sided normal p-value of the rank-sum statistic with ties)."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    n, m = int(has.sum()), int((~has).sum())
    u = rank[has].sum() - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - (count**3 - count).sum() / (total * (total - 1)))
    z = (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
    return u / (n * m), 0.5 * math.erfc(z / math.sqrt(2))


class _Pair(NamedTuple):
    latent: int
    word: int
    num_families: int
    in_title: int
    p: float
    auc: float
    chance: float


class Naming:
    """see(block) for every block of latents, in order; then names(). Row order is the pool's.

    words: of each picture; title_words: those of them that stand in the picture's own name, which break ties; groups: its family.
    """

    def __init__(
        self,
        words: Iterable[set[str]],
        title_words: Iterable[set[str]],
        groups: Sequence[str],
        heldout: Bool[np.ndarray, "num"],
    ) -> None:
        place = {name: at for at, name in enumerate(sorted(set(groups)))}
        self._member = np.fromiter((place[each] for each in groups), np.int64, len(groups))
        self._num_families = len(place)
        self._held = np.zeros(len(place), dtype=bool)
        self._held[self._member] = heldout
        # A million pictures have some ten million words: pairs of small numbers, never sets or a table of booleans.
        known: dict[str, int] = {}
        pairs, titled = (_pairs(known, each, self._member) for each in (words, title_words))
        train = pairs[~self._held[pairs[:, 0]]]
        often = np.flatnonzero(np.bincount(train[:, 1], minlength=len(known)) >= MIN_FREQUENCY)
        spelt = list(known)
        self._vocabulary = sorted(spelt[at] for at in often)
        number = np.full(len(known), -1)
        number[[known[word] for word in self._vocabulary]] = np.arange(len(self._vocabulary))
        self._words = _lists(pairs, number, self._num_families)
        self._titles = _lists(titled, number, self._num_families)
        train, tested = (_members(self._words, rows) for rows in (~self._held, self._held))
        num_train, num_words = int((~self._held).sum()), len(self._vocabulary)
        self._num_drawn = min(NUM_STRONGEST, num_train)
        self._tails = _tails(np.bincount(train[1], minlength=num_words), self._num_drawn, num_train)
        order = np.argsort(tested[1], kind="stable")
        self._heldout_families = np.searchsorted(tested[1][order], np.arange(num_words + 1)), tested[0][order]
        self._pairs: list[_Pair] = []
        self._num_latents = 0

    def _by_family(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        found = np.zeros(self._num_families, dtype=values.dtype)
        if self._num_families == len(values):
            found[self._member] = np.maximum(values, 0)
        else:
            np.maximum.at(found, self._member, values)
        return found

    def see(self, block: Float[np.ndarray, "latents pictures"]) -> None:
        """The next latents, one a row."""
        for values in block:
            self._look(self._num_latents, self._by_family(values))
            self._num_latents += 1

    def _look(self, latent: int, values: NDArray[np.float32]) -> None:
        train = np.flatnonzero(~self._held)
        top = train[strongest(values[train], self._num_drawn)]
        firing = top[values[top] > 0]
        counts, in_title = (_count(each, firing, len(self._vocabulary)) for each in (self._words, self._titles))
        p = self._tails[counts, np.arange(len(counts))]
        for word in np.flatnonzero(p <= MAX_Q).tolist():
            area, chance = 0.0, 1.0
            if counts[word] >= MIN_FAMILIES and np.diff(self._heldout_families[0])[word] >= MIN_HELDOUT:
                area, chance = auc(values[self._held], self._has(word))
            self._pairs.append(
                _Pair(latent, word, int(counts[word]), int(in_title[word]), float(p[word]), area, chance)
            )

    def _has(self, word: int) -> NDArray[np.bool_]:
        """Of the held-out families: whether each has the word."""
        starts, families = self._heldout_families
        found = np.zeros(int(self._held.sum()), dtype=bool)
        found[families[starts[word] : starts[word + 1]]] = True
        return found

    def names(self) -> list[Name | None]:
        """The name of each latent seen, or None."""
        q = benjamini_hochberg(
            np.array([pair.p for pair in self._pairs]), self._num_latents * max(len(self._vocabulary), 1)
        )
        found: list[list[tuple[int, Name]]] = [[] for _ in range(self._num_latents)]
        for pair, adjusted in zip(self._pairs, q.tolist(), strict=True):
            if adjusted <= MAX_Q and pair.num_families >= MIN_FAMILIES and pair.auc >= MIN_AUC and pair.chance <= 0.05:
                name = Name(self._vocabulary[pair.word], adjusted, float(pair.auc), pair.num_families)
                found[pair.latent].append((pair.in_title, name))
        return [_best(each) for each in found]


def _best(found: list[tuple[int, Name]]) -> Name | None:
    """Of words nearly as sure as the surest (log q within a fifth) the one that stands in names, not in keywords only: clock
    faces are "early" a little more exclusively than they are "clock".
    """
    limit = 0.8 * min((math.log(max(name.q, 1e-300)) for _, name in found), default=0.0)
    close = [pair for pair in found if math.log(max(pair[1].q, 1e-300)) <= limit]
    return max(close, key=lambda pair: (pair[0], pair[1].auc))[1] if close else None


def _pairs(known: dict[str, int], words: Iterable[set[str]], member: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distinct (family, word) [n, 2]; new words are added to `known`."""
    flat = array("q")
    for each, family in zip(words, member.tolist(), strict=True):
        for word in each:
            flat.extend((family, known.setdefault(word, len(known))))
    return np.unique(np.frombuffer(flat, dtype=np.int64).reshape(-1, 2), axis=0)


def _lists(
    pairs: NDArray[np.int64], number: NDArray[np.int64], num_families: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(start of each family's words, words): those in the vocabulary."""
    words = number[pairs[:, 1]]
    family, words = pairs[words >= 0, 0], words[words >= 0]
    return np.searchsorted(family, np.arange(num_families + 1)), words


def _members(
    lists: tuple[NDArray[np.int64], NDArray[np.int64]], families: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(place among `families`, word) of every word that one of them has."""
    starts, words = lists
    lengths = np.diff(starts)
    return np.repeat(np.arange(int(families.sum())), lengths[families]), words[np.repeat(families, lengths)]


def _count(
    lists: tuple[NDArray[np.int64], NDArray[np.int64]], families: NDArray[np.int64], num_words: int
) -> NDArray[np.int64]:
    starts, words = lists
    parts = [words[starts[each] : starts[each + 1]] for each in families]
    return np.bincount(np.concatenate(parts), minlength=num_words) if parts else np.zeros(num_words, np.int64)
