"""The benchmark of reading batches measures what it says, on little data."""

import re
import sys

from benchmarks import data_throughput


def test_every_kind_of_data_is_read_in_every_way(tmp_path, monkeypatch, capsys):
    flags = ["--gigabytes=0.004", f"--folder={tmp_path}", "--seq_len=64", "--batch_size=8", "--num_batches=2"]
    monkeypatch.setattr(sys, "argv", ["data_throughput.py", *flags])
    data_throughput.main()
    said = capsys.readouterr().out
    rows = [tuple(part.strip() for part in line.split("|")[1:4]) for line in said.splitlines() if "%" in line]
    ways = ("cold", "cold, in turn", "warm", "again")
    kinds = (("one", "as one"), ("one", "apart"), ("packed", "apart"), ("mixture of three", "apart"))
    assert rows == [(*kind, way) for kind in kinds for way in ways]
    assert re.search(r"first: 1,400,000 tokens written in", said)
    assert list(tmp_path.iterdir()) == []
