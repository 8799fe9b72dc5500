"""The benchmark's parts, on few samples: what it compares is the same work, and a missed target is said."""

import json
import sys

import pytest
import torch

from scripts import benchmark_evaluation as benchmark


def test_every_row_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "QUERIES", 300 * benchmark.SAMPLES // 1_200)
    monkeypatch.setattr(benchmark, "peak", lambda samples, size: 1.0)
    rows = benchmark.measure(False, 1_200)
    assert all(set(row) == {"name", "value", "target", "unit"} for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    json.dumps(rows)
    exact = [row for row in rows if "differs" in row["name"] or "optimistic" in row["name"]]
    assert len(exact) == 7
    assert not benchmark.missed(exact)


def test_what_is_measured_on_a_gpu_is_measured():
    rows = benchmark.on_device("cpu", 600)
    assert len({row["name"] for row in rows}) == 6
    assert all(row["value"] > 0 for row in rows)


def test_the_data_are_as_promised():
    embeddings, labels = benchmark.data(1_000, 16)
    assert embeddings.shape == (1_000, 16)
    assert labels.bincount().min() == 2
    far = torch.stack([(embeddings[labels == c] - embeddings[labels == c].mean(0)).norm(dim=1).max() for c in range(100)])
    assert far.max() > 1.5 * far.median(), "some are far from their class"
    assert (benchmark.data(1_000, 16)[0] == embeddings).all()


def test_a_miss_is_said():
    row = {"name": "a / b", "value": 1.5, "target": 1.4, "unit": "x"}
    assert benchmark.missed([row]) == ["a / b: 1.5 misses 1.4 x"]
    assert benchmark.missed([{**row, "value": 1.3}, {**row, "target": None}]) == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_peak_is_of_judging_alone():
    assert 0 < benchmark.peak(3_000, 32) < 300
