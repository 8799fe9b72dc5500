"""Planted near-duplicates of texts are found, and little else; and the rows are those that comparing all with all gives."""

import difflib
import json
import os
import random
import unicodedata
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from siamese.data.leakage import duplicates
from siamese.data.text_leakage import near_texts, normalised
from siamese.data.texts import as_bytes


def mistyped(text: str, rng: random.Random, times: int = 1) -> str:
    """A letter dropped, doubled or swapped with its neighbour."""
    for _ in range(times):
        at = rng.choice([at for at in range(len(text) - 1) if text[at : at + 2].isalnum() and text[at] != text[at + 1]])
        text = text[:at] + rng.choice([text[at + 1], 2 * text[at] + text[at + 1], text[at + 1] + text[at]]) + text[at + 2 :]
    return text


def punctuated(text: str, rng: random.Random) -> str:
    words = text.split()
    words[rng.randrange(len(words))] += rng.choice([",", "!", " -", "..."])
    return " ".join(words) + rng.choice("?.!")


def reworded(text: str, rng: random.Random, words: list[str]) -> str:
    parts = text.split()
    parts[rng.randrange(len(parts))] = rng.choice(words)
    return " ".join(parts)


KINDS = {
    "one mistake": lambda text, rng, words: mistyped(text, rng),
    "two mistakes": lambda text, rng, words: mistyped(text, rng, 2),
    "case": lambda text, rng, words: rng.choice([str.upper, str.title, str.capitalize])(text),
    "punctuation": lambda text, rng, words: punctuated(text, rng),
    "a word": reworded,
}


def made_up(rng: random.Random, count: int, least: int, most: int) -> list[str]:
    """Texts of words that follow Zipf's law, as in a language; a fifth of them begin as another does."""
    letters = ["".join(rng.choice(part) for part in ("bcdfghklmnprstvw", "aeiou", "lmnrst")) for _ in range(400)]
    words = list(dict.fromkeys("".join(rng.choices(letters, k=rng.choice([1, 1, 2, 2, 3]))) for _ in range(2000)))
    weights, texts = [1 / (place + 5) for place in range(len(words))], []
    for _ in range(count):
        text = rng.choices(words, weights, k=rng.randint(least, most))
        if texts and rng.random() < 0.2:
            start = rng.choice(texts).split()
            text = start[: len(start) // 2] + text[len(start) // 2 :]
        texts.append(" ".join(text))
    return list(dict.fromkeys(texts))


def levenshtein(one: list[str], other: list[str]) -> int:
    """The edit distance of words."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        last, row = row, [i]
        for j, y in enumerate(other, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def alike_before(one: str, other: str) -> bool:
    """By measures that are not those of the search."""
    one, other = one.lower(), other.lower()
    letters = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return levenshtein(one.split(), other.split()) <= 1 or (letters.quick_ratio() >= 0.9 and letters.ratio() >= 0.9)


def recall_and_precision(texts: list[str], kind: str, count: int) -> tuple[float, float]:
    """Of changed copies; another text found for a copy is wrong unless it is alike anyhow."""
    rng = random.Random(kind)
    words = sorted({word for text in texts for word in text.split()})
    able = [row for row, text in enumerate(texts) if len(normalised(text).split()) >= (5 if kind == "a word" else 2)]
    rows = rng.sample(able, min(count, len(able)))
    copies = [KINDS[kind](texts[row], rng, words) for row in rows]
    found = duplicates(as_bytes(texts), as_bytes(copies))
    pairs = list(zip(found.left.tolist(), found.right.tolist(), strict=True))
    hits = len({right for left, right in pairs if left == rows[right]})
    wrong = sum(left != rows[right] and not alike_before(normalised(texts[left]), normalised(copies[right])) for left, right in pairs)
    return hits / len(rows), hits / max(hits + wrong, 1)


@pytest.mark.parametrize("lengths", [(3, 12), (40, 120)], ids=["short", "long"])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_near_duplicates_are_found_and_little_else(kind, lengths):
    texts = made_up(random.Random(0), 3000 if lengths[0] == 3 else 600, *lengths)
    recall, precision = recall_and_precision(texts, kind, 600)
    assert recall >= 0.95
    assert precision >= 0.95


CLINC = Path(os.environ.get("SIAMESE_DATA_DIR", "data"), "clinc150", "data_full.json")


@pytest.mark.skipif(not CLINC.is_file(), reason=f"no CLINC150 in {CLINC}: set SIAMESE_DATA_DIR to the folder that has clinc150/")
@pytest.mark.parametrize("kind", KINDS)
def test_planted_near_duplicates_of_questions_are_found_and_little_else(kind):
    texts = [text for part in json.loads(CLINC.read_text(encoding="utf-8")).values() for text, _ in part]
    recall, precision = recall_and_precision(list({normalised(text): text for text in texts}.values()), kind, 1500)
    assert recall >= 0.95
    assert precision >= 0.95


def plainly(text: str) -> str:
    """`normalised`, for what the reference below is given."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "")
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def edits(one: str, other: str, replaced: int) -> int:
    """The whole table."""
    table = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(other) + 1)}
    for i, j in product(range(1, len(one) + 1), range(1, len(other) + 1)):
        table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + replaced * (one[i - 1] != other[j - 1]))
        if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
            table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(one), len(other)]


