"""Texts that are nearly one of another set's: in other case or punctuation, mistyped, with one word changed, or long and mostly the same.

Candidates come of two hashes, in time that grows little faster than the number of texts: MinHash of the sets of shingles, short runs of
characters (Broder 1997, "On the resemblance and containment of documents"), cut into bands (Indyk and Motwani 1998, "Approximate nearest
neighbors: towards removing the curse of dimensionality"); and the text with one word left out (Mor and Fraenkel 1982, "A hash code
method for detecting and correcting spelling errors"). Then the texts themselves decide. A resemblance of shingles alone would not do for
short ones: there another word changes fewer of them than two typing mistakes do.
"""

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from torch import Tensor

from siamese.data.texts import as_texts

_SHINGLE, _POINT = 3, 21  # characters in a shingle, and bits of one: a shingle is a number of 63 bits, without collisions
_BANDS, _ROWS = 32, 3  # of the MinHash: two texts are candidates when all rows of one band are equal
_ALIKE = 0.82  # Jaccard similarity of the shingles from which texts are alike, whatever it is that differs
_MISTAKES, _PER_MISTAKE, _LONG = 2, 8, 150  # at most so many, one for every so many characters, in texts of at most so many
_PER_SWAP = 2 * (_SHINGLE + 1)  # shingles by which two texts differ at most for one typing mistake, two letters swapped being the worst
_WORDS = 5  # with fewer, one changed word makes another text
_SKETCH = 8  # words of 64 bits: a set of shingles in short
_CHUNK, _COMPARED = 2**20, 2**13
_GOLDEN = 0x9E3779B97F4A7C15  # 2 ** 64 / the golden ratio: an odd number that mixes well (Knuth 1973)

_APOSTROPHES = "'`\u2018\u2019\u02bc"


class _Texts(NamedTuple):
    """U different normalised texts, none empty.

    Attributes:
        points: uint32, their code points, a space before each text and after it; text u begins at start[u], int64 [U].
        length: int64 [U], how many characters, without those spaces.
        shingles: int32 [U, V] sparse, 1 where text u has shingle v; size: int64 [U], how many it has.
        hashes: uint32, one for each entry of `shingles`.
        words: int64 [U], how many.
        keys, owner: uint64 [3, K] and int64 [K], see `_word_keys`.
    """

    points: np.ndarray
    start: np.ndarray
    length: np.ndarray
    shingles: csr_array
    size: np.ndarray
    hashes: np.ndarray
    words: np.ndarray
    keys: np.ndarray
    owner: np.ndarray


class _Table(dict):
    """For str.translate: apostrophes and what has no width go (what's = whats), punctuation becomes space; letters and symbols stay."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        gone = chr(code) in _APOSTROPHES or category == "Cf"
        self[code] = "" if gone else " " if category[0] in "PZ" or category == "Cc" else chr(code)
        return self[code]


_TABLE = _Table()


def normalised(text: str) -> str:
    """Without what is no difference between two texts: NFKC, casefolded, words with one space between them and no punctuation."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_TABLE).split())


def near_texts(left: Tensor, right: Tensor | None = None) -> np.ndarray:
    """Find texts of `right` that are nearly one of `left`; without `right`, within `left` (each pair once, left < right).

    Two texts are alike when, normalised, they are equal; or but for one word replaced or left out, both having at least 5; or but for
    typing mistakes, one in 8 characters and at most 2, in texts of at most 150; or when the Jaccard similarity of their shingles is at
    least 0.82. An empty text is like none. Of a text that stands in several rows each is paired with the first of the other side alone.

    Args:
        left, right: uint8 [N, L], UTF-8 padded with zeros.

    Returns:
        float64 [P, 3], rows (left, right, Jaccard similarity), less than 1 even where that is 1.
    """
    place: dict[str, int] = {"": -1}
    sides = [_places(side, place) for side in ((left,) if right is None else (left, right))]
    texts = _texts(list(place)[1:])
    one, other = (np.unique(side[side >= 0]) for side in (sides[0], sides[-1]))
    if not len(one) or not len(other):
        return np.empty((0, 3))
    but_for_a_word, resembling = (_codes(texts, some(texts, one, other), right is None) for some in (_but_for_a_word, _resembling))
    pairs = _distinct(np.concatenate([but_for_a_word, resembling]))
    accepted, same = np.isin(pairs, but_for_a_word), np.intersect1d(one, other)
    found = [np.column_stack([same, same, np.ones(len(same))])]
    found += [_compared(texts, *(of[at : at + _COMPARED] for of in (pairs, accepted))) for at in range(0, len(pairs), _COMPARED)]
    return _rows(np.concatenate(found), sides[0], sides[-1], right is None)


