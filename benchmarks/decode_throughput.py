"""Decode throughput of configs: steps alone over numbers of rows and positions, and traffic through the engine.

  python benchmarks/decode_throughput.py --configs configs/rat_1b.py configs/attention_1b.py --out decode.png
  python benchmarks/decode_throughput.py --configs configs/rat_1b.py --traffic mixed ragged --positions
  python benchmarks/decode_throughput.py --configs configs/default.py --batch_sizes 1 4 --positions 64

All weights are random. Steps are greedy, on caches of random numbers with room for a position's tokens, spread over the
last quarter before it, in calls of 16 that follow one another on the device. `bound` is the time to read cache and
weights at the measured copy bandwidth, `all` the memory of weights, cache and activations. Without `--batch_sizes`,
which a CPU needs, the numbers of rows are 1, 16, 256 and the most that fit.

Traffic is a list of prompts of random tokens that an engine continues, greedily and without an end of document:

  mixed    512 prompts of 20 to 1,000 tokens, 256 new tokens each
  ragged   4,096 prompts of 20 to 3,000 tokens, 32 to 512 new tokens

in up to `--slots` slots. `cold` is the first time, from the engine's making to the last token, `compile` the part that
goes to its programs, `warm` the same once more. `prefill` is a run in which each prompt gets a single token, `decode`
the rest of `warm`. `padding` is how many tokens were read for each of the prompts. Tokens a second, new ones and those
of prompts too, are those of `warm`; `steps/s` is what steps alone reach with as many rows in such caches, at the mean
of the positions that the traffic has. The shares of it: new tokens, all tokens, and new tokens in the seconds of
`decode`. `peak` is what the device had allocated at most, empty where earlier work needed more or it does not tell;
`planned` is weights, caches and the most that one program allocates for a while. For seconds from a cache of compiled
programs run the same command twice with `--compilation_cache`.

`--profile` lists what the device does in a call of 16 steps, how often each kernel runs and how long; the program then
runs without CUDA graphs, whose kernels cannot be told apart, and its other figures do not count.

`--out` writes a PNG, and the tables beside it as JSON, after each config.
"""

import argparse
import concurrent.futures
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import card, decode_steps, step_profile, traffic
from rat_jax import program
from rat_jax.compilation_cache import OFF, ProgramFiles, use_cache
from rat_jax.config import ModelConfig, config_from_dict
from rat_jax.config_file import load_config_file
from rat_jax.decoder import Decoder
from rat_jax.errors import RatJaxError
from rat_jax.files import write_json
from rat_jax.paths import local_path
from rat_jax.pictures import write_picture
from rat_jax.program_store import ProgramStore

BATCH_SIZES = [1, 16, 256]
POSITIONS = [1024, 4096, 16_384, 65_536, 131_072]
COMPILERS = 4  # at a time; each may try matrix products on the device

Row = dict[str, Any]


def measure_steps(
    name: str, decoder: Decoder, rows_at: Mapping[int, list[int]], flags: argparse.Namespace, gb_per_s: float
) -> Iterator[Row]:
    """Rows of the first table, printed; all programs are compiled before the first is timed.

    Args:
      name: of the config.
      decoder: of its model.
      rows_at: numbers of rows, by position.
      flags: of the program.
      gb_per_s: at which the bound reads.
    """
    print(f"\n{name}, {flags.steps} steps before each position\n{'position':>8} {decode_steps.TITLES}", flush=True)
    for position in (position for position, counts in rows_at.items() if not counts):
        yield _reason(name, position, 1, "does not fit the memory of this device")
    wanted = [(position, num_rows) for position, counts in rows_at.items() for num_rows in counts]
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        started = [pool.submit(decode_steps.lower(decoder, n, position).compile) for position, n in wanted]
    for (position, num_rows), compiled in zip(wanted, started, strict=True):
        try:
            first = position * 3 // 4
            row = decode_steps.measure(decoder, compiled.result(), num_rows, position, first, position, flags.steps)
        except jax.errors.JaxRuntimeError as error:  # other rows may fit
            yield _reason(name, position, num_rows, card.reason(error))
            continue
        print(f"{position:>8} {row.line(gb_per_s)}", flush=True)
        if flags.profile is not None:
            report = decode_steps.profile(decoder, compiled.result(), num_rows, position, first, flags.profile)
            print(f"\nprofile of {decode_steps.STEPS_PER_CALL} steps\n{report}\n", flush=True)
        bound_ms = row.bound_ms(gb_per_s)
        yield {"config": name, "position": position, **row._asdict()} | {
            "tokens_per_s": row.tokens_per_s,
            "bound_ms": bound_ms,
            "reached": bound_ms / row.ms,
        }


