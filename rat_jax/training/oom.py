"""What to tell a user whose devices ran out of memory."""

import jax

from rat_jax.config import Config
from rat_jax.training.step import abstract_batch, abstract_state, train_step

_GIB = 2**30


def explain_out_of_memory(config: Config, mesh: jax.sharding.Mesh, graphdef) -> str:
    """What a training step needs on each device, and the three settings most likely to help."""
    return "\n".join(["out of memory.", *_needs(config, mesh, graphdef), *_remedies(config)])


def _needs(config: Config, mesh: jax.sharding.Mesh, graphdef) -> list[str]:
    arguments = (abstract_state(config, mesh), abstract_batch(config, mesh))
    lowered = train_step.lower(graphdef, config.optimizer, config.training.num_steps, *arguments)
    try:
        needs = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # some compilers refuse what cannot fit
        return [f"the compiler says: {error}"]
    return [
        f"A step needs on each device {needs.argument_size_in_bytes / _GIB:.2f} GiB for parameters, optimizer state "
        f"and batch, and {needs.temp_size_in_bytes / _GIB:.2f} GiB for gradients and activations."
    ]


def _remedies(config: Config) -> list[str]:
    steps, rows = config.optimizer.accumulation_steps, config.data.global_batch_size
    return [
        "Most likely to help:",
        f"  config.optimizer.accumulation_steps, now {steps} ({rows // steps} sequences at a time): twice as many "
        f"halve the activations and change no result",
        f"  config.model.remat, now {config.model.remat!r}: 'block' keeps only the inputs of layers, for a third more "
        f"time; 'dots' lies between",
        f"  config.mesh.fsdp, now {config.mesh.fsdp}: more devices along it cut parameters and optimizer state",
    ]