def _places(side: Tensor, place: dict[str, int]) -> np.ndarray:
    """int64 [N]: which text each row is, -1 for an empty one; `place` takes in those that are new."""
    return np.array([place.setdefault(normalised(text), len(place) - 1) for text in as_texts(side)], dtype=np.int64)


def _texts(texts: list[str]) -> _Texts:
    points = np.frombuffer("".join(f" {text} " for text in texts).encode("utf-32-le"), dtype=np.uint32)
    length, words = (np.array(count, dtype=np.int64) for count in ([len(text) for text in texts], [text.count(" ") + 1 for text in texts]))
    end = (length + 2).cumsum()
    owner = np.repeat(np.arange(len(texts)), length + 2)
    inside = owner[: 1 - _SHINGLE] == owner[_SHINGLE - 1 :]
    codes = np.zeros(len(inside), dtype=np.uint64)
    for at in range(_SHINGLE):
        codes = codes << np.uint64(_POINT) | points[at : at + len(codes)]
    codes = codes[inside]
    known = _distinct(codes)
    which = np.searchsorted(known, codes)
    owner, columns = np.divmod(_distinct(owner[: len(inside)][inside] * len(known) + which), max(len(known), 1))
    size = np.bincount(owner, minlength=len(texts))
    ones = np.ones(len(columns), dtype=np.int32)
    shingles = csr_array((ones, columns, np.append(0, size.cumsum())), shape=(len(texts), len(known)))
    return _Texts(points, end - length - 2, length, shingles, size, _mixed(known)[columns], words, *_word_keys(texts, words))


