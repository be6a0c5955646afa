"""Continues prompts with a trained model.

  python generate.py --workdir=runs/default --prompt="import os"
  python generate.py --workdir=runs/default --prompts_file=prompts.jsonl --output_file=texts.jsonl --temperature=0.8

Prints each prompt with its continuation; of a single prompt as it is made. With an output file nothing is printed: the
file gets a line of JSON for each text, with the fields of the prompt's record, `completion`, and `sampling`, the
settings. The same command given again goes on after the lines that are there. Prompts are read one by one, three times,
and never held. A line of the prompts' file that cannot be continued is named on standard error and skipped. Exit codes:
0, also where lines were skipped, as the last line says then; 2 if flags, the workdir, its checkpoint, all prompts or
the output file do not fit, and nothing was changed; 75 if Ctrl-C ended it; 76 if another process of the job is lost; 1
if the output file could not be written.

All devices are used, of several hosts with the flags of train.py for them; --mesh says how (docs/scaling.md).
"""

from rat_jax import interrupts, stopwatch

if __name__ == "__main__":
    interrupts.exit_while_importing()

import functools
import sys

import jax
import tqdm
from absl import flags

from rat_jax import cluster, program
from rat_jax.checkpoints import Workdir, load_model
from rat_jax.checkpoints.store import find_checkpoint
from rat_jax.compilation_cache import define_cache_flag
from rat_jax.config import ModelConfig
from rat_jax.mesh_flag import MeshChoice, define_mesh_flag
from rat_jax.paths import local_path
from rat_jax.program_store import ProgramStore
from rat_jax.sampling.batch import Batch
from rat_jax.sampling.completions import FileWriter, Printer
from rat_jax.sampling.first_pass import FirstPass
from rat_jax.sampling.output_file import OutputFile, added_fields
from rat_jax.sampling.prompt_list import PromptList
from rat_jax.sampling.prompts import find_tokenizer
from rat_jax.sampling.text_settings import TextSettings

_use_compilation_cache, _mesh, _join_cluster = define_cache_flag(), define_mesh_flag(), cluster.define_cluster_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_STEP = flags.DEFINE_integer("step", None, "use the checkpoint of this step; left out: the newest")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue, may be empty; give it again for several")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    'prompts, one a line; in a file called *.jsonl: {"prompt": "..."} a line; in *.json an array of either',
)
_OUTPUT_FILE = flags.DEFINE_string("output_file", None, "file for JSON lines; what is there is gone on with")
_ORDER = flags.DEFINE_enum("order", "input", ["input", "arrival"], "of lines: the prompts', or as texts are complete")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "tokens after which a text ends if it has not before")
_MIN_NEW_TOKENS = flags.DEFINE_integer("min_new_tokens", 0, "tokens before which the end of a document is not chosen")
_STOP = flags.DEFINE_multi_string("stop", [], "a text ends before this string; give it again for several")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, 1 draws as the model predicts")
_TOP_K = flags.DEFINE_integer("top_k", None, "draw from the k likeliest tokens; left out: from all")
_TOP_P = flags.DEFINE_float("top_p", None, "draw from the likeliest tokens that reach this probability")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1: tokens that were there are less likely")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "texts for each prompt, which is read once for all of them")
_SEED = flags.DEFINE_integer("seed", 0, "of the random numbers")
_LOG_PROBS = flags.DEFINE_bool("log_probs", False, "write tokens and their log-probabilities to the output file too")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "texts that are made at a time", lower_bound=1)
_MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens", None, "skip longer prompts; left out: caches have room for the longest", lower_bound=1
)
_DATA_PATH = flags.DEFINE_string("data_path", None, "prepared corpus of the tokenizer, where the workdir has none")


