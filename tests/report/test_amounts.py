"""Numbers as text."""

import pytest

from rat_jax.report import amounts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (amounts.fixed(1234.56789), "1,234.5679"),
        (amounts.count(1234567), "1,234,567"),
        (amounts.count(10**400), "10" + ",000" * 133),
        (amounts.short(1082752), "1.08 M"),
        (amounts.short(12.5), "12.5"),
        (amounts.short(2e15), "2,000 T"),
        (amounts.num_bytes(1024), "1 KiB"),
        (amounts.num_bytes(4_211_000), "4.02 MiB"),
        (amounts.num_bytes(7), "7 bytes"),
        (amounts.percent(0.4567), "45.7 %"),
        (amounts.axis(50), "50"),
        (amounts.axis(2500), "2,500"),
        (amounts.axis(1.25e9), "1.25 B"),
        (amounts.plain(None), "none"),
        (amounts.plain(True), "true"),
        (amounts.plain(["rat", 3, None]), "rat, 3, none"),
        (amounts.plain({"b": 1, "a": "x"}), '{"a": "x", "b": 1}'),
    ],
    ids=lambda text: text[:20],
)
def test_text(text, expected):
    assert text == expected


def test_what_is_not_there():
    for function in (amounts.fixed, amounts.count, amounts.short, amounts.num_bytes, amounts.percent):
        assert function(None) == amounts.ABSENT
