"""What recognition costs beside faiss and the bare encoder, and how far its decisions can be trusted on characters and intents.

    python scripts/benchmark_recognition.py --check                          # costs: a few minutes
    python scripts/benchmark_recognition.py --full --model FOLDER --json docs/recognition.json   # trains on Omniglot and CLINC150 first

CPU seconds on one thread, ours and the other in turn, medians. Omniglot and CLINC150 lie in SIAMESE_DATA_DIR; FOLDER holds an encoder of
texts (the default one of conf/encoder/transformer.yaml is a download). One drawing, or one question, of each class is enrolled, all
others ask. `unknown`: half of the classes are enrolled, or all intents while questions of none ask.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from benchmark_default import ROOT
from benchmark_evaluation import row, seconds
from benchmark_texts import trained
from PIL import Image
from pytorch_metric_learning.distances import CosineSimilarity
from torch.nn.functional import normalize

from siamese.bundle import Bundle
from siamese.data.samples import Samples
from siamese.gallery import Gallery
from siamese.protocols import identify
from siamese.recognition import Recognizer
from siamese.record import write_json

SIZE, QUERIES, DRAWS = 512, 256, 20


def random(count: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def filled(count: int, each: int = 1, part: int = 2**14) -> Gallery:
    """References of classes that have `each` of them, added in parts, so that they are not held twice."""
    gallery = Gallery(CosineSimilarity(), SIZE)
    for start in range(0, count, part):
        numbers = range(start, min(start + part, count))
        gallery.add([str(number // each) for number in numbers], random(len(numbers), seed=start), [str(number) for number in numbers])
    return gallery


def search(count: int = 100_000) -> list[dict]:
    gallery, queries = filled(count), random(QUERIES, seed=1)
    index = faiss.IndexFlatIP(SIZE)
    index.add(torch.cat(gallery.blocks).numpy())
    found = [[int(match.label) for match in matches] for matches in gallery.search(queries, 5)]
    same = (np.array(found) == index.search(queries.numpy(), 5)[1]).mean()
    ours, theirs = seconds(lambda: gallery.search(queries, 5), lambda: index.search(queries.numpy(), 5), repeats=21)
    name = f"{count:,} x {SIZE}, {QUERIES} queries"
    rows = [row(f"{name}: / faiss IndexFlatIP", ours / theirs, 1.2, "x"), row(name, ours, None, "s")]
    return [*rows, row(f"{name}: neighbours that are faiss's", float(same), 0.999, "")]


def print_peak(path: str) -> None:
    """GB that a gallery takes, read from a file and searched, on top of a process that has done so with a small one."""

    def held(name: str) -> float:
        return next(int(line.split()[1]) * 1.024e-6 for line in Path("/proc/self/status").open() if line.startswith(name))

    Recognizer.load(f"{path}.small").gallery.search(random(QUERIES), 5)
    before = held("VmRSS")
    Recognizer.load(path).gallery.search(random(QUERIES), 5)
    print(held("VmHWM") - before)


def memory(count: int = 1_000_000) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        people, path = Recognizer(bundle({"_target_": "siamese.encoders.Conv4", "embedding_size": SIZE}, 32, 1)), f"{folder}/people.gallery"
        for number, name in ((1000, f"{path}.small"), (count, path)):
            people.gallery = filled(number, each=10)
            people.save(name)
        del people
        peak = float(subprocess.run([sys.executable, __file__, "--peak", path], capture_output=True, text=True, check=True).stdout)
    return [row(f"{count:,} x {SIZE} of {count // 10:,} classes in memory, read and searched", peak, 2.3, "GB")]


def bundle(encoder: dict, size: int, channels: int) -> Bundle:
    shape = {"input_shape": [channels, size, size]}
    parts = {
        "encoder": {**encoder, **shape},
        "distance": {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"},
        "preprocessing": {"_target_": "siamese.bundle.Standardize"},
        "reader": {"_target_": "siamese.data.reading.ImageReader", "size": size, "channels": channels},
    }
    torch.manual_seed(0)
    return Bundle(parts).eval()


def enrolment(count: int = 10_000) -> list[dict]:
    rows = []
    for name, encoder, size, channels, some in (
        ("conv4, 32 x 32", {"_target_": "siamese.encoders.Conv4"}, 32, 1, count),
        ("resnet18, 64 x 64", {"_target_": "siamese.encoders.Timm", "model": "resnet18"}, 64, 3, count // 5),
    ):
        people = Recognizer(bundle(encoder, size, channels))
        images = torch.randint(256, (some, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        names = [str(number) for number in range(some)]

        def enrol(people=people, images=images, names=names) -> None:
            people.gallery = Gallery(people.gallery.distance, people.gallery.embedding_size)
            people.enrol(names, images, names)

        bare, ours = seconds(lambda p=people, i=images: p.model.embed(i), enrol, repeats=3)
        rows.append(row(f"enrol {some:,} images in memory, {name}: throughput / bare encoder", bare / ours, 0.9, "x"))
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for number, image in enumerate(images):
                paths.append(f"{folder}/{number}.png")
                Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy() if channels == 1 else image.permute(1, 2, 0).numpy()).save(
                    paths[-1]
                )

            def files(people=people, paths=paths, names=names) -> None:
                people.gallery = Gallery(people.gallery.distance, people.gallery.embedding_size)
                people.enrol(names, paths, names)

            bare, ours = seconds(lambda p=people, i=images: p.model.embed(i), files, repeats=3)
        rows.append(row(f"enrol {some:,} files, {name}: throughput / bare encoder", bare / ours, None, "x"))
    return rows


def killed(count: int = 6_000) -> list[dict]:
    """An archive of files, its command killed in the middle and repeated: is the file the same?"""
    with tempfile.TemporaryDirectory() as folder:
        bundle({"_target_": "siamese.encoders.Conv4"}, 32, 1).save(f"{folder}/model.safetensors")
        os.mkdir(f"{folder}/archive")
        noise = np.random.default_rng(0)
        for number in range(count):
            Image.fromarray(noise.integers(0, 256, (105, 105), dtype=np.uint8)).save(f"{folder}/archive/{number}.png")
        command = [sys.executable, str(ROOT / "recognize.py"), "embed", "--model", "model.safetensors", "archive", "-o"]
        subprocess.run([*command, "whole.npz"], cwd=folder, check=True, capture_output=True)
        started = subprocess.Popen([*command, "part.npz"], cwd=folder)
        while len(list(Path(folder, "part.npz.parts").glob("*.safetensors"))) < 3:
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
        started.wait()
        done = subprocess.run([*command, "part.npz"], cwd=folder, check=True, capture_output=True, text=True)
        resumed = int(done.stderr.partition(" of ")[0].replace(",", ""))
        same = Path(folder, "part.npz").read_bytes() == Path(folder, "whole.npz").read_bytes()
    rows = [row(f"embed {count:,} files, killed and repeated: the same file", float(same), 1.0, "")]
    return [*rows, row("of which were embedded before it was killed", resumed, None, "files")]


def characters() -> list[dict]:
    """Omniglot's 20 evaluation alphabets, by a network trained on the background set."""
    from siamese.config import build, compose

    model, figures = trained("experiment=omniglot_semihard")
    return recognised("omniglot", model, figures, build(compose(["dataset=omniglot"]), "dataset").split("test"))


