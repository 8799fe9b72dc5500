"""Pairs and triplets that somebody has listed: every one is handed out, as it is written, and what is wrong in a list is named."""

import csv
import functools
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese.config import InputError
from siamese.data.listed import PAIRS, TRIPLETS, read
from siamese.data.module import SiameseData
from siamese.data.omniglot import Omniglot
from siamese.data.samples import Samples, Source
from siamese.data.sampling import ListedPairs, ListedTriplets, PairDataset, TripletDataset, balanced, pairs, triplets

IDS = [f"face{face}/letter{letter}" for letter in range(6) for face in range(4)]


def samples(labelled: bool = True, ids: list[str] = IDS) -> Samples:
    """24 samples of 6 classes whose input is their own index, so that a batch tells what is in it."""
    inputs = torch.arange(24).float().view(-1, 1)
    return Samples(inputs, torch.arange(24) // 4, list("abcdef"), ids) if labelled else Samples(inputs, None, [], ids)


@pytest.fixture
def written(tmp_path):
    """written("left,right,same", "a,b,1") -> the path of a CSV of these lines."""

    def write(*lines: str, encoding: str = "utf-8") -> str:
        path = tmp_path / "list.csv"
        path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
        return str(path)

    return write


def handed_out(dataset: PairDataset, rows: torch.Tensor) -> list[tuple[int, int, bool]]:
    """(left, right, same) of each pair of a batch, from its inputs and its tuples alone."""
    inputs, _, (anchor, positive, other, negative), *_ = dataset[rows]
    inputs = inputs.flatten().int().tolist()
    alike = [(inputs[a], inputs[b], True) for a, b in zip(anchor.tolist(), positive.tolist(), strict=True)]
    return alike + [(inputs[a], inputs[b], False) for a, b in zip(other.tolist(), negative.tolist(), strict=True)]


# Samples without labels


def test_samples_may_be_without_labels():
    unlabelled = samples(labelled=False)
    assert (len(unlabelled), unlabelled.labelled, samples().labelled) == (24, False, True)
    assert unlabelled[3] == (torch.tensor([3.0]), -1)
    assert unlabelled[[1, 2]].labels.tolist() == [-1, -1]
    assert unlabelled.labels.dtype == torch.int64
    assert str(unlabelled) == "24 samples without labels, 1"
    assert str(samples()) == "24 samples of 6 classes, 1"
    assert unlabelled.fingerprint() == samples(labelled=False).fingerprint() != samples().fingerprint()


@pytest.mark.parametrize(
    "loader", [balanced, pairs, triplets, lambda samples, seed: PairDataset(samples), lambda samples, seed: TripletDataset(samples)]
)
def test_what_goes_by_labels_refuses_samples_without(loader):
    with pytest.raises(ValueError, match=r"24 samples without labels.*by labels\. .*sampling=pairs sampling\.file="):
        loader(samples(labelled=False), seed=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_the_training_split_may_be_without(split):
    class Unlabelled(Source):
        def split(self, name: str) -> Samples:
            return samples(labelled=False)

    data = SiameseData(Unlabelled(), pairs)
    assert len(data.train) == 24
    with pytest.raises(ValueError, match=f"the {split} split has no labels"):
        getattr(data, split)


# What is handed out


@st.composite
def lists(draw):
    """(left, right, same) of different samples out of 24, with both kinds; a pair may come again."""
    couples = draw(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)).filter(lambda pair: pair[0] != pair[1]), min_size=2))
    same = [(left * right + left + right) % 3 == 0 for left, right in couples]
    if len(set(same)) < 2:
        couples += [(0, 3), (0, 1)]
        same += [True, False]
    return [left for left, _ in couples], [right for _, right in couples], same


