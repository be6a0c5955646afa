"""train.py --dry_run: what is compiled, printed and refused."""

import importlib.util
import os
import re
import subprocess
import sys
import types

import jax
import pytest

from rat_jax import chips
from rat_jax.checkpoints.store import abstract_model
from rat_jax.sharding import make_mesh
from rat_jax.training import dry_run as module
from rat_jax.training import step, topology
from rat_jax.training.collectives import Collectives
from rat_jax.training.dry_run import dry_run
from rat_jax.training.oom import remedies
from tests.commands import ROOT, call_script, import_path
from tests.tiny_run import tiny_config, train_command

GIB = 2**30


def needs_libtpu(test):
    installed = importlib.util.find_spec("libtpu") is not None
    return pytest.mark.tpu(pytest.mark.skipif(not installed, reason="libtpu is not installed")(test))


def printed_amount(text: str, name: str) -> float:
    """The first number of a line."""
    (line,) = re.findall(rf"^ *{name} +([\d.,e+-]+)", text, re.MULTILINE)
    return float(line.replace(",", ""))


def fake_lowered(memory=None, error: str | None = None, costs: dict | None = None):
    """What a compiler gives for a program of two gathers."""
    text = (
        "HloModule m\n\nENTRY %main (p: f32[4,64]) -> f32[4,64] {\n  %p = f32[4,64]{1,0} parameter(0)\n"
        "  %g = f32[8,64]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}\n"
        "  %h = f32[8,64]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,2]<=[2], dimensions={0}\n"
        "  ROOT %x = f32[4,64]{1,0} copy(%p)\n}\n"
    )

    def compile():
        if error is not None:
            raise jax.errors.JaxRuntimeError(error)
        sizes = {"argument": 4, "temp": 2, "output": 4, "alias": 3, "generated_code": 1} | (memory or {})
        figures = {f"{name}_size_in_bytes": int(size * GIB) for name, size in sizes.items()}
        return types.SimpleNamespace(
            memory_analysis=lambda: types.SimpleNamespace(**figures, peak_memory_in_bytes=5 * GIB),
            cost_analysis=lambda: {"flops": 1e6, "bytes accessed": 2e6} if costs is None else costs,
            as_text=lambda: text,
        )

    return types.SimpleNamespace(compile=compile)


@pytest.fixture
def compiled_as(monkeypatch):
    """Has a dry run find what the test says in place of the compiled step, and a limit of memory."""

    def use(limit: float | None = None, **settings):
        monkeypatch.setattr(module, "lower_train_step", lambda config, mesh: fake_lowered(**settings))
        monkeypatch.setattr(module, "_memory_limit", lambda mesh: None if limit is None else int(limit * GIB))

    return use


class TestCommand:
    """train.py --dry_run."""

    def test_virtual_devices(self, tmp_path):
        """The real step; no data is there, no workdir is asked for, nothing is written."""
        config = tiny_config(tmp_path / "nowhere", mesh__data=2, mesh__fsdp=2, model__pattern=("rnn",))
        command = [word for word in train_command(tmp_path, config) if not word.startswith("--workdir")]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
        done = subprocess.run(
            [*command, "--dry_run", f"--workdir={tmp_path / 'run'}"],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"config.py"}
        assert "4 x cpu; data 2, fsdp 2" in done.stdout
        state = module.abstract_state(config, make_mesh(tiny_config("x").mesh, jax.devices()[:1]))
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        assert printed_amount(done.stdout, "parameters") == num_parameters
        assert printed_amount(done.stdout, "all-gather") > 0
        assert "no peaks of cpu" in done.stdout

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--topology=v5e:2x2", "--workdir=x"], "--topology is for --dry_run alone"),
            ([], "--workdir is missing"),
            (
                ["--dry_run", "--config.mesh.fsdp=3"],
                "config.mesh.data 1, config.mesh.fsdp 3, config.mesh.context 1, config.mesh.tensor 1 do not multiply",
            ),
            (["--dry_run", "--config.model.widht=3"], "config has no field model.widht"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, capsys, flags, message):
        assert call_script("train.py", f"--config={ROOT / 'configs/default.py'}", *flags) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(("limit", "code"), [(8, 0), (7.9, 1), (None, 0)])
    def test_exit_codes(self, compiled_as, capsys, limit, code):
        compiled_as(limit)
        assert call_script("train.py", f"--config={ROOT / 'configs/default.py'}", "--dry_run") == code
        printed = capsys.readouterr().out
        assert printed_amount(printed, "needed") == 8  # 4 + 2 + 4 - 3 + 1
        assert ("It does not fit: 8.0 GiB of 7.9 GiB a device" in printed) == (code == 1)
        assert ("config.optimizer.accumulation_steps, now 1" in printed) == (code == 1)


def test_the_step_is_that_of_a_run():
    """The same function, its state donated, and the limit of the loss an argument."""
    config = tiny_config("nowhere", model__pattern=("rnn",))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    lowered = step.lower_train_step(config, mesh)
    donated = [info.donated for info in jax.tree.leaves(lowered.args_info[0])]
    num_state = len(jax.tree.leaves(step.abstract_state(config, mesh)))
    assert donated == [True] * num_state + [False] * 5  # four arrays of a batch, and the limit
    graphdef = abstract_model(config.model)[0]
    arguments = (step.abstract_state(config, mesh), step.abstract_batch(config, mesh), step.NO_LIMIT)
    with jax.set_mesh(mesh):
        own = step.train_step.lower(graphdef, config.optimizer, config.training.num_steps, *arguments)
    assert own.as_text() == lowered.as_text()


