"""Give a latent a word where the pictures it fires on share one: enrichment, corrected for all pairs, and confirmed
on pictures not used.

Unit of evidence: a family of pictures (man cooking, woman cooking, cook: one), by the largest activation among them.

    p(latent, word) = P(X >= k),  X ~ Hypergeometric(N families, K with the word, n drawn): k of the latent's n
    strongest families have the word
    q = Benjamini-Hochberg over every (latent, word) pair                                     (kept: q <= 0.05 and k
    >= 5 families)
    AUC = P(a(with word) > a(without)) + P(tie)/2 on held-out families                        (kept: >= 3 with the
    word, AUC >= 0.7, one-sided p <= 0.05)

No name is better than a wrong one: a latent with no surviving word stays unnamed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from data import family

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
    word: str
    q: float
    auc: float
    count: int

    @property
    def source(self) -> str:
        found = f"enrichment: word '{self.word}' in {self.count} of {NUM_STRONGEST} strongest"
        return f"{found}, q={self.q:.1e}, held-out AUC {self.auc:.2f}"


def words_of(name: str, keywords: list[str], category: str) -> set[str]:
    """Lower-case words of a picture's name, keywords and category."""
    text = " ".join([name, *keywords, category]).lower()
    return {w for w in re.findall(r"[a-z][a-z'-]*[a-z]", text) if w not in STOP}


def log_factorials(n: int) -> np.ndarray:
    return np.array([math.lgamma(i + 1) for i in range(n + 1)])


def enrichment(counts: np.ndarray, totals: np.ndarray, num_drawn: int, num_all: int) -> np.ndarray:
    """P(X >= counts) [latents, words] for X ~ Hypergeometric(num_all, totals [words], num_drawn)."""
    f = log_factorials(num_all)

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        ok = (k >= 0) & (k <= n)
        n, k = np.where(ok, n, 0), np.where(ok, k, 0)
        return np.where(ok, f[n] - f[k] - f[n - k], -np.inf)

    drawn = np.arange(num_drawn + 1)[:, None]
    pmf = np.exp(
        log_choose(totals[None], drawn)
        + log_choose(num_all - totals[None], num_drawn - drawn)
        - (f[num_all] - f[num_drawn] - f[num_all - num_drawn])
    )
    tail = np.minimum(np.cumsum(pmf[::-1], axis=0)[::-1], 1.0)  # [drawn, words]: P(X >= i)
    return tail[counts, np.arange(counts.shape[1])[None]]


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values of all entries together: q_(i) = min_{j >= i} p_(j) m / j."""
    flat = p.ravel()
    order = np.argsort(flat)
    scaled = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    q = np.empty_like(flat)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q.reshape(p.shape)


def auc(values: np.ndarray, has: np.ndarray) -> tuple[float, float]:
    """(AUC, one-sided normal p-value of the rank-sum statistic with ties)."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    n, m = int(has.sum()), int((~has).sum())
    u = rank[has].sum() - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - (count**3 - count).sum() / (total * (total - 1)))
    z = (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
    return u / (n * m), 0.5 * math.erfc(z / math.sqrt(2))


def name_features(
    activations: np.ndarray,
    words: list[set[str]],
    title_words: list[set[str]],
    code_points: list[str],
    heldout: np.ndarray,
) -> list[Name | None]:
    """activations [pictures, latents] -> the name of each latent, or None. Row order is the pool's.

    title_words: those of `words` that stand in the picture's own name; they break ties.
    """
    families, member = np.unique([family(c) for c in code_points], return_inverse=True)
    num_latents = activations.shape[1]
    strongest = np.zeros((len(families), num_latents), dtype=activations.dtype)
    np.maximum.at(strongest, member, activations)
    family_words: list[set[str]] = [set() for _ in families]
    for i, m in enumerate(member):
        family_words[m] |= words[i]
    held = np.zeros(len(families), dtype=bool)
    held[member] = heldout
    frequency = Counter(w for m, ws in enumerate(family_words) if not held[m] for w in ws)
    vocabulary = sorted(w for w, n in frequency.items() if n >= MIN_FREQUENCY)
    has = np.array([[w in ws for w in vocabulary] for ws in family_words])  # [families, words]

    train, test = strongest[~held], strongest[held]
    top = np.argsort(-train, axis=0, kind="stable")[:NUM_STRONGEST]  # [n, latents]
    drawn = np.take_along_axis(train, top, axis=0) > 0
    counts = (has[~held][top] & drawn[..., None]).sum(0)  # [latents, words]
    p = enrichment(counts, has[~held].sum(0), NUM_STRONGEST, int((~held).sum()))
    q = benjamini_hochberg(p)
    titled = np.zeros((len(families), len(vocabulary)), dtype=bool)
    place = {w: i for i, w in enumerate(vocabulary)}
    for i, m in enumerate(member):
        titled[m, [place[w] for w in title_words[i] if w in place]] = True
    in_title = (titled[~held][top] & drawn[..., None]).sum(0)

    names: list[Name | None] = []
    for j in range(num_latents):
        found = []
        for w in np.flatnonzero((q[j] <= MAX_Q) & (counts[j] >= MIN_FAMILIES)):
            known = has[held][:, w]
            if known.sum() < MIN_HELDOUT:
                continue
            area, chance = auc(test[:, j], known)
            if area >= MIN_AUC and chance <= 0.05:
                found.append((int(in_title[j, w]), Name(vocabulary[w], float(q[j, w]), float(area), int(counts[j, w]))))
        # Of words nearly as sure as the surest (log q within a fifth) the one that stands in names, not in keywords only:
        # clock faces are "early" a little more exclusively than they are "clock".
        limit = 0.8 * min((math.log(max(name.q, 1e-300)) for _, name in found), default=0.0)
        close = [pair for pair in found if math.log(max(pair[1].q, 1e-300)) <= limit]
        names.append(max(close, key=lambda pair: (pair[0], pair[1].auc))[1] if close else None)
    return names
