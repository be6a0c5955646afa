"""What to tell a user whose devices have too little memory for a training step."""

import math

import jax

from rat_jax.config import Config
from rat_jax.memory import gib
from rat_jax.mesh import BATCH_AXES
from rat_jax.training.step import lower_train_step


def explain_out_of_memory(config: Config, mesh: jax.sharding.Mesh) -> str:
    """What a training step needs on each device, and the settings most likely to help."""
    return "\n".join(["out of memory.", *_needs(config, mesh), *remedies(config, mesh)])


def remedies(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """The settings most likely to make a step fit, in lines."""
    steps, rows = config.optimizer.accumulation_steps, config.data.global_batch_size
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    lines = ["Most likely to help:"]
    if rows % (2 * steps * devices) == 0:
        lines.append(
            f"  config.optimizer.accumulation_steps, now {steps} ({rows // steps} sequences at a time): twice as many "
            f"halve the activations and change no result"
        )
    elif rows > devices:
        lines.append(
            f"  config.data.global_batch_size, now {rows}, and config.optimizer.accumulation_steps, now {steps}: "
            f"activations are those of {rows // steps} sequences at a time, which may be as few as {devices}, one a "
            f"device"
        )
    if config.model.remat != "block":
        lines.append(
            f"  config.model.remat, now {config.model.remat!r}: 'block' keeps only the inputs of layers, for a third "
            f"more time; 'dots' lies between"
        )
    if config.model.scan_unroll > 1:
        lines.append(
            f"  config.model.scan_unroll, now {config.model.scan_unroll}: 1 lets the compiler plan the memory of one "
            f"repeat of the pattern alone, at some cost in time"
        )
    return [*lines, cut_state(config, mesh)]


def cut_state(config: Config, mesh: jax.sharding.Mesh) -> str:
    """The setting that makes a run's state smaller on each device."""
    return (
        f"  config.mesh.fsdp, now {config.mesh.fsdp}, {mesh.shape['fsdp']} of {mesh.size} devices: more devices along "
        f"it cut parameters and optimizer state"
    )


def _needs(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    try:
        memory = lower_train_step(config, mesh).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # some compilers refuse what cannot fit
        return [f"the compiler says: {error}"]
    return [
        f"A step needs on each device {gib(memory.argument_size_in_bytes)} for parameters, optimizer state "
        f"and batch, and {gib(memory.temp_size_in_bytes)} for gradients and activations."
    ]
