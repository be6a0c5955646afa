"""Bytes of keys, values or summaries that chips exchange in a training step whose rows are cut along `context` alone.

  python benchmarks/context_exchange.py --config configs/rat_1b.py --topology v5p:2x2x2 --seq_len 262144

Compiles the step of one row for TPUs that need not be there (which needs libtpu) and counts the collectives whose
arrays have four axes, rows, tokens, heads and channels, but for those that a product asks for, of parameters. Prints
them by kind, and how much a chip sends for each token of the row.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.model_throughput import load_config
from rat_jax import program
from rat_jax.config import MeshConfig
from rat_jax.sharding import check_divides, make_mesh
from rat_jax.training.collectives import count_collectives
from rat_jax.training.hlo import Instruction, Program
from rat_jax.training.step import lower_train_step
from rat_jax.training.topology import topology_devices


def table(text: str, num_devices: int, tokens: int) -> str:
    """Of a compiled program's text, for a row of so many tokens."""
    compiled = Program.parse(text)

    def is_of_tokens(collective: Instruction) -> bool:
        return compiled.axes_of_operands(collective) == {4} and 'dot_general"' not in collective.text

    found = count_collectives(compiled, num_devices, is_of_tokens)
    lines = [f"{kind:<18} {part.count:6,} {part.sent_bytes / 2**30:10.3f} GiB sent" for kind, part in found.items()]
    total = sum(part.sent_bytes for part in found.values())
    return "\n".join([*lines, f"{'together':<25} {total / 2**30:10.3f} GiB sent, {total / tokens:,.0f} bytes a token"])


def main() -> None:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="file of a config")
    parser.add_argument("--topology", required=True, help="TPUs by libtpu's names; context cuts rows over all of them")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens of the row")
    flags = parser.parse_args()
    config = load_config(flags.config, 1, seq_len=flags.seq_len)
    mesh = make_mesh(MeshConfig(fsdp=1, context=-1), topology_devices(flags.topology))
    check_divides(config, mesh)
    print(table(lower_train_step(config, mesh).compile().as_text(), mesh.size, flags.seq_len))


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