def test_a_compiler_that_refuses_is_no_trace(compiled_as, capsys):
    compiled_as(error="RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15.75G hbm.\nmore")
    assert not dry_run(tiny_config("nowhere"), None)
    printed = capsys.readouterr().out
    assert "The compiler refuses it: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm" in printed
    assert "config.model.remat, now 'none'" in printed


def test_a_state_that_does_not_fit_is_not_compiled(compiled_as, capsys):
    compiled_as(limit=1e-6, error="INTERNAL: compiled")
    assert not dry_run(tiny_config("nowhere"), None)
    printed = capsys.readouterr().out
    assert "It does not fit: the state alone takes 0.0 GiB of 0.0 GiB a device" in printed
    assert "config.mesh.fsdp, now 1, 1 of 1 devices" in printed


def test_other_errors_of_a_compiler_are_raised(compiled_as):
    compiled_as(error="INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        dry_run(tiny_config("nowhere"), None)


def test_what_is_printed(compiled_as, capsys):
    compiled_as(limit=16)
    assert dry_run(tiny_config("nowhere"), None)
    printed = capsys.readouterr().out
    for name, amount in {
        "arguments": 4,
        "temporaries": 2,
        "output": 4,
        "aliased": 3,
        "program": 1,
        "peak": 5,
        "all-gather": 2,
        "XLA's FLOPs": 1e6,
        "XLA's bytes": 2e6,
    }.items():
        assert printed_amount(printed, name) == amount


@pytest.mark.parametrize(
    ("flops", "temporaries", "sent", "longest", "ms"),
    [
        (5e12, 0, 0, "arithmetic", 50.0),
        (0, 1, 0, "memory", 1.0e3 * (4 + 4 + 2) * GIB / 1e12),
        (0, 0, 1e10, "links", 100.0),
    ],
)
def test_the_estimate_is_the_longest_of_three_times(monkeypatch, flops, temporaries, sent, longest, ms):
    monkeypatch.setattr(module, "chip_of", lambda kind: chips.Chip(1e14, 16 * GIB, 1e12, 1e11))
    config = tiny_config("nowhere")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    memory = fake_lowered({"temp": temporaries}).compile().memory_analysis()
    collectives = {"all-reduce": Collectives(1, 0, int(sent), 0)} if sent else {}
    text = "\n".join(module._estimate(config, mesh, flops, memory, {}, collectives))
    assert f"limited by {longest}" in text
    assert printed_amount(text, "time a step") == pytest.approx(ms, rel=0.01)
    assert "an estimate from the chip's peaks" in text


class TestTopologies:
    """TPUs that are not there."""

    def test_without_libtpu(self, monkeypatch):
        monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
        monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
        message = r"--topology=v5e:2x2: libtpu .* is not installed: pip install 'libtpu"
        with pytest.raises(topology.TopologyError, match=message):
            topology.topology_devices("v5e:2x2")

    @needs_libtpu
    def test_a_step_for_four_chips(self, tmp_path):
        config = tiny_config(tmp_path / "nowhere", mesh__data=1, mesh__fsdp=-1, model__pattern=("rnn",))
        command = [word for word in train_command(tmp_path, config) if not word.startswith("--workdir")]
        done = subprocess.run(
            [*command, "--dry_run", "--topology=v5e:2x2"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": import_path(), "JAX_PLATFORMS": ""},  # as users have it
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "4 x TPU v5 lite of v5e:2x2, not there; data 1, fsdp 4" in done.stdout
        assert printed_amount(done.stdout, "all-gather") > 0
        assert "there are 16.0 GiB" in done.stdout
        assert "an estimate from the chip's peaks" in done.stdout

    @needs_libtpu
    @pytest.mark.slow
    def test_what_does_not_fit(self):
        """Activations would take six times the memory of a chip."""
        done = subprocess.run(
            [
                *(sys.executable, "train.py", f"--config={ROOT / 'configs/default.py'}"),
                *("--dry_run", "--topology=v5e:2x2"),
                *("--config.model.pattern=('rnn',)", "--config.model.remat=none", "--config.model.num_layers=2"),
                *("--config.model.width=1024", "--config.model.mlp_width=8192"),
                *("--config.data.seq_len=65536", "--config.data.global_batch_size=16"),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": import_path(), "JAX_PLATFORMS": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert "The compiler refuses it: RESOURCE_EXHAUSTED: Ran out of memory" in done.stdout
        assert "config.model.remat, now 'none'" in done.stdout

    @needs_libtpu
    @pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    def test_a_chip_is_a_device_whose_peaks_are_known(self, name):
        devices = topology.topology_devices(name)
        assert len(devices) == 4
        assert chips.chip_of(devices[0].device_kind) is not None

    @needs_libtpu
    @pytest.mark.parametrize("name", ["v5e:2x3", "v9:2x2", "nonsense"])
    def test_unknown_names(self, name):
        with pytest.raises(topology.TopologyError, match=f"--topology={name}: libtpu has no such topology .*v5e:16x16"):
            topology.topology_devices(name)


def advice(devices: dict[str, int], **changes) -> str:
    mesh = types.SimpleNamespace(shape=devices, size=devices["data"] * devices["fsdp"])
    return "\n".join(remedies(tiny_config("nowhere", **changes), mesh))


def test_advice_names_what_can_be_changed():
    """Of 8 sequences on 2 devices; and where none of it can."""
    text = advice({"data": 1, "fsdp": 2}, model__scan_unroll=2)
    for field in ("accumulation_steps, now 1 (8 sequences", "remat, now 'none'", "scan_unroll, now 2", "fsdp, now 1"):
        assert field in text
    text = advice({"data": 1, "fsdp": 8}, model__remat="block")
    for field in ("accumulation_steps", "global_batch_size", "remat", "scan_unroll"):
        assert field not in text
    assert "global_batch_size, now 8" in advice({"data": 1, "fsdp": 3})