def _distinct(values: np.ndarray) -> np.ndarray:
    """np.unique, which hashes integers and for millions of them takes longer than sorting."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def _mixed(codes: np.ndarray) -> np.ndarray:
    """uint64 -> uint32 hashes (the finalizer of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        codes = (codes ^ codes >> np.uint64(shift)) * np.uint64(factor)
    return (codes >> np.uint64(32)).astype(np.uint32)


def _word_keys(texts: list[str], words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of texts of at least _WORDS words, uint64 [3, K] keys and int64 [K] whose they are: a line for each word.

    The three are of the text whole, without the word, and with a gap for it: polynomials of the words' random numbers, modulo 2 ** 64.
    """
    many = np.flatnonzero(words >= _WORDS)
    if not len(many):
        return np.empty((3, 0), dtype=np.uint64), many
    count = words[many]
    known: dict[str, int] = {}
    which = [known.setdefault(word, len(known)) for text in many for word in texts[text].split()]
    start, owner = count.cumsum() - count, np.repeat(np.arange(len(many)), count)
    power = np.full(count.max(), _GOLDEN, dtype=np.uint64).cumprod()
    number = np.random.default_rng(0).integers(2**64, size=len(known), dtype=np.uint64)
    term = number[which] * power[np.arange(len(which)) - start[owner]]
    before = term.cumsum() - term
    before -= before[start][owner]
    whole = np.add.reduceat(term, start)[owner]
    after = whole - before - term
    without = before + after * np.uint64(pow(_GOLDEN, -1, 2**64))  # what follows moves up by one
    return np.stack([whole, without, before + after]), many[owner]


def _in_one_bucket(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places in `left` and `right` of equal keys, some _CHUNK pairs at a time."""
    order = left.argsort(kind="stable")
    first, last = (np.searchsorted(left[order], right, side) for side in ("left", "right"))
    count = last - first
    end = count.cumsum()
    for at in range(0, int(end[-1]) if len(end) else 0, _CHUNK):
        pair = np.arange(at, min(at + _CHUNK, end[-1]))
        place = np.searchsorted(end, pair, "right")
        yield order[first[place] + pair - (end - count)[place]], place


def _resembling(texts: _Texts, left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Different texts that are in one bucket, and by their sketches perhaps alike."""
    begin = texts.shingles.indptr[:-1]
    sketch = np.zeros((len(begin), _SKETCH), dtype=np.uint64)
    bit = texts.hashes % np.uint32(64 * _SKETCH)
    np.bitwise_or.at(sketch, (np.repeat(np.arange(len(begin)), texts.size), bit // 64), np.uint64(1) << (bit % 64).astype(np.uint64))
    rng = np.random.default_rng(0)
    for _ in range(_BANDS):
        key = np.zeros(len(begin), dtype=np.uint64)
        for factor, shift in rng.integers(2**32, size=(_ROWS, 2), dtype=np.uint32):
            least = np.minimum.reduceat(texts.hashes * (factor | np.uint32(1)) + shift, begin)
            key = (key ^ least) * np.uint64(_GOLDEN)
            key ^= key >> np.uint64(29)
        for one, other in _in_one_bucket(key[left], key[right]):
            one, other = left[one], right[other]
            # A bit differs only where a shingle does: what the sketches rule out is not alike.
            differ = np.bitwise_count(sketch[one] ^ sketch[other]).sum(1, dtype=np.int64)
            maybe = (differ <= _differing(texts, one, other)) & (one != other)
            yield one[maybe], other[maybe]


def _but_for_a_word(texts: _Texts, left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Different texts that an edit distance of one word lies between: one left out of either, or replaced."""
    sides = [np.flatnonzero(np.isin(texts.owner, side)) for side in (left, right)]
    whole, without, gap = texts.keys
    for keys in ((whole, without), (without, whole), (gap, gap)):
        for one, other in _in_one_bucket(*(some[side] for some, side in zip(keys, sides, strict=True))):
            one, other = texts.owner[sides[0][one]], texts.owner[sides[1][other]]
            yield one[one != other], other[one != other]


def _codes(texts: _Texts, pairs: Iterator[tuple[np.ndarray, np.ndarray]], within: bool) -> np.ndarray:
    """int64: each pair once as one number, the lesser text first where both are of one set."""
    found = [np.empty(0, dtype=np.int64)]
    for one, other in pairs:
        if within:
            one, other = np.minimum(one, other), np.maximum(one, other)
        found.append(_distinct(one * len(texts.size) + other))
    return _distinct(np.concatenate(found))


def _mistakes(texts: _Texts, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many typing mistakes two texts may be apart."""
    shorter, longer = np.minimum(texts.length[left], texts.length[right]), np.maximum(texts.length[left], texts.length[right])
    return np.minimum(shorter // _PER_MISTAKE, _MISTAKES) * (longer <= _LONG)


def _differing(texts: _Texts, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many shingles at most only one of two texts has, when they are alike."""
    by_similarity = (texts.size[left] + texts.size[right]) * ((1 - _ALIKE) / (1 + _ALIKE))
    return np.maximum(_PER_SWAP * _mistakes(texts, left, right), by_similarity + 1e-6)


def _compared(texts: _Texts, pairs: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """Rows (text, text, similarity) of the pairs that are alike, those that are `accepted` among them."""
    left, right = np.divmod(pairs, len(texts.size))
    both = np.asarray(texts.shingles[left].multiply(texts.shingles[right]).sum(1)).ravel()
    size = texts.size[left] + texts.size[right]
    similarity, allowed = both / (size - both), _mistakes(texts, left, right)
    alike = accepted | (similarity >= _ALIKE)
    typed = np.flatnonzero(~alike & (size - 2 * both <= _PER_SWAP * allowed))
    alike[typed] = _edits(texts, left[typed], right[typed]) <= allowed[typed]
    return np.column_stack([left, right, similarity])[alike]


def _edits(texts: _Texts, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64 [P], the edit distance with swaps of neighbours (Damerau 1964) where that is at most _MISTAKES, else something more.

    Only what is at most so far off the diagonal is filled in (Ukkonen 1985, "Algorithms for approximate string matching"). In texts of few
    words another letter counts as two mistakes: "call tom" is not "call mom" mistyped.
    """
    lengths, steps = (texts.length[left], texts.length[right]), int(texts.length[np.append(left, right)].max(initial=0))
    place = np.arange(-_MISTAKES - 2, steps + _MISTAKES)
    one, other = (
        np.where((place >= 0) & (place < length[:, None]), texts.points[(texts.start[rows, None] + 1 + place) % len(texts.points)], beyond)
        for rows, length, beyond in zip((left, right), lengths, (2**31, 2**31 + 1), strict=True)  # beyond its ends a text equals nothing
    )
    replaced = np.where(np.minimum(texts.words[left], texts.words[right]) < _WORDS, 2, 1)
    # last[:, 1 + b]: from the first i characters of one to the first i + b - _MISTAKES of other
    last = np.full((len(left), 2 * _MISTAKES + 3), _MISTAKES + 1)
    last[:, 1 + _MISTAKES : -1] = np.arange(_MISTAKES + 1)
    before, end = np.full_like(last, _MISTAKES + 1), np.clip(lengths[1] - lengths[0] + _MISTAKES + 1, 0, 2 * _MISTAKES + 2)
    edits = np.where(lengths[0] == 0, last[np.arange(len(left)), end], _MISTAKES + 1)
    for i in range(1, steps + 1):
        now = np.full_like(last, _MISTAKES + 1)
        x, w = one[:, i + _MISTAKES + 1], one[:, i + _MISTAKES]
        for b in range(1, 2 * _MISTAKES + 2):
            y, v = other[:, i + b], other[:, i + b - 1]
            now[:, b] = np.minimum(np.minimum(last[:, b + 1], now[:, b - 1]) + 1, last[:, b] + np.where(x == y, 0, replaced))
            now[:, b] = np.minimum(now[:, b], before[:, b] + np.where((x == v) & (w == y), 1, _MISTAKES + 1))
        before, last = last, now
        edits = np.where(lengths[0] == i, now[np.arange(len(left)), end], edits)
    return edits


def _rows(found: np.ndarray, left: np.ndarray, right: np.ndarray, within: bool) -> np.ndarray:
    """Pairs of texts to pairs of the rows that hold them: all of `right` with the first of `left`, the others with the first of `right`."""
    orders, pairs = [side.argsort(kind="stable") for side in (left, right)], found[:, :2].astype(np.int64)
    first, last = (
        np.column_stack([np.searchsorted(side[order], text, end) for side, order, text in zip((left, right), orders, pairs.T, strict=True)])
        for end in ("left", "right")
    )
    count = (last - first).sum(1) - 1
    pair = np.repeat(np.arange(len(found)), count)
    turn = np.arange(len(pair)) - np.repeat(count.cumsum() - count, count)
    many = (last - first)[pair, 1]
    turn = np.maximum(turn - many + 1, 0), np.where(turn < many, turn, 0)
    rows = np.column_stack([order[first[pair, side] + turn[side]] for side, order in enumerate(orders)])
    alike = np.minimum(found[pair, 2], 0.9999)  # 1 says that the bytes are equal
    if within:
        keep = (found[pair, 0] != found[pair, 1]) | (rows[:, 0] < rows[:, 1])
        rows, alike = np.sort(rows[keep], axis=1), alike[keep]
    return np.column_stack([rows, alike])
