"""The benchmark's parts, on little data: what it compares is the same work, and a missed target is said."""

import json
import os

import pytest
import torch

from scripts import benchmark_data as benchmark
from siamese.data.glyphs import Glyphs


def test_every_row_is_measured():
    data = os.environ.get("SIAMESE_DATA_DIR")
    rows = benchmark.measure(False, photos=60, count=2, items=5_000, sizes=(200, 400))
    assert os.environ.get("SIAMESE_DATA_DIR") == data
    assert all(set(row) == {"name", "value", "target", "unit"} for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    json.dumps(rows)
    found = [row for row in rows if "planted" in row["name"] or "others that are found" in row["name"]]
    assert len(found) == 4
    assert not benchmark.missed(found)


def test_both_kinds_of_steps_learn_and_only_one_needs_new_batches():
    samples = Glyphs().split("val")
    taken = list(benchmark.steps(samples))
    assert len(taken) == 2 * -(-len(samples) // 128)
    for step in taken[:4]:
        step()


def test_photos_are_many_and_differ():
    images = benchmark.noise(20, 32)
    assert images.shape == (20, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in images}) == 20
    assert torch.equal(images, benchmark.noise(20, 32))


def test_a_miss_is_said():
    rows = [benchmark.row("a", 1.2, 1.0), benchmark.row("b", 0.5, 1.0), benchmark.row("c", 9.0)]
    assert benchmark.missed(rows) == ["a: 1.2 misses 1 x"]
    assert pytest.approx(benchmark.seconds(lambda: None, repeats=1)[0], abs=0.01) == 0