def measure_traffic(
    name: str, decoder: Decoder, flags: argparse.Namespace, files: ProgramFiles | None
) -> Iterator[Row]:
    """Rows of the second table, printed."""
    store = files and ProgramStore(files, decoder.config)
    if flags.traffic:
        print(f"\n{name}\n{traffic.TITLES}", flush=True)
    for job in flags.traffic:
        requests = traffic.JOBS[job].requests(decoder.config.vocab_size)[: flags.prompts]
        slots = traffic.num_slots(decoder, requests, flags.slots)
        try:
            row = traffic.measure(decoder, requests, slots, flags.steps, store)
        except (RatJaxError, jax.errors.JaxRuntimeError) as error:  # another job may need less
            why = card.reason(error)
            print(f"{job:>7} {slots:>6} {why}", flush=True)
            yield {"config": name, "job": job, "num_slots": slots, "error": why}
            continue
        print(traffic.line(job, row), flush=True)
        yield {"config": name, "job": job, "num_prompts": len(requests), **row._asdict(), **row.rates}


def _batch_sizes(decoder: Decoder, position: int) -> list[int]:
    """Those of BATCH_SIZES that fit, and the most that fit; none if one row does not.

    Raises:
      FlagError: if the device does not tell what it has free, or is a CPU.
    """
    most = decode_steps.most_rows(decoder, position)
    if most is None:
        raise program.FlagError("how many rows fit is known of devices with memory of their own: give --batch_sizes")
    return sorted({num_rows for num_rows in (*BATCH_SIZES, most) if 1 <= num_rows <= most})


def _reason(name: str, position: int, num_rows: int, why: str) -> Row:
    print(f"{position:>8} {num_rows:>6} {why}", flush=True)
    return {"config": name, "position": position, "num_rows": num_rows, "error": why}


