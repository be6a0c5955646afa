"""What a row's cache takes in models of configs, in MiB (2**20 bytes), and how many bytes each further token adds.

  python benchmarks/cache_sizes.py
  python benchmarks/cache_sizes.py --configs configs/rat_1b.py --lengths 8192 1048576

They are the bytes that `LanguageModel.init_cache` allocates (`LanguageModel.cache_bytes`); nothing is computed.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rat_jax import program
from rat_jax.config import config_from_dict
from rat_jax.config_file import load_config_file
from rat_jax.report.costs import cache_bytes

LENGTHS = [4096, 32_768, 131_072]
_FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = [file for size in ("1b", "3b", "7b", "12b") for file in sorted(_FOLDER.glob(f"*_{size}.py"))]


def table(files: Sequence[Path | str], lengths: Sequence[int]) -> str:
    """The table in Markdown, a line for each config."""
    head = ["config", "pattern", *(f"{length:,} tokens" for length in lengths), "a further token"]
    lines = [head, ["---"] * 2 + ["--:"] * (len(lengths) + 1)]
    for file in files:
        config = config_from_dict(load_config_file(str(file), "--configs")).model
        sizes = cache_bytes(config, (*lengths, 2 * max(lengths)))
        further = (sizes[-1] - max(sizes[:-1])) / max(lengths)
        runs = [(name, len(list(run))) for name, run in itertools.groupby(config.pattern)]
        pattern = ", ".join(name if count == 1 else f"{count} {name}" for name, count in runs)
        in_mib = [f"{size / 2**20:,.1f}" for size in sizes[:-1]]
        lines.append([Path(file).stem, pattern, *in_mib, f"{further:,.0f} bytes"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="files of configs")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a row")
    flags = parser.parse_args()
    if min(flags.lengths) < 1:
        raise program.FlagError(f"--lengths must be 1 or more, got {min(flags.lengths)}")
    print(table(flags.configs, flags.lengths))


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