def compared(one: str, other: str) -> float:
    """How alike two texts are, 0 for not; all of it in plain loops."""
    if not one or not other:
        return 0
    sides = [{f" {text} "[at : at + 3] for at in range(len(text))} for text in (one, other)]
    similarity = min(len(sides[0] & sides[1]) / len(sides[0] | sides[1]), 0.9999)
    words, lengths = [text.split() for text in (one, other)], sorted(map(len, (one, other)))
    few = min(map(len, words)) < 5
    if similarity >= 0.82 or (not few and abs(len(words[0]) - len(words[1])) <= 1 and levenshtein(*words) <= 1):
        return similarity
    allowed = min(lengths[0] // 8, 2) if lengths[1] <= 150 else 0
    letters = [Counter(text) for text in (one, other)]
    if max((letters[0] - letters[1]).total(), (letters[1] - letters[0]).total()) > allowed:  # an edit adds one letter at most
        return 0
    return similarity if edits(one, other, 2 if few else 1) <= allowed else 0


@pytest.fixture(scope="module")
def changed() -> list[str]:
    """Few texts, each with some that are nearly it, in no order; some occur twice, some are empty."""
    rng = random.Random(1)
    texts = made_up(rng, 20, 2, 9) + made_up(rng, 3, 20, 30)
    words = sorted({word for text in texts for word in text.split()})
    texts += [KINDS[kind](text, rng, words) for text in texts for kind in KINDS]
    texts += [" ".join(text.split()[1:]) for text in texts[:20]] + [mistyped(text, rng, 3) for text in texts[:20]]
    texts += ["", "?!", "", *texts[:10]]
    rng.shuffle(texts)
    return texts


def table(rows: np.ndarray) -> dict[tuple[int, int], float]:
    pairs = {(int(left), int(right)): alike for left, right, alike in rows}
    assert len(pairs) == len(rows), "each pair once"
    return pairs


@pytest.mark.parametrize("within", [True, False])
def test_the_rows_are_those_of_a_comparison_of_all_with_all(changed, within):
    """Hashing finds what comparing every pair would, but for a few that are barely alike."""
    left, right = (changed, changed) if within else (changed[:90], changed[90:])
    plain = [[plainly(text) for text in side] for side in (left, right)]
    places = combinations(range(len(left)), 2) if within else product(range(len(left)), range(len(right)))
    first = [{text: row for row, text in reversed([*enumerate(side)])} for side in plain]  # of several rows with one text
    places = [(a, b) for a, b in places if first[0][plain[0][a]] == a or first[1][plain[1][b]] == b]
    truth = {pair: alike for pair in places if (alike := compared(plain[0][pair[0]], plain[1][pair[1]]))}
    found = table(near_texts(as_bytes(left), None if within else as_bytes(right)))
    assert len(truth) > 100
    assert found.keys() <= truth.keys()
    assert len(truth.keys() - found.keys()) <= 0.01 * len(truth)
    assert all(alike == pytest.approx(truth[pair]) for pair, alike in found.items())


def test_order_makes_no_difference(changed):
    changed = list({plainly(text): text for text in changed}.values())
    turned = np.random.default_rng(0).permutation(len(changed))
    shuffled = [changed[row] for row in turned]
    one, other = table(near_texts(as_bytes(changed))), table(near_texts(as_bytes(shuffled)))
    assert {tuple(sorted((int(turned[left]), int(turned[right])))): alike for (left, right), alike in other.items()} == one
    half = as_bytes(changed[:100])
    one, other = table(near_texts(half, as_bytes(changed))), table(near_texts(half, as_bytes(shuffled)))
    assert {(left, int(turned[right])): alike for (left, right), alike in other.items()} == one
    mirrored = table(near_texts(as_bytes(changed), half))
    assert {(right, left): alike for (left, right), alike in mirrored.items()} == one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's the time?", "  WHATS the\ttime\n"),
        ("what\u2019s the time", "what's the time"),
        ("wi-fi, and more", "wi fi and... more"),
        ("".join(chr(ord(letter) + 0xFEE0) for letter in "fullwidth"), "fullwidth"),
        ("ﬁne Straße", "fine STRASSE"),
        ("cafe\u0301 cre\u0300me", "café crème"),
        ("zero\u200bwidth", "zerowidth"),
        ("नमस्ते दुनिया", "नमस्ते, दुनिया।"),
        ("今天天气怎么样?", "今天天气怎么样。"),
    ],
)
def test_case_punctuation_and_the_way_of_encoding_make_no_difference(one, other):
    assert normalised(one) == normalised(other) == normalised(normalised(one))
    assert near_texts(as_bytes([one]), as_bytes(["else", other])).tolist() == [[0, 1, 0.9999]]


