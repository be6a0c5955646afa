"""One optimizer step, and the loss of one batch, as pure functions of arrays."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import Config, OptimizerConfig
from rat_jax.data.pipeline import Batch
from rat_jax.loss import LossSums, next_token_loss
from rat_jax.mesh import constrain_tokens
from rat_jax.model import LanguageModel, cast_operands
from rat_jax.shapes import Array, Bool, Float32, Int
from rat_jax.sharding import batch_sharding, constrain, shardings
from rat_jax.training.optimizer import learning_rate_schedule, make_optimizer

NO_LIMIT = np.float32(np.inf)  # of the loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes."""

    step: Int[Array, ""]  # steps done; the optimizer counts those that were not skipped
    params: nnx.State  # float32
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Figures of one step, on the device."""

    loss: Float32[Array, ""]  # mean over the batch's targets, before the step
    grad_norm: Float32[Array, ""]  # global L2 norm, before clipping
    param_norm: Float32[Array, ""]  # global L2 norm, after the step
    learning_rate: Float32[Array, ""]
    num_targets: Float32[Array, ""]
    updated: Bool[Array, ""]  # False: the step was skipped, the state is as it was


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer", "num_steps"), donate_argnames=("state",))
def train_step(
    graphdef: nnx.GraphDef,
    optimizer: OptimizerConfig,
    num_steps: int,
    state: TrainState,
    batch: Batch,
    max_loss: np.float32 | Float32[Array, ""] = NO_LIMIT,
) -> tuple[TrainState, StepMetrics]:
    """One step of `rat_jax.training.optimizer` on the mean loss of a batch.

    The loss is the sum over the targets of the whole batch divided by the sum of their weights, so that neither the
    number of accumulation steps nor of devices changes it. Part p of P holds rows p, p + P, p + 2 P, ..., so that
    each device has rows of every part.

    A step is skipped (parameters and optimizer state stay as they are, bit for bit) if loss or gradient norm are not
    finite, or the loss is above `max_loss`. The choice is made where each array is updated, which costs no pass.

    Args:
      graphdef: of the model, from `nnx.split`.
      optimizer: says how many parts the batch is cut into, too.
      num_steps: of the run, for the schedule.
      state: is donated.
      batch: rows of all hosts.
      max_loss: equal on all hosts.
    """
    total_weight = jnp.sum(batch.loss_weights)
    divisor = jnp.where(total_weight > 0, total_weight, 1.0)

    def part_loss(params, part):
        return _loss_sums(graphdef, params, part).loss / divisor

    # Cast once, not in each layer of each pass and part; gradients are then what products give, in the same dtype.
    params = cast_operands(state.params, _compute_dtype(graphdef, state.params))
    loss, grads = _accumulate(jax.value_and_grad(part_loss), params, batch, optimizer.accumulation_steps)
    # Without the barrier XLA puts layers' gradients together once for each of the three arrays that an update writes.
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), jax.lax.optimization_barrier(grads))
    grad_norm = optax.tree.norm(grads)
    with jax.named_scope("optimizer"):
        is_good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= max_loss)
        updates, opt_state = make_optimizer(optimizer, num_steps).update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = _kept_if(is_good, new, (state.params, state.opt_state))
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        param_norm=optax.tree.norm(params),
        learning_rate=learning_rate_schedule(optimizer, num_steps)(state.opt_state["learning_rate"].count),
        num_targets=total_weight,
        updated=is_good,
    )
    return TrainState(state.step + 1, constrain(params), constrain(opt_state)), metrics


@functools.partial(jax.jit, static_argnames=("graphdef",))
def batch_loss(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> LossSums:
    """Sums of the losses and weights of a batch."""
    return _loss_sums(graphdef, params, batch)


def initial_state(config: Config, mesh: jax.sharding.Mesh, params: nnx.State | None = None) -> TrainState:
    """The state before the first step, made where it belongs on the mesh.

    Args:
      config: its seed decides the parameters.
      mesh: of the devices.
      params: start from these instead, already on the mesh.
    """
    with jax.set_mesh(mesh):
        return _make_state(config, params)


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state."""
    state = jax.eval_shape(functools.partial(_make_state, config, None))
    return jax.tree.map(_placed, state, shardings(state, mesh))


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and shardings of a run's batches."""
    shape = (config.data.global_batch_size, config.data.seq_len)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    return Batch(integers, integers, weights, integers if config.data.segment_documents else None)


def lower_train_step(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The step as a run calls it, traced for a mesh, whose devices need not be there."""
    arguments = (abstract_state(config, mesh), abstract_batch(config, mesh), NO_LIMIT)
    with jax.set_mesh(mesh):
        return train_step.lower(
            abstract_model(config.model)[0], config.optimizer, config.training.num_steps, *arguments
        )


@functools.partial(jax.jit, static_argnames=("config",))
def _make_state(config: Config, params: nnx.State | None) -> TrainState:
    if params is None:
        params = nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(config.seed)))
    opt_state = make_optimizer(config.optimizer, config.training.num_steps).init(params)
    return TrainState(jnp.int32(0), constrain(params), constrain(opt_state))


def _compute_dtype(graphdef: nnx.GraphDef, params: nnx.State) -> str:
    return nnx.merge(graphdef, params).config.dtype


def _kept_if(is_good: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, is_good), new, old)


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _loss_sums(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> LossSums:
    model = nnx.merge(graphdef, params)
    hidden = constrain_tokens(model.hidden(constrain_tokens(batch.tokens), batch.segment_ids))
    with jax.named_scope("loss"):
        return next_token_loss(hidden, model.embedding[...], batch.targets, batch.loss_weights)


def _accumulate(value_and_grad: Any, params: nnx.State, batch: Batch, num_parts: int) -> tuple[Array, nnx.State]:
    """Sums of values and gradients over the parts of a batch, one part in memory at a time."""
    if num_parts == 1:
        loss, grads = value_and_grad(params, batch)
        return loss, constrain(grads)

    def cut(x):
        parts = x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain_tokens(parts, axis=1)

    def add_part(sums, part):
        loss, grads = jax.tree.map(jnp.add, sums, value_and_grad(params, part))
        return (loss, constrain(grads)), None

    zeros = (jnp.float32(0), constrain(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)))
    return jax.lax.scan(add_part, zeros, jax.tree.map(cut, batch))[0]
