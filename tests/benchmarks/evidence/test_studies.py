"""The models of the studies: that they are equal but for what they are to show."""

import pytest

from benchmarks.evidence import train_config
from benchmarks.evidence.studies import KINDS, STUDIES, Model, models
from rat_jax.config import config_from_dict, config_to_dict
from rat_jax.report.costs import num_parameters


def config(kind):
    return config_from_dict(train_config.get_config(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_attention(kind):
    counts = [num_parameters(config(name).model) for name in (kind, "attention")]
    assert abs(counts[0] / counts[1] - 1) <= 0.02
    assert 25e6 <= counts[0] <= 40e6


def test_all_kinds_are_trained_alike():
    """Nothing but the model differs: its pattern, its mixers' settings, their norms and the width of its MLP."""

    def shared(kind):
        values = config_to_dict(config(kind))
        model = values.pop("model")
        own = {"pattern", "mlp_width", "qk_norm", *model["pattern"]}
        return values, {name: value for name, value in model.items() if name not in own}

    values, model = shared("attention")
    for kind in KINDS:
        found_values, found_model = shared(kind)
        assert found_values == values
        mixers = {name for name in (*model, *found_model) if isinstance({**model, **found_model}[name], dict)}
        assert {k: v for k, v in found_model.items() if k not in mixers} == {
            k: v for k, v in model.items() if k not in mixers
        }


def test_settings_of_kinds():
    rattention, windows = (config(kind).model for kind in ("rattention", "windows_256"))
    assert rattention.pattern == ("attention", "rattention", "rattention", "rattention")
    assert rattention.mixers["rattention"].window == windows.mixers["local_attention"].window == 256
    assert config("rat_swa").model.mixers["local_attention"].window == 512
    assert config("rat").model.mixers["rat"].chunk_size == 16
    nope, partly = (config(kind).model.mixers for kind in ("rat_swa_nope", "rat_swa_global_nope"))
    assert [settings.rope for settings in nope.values()] == [False, False]
    assert (partly["rat"].rope, partly["local_attention"].rope) == (False, True)
    assert all(config(kind).model.qk_norm == kind.endswith("_qk_norm") for kind in KINDS)


def test_order():
    """The first study comes first, with all seeds; a kind of several studies is trained once."""
    found = models()
    kinds = STUDIES["mixers"].kinds
    assert found[: 2 * len(kinds)] == [Model(kind, seed) for seed in range(2) for kind in kinds]
    assert len(found) == len(set(found)) == 2 * len(KINDS)
    rest = found[2 * len(kinds) :]
    assert [model.seed for model in rest] == sorted(model.seed for model in rest)
    assert {kind for study in STUDIES.values() for kind in study.kinds} == set(KINDS)
    assert models(("chunks",), 1) == [Model(kind, 0) for kind in STUDIES["chunks"].kinds]


def test_small_models():
    for kind in KINDS:
        small = config(f"{kind}-small")
        assert small.model.pattern == config(kind).model.pattern
        assert num_parameters(small.model) < 100_000
    assert config("rattention_16-small").model.mixers["rattention"].window == 2


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="'lstm' is no kind of the studies, which are attention, rnn, "):
        train_config.get_config("lstm-small")