@pytest.mark.parametrize(("one", "other"), [("c++", "c"), ("नमस्ते", "नमसत"), ("good 👍", "good 👎"), ("a b", "ab"), ("$5", "5")])
def test_letters_marks_and_symbols_make_one(one, other):
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("play music", "play songs", False),
        ("call mom", "call tom", False),
        ("call steven", "call stevven", True),
        ("what is my balance", "what is my name", False),
        ("what is my balance", "what is my blanace", True),
        ("what is the balance today", "what is the forecast today", True),
        ("what is the balance today", "what was the forecast today", False),
        ("please show me my balance today", "show me my balance today", True),
        ("show me my balance", "please show me my balance", False),  # has four words, and a fifth makes another text of them
        ("one two three four five", "five one two three four", True),  # of the shingles only a few differ
        ("今天北京的天气怎么样", "今天北京的气天怎么样", True),
        ("今天北京的天气怎么样", "今天上海的天气怎么样", False),
        ("yes", "yess", False),
        ("yes", "no", False),
    ],
)
def test_short_texts(one, other, alike):
    assert len(near_texts(as_bytes([one]), as_bytes([other]))) == alike
    assert len(near_texts(as_bytes([one, other]))) == alike


def test_empty_texts_are_near_none():
    empty, text = as_bytes(["", "...", "\n"]), as_bytes(["to be", "..."])
    for left, right in product((empty, text, empty[:0], empty[:, :0]), (empty, empty[:0], empty[:, :0], None)):
        assert near_texts(left, right).shape == (0, 3)


def test_texts_that_occur_often_are_paired_with_the_first_and_equal_ones_are_told_apart():
    texts = as_bytes(["to be or not to be", "To be, or not to be", "that is the question", "to be or not to be"])
    found = duplicates(texts)
    assert list(zip(*(part.tolist() for part in found[:2]), strict=True)) == [(0, 3), (0, 1)]
    assert found.alike.tolist() == pytest.approx([1, 0.9999])


def test_a_text_that_is_everywhere_takes_no_more_than_its_rows():
    found = duplicates(as_bytes(["Thank you!"] * 3000 + ["something else"]), as_bytes(["thank you", "Thank you!"] * 1000))
    assert len(found.left) < 2 * 5000
    assert (len(found.left.unique()), len(found.right.unique())) == (3000, 2000)


def test_texts_of_two_lengths_of_padding_are_equal():
    """Each split is as long as its longest text."""
    found = duplicates(as_bytes(["to be", "not to be at all"]), as_bytes(["to be"]))
    assert [part.tolist() for part in found] == [[0], [0], [1]]


def test_a_letter_that_was_cut_in_two_is_left_out():
    whole = as_bytes(["ten letters and é"])
    cut = as_bytes(["ten letters and é"], len(whole[0]) - 1)
    assert [row[:2] for row in near_texts(whole, cut).tolist()] == [[0, 0]]
