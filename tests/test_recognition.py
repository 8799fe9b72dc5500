"""A recognizer: what is enrolled is found again, strangers are refused as promised, and its file can do no harm."""

import json
import os
import pathlib
import re
import stat
import threading

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

import siamese.recognition
from siamese.bundle import Bundle
from siamese.decision import Decision
from siamese.evaluation import evaluate
from siamese.recognition import Recognizer, name_of

COSINE = {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"}
IMAGES = {
    "encoder": {"_target_": "siamese.encoders.MLP", "input_shape": [1, 16, 16], "hidden": [16], "embedding_size": 6},
    "distance": COSINE,
    "preprocessing": {"_target_": "siamese.bundle.Standardize", "mean": [0.5], "std": [0.3]},
    "reader": {"_target_": "siamese.data.reading.ImageReader", "size": 16, "channels": 1},
}
TEXTS = {
    "encoder": {"_target_": "siamese.text_encoders.NGrams", "embedding_size": 64},
    "distance": COSINE,
    "preprocessing": {"_target_": "siamese.bundle.Unchanged"},
    "reader": {"_target_": "siamese.data.reading.TextReader", "max_bytes": 200},
}
ROWS = {
    "encoder": {"_target_": "siamese.encoders.MLP", "input_shape": [3], "hidden": [8], "embedding_size": 5},
    "distance": {"_target_": "siamese.distances.LearnedDistance"},
    "preprocessing": {"_target_": "siamese.bundle.Standardize"},
    "reader": {"_target_": "siamese.data.reading.RowReader", "columns": {"weight": 2.0, "colour": ["blue", "red"]}},
}
DECISION = Decision(
    "equal_error",
    0.9,
    0.05,
    0.04,
    400,
    90_000,
    20.0,
    -17.0,
    [[0.999, 0.0001, 0.5], [0.99, 0.001, 0.3], [0.95, 0.01, 0.1], [0.9, 0.05, 0.04]],
)


def model(parts: dict = IMAGES, seed: int = 0, decision: Decision | None = DECISION) -> Bundle:
    torch.manual_seed(seed)
    return Bundle(parts, decision, {"dataset": {}})


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def written(folder, count: int, seed: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"my photo ({n}).png") for n in range(count)]
    for path, image in zip(paths, pictures(count, seed), strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    return paths


# What is embedded


def test_all_ways_to_hand_over_an_image_give_the_same_embedding(tmp_path):
    people, paths = Recognizer(model()), written(tmp_path, 5)
    expected = people.model.embed(pictures(5))
    opened = [Image.open(path) for path in paths]
    data = [pathlib.Path(path).read_bytes() for path in paths]
    for inputs in (pictures(5), paths, opened, data, tuple(paths)):
        assert torch.allclose(people.embed(inputs), expected, atol=1e-6)
    assert torch.allclose(people.embed(paths[2]), expected[2:3], atol=1e-6)
    assert people.embed([]).shape == (0, 6)


def test_texts_and_rows_are_embedded_too():
    texts, rows = Recognizer(model(TEXTS)), Recognizer(model(ROWS))
    assert texts.embed(["how do I pay", "where is it"]).shape == (2, 64)
    assert rows.embed([{"weight": 1, "colour": "red"}]).shape == (1, 5)
    assert torch.equal(rows.embed({"weight": None, "colour": "green"}), rows.model.embed(torch.tensor([[2.0, 0, 0]])))


def test_what_cannot_be_read_is_named(tmp_path):
    paths = written(tmp_path, 2)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"cut\.png: it is no image"):
        Recognizer(model()).embed([*paths, str(tmp_path / "cut.png")])
    parts = {name: part for name, part in IMAGES.items() if name != "reader"}
    with pytest.raises(ValueError, match="does not say how a file becomes an input"):
        Recognizer(model(parts)).embed(paths)


