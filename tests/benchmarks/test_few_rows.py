"""The table of products of few rows, in small: XLA's lines anywhere, the kernel's as far as they are lowered."""

import functools
import re
import types

import jax
import numpy as np
import pytest

from benchmarks import card, few_rows
from rat_jax.ops import platform


def run(capsys, monkeypatch, *words) -> list[str]:
    monkeypatch.setattr(card, "measure_ceilings", lambda repeats: card.Ceilings(10.0, 1.0))
    monkeypatch.setattr(card, "share_memory", lambda: None)  # settings of the whole process
    monkeypatch.setattr(few_rows, "LONGEST", 4)
    few_rows.main(["--small", "--repeats", "1", "--rows", "1", *words])
    return capsys.readouterr().out.splitlines()


def test_the_table_has_a_line_for_each_implementation(capsys, monkeypatch):
    title, *rows = run(capsys, monkeypatch, "--sizes", "in_proj", "mlp")[-5:]
    assert title.split() == ["product", "rows", "by", "us", "+-", "GB/s", "share", "off"]
    for name, (xla, kernel) in zip(("in_proj", "mlp"), (rows[:2], rows[2:]), strict=True):
        found = re.fullmatch(rf"{name} +1 xla +([\d.]+) +[\d.]+ +\d+ +([\d.]+)% +0\.00000", xla)
        num_bytes = few_rows.Chain(few_rows.SMALL[name], 1).num_bytes
        us, share = map(float, found.groups())
        np.testing.assert_allclose(share / 100, num_bytes / 4 / (1e3 * us) / 10.0, atol=0.002)
        if jax.default_backend() == "cpu":
            assert re.match(rf"{name} +1 mosaic_gpu +UnsupportedError: .* it runs on NVIDIA GPUs", kernel)


def test_no_chain_begins_after_the_time_is_over(capsys, monkeypatch):
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(few_rows, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    lines = run(capsys, monkeypatch, "--sizes", "up", "--seconds", "5")
    assert re.match(r"up +1 not measured: --seconds 5 are over", lines[-1])


@pytest.mark.parametrize("name", ["in_proj", "mlp"])
def test_the_kernels_chain_lowers_for_cuda(name, monkeypatch):
    monkeypatch.setattr(few_rows, "LONGEST", 4)
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(platform, "expected_capability", lambda: (9, 0))
    chain = few_rows.Chain(few_rows.SMALL[name], 2)
    by_xla, by_kernel = (
        jax.jit(functools.partial(chain.run, implementation)).trace(*jax.eval_shape(chain.arguments))
        for implementation in few_rows.IMPLEMENTATIONS
    )
    assert "normed_product_mosaic" in by_kernel.lower(lowering_platforms=("cuda",)).as_text()
    for found, want in zip(by_kernel.out_info, by_xla.out_info, strict=True):
        assert (found.shape, found.dtype) == (want.shape, want.dtype)


def test_real_chains_hold_more_than_any_cache():
    for name, products in few_rows.SIZES.items():
        chain = few_rows.Chain(products, 1)
        assert len(chain.all()) <= few_rows.LONGEST
        assert 200e6 <= chain.num_bytes <= 1e9, name


@pytest.mark.parametrize(
    ("words", "flag"),
    [("--rows 0", "--rows"), ("--repeats 0", "--repeats"), ("--seconds 0", "--seconds"), ("--sizes x", "--sizes")],
)
def test_flags_that_do_not_fit_are_named(words, flag):
    with pytest.raises(few_rows.program.FlagError, match=flag):
        few_rows.parse(words.split())
