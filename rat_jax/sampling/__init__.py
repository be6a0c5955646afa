"""Text from a model: prompts read into caches, tokens drawn, completions written.

engine = Engine(model.decoder(), num_slots=64, capacity=4096, rule=SamplingParams.of(), eos_id=tokenizer.eos_id)
number = engine.submit(Request(ids, max_new_tokens=256, on_event=print))
while engine.step():
    pass
"""

from rat_jax.sampling.engine import Engine
from rat_jax.sampling.errors import SamplingError, SamplingStopped
from rat_jax.sampling.generation import generate
from rat_jax.sampling.request import Event, Request
from rat_jax.sampling.sampling_params import SamplingParams
from rat_jax.sampling.stop_strings import generate_text

__all__ = [
    "Engine",
    "Event",
    "Request",
    "SamplingError",
    "SamplingParams",
    "SamplingStopped",
    "generate",
    "generate_text",
]