def test_many_items_come_chunk_by_chunk_from_several_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(siamese.recognition, "_CHUNK", 3)
    people, paths = Recognizer(model()), written(tmp_path, 20)
    people.models.append(model())  # as a second GPU would
    paths[7] = str(tmp_path / "none.png")
    found = list(people.stream(paths))
    assert [start for start, _, _ in found] == list(range(0, 20, 3))
    assert [failed for _, _, failed in found if failed] == [{1: "there is no such file"}]
    kept = [n for n in range(20) if n != 7]
    assert torch.allclose(torch.cat([part for _, part, _ in found]), people.model.embed(pictures(20))[kept], atol=1e-6)
    assert [start for start, _, _ in people.stream(paths, done={0, 3, 9})] == [6, 12, 15, 18]
    assert not people.model.training


def test_large_images_are_embedded_few_at_a_time():
    parts = {**IMAGES, "reader": {**IMAGES["reader"], "size": 2048}}
    assert Recognizer(model(parts)).chunk == 4
    assert Recognizer(model()).chunk == 512


# What is decided


@pytest.fixture
def people() -> Recognizer:
    """Ten classes of one reference each."""
    people = Recognizer(model())
    people.enrol([f"person {n}" for n in range(10)], pictures(10), [f"{n}.png" for n in range(10)])
    return people


def test_who_is_enrolled_is_found_and_a_stranger_is_not(people):
    answers = people.identify(pictures(10), k=3, threshold=0.99)
    assert [answer.label for answer in answers] == [f"person {n}" for n in range(10)]
    assert all(len(answer.matches) == 3 for answer in answers)
    stranger = people.identify(pictures(1, seed=9), threshold=0.9999)[0]
    assert (stranger.label, stranger.reason) == (None, "below the threshold")
    assert stranger.matches[0].score < 0.9999


def test_two_classes_that_are_as_alike_are_not_chosen_between(people):
    people.enrol("twin", pictures(10)[3:4], ["twin.png"])
    one, other = people.identify(pictures(10)[2:4], threshold=0.5)
    assert one.label == "person 2"
    assert (other.label, other.reason) == (None, "too close to call")
    gap = one.matches[0].score - one.matches[1].score
    assert people.identify(pictures(10)[2:3], threshold=0.5, margin=gap * 1.01)[0].reason == "too close to call"
    assert people.identify(pictures(10)[2:3], threshold=0.5, margin=gap * 0.99)[0].label == "person 2"


def test_the_threshold_leaves_each_reference_its_share_of_the_false_alarms(people):
    assert people.threshold_for(0.1) == DECISION.at_far(0.01)[0] == 0.95
    assert people.threshold_for(0.01) == DECISION.at_far(0.001)[0] == 0.99
    assert people.false_alarms_at(0.95) == pytest.approx(0.1)
    people.enrol("person 0", pictures(90, seed=3))
    assert people.threshold_for(0.1) == 0.99, "a hundred references"
    assert people.threshold_for(0.1, "prototype") == 0.95, "of ten classes"
    assert people.threshold_for(1e-6) == 0.999, "as strict as validation can tell"
    assert people.false_alarms_at(0.999) == pytest.approx(100 * DECISION.finest), "and says what that means"
    with pytest.raises(ValueError, match="false alarms"):
        people.threshold_for(0)


