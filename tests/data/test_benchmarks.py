"""The field's benchmarks: their authors' layouts, in small, are read by the standard splits, and what is broken or missing is named."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from siamese import judging
from siamese.bundle import Bundle
from siamese.config import available, compose
from siamese.data.benchmarks import CUB200, LFW, Benchmark, Cars196, InShop, StanfordOnlineProducts, lfw_pairs
from siamese.data.listing import Listed, share_out
from siamese.data.module import SiameseData
from siamese.evaluation import evaluate_pairs


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path / "data"))


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), sum(map(ord, str(path))) % 256).save(path)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def cub200(folder: Path) -> CUB200:
    names = [f"{label:03d}.Bird_{label}/Bird_{number}.jpg" for label in range(1, 201) for number in (1, 2)]
    for name in names:
        image(folder / "CUB_200_2011" / "images" / name)
    write(folder / "CUB_200_2011" / "images.txt", [f"{row} {name}" for row, name in enumerate(names, 1)])
    write(folder / "CUB_200_2011" / "image_class_labels.txt", [f"{row} {int(name[:3])}" for row, name in enumerate(names, 1)])
    return CUB200(folder, size=4)


def cars196(folder: Path) -> Cars196:
    names = [f"Car {'C/V ' if label == 7 else ''}{label}" for label in range(1, 197)]
    write(folder / "names.csv", names)
    for part in ("train", "test"):
        for label, name in enumerate(names, 1):
            image(folder / "car_data" / "car_data" / part / name.replace("/", "-") / f"{label:05d}.jpg")
        write(folder / f"anno_{part}.csv", [f"{label:05d}.jpg,39,116,569,375,{label}" for label in range(1, 197)])
    return Cars196(folder, size=4)


def sop(folder: Path) -> StanfordOnlineProducts:
    row = 0
    for part, labels in (("train", range(1, 31)), ("test", range(31, 39))):
        lines = ["image_id class_id super_class_id path"]
        for label in labels:
            for number in (0, 1):
                row += 1
                path = f"{'bicycle' if label % 2 else 'chair'}_final/{1000 + label}_{number}.JPG"
                image(folder / "Stanford_Online_Products" / path)
                lines.append(f"{row} {label} {2 - label % 2} {path}")
        write(folder / "Stanford_Online_Products" / f"Ebay_{part}.txt", lines)
    return StanfordOnlineProducts(folder, size=4)


def inshop(folder: Path) -> InShop:
    lines = []
    for item in range(1, 31):
        for number, status in enumerate(("train",) * 3 if item <= 24 else ("query", "gallery", "gallery")):
            path = f"img/WOMEN/Dresses/id_{item:08d}/0{number}_1_front.jpg"
            image(folder / "Img" / path)
            lines.append(f"{path} id_{item:08d} {status}")
    write(folder / "Eval" / "list_eval_partition.txt", [str(len(lines)), "image_name item_id evaluation_status", *lines])
    return InShop(folder, size=4)


def lfw(folder: Path) -> LFW:
    for person in range(40):
        for number in (1, 2):
            image(folder / "lfw" / f"P_{person}" / f"P_{person}_{number:04d}.jpg")
    lines = ["2\t2"]
    for fold in (0, 4):  # of eight people two folds of two pairs of each kind
        lines += [f"P_{fold}\t1\t2", f"P_{fold + 1}\t2\t1", f"P_{fold}\t1\tP_{fold + 2}\t1", f"P_{fold + 3}\t2\tP_{fold}\t2"]
    write(folder / "pairs.txt", lines)
    return LFW(folder, size=4)


LAYOUTS = {"cub200": cub200, "cars196": cars196, "sop": sop, "inshop": inshop, "lfw": lfw}


def splits(source: Benchmark) -> dict:
    return {name: source.split(name) for name in ("train", "val", "test")}


def test_each_has_a_yaml_and_says_where_it_comes_from(tmp_path):
    assert LAYOUTS.keys() <= set(available("dataset"))
    for name, layout in LAYOUTS.items():
        source = layout(tmp_path / name)
        config = compose([f"dataset={name}", f"dataset.path={tmp_path / name}"])["dataset"]
        assert config["_target_"] == f"siamese.data.benchmarks.{type(source).__name__}"
        read = splits(type(source)(**{key: value for key, value in config.items() if key != "_target_"} | {"size": 4}))
        for split, samples in splits(source).items():
            assert torch.equal(samples.inputs, read[split].inputs)
            assert samples.inputs.shape[1:] == (3, 4, 4)


@pytest.mark.parametrize(("layout", "last", "total", "number"), [(cub200, 100, 200, r"^(\d+)\."), (cars196, 98, 196, r"(\d+)$")])
def test_the_first_half_of_the_classes_is_to_train_and_the_second_to_test(tmp_path, monkeypatch, layout, last, total, number):
    source = layout(tmp_path)
    monkeypatch.setattr(type(source), "published", ((last, 2 * last), (last, 2 * last)))
    found = splits(source)
    classes = {name: {int(re.search(number, label)[1]) for label in samples.class_names} for name, samples in found.items()}
    assert classes["train"] | classes["val"] == set(range(1, last + 1))
    assert classes["test"] == set(range(last + 1, total + 1))
    assert (len(classes["val"]), len(classes["train"])) == (10, last - 10)
    assert all(len(samples) == 2 * len(samples.class_names) for samples in found.values())
    assert source.findings() == []
    for samples in found.values():
        for label, path in zip(samples.labels, samples.ids, strict=True):
            assert Path(path).parent.name == samples.class_names[label]
            assert (tmp_path / path).is_file()


def test_validation_is_drawn_as_elsewhere_and_more_of_it_takes_none_of_the_test(tmp_path):
    few = splits(cub200(tmp_path))
    names = sorted({*few["train"].class_names, *few["val"].class_names})
    expected = share_out([*(Listed(name, name, "", "train") for name in names), Listed("x", "x", "", "test")], 0.1, 0.1)
    assert few["val"].class_names == [sample.label for sample in expected if sample.split == "val"]
    many = splits(CUB200(tmp_path, size=4, val=0.5))
    assert len(many["val"].class_names) == 50
    assert set(few["val"].class_names) < set(many["val"].class_names)
    assert few["test"].fingerprint() == many["test"].fingerprint()
    named = CUB200(tmp_path, size=4, val=["005.Bird_5", "100.Bird_100"])
    assert named.split("val").class_names == ["005.Bird_5", "100.Bird_100"]
    with pytest.raises(ValueError, match=r"no class '150.Bird_150' to take"):
        CUB200(tmp_path, val=["150.Bird_150"]).split("val")


def test_products_are_split_as_the_lists_say(tmp_path):
    found = splits(sop(tmp_path))
    assert found["test"].class_names == sorted(f"{'bicycle' if label % 2 else 'chair'}/{label}" for label in range(31, 39))
    assert found["test"].ids[0] == "Stanford_Online_Products/bicycle_final/1031_0.JPG"
    assert (len(found["val"].class_names), len(found["train"].class_names)) == (3, 27)


def test_of_the_shop_queries_are_compared_with_the_gallery(tmp_path):
    source = inshop(tmp_path)
    found = splits(source)
    assert found["test"].class_names == [f"WOMEN/Dresses/id_{item:08d}" for item in range(25, 31)]
    assert found["test"].gallery.tolist() == [False, True, True] * 6
    assert found["train"].gallery is found["val"].gallery is None
    assert (len(found["val"]), len(found["train"])) == (6, 66)
    assert found["test"].ids[0] == "Img/img/WOMEN/Dresses/id_00000025/00_1_front.jpg"
    (tmp_path / "Eval" / "list_eval_partition.txt").rename(tmp_path / "list_eval_partition.txt")
    (tmp_path / "Img" / "img").rename(tmp_path / "img")
    (tmp_path / "Eval").rmdir()
    (tmp_path / "Img").rmdir()
    assert InShop(tmp_path, size=4).split("test").fingerprint() == found["test"].fingerprint()


def test_an_item_in_two_categories_is_one_class(tmp_path):
    source = inshop(tmp_path)
    image(tmp_path / "Img" / "img/WOMEN/Skirts/id_00000030/9.jpg")
    file = tmp_path / "Eval" / "list_eval_partition.txt"
    file.write_text(file.read_text().replace("90\n", "91\n", 1) + "img/WOMEN/Skirts/id_00000030/9.jpg id_00000030 gallery\n")
    test = source.split("test")
    assert len(test.class_names) == 6
    assert test.labels.bincount().tolist() == [3, 3, 3, 3, 3, 4]


def test_people_in_no_pair_are_to_train_and_the_pairs_are_places_among_the_test(tmp_path):
    source = lfw(tmp_path)
    found = splits(source)
    assert {*found["train"].class_names, *found["val"].class_names} == {f"P_{person}" for person in range(8, 40)}
    assert (len(found["val"].class_names), len(found["train"])) == (3, 58)
    pairs = lfw_pairs(tmp_path / "pairs.txt")
    assert found["test"].ids == [f"lfw/{name}" for name in pairs.images]
    assert pairs.images[:3] == ["P_0/P_0_0001.jpg", "P_0/P_0_0002.jpg", "P_1/P_1_0002.jpg"]
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4
    named = [[pairs.images[place] for place in side.tolist()] for side in (pairs.left, pairs.right)]
    assert named[0][3:6] == ["P_3/P_3_0002.jpg", "P_4/P_4_0001.jpg", "P_5/P_5_0002.jpg"]
    assert named[1][3:6] == ["P_0/P_0_0002.jpg", "P_4/P_4_0002.jpg", "P_5/P_5_0001.jpg"]
    listed = found["test"].tuples
    assert torch.equal(listed.rows, torch.stack([pairs.left, pairs.right], 1))
    assert (listed.same.tolist(), listed.folds.tolist()) == (pairs.same.tolist(), pairs.fold.tolist())
    (tmp_path / "lfw").rename(tmp_path / "lfw-deepfunneled")
    assert LFW(tmp_path, size=4).split("test").fingerprint() == found["test"].fingerprint()
    (tmp_path / "lfw-deepfunneled" / "P_0" / "P_0_0001.jpg").unlink()
    less = LFW(tmp_path, size=4).split("test")
    assert less.tuples.where == [f"pairs.txt, pair {row}" for row in (2, 4, 5, 6, 7, 8)]
    assert [tuple(less.ids[row].partition("/")[2] for row in rows) for rows in less.tuples.rows.tolist()] == [
        (pairs.images[left], pairs.images[right])
        for left, right in zip(pairs.left[[1, *range(3, 8)]], pairs.right[[1, *range(3, 8)]], strict=True)
    ]


def test_faces_are_judged_by_the_ten_fold_protocol_with_no_threshold_of_their_own(tmp_path):
    source = lfw(tmp_path)
    model = Bundle(
        {
            "encoder": {"_target_": "siamese.encoders.Flatten", "input_shape": [3, 4, 4]},
            "distance": {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"},
            "preprocessing": {"_target_": "siamese.bundle.Standardize", "mean": [0.5] * 3, "std": [0.2] * 3},
        }
    )
    results = judging.judge(model, SiameseData(source, None))
    test = source.split("test")
    embeddings = model.embed(test.inputs)
    scores = torch.cosine_similarity(*embeddings[test.tuples.rows.T], dim=1)
    wanted, _, _ = evaluate_pairs(scores, test.tuples.same, test.tuples.folds, model.threshold)
    assert results["test"].figures["accuracy_2fold"] == wanted["accuracy_2fold"]
    assert results["test"].figures["auc"] == wanted["auc"]
    assert "map_at_r" in results["val"].figures
    assert "f1" not in results["test"].figures, "nobody has fitted its threshold on other pairs"


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        (1, "10", r"pairs.txt, line 1 must be the number of folds and of pairs of each kind in them, as in 10 300"),
        (1, "3\t2", r"pairs.txt has 8 pairs, not 3 folds x 2 x 2"),
        (2, "P_0\t1\tP_1\t2", r"pairs.txt, line 2 must be a name and two numbers, of the same: it is 'P_0\\t1\\tP_1\\t2'"),
        (5, "P_0\t1\t2", r"pairs.txt, line 5 must be two names, each with a number, of different: it is"),
        (7, "P_5\tx\t1", r"pairs.txt, line 7 must be a name and two numbers"),
    ],
)
def test_a_broken_list_of_pairs_is_named_with_its_line(tmp_path, line, words, message):
    source = lfw(tmp_path)
    lines = (tmp_path / "pairs.txt").read_text().splitlines()
    lines[line - 1] = words
    write(tmp_path / "pairs.txt", lines)
    with pytest.raises(ValueError, match=message):
        lfw_pairs(tmp_path / "pairs.txt")
    with pytest.raises(ValueError, match=rf"{message}.*: unpack anew what http://vis-www"):
        source.split("train")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cub200", "CUB_200_2011/images.txt"),
        ("cub200", "CUB_200_2011/image_class_labels.txt"),
        ("cars196", "names.csv"),
        ("cars196", "anno_test.csv"),
        ("sop", "Stanford_Online_Products/Ebay_test.txt"),
        ("inshop", "Eval/list_eval_partition.txt"),
        ("lfw", "pairs.txt"),
    ],
)
def test_a_list_that_is_missing_or_broken_is_named_with_where_it_comes_from(tmp_path, name, file):
    source = LAYOUTS[name](tmp_path)
    site = re.escape(source.site)
    for broken in ("x\n" * 9, *[""] * (file != "anno_test.csv")):  # without it there are half the images, of which a finding tells
        (tmp_path / file).write_text(broken)
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / file))}.*: unpack anew what {site} offers"):
            source.split("train")
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path / file))} cannot be read .*: unpack there what {site} offers"):
        source.split("train")
    with pytest.raises(FileNotFoundError, match=rf"nowhere cannot be read .*: unpack there what {site} offers"):
        type(source)(tmp_path / "nowhere").split("train")


def test_lists_that_were_cut_short_and_images_that_are_missing_are_told_of(tmp_path):
    source = cub200(tmp_path)
    (tmp_path / "CUB_200_2011" / "images" / "150.Bird_150" / "Bird_2.jpg").unlink()
    assert len(source.split("test")) == 199
    told, missing = source.findings()
    assert (told.serious, missing.serious) == (True, True)
    assert told.where == ["train: 100 classes and 200 images, not 100 and 5,864", "test: 100 classes and 200 images, not 100 and 5,924"]
    assert missing.where == ["CUB_200_2011/images/150.Bird_150/Bird_2.jpg (there is no such file)"]


def test_an_in_shop_list_that_is_cut_short_or_has_an_unknown_word_is_refused(tmp_path):
    source, file = inshop(tmp_path), tmp_path / "Eval" / "list_eval_partition.txt"
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("img/")])
    with pytest.raises(ValueError, match=r"list_eval_partition.txt lists 89 images, but in line 1 says '90'"):
        source.split("test")
    file.write_text(whole.replace(" query", " probe", 1))
    with pytest.raises(
        ValueError, match=r"list_eval_partition.txt, line 75 must be an image, an item and train, query or gallery: it is 'img/"
    ):
        source.split("test")


def test_only_listing_is_of_their_own():
    with pytest.raises(NotImplementedError):
        Benchmark(".").split("train")
    with pytest.raises(ValueError, match="fit=squeeze"):
        LFW(".", fit="squeeze")