def _settings() -> TextSettings:
    if _SEED.present and _TEMPERATURE.value == 0:
        print(f"seed {_SEED.value} has no effect at temperature 0, which draws nothing", file=sys.stderr)
    return TextSettings(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        seed=_SEED.value,
        min_new_tokens=_MIN_NEW_TOKENS.value,
        num_samples=_NUM_SAMPLES.value,
        stop=tuple(_STOP.value),
        log_probs=_LOG_PROBS.value,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _go_on(output_file: OutputFile, step: int, settings: TextSettings) -> None:
    output_file.go_on({"step": step, **settings.to_record()})


def _mesh_for(choice: MeshChoice, model: ModelConfig) -> jax.sharding.Mesh | None:
    """The mesh of several devices; None for the only one, on which programs are the same whatever the mesh."""
    mesh = choice.mesh_for(model, _say)
    return mesh if mesh.size > 1 else None


def _continue(
    prompts: PromptList,
    first_pass: FirstPass,
    settings: TextSettings,
    output_file: OutputFile | None,
    mesh: MeshChoice,
) -> None:
    times = stopwatch.Stopwatch()
    workdir = Workdir(local_path(_WORKDIR.value, "--workdir"))
    files = _use_compilation_cache()
    loaded = load_model(workdir.path, _STEP.value, mesh=functools.partial(_mesh_for, mesh), report=_say)
    tokenizer = find_tokenizer(workdir, loaded.config, _DATA_PATH.value)
    times.lap("load")
    if output_file is not None:
        _go_on(output_file, loaded.step, settings)
    sizes = {"batch_size": _BATCH_SIZE.value, "max_prompt_tokens": _MAX_PROMPT_TOKENS.value}
    # Hosts that found their programs apart from each other might not compile the others together.
    store = ProgramStore(files, loaded.model.config) if files and jax.process_count() == 1 else None
    batch = Batch(loaded.model, tokenizer, prompts, settings, store=store, **sizes)
    printer = Printer(first_pass.num_prompts, settings.num_samples)
    is_quiet = not sys.stderr.isatty()
    with tqdm.tqdm(
        desc="counting tokens", unit="prompt", total=first_pass.num_prompts, disable=is_quiet, leave=False
    ) as bar:
        survey = batch.survey(printer if output_file is None else output_file, first_pass.tell, bar.update)
    times.lap("prompts")
    first_pass.check_any_left()
    if survey.num_rows > 0:  # else those that are not done are all refused
        engine = batch.engine(survey)
        if output_file is None:
            batch.run(engine, printer, times.add_tokens)
        else:
            with FileWriter(output_file, engine.num_slots) as writer:
                batch.run(engine, writer, times.add_tokens)
    times.report()


def main() -> int:
    _join_cluster(cluster.given_flags() | {"--workdir": str(local_path(_WORKDIR.value, "--workdir"))})
    with cluster.first_alone_prints():
        return _run()


def _run() -> int:
    settings = _settings()
    if _LOG_PROBS.value and _OUTPUT_FILE.value is None:
        raise program.FlagError("--log_probs needs an --output_file, to which they are written")
    mesh = _mesh()
    mesh.check_rows_whole("generate.py")
    path = None if _PROMPTS_FILE.value is None else local_path(_PROMPTS_FILE.value, "--prompts_file")
    prompts = PromptList(_PROMPT.value, path, added_fields(settings.num_samples, settings.log_probs))
    first_pass = FirstPass(prompts)
    if _OUTPUT_FILE.value is None:
        for _ in first_pass:
            pass
        first_pass.check_same_on_all_hosts()
        first_pass.check_any_left()
        _continue(prompts, first_pass, settings, None, mesh)
        first_pass.report()
        return 0
    output_file = OutputFile(
        local_path(_OUTPUT_FILE.value, "--output_file"),
        first_pass,
        order=_ORDER.value,
        num_samples=settings.num_samples,
        with_log_probs=settings.log_probs,
    )
    first_pass.check_same_on_all_hosts()
    first_pass.check_any_left()
    if output_file.num_done > 0:
        _say(f"{output_file.path}: {output_file.num_done} of {output_file.num_rows} completions are there")
    try:
        if output_file.num_done < output_file.num_rows:
            _continue(prompts, first_pass, settings, output_file, mesh)
        elif output_file.num_done > 0:  # nothing is left to make, but what is there may be another command's
            _, manifest = find_checkpoint(local_path(_WORKDIR.value, "--workdir"), _STEP.value, report=_say)
            _go_on(output_file, manifest.step, settings)
    except KeyboardInterrupt:
        done = f"{output_file.num_done} of {output_file.num_rows} completions are in {output_file.path}"
        _say(f"interrupted: {done}; the same command goes on")
        return program.INTERRUPTED
    first_pass.report()
    return 0


if __name__ == "__main__":
    program.run(main, required=["workdir"], interrupts="raise", at_end=cluster.leave)
