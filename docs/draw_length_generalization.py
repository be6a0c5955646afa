"""Runs in one table and one picture: what `eval.py --length_generalization` measured of runs.

python docs/draw_length_generalization.py runs/length_*                  the picture is runs/length_generalization.png
python docs/draw_length_generalization.py runs/a runs/b --out lengths.png
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from rat_jax import program
from rat_jax.evaluation.length_report import find_results, markdown_table, plot
from rat_jax.paths import local_path


def main() -> None:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="workdirs, or the JSON files in them")
    parser.add_argument("--out", help="the picture; left out: length_generalization.png beside the first run")
    args = parser.parse_args()
    paths = [local_path(run, "runs") for run in args.runs]
    out = paths[0].resolve().parent / "loss_beyond.png" if args.out is None else local_path(args.out, "--out")
    runs = [find_results(path) for path in paths]
    print(markdown_table(runs))
    plot(runs, out)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
