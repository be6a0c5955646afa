"""What a training step needs, from compiling it alone: for the devices of this machine, or TPUs that are not there."""

import math
import time
from typing import Any

import jax

from rat_jax.chips import chip_of
from rat_jax.config import Config
from rat_jax.flops import flops_per_token
from rat_jax.memory import free_bytes_of_local_devices, gib, is_out_of_memory
from rat_jax.sharding import check_divides, describe_axes, make_mesh
from rat_jax.training.collectives import Collectives, count_collectives
from rat_jax.training.hlo import Program
from rat_jax.training.mesh_advice import mesh_advice
from rat_jax.training.oom import cut_state, remedies
from rat_jax.training.step import abstract_state, lower_train_step
from rat_jax.training.topology import topology_devices


def dry_run(config: Config, topology: str | None) -> bool:
    """Compiles the step that a run of the config does, and prints what it needs; nothing is read, written or run.

    Args:
      config: data and checkpoints that it names need not be there.
      topology: of TPUs, as `rat_jax.training.topology` knows them; None: the devices that jax sees.

    Returns:
      Whether the step fits into the devices' memory. True where that is not known.

    Raises:
      ConfigError: if the config does not fit the devices.
      TopologyError: if there is no such topology.
      JaxRuntimeError: of the compiler, other than that memory is lacking.
    """
    mesh = make_mesh(config.mesh, None if topology is None else topology_devices(topology))
    check_divides(config, mesh)
    state, limit = abstract_state(config, mesh), _memory_limit(mesh)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    _print(_heading(config, mesh, topology, num_parameters))
    if advice := mesh_advice(mesh):
        _print([_line("advice", advice)])
    if limit is not None and (held := _bytes_on_a_device(state)) > limit:  # compilers have crashed
        lines = [f"It does not fit: the state alone takes {gib(held)} of {gib(limit)} a device."]
        _print([*lines, cut_state(config, mesh)])
        return False
    began = time.monotonic()
    lowered = lower_train_step(config, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _print([f"The compiler refuses it: {str(error).splitlines()[0]}", *remedies(config, mesh)])
        return False
    _print([_line("compiled in", f"{time.monotonic() - began:,.0f} s")])
    memory = compiled.memory_analysis()
    collectives = count_collectives(Program.parse(compiled.as_text()), mesh.size)
    _print(_memory_table(memory, limit))
    _print(_costs(config, mesh, num_parameters, memory, compiled.cost_analysis(), collectives))
    if limit is None or _needed(memory) <= limit:
        return True
    _print([f"It does not fit: {gib(_needed(memory))} of {gib(limit)} a device.", *remedies(config, mesh)])
    return False


def _print(lines: list[str]) -> None:
    """On the first host."""
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)


def _line(name: str, text: str) -> str:
    return f"{name:<15} {text}"


def _heading(config: Config, mesh: jax.sharding.Mesh, topology: str | None, num_parameters: int) -> list[str]:
    where = "" if topology is None else f" of {topology}, not there"
    data, parts = config.data, config.optimizer.accumulation_steps
    return [
        _line("devices", f"{mesh.size} x {mesh.devices.flat[0].device_kind}{where}; {describe_axes(mesh)}"),
        _line("parameters", f"{num_parameters:,}"),
        _line("a step", f"{data.global_batch_size} sequences of {data.seq_len} tokens in {parts} part(s)"),
    ]


def _memory_limit(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a program may have on each device; None where that is not known.

    The compiler for TPUs has its own limit, somewhat lower, and refuses what is above.
    """
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if device.client is not jax.devices()[0].client:  # not there
        return None if chip is None else int(chip.memory_bytes)
    return free_bytes_of_local_devices()[0]


def _bytes_on_a_device(tree: Any) -> int:
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shards)


def _needed(memory: Any) -> int:
    """Bytes that a device holds while a program runs; results that are written over arguments count once."""
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _memory_table(memory: Any, limit: int | None) -> list[str]:
    rows = {
        "arguments": (memory.argument_size_in_bytes, "parameters, optimizer state, batch"),
        "temporaries": (memory.temp_size_in_bytes, "gradients, activations"),
        "output": (memory.output_size_in_bytes, "the new state"),
        "aliased": (memory.alias_size_in_bytes, "of the output, written over arguments"),
        "program": (memory.generated_code_size_in_bytes, "its code"),
        "needed": (_needed(memory), "the sum without what is aliased" + (f"; there are {gib(limit)}" if limit else "")),
        "peak": (memory.peak_memory_in_bytes, "as the compiler reports it"),
    }
    lines = [_line("memory a device", "")]
    return lines + [_line(f"  {name}", f"{size / 2**30:9.3f} GiB  {what}") for name, (size, what) in rows.items()]


def _costs(
    config: Config,
    mesh: jax.sharding.Mesh,
    num_parameters: int,
    memory: Any,
    costs: dict[str, float],
    collectives: dict[str, Collectives],
) -> list[str]:
    tokens = config.data.global_batch_size * config.data.seq_len
    model_flops = flops_per_token(config.model, num_parameters, config.data.seq_len) * tokens / mesh.size
    once = "each loop's body once"
    lines = [
        _line("work a device", ""),
        _line("  model FLOPs", f"{model_flops:.3e}  as for MFU: without what is computed again"),
        _line("  XLA's FLOPs", f"{costs.get('flops', math.nan):.3e}  {once}, without kernels"),
        _line("  XLA's bytes", f"{costs.get('bytes accessed', math.nan):.3e}  {once}"),
        _line("collectives", "a step and device; bytes sent where groups are rings"),
    ]
    for kind, part in collectives.items():
        turn = f"; {part.looped} of them for one turn of a loop" if part.looped else ""
        sizes = f"{part.num_bytes / 2**20:12,.1f} MiB of arrays, {part.sent_bytes / 2**20:12,.1f} MiB sent"
        lines.append(_line(f"  {kind}", f"{part.count:6,}  {sizes}{turn}"))
    if not collectives:
        lines.append(_line("  none", ""))
    return lines + _estimate(config, mesh, model_flops, memory, costs, collectives)


def _estimate(
    config: Config,
    mesh: jax.sharding.Mesh,
    model_flops: float,
    memory: Any,
    costs: dict[str, float],
    collectives: dict[str, Collectives],
) -> list[str]:
    """The longest of three times at a chip's peaks: arithmetic, memory, links.

    Of memory each argument is read once, each result written once, each byte of temporaries both, which is little.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        return [_line("time a step", f"no estimate: rat_jax/chips.py has no peaks of {kind}")]
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    times = {
        "arithmetic": max(model_flops, costs.get("flops", 0.0)) / chip.flops,
        "memory": moved / chip.memory_bandwidth,
        "links": sum(part.sent_bytes for part in collectives.values()) / chip.link_bandwidth,
    }
    longest = max(times, key=times.get)
    seconds = times[longest]
    parts = ", ".join(f"{name} {1e3 * time:,.3g}" for name, time in times.items())
    rate = config.data.global_batch_size * config.data.seq_len / seconds
    return [
        _line("time a step", f"{1e3 * seconds:,.3g} ms at least: an estimate from the chip's peaks (ms: {parts})"),
        _line("", f"limited by {longest}; {rate:,.0f} tokens/s at most"),
    ]
