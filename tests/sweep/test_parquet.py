"""Results as one Parquet file beside results.jsonl."""

import json
from pathlib import Path

import pyarrow.parquet

from niwaki.sweep.results import write_rows


def test_rows_lie_in_both_files(tmp_path: Path) -> None:
    rows = [
        {"trial": "a", "status": "done", "options": {"keep": 0.5}, "values": {"accuracy": 91.5}},
        {"trial": "b", "status": "failed", "options": {"keep": 0.25}, "values": {}},
    ]
    write_rows(tmp_path, rows)
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == rows
    first, second = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert (first["trial"], first["value_accuracy"], json.loads(first["options"])) == ("a", 91.5, {"keep": 0.5})
    assert (second["status"], second["value_accuracy"]) == ("failed", None)