def intents(encoder: str | None) -> list[dict]:
    """CLINC150's 50 test intents, by a network trained on 80 others."""
    from siamese.config import build, compose

    mine = [f"encoder.model={encoder}"] if encoder else []
    text = ["dataset=clinc150", "encoder=transformer", "augmentation=none", "encoder.max_length=48", *mine]
    model, figures = trained(*text, "trainer.max_epochs=1")
    source = build(compose(text), "dataset")
    return recognised("clinc150", model, figures, source.split("test"), source.official("oos_test"))


def recognised(name: str, model: Bundle, figures: dict[str, float], samples: Samples, strangers: Samples | None = None) -> list[dict]:
    """Rates of identification with one example enrolled, of strangers refused, and of the verification that validation has promised."""
    embeddings, labels = model.embed(samples.inputs), samples.labels
    classes = int(labels.max()) + 1
    others = None if strangers is None else model.embed(strangers.inputs)
    rows = []
    for size in dict.fromkeys(min(size, classes) for size in (20, 100, classes)):
        rates = [figures_of(model, embeddings, labels, size, 0, seed)["first"] for seed in range(DRAWS)]
        rows.append(row(f"{name}, one of each of {size} classes: identified", float(np.mean(rates)), None, ""))
    half = classes if others is not None else classes // 2
    found = [figures_of(model, embeddings, labels, half, classes - half, seed, others) for seed in range(DRAWS)]
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    rows.append(row(f"{name}, {half} classes and strangers: detected and identified at 1 % false alarms", mean["best"], None, ""))
    rows.append(row(f"{name}: the same, by the threshold that validation gives for 1 %", mean["detected"], None, ""))
    rows.append(row(f"{name}: false alarms by that threshold", mean["alarms"], 0.02, ""))
    decision = model.decision
    rows.append(row(f"{name}, verification: false accepts promised", decision.far, None, ""))
    rows.append(row(f"{name}, verification: false accepts on test", figures["test/far"], None, ""))
    rows.append(row(f"{name}, verification: false refusals promised", decision.frr, None, ""))
    rows.append(row(f"{name}, verification: false refusals on test", figures["test/frr"], None, ""))
    rows.append(row(f"{name}, calibration error on test", figures["test/calibration_error"], None, ""))
    return rows


