"""The scripts that look at runs, on runs made up on the spot."""

import csv
import json
import subprocess
import sys

import pytest

from scripts import compare
from scripts.benchmark_default import missed
from siamese.config import ROOT


def made_up(folder, choices, seed, **figures):
    (folder / ".hydra").mkdir(parents=True)
    margin = {"loss": {"margin": 0.1}} if choices["loss"] == "triplet" else {"loss": {"temperature": 0.5}}
    (folder / ".hydra" / "config.yaml").write_text(json.dumps({"seed": seed, **margin, "paths": {"output_dir": str(folder)}}))
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": {**choices, "hydra/launcher": "basic"}}}}))
    if figures:
        (folder / "metrics.json").write_text(json.dumps({**figures, "seconds/fit": 12.3}))


@pytest.fixture
def sweep(tmp_path):
    made_up(tmp_path / "0", {"loss": "triplet", "miner": "hard"}, 0, **{"test/map_at_r": 0.5, "test/eer": 0.2, "val/map_at_r": 0.9})
    made_up(tmp_path / "1", {"loss": "supcon", "miner": "hard"}, 0, **{"test/map_at_r": 0.7, "test/eer": 0.3, "val/map_at_r": 0.4})
    made_up(tmp_path / "2", {"loss": "supcon", "miner": "hard"}, 1, **{"test/map_at_r": 0.6, "test/eer": 0.1, "val/map_at_r": 0.5})
    made_up(tmp_path / "10", {"loss": "supcon", "miner": "hard"}, 2)
    return tmp_path


def test_compare_shows_what_differed_and_the_best_first(sweep):
    header, rows, unfinished = compare.rows([str(sweep)], ["map_at_r", "eer"], None)
    assert header == ["run", "loss", "seed", "test/map_at_r", "test/eer", "seconds/fit"]
    assert [row[0] for row in rows] == ["1", "2", "0"]
    assert rows[0] == ["1", "supcon", "0", 0.7, 0.3, 12]
    assert [path.rpartition("/")[2] for path in unfinished] == ["10"]


def test_compare_puts_the_lowest_error_first(sweep):
    _, rows, _ = compare.rows([str(sweep)], ["eer"], None)
    assert [row[0] for row in rows] == ["2", "0", "1"]


def test_compare_falls_back_on_validation_where_a_run_has_not_looked_at_test(sweep):
    made_up(sweep / "3", {"loss": "supcon", "miner": "hard"}, 3, **{"val/map_at_r": 0.95})
    header, rows, _ = compare.rows([str(sweep)], ["map_at_r"], None)
    assert "val/map_at_r" in header
    assert rows[0][0] == "3"


def test_compare_prints_a_table_and_writes_a_csv(sweep, tmp_path):
    file = tmp_path / "table.csv"
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", str(sweep), "--csv", str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "supcon" in done.stdout
    assert "unfinished" in done.stdout
    with file.open() as lines:
        written = list(csv.reader(lines))
    assert written[0][:3] == ["run", "loss", "seed"]
    assert len(written) == 4


@pytest.mark.parametrize(("arguments", "says"), [(["nowhere"], "is no directory"), (["tests"], "no run")])
def test_compare_says_what_is_wrong_in_a_line(arguments, says):
    done = subprocess.run([sys.executable, "scripts/compare.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_benchmark_knows_which_way_a_target_is_missed():
    def row(name, value, target, unit=""):
        return {"name": name, "value": value, "target": target, "unit": unit}

    assert missed([row("test recall_at_1", 0.99, 0.98), row("test eer", 0.02, 0.031), row("command to prompt", 59, 60, "s")]) == []
    late = [row("test recall_at_1", 0.97, 0.98), row("test eer", 0.04, 0.031), row("command to prompt", 61, 60, "s"), row("x", 0, None)]
    assert len(missed(late)) == 3