@given(lists(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_every_listed_pair_comes_once_an_epoch_as_it_was_listed(columns, seed, epoch, batch, labelled):
    dataset = ListedPairs(samples(labelled), *columns, seed)
    dataset.set_epoch(epoch)
    found = [pair for rows in torch.arange(len(dataset)).split(batch) for pair in handed_out(dataset, rows)]
    assert sorted(found) == sorted(zip(*columns, strict=True))
    for index in range(len(dataset)):
        (left, right), same = dataset[index]
        assert (int(left), int(right), same) == (int(dataset.left[index]), int(dataset.right[index]), bool(dataset.same[index]))
    inputs, labels, tuples, *_ = dataset[torch.arange(len(dataset))]
    assert inputs.flatten().tolist() == torch.cat([dataset.left, dataset.right]).tolist(), "all lefts, then all rights"
    assert labels.tolist() == [int(i) // 4 if labelled else -1 for i in inputs]
    assert ((tuples[1] - tuples[0]) == len(dataset)).all()
    assert ((tuples[3] - tuples[2]) == len(dataset)).all()


@given(lists())
@settings(deadline=None)
def test_positives_are_spread_over_the_epoch_as_far_as_the_list_has_them(columns):
    dataset = ListedPairs(samples(False), *columns)
    same = np.array([dataset[i][1] for i in range(len(dataset))])
    assert same.sum() == sum(columns[2])
    ahead = np.concatenate([[0.0], np.cumsum(same - same.mean())])
    assert ahead.max() - ahead.min() <= 1 + 1e-9


ALL_PAIRS = [(left, right, left // 4 == right // 4) for left in range(24) for right in range(left)]
SOME_TRIPLETS = [(a, p, n) for a in range(0, 24, 3) for p in range(24) for n in range(0, 24, 5) if a // 4 == p // 4 != n // 4 and a != p]


def listed_pairs(seed: int = 0) -> ListedPairs:
    return ListedPairs(samples(False), *zip(*ALL_PAIRS, strict=True), seed)


def listed_triplets(seed: int = 0) -> ListedTriplets:
    return ListedTriplets(samples(False), *zip(*SOME_TRIPLETS, strict=True), seed)


@pytest.mark.parametrize("make", [listed_pairs, listed_triplets])
def test_seed_and_epoch_decide_the_order(make):
    def contents(dataset, epoch: int) -> list:
        dataset.set_epoch(epoch)
        return dataset[torch.arange(len(dataset))].inputs.flatten().tolist()

    worn = make(3)
    first = worn[torch.arange(len(worn))].inputs.flatten().tolist()
    orders = [contents(worn, epoch) for epoch in range(4)]
    assert orders[0] == first, "without set_epoch it is epoch 0"
    assert orders == [contents(make(3), epoch) for epoch in range(4)], "nothing is stored between epochs"
    assert len({str(order) for order in [*orders, contents(make(4), 0)]}) == 5


def test_every_positive_pair_is_in_the_first_batch_of_some_epoch():
    dataset = listed_pairs()
    firsts = set()
    for epoch in range(200):
        dataset.set_epoch(epoch)
        firsts |= {pair for pair in handed_out(dataset, torch.arange(16)) if pair[2]}
    assert firsts == {pair for pair in ALL_PAIRS if pair[2]}


def test_every_listed_triplet_comes_once_an_epoch_as_it_was_listed():
    dataset = listed_triplets()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        found = []
        for rows in torch.arange(len(dataset)).split(7):
            inputs, labels, tuples, *_ = dataset[rows]
            assert torch.cat(tuples).tolist() == list(range(3 * len(rows))), "all anchors, then all positives, then all negatives"
            found += zip(*(inputs[part].flatten().int().tolist() for part in tuples), strict=True)
            assert labels.tolist() == [-1] * 3 * len(rows)
        assert sorted(found) == sorted(SOME_TRIPLETS)
    assert tuple(int(one) for one in dataset[5]) in SOME_TRIPLETS


# Files

PAIR_LINES = [f"{IDS[left]},{IDS[right]},{int(same)}" for left, right, same in ALL_PAIRS]
TRIPLET_LINES = [",".join(IDS[place] for place in three) for three in SOME_TRIPLETS]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_file_lists_pairs_by_id(written, labelled):
    loader = pairs(samples(labelled), seed=2, batch_size=10, file=written("left,right,same", *PAIR_LINES))
    expected = ListedPairs(samples(labelled), *zip(*ALL_PAIRS, strict=True), seed=2)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        batches = [expected[rows] for rows in torch.arange(len(ALL_PAIRS)).split(10)]
        assert [(b.inputs.tolist(), [t.tolist() for t in b.tuples]) for b in loader] == [
            (b.inputs.tolist(), [t.tolist() for t in b.tuples]) for b in batches
        ]


def test_a_file_lists_triplets_by_id(written):
    loader = triplets(samples(False), seed=2, batch_size=10, file=written("anchor,positive,negative", *TRIPLET_LINES))
    assert [batch.inputs.tolist() for batch in loader] == [
        listed_triplets(2)[rows].inputs.tolist() for rows in torch.arange(len(SOME_TRIPLETS)).split(10)
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ["left,right,same", "0,1,1", "0,23,0"],
        [" left , right,same", "0, 1, True", "", "0, 23, FALSE", ""],
        ["\ufeffleft,right,same\r", '"0","1",true\r', "0,23,false\r"],
    ],
    ids=["plain", "spaces", "spreadsheet"],
)
def test_row_numbers_and_other_spellings_are_understood(written, lines):
    columns, numbers = read(written(*lines), PAIRS, samples())
    assert columns == [[0, 0], [1, 23], [1, 0]]
    assert numbers == ([2, 4] if "" in lines else [2, 3])


def test_numbers_are_ids_where_one_of_them_is(written):
    numbered = samples(ids=[str(100 - number) for number in range(24)])
    columns, _ = read(written("anchor,positive,negative", "100,99,77"), TRIPLETS, numbered)
    assert columns == [[0], [1], [23]]
    with pytest.raises(ValueError, match="line 2: no sample of the training split has the id '3'"):
        read(written("anchor,positive,negative", "100,99,3"), TRIPLETS, numbered)


BAD_PAIRS = [
    (["left,right,same", "0,1,1", "0,9,2"], "line 3: same is '2', it must be 0, 1, false or true"),
    (["left,right,same", "0,1,1", "0,9,"], "line 3: same is ''"),
    (["left,right,same", "0,1,1", "0,9"], "line 3 has 2 entries, not 3: left,right,same"),
    (["left;right;same", "0;1;1"], "the first line is 'left;right;same', it must be the header left,right,same"),
    (["0,1,1", "0,9,0"], "the first line is '0,1,1', it must be the header left,right,same"),
    (["anchor,positive,negative", "0,1,9"], "it must be the header left,right,same"),
    ([], "the first line is '', it must be the header left,right,same"),
    (["left,right,same"], "nothing is listed"),
    (["left,right,same", "0,1,1", "0,24,0"], "line 3: rows of the training split are numbered 0 to 23, here are \\[0, 24\\]"),
    (["left,right,same", "0,1,1", "face0/letter9,9,0"], "line 2: no sample .* has the id '0': ids look like 'face0/letter0'"),
    (["left,right,same", "face0/letter0,face1/leter0,1"], "line 2: .* the id 'face1/leter0': did you mean 'face1/letter0'"),
    (["left,right,same", "0,1,1", "", "9,9,1", "0,9,0"], "line 4: one sample stands in it twice"),
    (["left,right,same", "0,1,1", "0,9,0", "2,3,1", "9,0,1"], "line 3 and line 5 call one pair the same and different"),
    (["left,right,same", "0,1,1", "2,3,1"], "no pair is listed as different"),
    (["left,right,same", "0,9,0"], "no pair is listed as the same"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_PAIRS)
def test_what_is_wrong_in_a_list_of_pairs_is_named_with_its_line(written, lines, message):
    path = written(*lines)
    with pytest.raises(ValueError, match=rf"^sampling\.file={path}: .*{message}") as error:
        pairs(samples(), seed=0, file=path)
    assert "\n" not in str(error.value)


BAD_TRIPLETS = [
    (["left,right,same", "0,1,1"], "it must be the header anchor,positive,negative"),
    (["anchor,positive,negative", "0,1,9", "0,1,1"], "line 3: one sample stands in it twice"),
    (["anchor,positive,negative", "0,1,9", "0,9,0"], "line 3: one sample stands in it twice"),
    (["anchor,positive,negative", "0,1,9", "0,1"], "line 3 has 2 entries, not 3"),
    (["anchor,positive,negative", "0,1,77"], "line 2: rows of the training split are numbered 0 to 23, here are \\[0, 1, 77\\]"),
    (["anchor,positive,negative"], "nothing is listed"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_TRIPLETS)
def test_what_is_wrong_in_a_list_of_triplets_is_named_with_its_line(written, lines, message):
    path = written(*lines)
    with pytest.raises(ValueError, match=rf"^sampling\.file={path}: .*{message}"):
        triplets(samples(), seed=0, file=path)


def test_a_file_that_cannot_be_read_is_named(written, tmp_path):
    with pytest.raises(ValueError, match=r"^sampling\.file=/nowhere/list\.csv: No such file"):
        pairs(samples(), seed=0, file="/nowhere/list.csv")
    with pytest.raises(ValueError, match=rf"^sampling\.file={tmp_path}: Is a directory"):
        pairs(samples(), seed=0, file=str(tmp_path))
    path = written("left,right,same", "é,ö,1", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"^sampling\.file={path}: .*utf-8"):
        pairs(samples(), seed=0, file=path)


def test_an_id_of_several_samples_is_refused(written):
    twice = samples(ids=["a", "b", "b", *IDS[3:]])
    assert read(written("left,right,same", f"a,{IDS[3]},1"), PAIRS, twice)[0] == [[0], [3], [1]], "only if it is listed"
    with pytest.raises(ValueError, match=r"line 2: several samples have the id 'b'\. Give row numbers"):
        read(written("left,right,same", "a,b,1"), PAIRS, twice)


BAD_COLUMNS = [
    (([0, 0], [1, 9, 4], [1, 0]), "2 and 3 entries"),
    (([0, 0], [1, 9], [1, 0, 1]), "2 pairs, but 3 entries of same"),
    (([0, 0, 0], [1, 9, 5], [1, 0, 2]), "pair 2: same is 2, it must be 0 or 1"),
    (([0, 0], [1, -1], [1, 0]), r"pair 1: .* 0 to 23, here are \[0, -1\]"),
    (([], [], []), "nothing is listed"),
]


@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS)
def test_columns_that_are_no_pairs_are_refused(kind, columns, message):
    with pytest.raises(ValueError, match=message):
        ListedPairs(samples(False), *map(kind, columns))


def test_a_list_that_contradicts_the_labels_is_followed_and_said_once(caplog):
    columns = [0, 0, 0, 4], [1, 9, 8, 5], [1, 0, 1, 0]  # the last two are not what the labels say
    with caplog.at_level(logging.INFO):
        dataset = ListedPairs(samples(), *columns)
        dataset.set_epoch(1)
        ListedPairs(samples(False), *columns)
        ListedPairs(samples(), [0, 0], [1, 9], [1, 0])
    assert [r.getMessage() for r in caplog.records] == ["2 of 4 listed tuples contradict the labels of their samples: the list is followed"]
    assert sorted(handed_out(dataset, torch.arange(4))) == sorted(zip(*columns, strict=True))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ListedTriplets(samples(), [0, 0, 0], [1, 1, 9], [9, 2, 17])
        ListedTriplets(samples(), [0], [1], [9])
    assert [r.getMessage()[:6] for r in caplog.records] == ["2 of 3"]


def test_the_log_says_what_a_file_holds(written, caplog):
    with caplog.at_level(logging.INFO):
        pairs(samples(), seed=0, file=written("left,right,same", "0,1,1", "0,9,0", "0,8,0", "0,7,0"))
    (record,) = caplog.records
    assert "lists 4 pairs, 25 % of them of the same: sampling.positive_fraction is not used" in record.getMessage()


# Validation


class TwoSplits(Source):
    """Validation has other classes, and half as many samples, than training."""

    def split(self, name: str) -> Samples:
        if name == "train":
            return samples(labelled=False)
        return Samples(torch.arange(100, 112).float().view(-1, 1), torch.arange(12) // 3, list("wxyz"), [str(n) for n in range(12)])


def test_validation_pairs_are_drawn_from_its_labels_in_the_lists_share_of_positives(written):
    path = written("left,right,same", *PAIR_LINES[:24])
    share = sum(line.endswith(",1") for line in PAIR_LINES[:24]) / 24
    data = SiameseData(TwoSplits(), functools.partial(pairs, batch_size=5, file=path))
    _, fixed = data.val_dataloader()
    batches = list(fixed)
    assert [len(batch.inputs) for batch in batches] == [10, 10, 4]
    for batch in batches:
        assert (batch.labels == (batch.inputs.flatten().long() - 100) // 3).all()
        anchor, positive, other, negative = batch.tuples
        assert (batch.labels[anchor] == batch.labels[positive]).all()
        assert (batch.labels[other] != batch.labels[negative]).all()
    assert sum(len(batch.tuples[0]) for batch in batches) == pytest.approx(12 * share, abs=0.5)
    assert 0.2 < share < 0.45, "or it could not be told from the default"
    again = [batch.inputs.tolist() for batch in data.val_dataloader()[1]]
    assert again == [batch.inputs.tolist() for batch in batches], "the same ones every time"


def test_validation_triplets_are_drawn_from_its_labels(written):
    path = written("anchor,positive,negative", *TRIPLET_LINES)
    data = SiameseData(TwoSplits(), functools.partial(triplets, batch_size=5, file=path))
    batches = list(data.val_dataloader()[1])
    assert [len(batch.inputs) for batch in batches] == [15, 15, 6]
    for batch in batches:
        anchor, positive, negative = (batch.labels[part] for part in batch.tuples)
        assert (anchor == positive).all()
        assert (anchor != negative).all()


# Whole runs


class WithoutLabels(Omniglot):
    def split(self, name: str) -> Samples:
        given = super().split(name)
        return Samples(given.inputs, None, [], given.ids) if name == "train" else given


@pytest.fixture(scope="module")
def lists_of(drawings, tmp_path_factory) -> dict[str, str]:
    """Lists of the tiny run's training split, as one would write them who knows the classes."""
    train = Omniglot(drawings, "small1", 16).split("train")
    two, three = PairDataset(train, 0.4, seed=9), TripletDataset(train, seed=9)
    columns = {"pairs": (PAIRS, [two.left, two.right], [two.same.int().tolist()])}
    columns["triplets"] = (TRIPLETS, [three.anchor, three.positive, three.negative], [])
    folder = tmp_path_factory.mktemp("lists")
    for name, (header, places, rest) in columns.items():
        ids = [[train.ids[place] for place in column] for column in places]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *zip(*ids, *rest, strict=True)])
    return {name: str(folder / f"{name}.csv") for name in columns}


@pytest.mark.parametrize("sampling", ["pairs", "triplets"])
def test_a_run_without_labels_learns_and_is_the_run_with_labels(fit, lists_of, tmp_path, sampling):
    """The labels of the training split have no part in it: two runs that differ in nothing else come to the same figures."""
    options = [f"sampling={sampling}", "loss=contrastive", f"sampling.file={lists_of[sampling]}", "trainer.max_epochs=8", "test=false"]
    fit(tmp_path / "with", *options)
    fit(tmp_path / "without", *options, f"dataset._target_={__name__}.WithoutLabels")
    found, given = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("without", "with"))
    assert {k: v for k, v in found.items() if not k.startswith("seconds/")} == {
        k: v for k, v in given.items() if not k.startswith("seconds/")
    }
    with (tmp_path / "without" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    steps = [row for row in rows if row["train/loss"]]
    apart = [float(row["train/negative_distance"]) - float(row["train/positive_distance"]) for row in steps]
    assert np.mean(apart[-3:]) > np.mean(apart[:3]) + 0.05, "it learns"
    assert {float(row["train/mined_fraction"]) for row in steps} == {1.0}
    assert len([row for row in rows if row["val/loss"]]) == 8


def test_a_bad_list_is_the_users_to_mend(fit, written, tmp_path):
    path = written("left,right,same", "0,1,1", "0,0,0")
    with pytest.raises(InputError, match=rf"sampling\.file={path}: line 3: ") as error:
        fit(tmp_path / "run", "sampling=pairs", "loss=contrastive", f"sampling.file={path}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_balanced_run_without_labels_is_refused(fit, tmp_path):
    with pytest.raises(InputError, match=r"192 samples without labels.*sampling=pairs sampling\.file="):
        fit(tmp_path / "run", f"dataset._target_={__name__}.WithoutLabels")