def figures_of(model: Bundle, embeddings, labels, enrolled: int, unknown: int, seed: int, others=None) -> dict[str, float]:
    """One draw of classes, and of one example of each that is enrolled."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(labels.max()) + 1, generator=draw)[: enrolled + unknown]
    members = [(labels == label).nonzero().flatten() for label in order.tolist()]
    first = torch.stack([rows[torch.randint(len(rows), (), generator=draw)] for rows in members[:enrolled]])
    probes = torch.cat(members)
    probes = probes[~torch.isin(probes, first)]
    asked, of = embeddings[probes], labels[probes]
    if others is not None:
        asked, of = torch.cat([asked, others]), torch.cat([of, torch.full((len(others),), -1)])
    people = Recognizer(model)
    people.gallery.add([str(label) for label in labels[first].tolist()], embeddings[first], [str(row) for row in first.tolist()])
    known = torch.isin(of, labels[first]).tolist()
    answers = people.identify(asked, k=2, false_alarms=0.01)
    right = [answer.matches[0].label == str(label) for answer, label, one in zip(answers, of.tolist(), known, strict=True) if one]
    detected = [answer.label == str(label) for answer, label, one in zip(answers, of.tolist(), known, strict=True) if one]
    told = {"first": float(np.mean(right)), "detected": float(np.mean(detected))}
    if not all(known):
        alarms = [answer.label is not None for answer, one in zip(answers, known, strict=True) if not one]
        told["alarms"] = float(np.mean(alarms))
        told["best"] = identify(asked, of, embeddings[first], labels[first], model.distance, (0.01,))[0].get("dir_at_far_1e2", float("nan"))
    return told


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target: at least that of throughput and of what is the same, at most that of all else."""
    out = []
    for entry in (entry for entry in rows if entry["target"] is not None):
        more = any(word in entry["name"] for word in ("throughput", "the same file", "neighbours"))
        if entry["value"] < entry["target"] if more else entry["value"] > entry["target"]:
            out.append(f"{entry['name']}: {entry['value']:g} misses {entry['target']:g} {entry['unit']}")
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face encoder, by its folder or name")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="train on Omniglot and CLINC150, and recognise: half an hour")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        sys.exit(print_peak(arguments.peak))
    if arguments.model and os.path.exists(arguments.model):
        arguments.model = os.path.abspath(arguments.model)
    measured = [*search(), *memory(), *enrolment(), *killed()]
    if arguments.full:
        measured += [*characters(), *intents(arguments.model)]
    if arguments.json:
        write_json(Path(arguments.json), measured)
    for line in (failures := missed(measured)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