def test_strangers_are_taken_for_somebody_no_more_often_than_promised():
    """Embeddings of many classes: half are for validation, of the other half some are enrolled."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(300, 6, generator=generator)
    embeddings = centres.repeat_interleave(12, 0) + 0.3 * torch.randn(3600, 6, generator=generator)
    labels = torch.arange(300).repeat_interleave(12)
    bundle = model()
    bundle.decision = Decision.of("equal_error", evaluate(embeddings[:1800], labels[:1800], bundle.distance))
    people = Recognizer(bundle)
    rows = torch.arange(1800, 1800 + 12 * 40, 12)  # one of each of 40 classes
    people.gallery.add([str(label) for label in labels[rows].tolist()], embeddings[rows], [str(row) for row in rows.tolist()])
    for rate in (0.5, 0.1):
        strangers = people.identify(embeddings[2400:], false_alarms=rate)
        share = np.mean([answer.label is not None for answer in strangers])
        assert share <= rate * 1.5, "1,200 strangers of 100 classes: these vary"
        assert share > rate / 6, "and the threshold is not absurdly strict"
    enrolled = people.identify(embeddings[1800 : 1800 + 12 * 40], false_alarms=0.1)
    right = [answer.label == str(label) for answer, label in zip(enrolled, labels[1800 : 1800 + 480].tolist(), strict=True)]
    assert np.mean(right) > 0.4


def test_without_a_decision_nobody_is_refused_and_nothing_promised():
    people = Recognizer(model(decision=None))
    people.enrol("one", pictures(1))
    assert people.identify(pictures(1, seed=4))[0].label == "one"
    assert people.false_alarms_at(0.5) is None
    with pytest.raises(ValueError, match="without a threshold"):
        people.verify(pictures(1), pictures(1))
    answer = people.verify(pictures(1), pictures(1), threshold=0.9)
    assert (answer.same, answer.far, answer.probability) == (True, None, None)


def test_a_verification_says_how_often_it_errs(people):
    images = pictures(2)
    answer = people.verify(images[:1], images[1:])
    expected = float(people.model.scores(*people.model.embed(images).double().split(1)))
    assert answer.score == pytest.approx(expected, abs=1e-6)
    assert answer.same == (expected >= 0.9)
    assert (answer.threshold, answer.far, answer.frr) == (0.9, 0.05, 0.04)
    assert answer.probability == pytest.approx(1 / (1 + np.exp(17 - 20 * expected)), abs=1e-6)
    strict = people.verify(images[:1], images[:1], threshold=0.99)
    assert (strict.same, strict.far, strict.frr) == (True, 0.001, 0.3)
    with pytest.raises(ValueError, match="one input and another, these are 2 and 1"):
        people.verify(images, images[:1])


def test_triage_tells_twins_and_references_in_the_wrong_class(people):
    people.enrol("twin", pictures(10)[3:4], ["twin.png"])
    people.enrol("person 5", pictures(10)[6:7], ["wrong.png"])
    found = people.triage(threshold=0.9999)
    assert {(one, other) for one, other, _ in found.close} == {("person 3", "twin"), ("person 5", "person 6")}
    assert all(score > 0.9999 for _, _, score in found.close)
    worst = found.odd[0]
    assert worst[:2] == ("person 5", "wrong.png")
    assert worst[3] == "person 6"
    assert worst[2] < worst[4]
    people.enrol("person 0", pictures(10)[:1], ["again.png"])
    assert not [one for one in people.triage(["person 0"]).odd if one[0] == "person 0"], "two of the same"
    people.enrol("person 0", pictures(1, seed=31), ["far.png"])
    far = next(one for one in people.triage(["person 0"]).odd if one[1] == "far.png")
    assert far[2] < people.model.threshold
    alone = Recognizer(model())
    alone.enrol("only", torch.cat([pictures(1), pictures(1), pictures(1, seed=31)]), ["a", "b", "far"])
    assert alone.triage().odd == [("only", "far", pytest.approx(far[2], abs=1e-6), "", None)]
    assert people.triage(["person 0", "person 3"], threshold=0.9999).close == [("person 3", "twin", pytest.approx(1))]


# Files


def test_a_gallery_survives_its_file(people, tmp_path):
    people.enrol("Ада \x1b[31m", pictures(3, seed=2))
    people.save(tmp_path / "people.gallery")
    read = Recognizer.load(tmp_path / "people.gallery")
    assert read.gallery.classes() == people.gallery.classes()
    assert read.fingerprint == people.fingerprint
    assert read.model.decision == DECISION
    assert read.identify(pictures(4, seed=2)) == people.identify(pictures(4, seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["people.gallery"]
    read.remove("Ада \x1b[31m")
    read.save()
    assert "Ада \x1b[31m" not in Recognizer.load(tmp_path / "people.gallery").gallery.classes()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat(tmp_path / "people.gallery").st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("parts", [TEXTS, ROWS], ids=["texts", "rows"])
def test_so_do_those_of_texts_and_rows(parts, tmp_path):
    people = Recognizer(model(parts))
    inputs = ["how do I pay", "where is it"] if parts is TEXTS else [{"weight": 1, "colour": "red"}, {"weight": 7}]
    people.enrol(["one", "other"], inputs)
    people.save(tmp_path / "g")
    found = Recognizer.load(tmp_path / "g").identify(inputs, threshold=-100.0)
    assert [answer.label for answer in found] == ["one", "other"]


def test_an_empty_gallery_survives_too(tmp_path):
    Recognizer(model()).save(tmp_path / "g.gallery")
    assert len(Recognizer.load(tmp_path / "g.gallery").gallery) == 0


def test_a_recognizer_begins_with_a_bundle(tmp_path):
    model().save(tmp_path / "bundle.safetensors")
    begun = Recognizer.load(tmp_path / "bundle.safetensors")
    assert len(begun.gallery) == 0
    with pytest.raises(ValueError, match="no file yet"):
        begun.save()
    with pytest.raises(FileNotFoundError):
        Recognizer.load(tmp_path / "none.gallery")


def test_what_another_process_has_saved_meanwhile_is_not_lost(people, tmp_path):
    people.save(tmp_path / "people.gallery")
    one, other = (Recognizer.load(tmp_path / "people.gallery") for _ in range(2))
    one.enrol("first", pictures(1, seed=7))
    one.save()
    other.enrol("second", pictures(1, seed=8))
    with pytest.raises(ValueError, match="changed by somebody else"):
        other.save()
    assert "first" in Recognizer.load(tmp_path / "people.gallery").gallery.classes()
    one.enrol("third", pictures(1, seed=9))
    one.save()


def parts_of(path) -> tuple[dict, dict]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["gallery"])  # noqa: SIM118


def packed(texts) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)


HARM = {
    "another size": lambda tensors, told: tensors.update({"references.0": torch.ones(10, 5)}),
    "another type": lambda tensors, told: tensors.update({"references.0": torch.ones(10, 6, dtype=torch.float64)}),
    "no matrix": lambda tensors, told: tensors.update({"references.0": torch.ones(60)}),
    "too few": lambda tensors, told: tensors.update({"references.0": torch.ones(9, 6)}),
    "no references": lambda tensors, told: tensors.pop("references.0"),
    "no labels": lambda tensors, told: tensors.pop("labels"),
    "labels of floats": lambda tensors, told: tensors.update({"labels": torch.zeros(10)}),
    "a label without class": lambda tensors, told: tensors.update({"labels": torch.arange(1, 11)}),
    "a negative label": lambda tensors, told: tensors.update({"labels": torch.arange(-1, 9)}),
    "a class without reference": lambda tensors, told: tensors.update({"labels": torch.zeros(10, dtype=torch.int64)}),
    "ids that are no texts": lambda tensors, told: tensors.update({"ids.0": packed(list(range(10)))}),
    "ids that are no list": lambda tensors, told: tensors.update({"ids.0": packed({"a": 1})}),
    "ids that are no JSON": lambda tensors, told: tensors.update({"ids.0": torch.zeros(10, dtype=torch.uint8)}),
    "ids of half a letter": lambda tensors, told: tensors.update({"ids.0": torch.full((10,), 0xC3, dtype=torch.uint8)}),
    "ids without end": lambda tensors, told: tensors.update({"ids.0": torch.full((200_000,), ord("["), dtype=torch.uint8)}),
    "no ids": lambda tensors, told: tensors.pop("ids.0"),
    "a name twice": lambda tensors, told: tensors.update({"names": packed(["person 0"] * 10)}),
    "an empty name": lambda tensors, told: tensors.update({"names": packed([""] + [f"person {n}" for n in range(1, 10)])}),
    "a path out of it": lambda tensors, told: tensors.update({"../../evil": torch.ones(1)}),
    "one more tensor": lambda tensors, told: tensors.update({"more": torch.ones(1)}),
    "a NaN": lambda tensors, told: tensors["references.0"].__setitem__((3, 2), float("nan")),
    "a changed number": lambda tensors, told: tensors["references.0"].__setitem__((3, 2), 0.5),
    "a changed id": lambda tensors, told: tensors.update({"ids.0": packed([f"{n}.jpg" for n in range(10)])}),
    "a changed weight": lambda tensors, told: tensors[next(iter(sorted(n for n in tensors if n.startswith("model."))))].add_(1),
    "a missing weight": lambda tensors, told: tensors.pop(next(n for n in tensors if n.startswith("model."))),
    "another version": lambda tensors, told: told.update(version=2),
    "no version": lambda tensors, told: told.pop("version"),
    "no parts": lambda tensors, told: told.pop("parts"),
    "no model": lambda tensors, told: told.pop("model"),
    "no checksum": lambda tensors, told: told.pop("crc32"),
    "a class that runs code": lambda tensors, told: told["parts"].update(encoder={"_target_": "os.system", "command": "touch HARM"}),
    "a reader that is none": lambda tensors, told: told["parts"].update(reader={"_target_": "siamese.bundle.Bundle", "parts": {}}),
    "no configuration": lambda tensors, told: told.update(config="none"),
    "a decision of words": lambda tensors, told: told["decision"].update(threshold="high"),
    "references elsewhere": lambda tensors, told: told.update(elsewhere=True),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_gallery_is_refused_in_one_line(people, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "people.gallery"
    people.save(path)
    tensors, told = parts_of(path)
    HARM[harm](tensors, told)
    safetensors.torch.save_file(tensors, path, {"gallery": json.dumps(told)})
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        Recognizer.load(path)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["people.gallery"], "and nothing was run"


@pytest.mark.parametrize("cut", [4, 100, 2000, -1])
def test_a_gallery_that_is_cut_off_is_refused(people, tmp_path, cut):
    people.save(tmp_path / "whole.gallery")
    (tmp_path / "people.gallery").write_bytes((tmp_path / "whole.gallery").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"people\.gallery"):
        Recognizer.load(tmp_path / "people.gallery")


@pytest.mark.parametrize("metadata", ["[]", "no json", "{}", "[" * 100_000])
def test_metadata_that_is_none_is_refused(people, tmp_path, metadata):
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "p.gallery", {"gallery": metadata})
    with pytest.raises(ValueError, match=r"p\.gallery"):
        Recognizer.load(tmp_path / "p.gallery")


def test_a_save_that_fails_leaves_the_old_file(people, tmp_path, monkeypatch):
    path = tmp_path / "people.gallery"
    people.save(path)
    before = path.read_bytes()
    people.enrol("more", pictures(1, seed=5))

    def full(tensors, file, metadata):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        people.save()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["people.gallery"]


def test_names_stand_for_their_inputs():
    assert name_of("a/b c.png") == "a/b c.png"
    assert len(name_of("x" * 1000)) <= 200
    assert name_of("x" * 1000) != name_of("x" * 1001)
    digests = {name_of(item) for item in (pictures(1)[0], pictures(2)[1], b"abc", b"abd", {"a": 1}, Image.new("L", (2, 2)))}
    assert len(digests) == 6
    assert name_of(pictures(1)[0]) == name_of(pictures(3)[0])


def test_a_service_may_enrol_while_it_identifies(people):
    failures = []

    def serve(thread: int) -> None:
        try:
            for n in range(40):
                people.enrol(f"{thread}-{n}", pictures(2, seed=100 * thread + n))
                if n % 7 == 0:
                    people.remove(f"{thread}-{n}")
                people.identify(pictures(3, seed=5), threshold=-1.0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(people.gallery) == 10 + 2 * 4 * (40 - 6)
