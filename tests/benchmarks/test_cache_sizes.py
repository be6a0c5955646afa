"""The table of caches' sizes in the README is what the code gives."""

import pytest

from benchmarks import cache_sizes
from tests.documented import ROOT


@pytest.fixture(scope="module")
def lines():
    return cache_sizes.table(cache_sizes.CONFIGS, cache_sizes.LENGTHS).splitlines()


def test_the_readme_has_the_table(lines):
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(lines) in readme


def test_what_the_papers_promise(lines):
    """A sixteenth of attention's for RAT with chunks of 16; nothing a token for windows and states."""
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines[2:]}
    longest = {name: float(row[-2].replace(",", "")) for name, row in cells.items()}
    assert longest["attention_1b"] / longest["rat_1b"] == pytest.approx(16, rel=0.02)
    assert {cells[name][-1] for name in ("rnn_1b", "gated_deltanet_1b", "gated_deltanet_swa_1b")} == {"0 bytes"}