def draw(steps: Sequence[Row], jobs: Sequence[Row], gb_per_s: float, caption: str) -> Figure:
    """Tokens a second over rows, and over positions with the most rows; the bound's share; traffic beside steps."""
    steps, jobs = ([row for row in rows if "error" not in row] for rows in (steps, jobs))
    figure = Figure(figsize=(20 if jobs else 15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    rates, longer, reached, *rest = figure.subplots(1, 4 if jobs else 3)
    positions = [row["position"] for row in steps]
    shown = max(sorted(set(positions)), key=positions.count, default=0)  # the shortest of those with most rows
    for i, name in enumerate(dict.fromkeys(row["config"] for row in steps)):
        own = [row for row in steps if row["config"] == name]
        style = {"color": f"C{i}", "marker": "o", "label": name}
        here = sorted((row["num_rows"], row["tokens_per_s"], row["reached"]) for row in own if row["position"] == shown)
        rates.plot([x for x, _, _ in here], [rate for _, rate, _ in here], **style)
        reached.plot([x for x, _, _ in here], [100 * share for _, _, share in here], **style)
        best = {row["position"]: row for row in sorted(own, key=lambda row: row["num_rows"])}
        longer.plot(sorted(best), [best[position]["tokens_per_s"] for position in sorted(best)], **style)
    rates.set(xscale="log", yscale="log", xlabel=f"rows at position {shown:,}", ylabel="tokens/s")
    reached.set(xscale="log", ylim=(0, 105), xlabel=f"rows at position {shown:,}", ylabel="of the memory bound, %")
    reached.set_title(f"bound: cache and weights read at {gb_per_s:,.0f} GB/s", fontsize=9)
    longer.set(xscale="log", yscale="log", xlabel="position", ylabel="tokens/s, the most rows that were measured")
    all_rows = sorted({row["num_rows"] for row in steps if row["position"] == shown})
    for axes in (rates, reached):
        axes.set_xticks(all_rows, [f"{count:,}" for count in all_rows], minor=False)
    ticks = sorted(set(positions))
    longer.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks], minor=False)
    for axes in (rates, longer, reached):
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        if steps:
            axes.legend(fontsize=8)
    for axes in rest:
        places = range(len(jobs))
        axes.barh(places, [row["steps_per_s"] for row in jobs], color="lightgray", label="steps alone")
        for name, thickness in (("all", 0.55), ("new", 0.25)):
            axes.barh(places, [row[f"{name}_per_s"] for row in jobs], thickness, label=f"{name} tokens", alpha=0.8)
        axes.set_yticks(places, [f"{row['config']}\n{row['job']}, {row['num_slots']} slots" for row in jobs])
        axes.set_xlabel("tokens/s of traffic")
        axes.legend(fontsize=8)
    card.write_caption(figure, caption)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; `out` is a path."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, help="files of configs")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=None, help="rows; left out: up to what fits")
    parser.add_argument("--positions", type=int, nargs="*", default=POSITIONS, help="none: no steps alone")
    parser.add_argument("--steps", type=int, default=128, help="that are timed for each row of the table")
    parser.add_argument("--traffic", nargs="+", choices=list(traffic.JOBS), default=[])
    parser.add_argument("--slots", type=int, default=736, help="of the engine; fewer if they do not fit")
    parser.add_argument("--prompts", type=int, default=None, help="the first ones of each job; left out: all")
    parser.add_argument("--compilation_cache", default=OFF, help="folder that keeps compiled programs; left out: none")
    parser.add_argument("--profile", default=None, help="folder for traces of some steps of each row of the table")
    parser.add_argument("--out", default=None, help="PNG; the tables go beside it as JSON")
    flags = parser.parse_args(arguments)
    shortest = 4 * decode_steps.STEPS_PER_CALL  # a quarter of it holds a call
    for name, values, least in (
        ("positions", flags.positions, shortest),
        ("batch_sizes", flags.batch_sizes or [], 1),
        ("steps", [flags.steps], decode_steps.STEPS_PER_CALL),
        ("slots", [flags.slots], 1),
        ("prompts", [] if flags.prompts is None else [flags.prompts], 1),
    ):
        if min(values, default=least) < least:
            parser.error(f"--{name} must be {least} or more, got {min(values)}")
    if flags.out is not None:
        flags.out = local_path(flags.out, "--out")
        if flags.out.suffix != ".png":
            parser.error(f"--out is a picture, whose name ends with .png, got {flags.out}")
    if flags.profile is not None:
        flags.profile = str(local_path(flags.profile, "--profile"))
    return flags


def run(flags: argparse.Namespace) -> None:
    """Prints the tables and writes what was asked for."""
    configs: dict[str, ModelConfig] = {
        file: config_from_dict(load_config_file(file, "--configs")).model for file in flags.configs
    }
    card.share_memory()
    if flags.profile is not None:
        step_profile.name_every_kernel()
    files = use_cache(flags.compilation_cache)
    ceilings = card.measure_ceilings(3)
    table: Row = {"card": card.describe(), **ceilings._asdict(), "steps": [], "traffic": []}
    print(f"{table['card']}\ncopy {ceilings.copy_gb_per_s:.0f} GB/s")
    caption = card.caption(", ".join(dict.fromkeys(config.dtype for config in configs.values())))
    for file, config in configs.items():
        decoder = decode_steps.random_decoder(config)
        name = pathlib.Path(file).stem
        rows_at = {position: flags.batch_sizes or _batch_sizes(decoder, position) for position in flags.positions}
        table["traffic"] += measure_traffic(name, decoder, flags, files)  # first: its peak of memory is then its own
        table["steps"] += measure_steps(name, decoder, rows_at, flags, ceilings.copy_gb_per_s)
        del decoder  # the next needs the room
        if flags.out is not None:
            write_picture(draw(table["steps"], table["traffic"], ceilings.copy_gb_per_s, caption), flags.out)
            write_json(flags.out.with_suffix(".json"), table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return program.exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
