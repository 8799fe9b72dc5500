"""References in Qdrant: the same answers as from memory, and a command line that says what is wrong and goes on where it stopped."""

import http.server
import json
import socket
import sys
import threading
from collections import Counter
from functools import partial

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from qdrant_client import QdrantClient, models

import recognize
import siamese.qdrant
from siamese.bundle import Bundle
from siamese.decision import Decision
from siamese.distances import LearnedDistance, scores
from siamese.gallery import Gallery
from siamese.qdrant import QdrantGallery
from siamese.recognition import Recognizer


def learned(**options) -> LearnedDistance:
    distance = LearnedDistance(8, **options)
    with torch.no_grad():
        distance.weight.copy_(torch.linspace(-1, 2, 8))
        distance.weight[3] = 0
    return distance


DISTANCES = {
    "cosine": CosineSimilarity,
    "dot product": lambda: DotProductSimilarity(normalize_embeddings=False),
    "euclidean": LpDistance,
    "euclidean as it is": lambda: LpDistance(normalize_embeddings=False),
    "learned": learned,
    "learned of unit length": lambda: learned(normalize_embeddings=True),
}


def references(seed: int = 0, count: int = 90, classes: int = 9):
    """Embeddings, two thirds of them of one class, with labels and ids; the name of one class looks like a UUID."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 8, generator=generator) + 1
    numbers = torch.randint(1, classes, (count,), generator=generator)
    numbers[: 2 * count // 3] = 0
    return embeddings, [f"{n:032x}" if n == 5 else f"class {n}" for n in numbers.tolist()], [f"photo {n}" for n in range(count)]


@pytest.fixture(autouse=True)
def small_requests(monkeypatch):
    monkeypatch.setattr(siamese.qdrant, "_REFERENCES", 7)
    monkeypatch.setattr(siamese.qdrant, "_QUERIES", 4)
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)


def both(distance) -> tuple[Gallery, QdrantGallery]:
    galleries = Gallery(distance, 8), QdrantGallery(distance, 8, ":memory:", "people")
    embeddings, labels, ids = references()
    for gallery in galleries:
        gallery.add(labels, embeddings, ids)
    return galleries


def assert_alike(memory: Gallery, qdrant: QdrantGallery, k: int):
    queries = references(seed=1, count=10)[0]
    for mine, theirs in zip(qdrant.search(queries, k), memory.search(queries, k), strict=True):
        assert [(match.label, match.reference) for match in mine] == [(match.label, match.reference) for match in theirs]
        assert [match.score for match in mine] == pytest.approx([match.score for match in theirs], abs=1e-4)


@pytest.mark.parametrize("name", DISTANCES)
def test_it_answers_as_a_gallery_in_memory_does(name):
    distance = DISTANCES[name]()
    memory, qdrant = both(distance)
    assert len(qdrant) == 90
    assert qdrant.classes() == memory.classes()
    for k in (1, 3, 40):
        assert_alike(memory, qdrant, k)
    embeddings, labels, _ = references()
    query = references(seed=1, count=1)[0]
    best = scores(distance, query, embeddings)[0].max()
    assert qdrant.search(query, 1)[0][0].score == pytest.approx(best.item(), abs=1e-4)

    kept, ids = memory.of("class 0")
    mine, names = qdrant.of("class 0")
    order = [ids.index(one) for one in names]
    assert sorted(names) == sorted(ids)
    assert torch.allclose(mine, kept[order], atol=1e-6)

    again = -embeddings[:3]
    for gallery in (memory, qdrant):
        gallery.add([labels[0], labels[1], "new"], again, ["photo 0", "photo 1", "photo 0"])
        assert len(gallery) == 91
        assert gallery.remove("class 1") == labels.count("class 1")
    assert qdrant.classes() == memory.classes()
    assert_alike(memory, qdrant, 3)
    for call in (qdrant.remove, qdrant.of):
        with pytest.raises(KeyError):
            call("class 1")


def test_a_server_is_asked_for_the_classes_by_their_number():
    gallery = QdrantGallery(CosineSimilarity(), 8, ":memory:", "people")
    labels = [f"class {n % 23}" for n in range(90)]
    gallery.add(labels, references()[0], references()[2])
    assert gallery._facet(limit=2) == Counter(labels)


def test_what_cannot_be_is_refused():
    for distance in (LpDistance(power=2), LpDistance(p=1), SNRDistance()):
        with pytest.raises(ValueError, match="Qdrant cannot compare by"):
            QdrantGallery(distance, 8, ":memory:", "people")
    gallery = QdrantGallery(CosineSimilarity(), 8, ":memory:", "people")
    assert (len(gallery), gallery.classes()) == (0, {})
    for call in (gallery.remove, gallery.of):
        with pytest.raises(KeyError):
            call("nobody")
    with pytest.raises(ValueError, match="nothing is enrolled"):
        gallery.search(torch.ones(1, 8))
    with pytest.raises(ValueError, match="among them y"):
        gallery.add(["a", "b"], torch.tensor([[1.0] * 8, [float("nan")] * 8]), ["x", "y"])
    assert not gallery.exists
    gallery.add(["a"], torch.ones(1, 8), ["x"])
    with pytest.raises(ValueError, match="prototype is for a gallery that is a file"):
        gallery.search(torch.ones(1, 8), rule="prototype")
    with pytest.raises(ValueError, match="queries are"):
        gallery.search(torch.ones(1, 9))


# With a model


def model(seed: int = 0, size: int = 8) -> Bundle:
    torch.manual_seed(seed)
    parts = {
        "encoder": {"_target_": "siamese.encoders.MLP", "input_shape": [3], "hidden": [8], "embedding_size": size},
        "distance": {"_target_": "siamese.distances.LearnedDistance"},
        "preprocessing": {"_target_": "siamese.bundle.Standardize"},
        "reader": {"_target_": "siamese.data.reading.RowReader", "columns": {"weight": 2.0, "colour": ["blue", "red"]}},
    }
    rates = [[-0.0001, 0.0001, 0.5], [-0.01, 0.01, 0.1], [-0.1, 0.05, 0.04]]
    return Bundle(parts, Decision("equal_error", -0.1, 0.05, 0.04, 400, 90_000, 20.0, 2.0, rates), {"dataset": {}})


def rows(*names: str) -> list[str]:
    return [json.dumps({"weight": float(name[1:]), "colour": {"b": "blue", "r": "red"}[name[0]]}) for name in names]


def test_a_collection_is_of_one_model(tmp_path):
    place = partial(QdrantGallery, place=str(tmp_path / "store"), collection="people")
    model().save(tmp_path / "model.safetensors")
    people = Recognizer.load(tmp_path / "model.safetensors", gallery=place)
    assert not (tmp_path / "store").exists(), "to look is to change nothing"
    people.enrol("Ada", {"weight": 1, "colour": "red"})
    people.enrol("Bob", {"weight": 3, "colour": "blue"})
    people.save(tmp_path / "people.gallery")
    assert people.identify({"weight": 1.01, "colour": "red"}, threshold=-0.1)[0].label == "Ada"
    with pytest.raises(ValueError, match="in use by another program"):
        Recognizer.load(tmp_path / "people.gallery", gallery=place)
    del people
    people = Recognizer.load(tmp_path / "people.gallery", gallery=place)
    assert people.gallery.classes() == {"Ada": 1, "Bob": 1}
    assert people.remove("Bob") == 1
    (tmp_path / "people.gallery").write_bytes((tmp_path / "people.gallery").read_bytes())
    people.save()  # what is in the file has not changed
    del people
    for other, why in ((model(1), "another model has made"), (model(size=9), "does not hold 9 numbers with the distance Manhattan")):
        with pytest.raises(ValueError, match=why):
            Recognizer(other, place(other.distance, other.encoder.embedding_size))
    with pytest.raises(ValueError, match="embeddings have 9 numbers, the gallery's 8"):
        Recognizer(model(size=9), place(LearnedDistance(8), 8))
    client = QdrantClient(path=str(tmp_path / "store"))
    client.create_collection("photos", vectors_config=models.VectorParams(size=8, distance="Manhattan"))
    client.close()
    with pytest.raises(ValueError, match="is of something else"):
        Recognizer(model(), QdrantGallery(model().distance, 8, tmp_path / "store", "photos"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(arguments) -> (exit code, what was printed, what was said), in a folder with two models."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        model(seed).save(f"model{seed}.safetensors")

    def run(*arguments):
        code = recognize.main(list(arguments))
        out, err = capsys.readouterr()
        if code == 2:
            assert err.count("error: ") == err.count("\n") == 1, "one sentence, and nothing else"
        return code, out, err

    return run


BEGIN = ("enrol", "people.gallery", "--model", "model0.safetensors", "--qdrant", "store", "--as")


def test_the_command_line_from_the_first_reference_to_the_last(run, tmp_path):
    assert run(*BEGIN, "Ada", *rows("r1", "r2")) == (0, "2 enrolled: people.gallery has 2 references of 1 classes\n", "")
    again = run("enrol", "people.gallery", "--qdrant", "store", "--as", "Ada", *rows("r2", "r3"))[1]
    assert again == "2 enrolled, of which 1 took another's place: people.gallery has 3 references of 1 classes\n"
    assert run("enrol", "people.gallery", "--qdrant", "store", "--as", "Bob", *rows("b9"))[0] == 0
    code, out, _ = run("identify", "people.gallery", "--qdrant", "store", "--json", "--threshold", "-0.01", *rows("r3", "b9", "b30"))
    assert (code, [answer["label"] for answer in json.loads(out)["answers"]]) == (1, ["Ada", "Bob", None])
    assert json.loads(run("show", "people.gallery", "--qdrant", "store", "--json")[1])["classes"] == {"Ada": 3, "Bob": 1}
    assert "has no class 'Eve': nothing is removed" in run("remove", "people.gallery", "--qdrant", "store", "Ada", "Eve")[2]
    assert run("remove", "people.gallery", "--qdrant", "store", "Ada")[1] == "3 references removed: 1 of 1 classes are left\n"
    assert json.loads(run("show", "people.gallery", "--qdrant", "store", "--json")[1])["classes"] == {"Bob": 1}
    assert run("verify", "--model", "people.gallery", *rows("r1", "r1"))[0] == 0, "which takes the model alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model0.safetensors", "model1.safetensors", "people.gallery", "store"]


@pytest.mark.parametrize("call", ["create_collection", "upsert"])
def test_an_enrolment_that_is_interrupted_goes_on(run, monkeypatch, tmp_path, call):
    real, calls = QdrantGallery._ask, []

    def interrupted(self, name, **arguments):
        calls.append(name)
        if calls.count("upsert") == 2 or (name, call) == ("create_collection", "create_collection"):
            raise KeyboardInterrupt
        return real(self, name, **arguments)

    many = rows(*(f"r{n}" for n in range(10)))
    monkeypatch.setattr(QdrantGallery, "_ask", interrupted)
    assert run(*BEGIN, "Ada", *many)[0] == 130
    assert (tmp_path / "people.gallery").exists() == (call == "upsert"), "the file comes after its collection"
    monkeypatch.setattr(QdrantGallery, "_ask", real)
    code, out, _ = run(*BEGIN, "Ada", *many)
    assert (code, out.endswith("people.gallery has 10 references of 1 classes\n")) == (0, True)


def test_what_the_command_line_refuses(run, tmp_path):
    assert run(*BEGIN, "Ada", *rows("r1"))[0] == 0
    one = rows("r1")
    for arguments, why in (
        (["identify", "people.gallery", *one], "are in Qdrant: say where, with --qdrant PLACE"),
        (["identify", "people.gallery", "--qdrant", "stroe", *one], "stroe has no collection people"),
        (["enrol", "people.gallery", "--qdrant", "stroe", "--as", "Ada", *one], "stroe has no collection people"),
        (["identify", "people.gallery", "--qdrant", "model0.safetensors", *one], "model0.safetensors"),
        (["identify", "people.gallery", "--qdrant", ":memory:", *one], ":memory: would be forgotten"),
        (["identify", "people.gallery", "--qdrant", "localhost:6333", *one], "must begin with http:// or https://"),
        (["identify", "people.gallery", "--qdrant", "http://localhost:99999", *one], "http://localhost:99999"),
        (["identify", "people.gallery", "--qdrant", "store", "--rule", "prototype", *one], "prototype is for a gallery that is a file"),
        (["enrol", "a:b.gallery", *BEGIN[2:-1], "--as", "x", *one], "Collection name cannot contain ':' char"),
    ):
        code, _, err = run(*arguments)
        assert (code, why in err) == (2, True), err
    assert not (tmp_path / "stroe").exists()
    (tmp_path / "people.gallery").rename(tmp_path / "old.gallery")
    begin = ["enrol", "people.gallery", "--qdrant", "store", "--as", "Bob", *rows("b1")]
    assert "holds references that another model has made" in run(*begin, "--model", "model1.safetensors")[2]
    code, out, err = run(*begin, "--model", "old.gallery")
    assert (code, out[:10]) == (0, "1 enrolled")
    assert err == "store holds 1 references of this model for people already: they stay\n"
    assert run("enrol", "own.gallery", "--model", "people.gallery", "--as", "Bob", *rows("b1"))[1].endswith("1 references of 1 classes\n")
    assert "holds its references itself" in run("show", "own.gallery", "--qdrant", "store")[2]


def test_without_the_client_the_remedy_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    assert "run `pip install -e '.[qdrant]'`" in run(*BEGIN, "Ada", *rows("r1"))[2]


def test_a_damaged_folder_is_said_to_be(run, tmp_path):
    assert run(*BEGIN, "Ada", *rows("r1"))[0] == 0
    (tmp_path / "store" / "meta.json").write_text("{")
    assert "store is damaged, or no folder of Qdrant" in run("show", "people.gallery", "--qdrant", "store")[2]


# Servers


@pytest.fixture
def server():
    """An HTTP server that is no Qdrant: (address, requests, answer), where answer is [status, body]."""
    requests, answer = [], [404, b"<html>nothing here</html>"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("api-key")))
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", requests, answer
        listening.shutdown()


def test_a_server_that_does_not_answer_as_it_should_is_named(run, server, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    begin = ["enrol", "people.gallery", "--model", "model0.safetensors", "--as", "Ada", *rows("r1"), "--qdrant"]
    code, _, err = run(*begin, nobody)
    assert (code, f"{nobody} cannot be reached as Qdrant: " in err) == (2, True), err
    place, requests, answer = server
    assert f"{place} says 404 to collection_exists: <html>" in run(*begin, place)[2]
    answer[:] = 200, b"<html>welcome</html>"
    assert f"{place} cannot be reached as Qdrant: " in run(*begin, place)[2]
    answer[:] = 403, b"Invalid API key"
    assert "set the environment variable QDRANT_API_KEY" in run(*begin, place)[2]
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with pytest.warns(UserWarning, match="insecure connection"):
        run(*begin, place)
    assert requests[-2:] == [("/collections/people/exists", None), ("/collections/people/exists", "secret")]
