"""The page as HTML: text is never markup, nothing else is needed, colours are seen."""

import re

from rat_jax.report import page, read_runs, render
from tests.report.workdirs import (
    HARNESS,
    SECTIONS,
    add_evaluations,
    add_scores,
    add_tasks,
    evaluation,
    make_workdir,
    page_of,
)

EVIL = "<script>alert(1)</script><img src=http://x onerror=alert(1)>\"'&amp; \x00\x1b\u202e"


def test_what_files_say_is_text(tmp_path):
    path = make_workdir(
        tmp_path / EVIL.replace("/", "∕").replace("\x00", ""),
        training__wandb_project=EVIL,
        corpus=EVIL.replace("\x00", ""),
    )
    add_tasks(path, {EVIL: (0.5, 0.1, 7), f"failed {EVIL}": EVIL}, setting=EVIL, **{EVIL: 1})
    add_scores(path, EVIL, [{"name": "\ud800", "metric": EVIL, "value": 0.5}])
    add_evaluations(path, evaluation(16, 2.0), data=f"/{EVIL}")
    shown = page_of(path)
    assert not shown.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    text = EVIL.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert any(head == f"{text} acc, 7 documents" for head in shown.cells(HARNESS))
    assert shown.cells(text)[f"\\ud800 {text}"]
    assert shown.headings[0].startswith("Run <script>alert(1)<∕script><img src=http:∕∕x onerror=alert(1)>")


def test_the_page_needs_nothing_else(tmp_path):
    content = render(read_runs([make_workdir(tmp_path / "run")])).decode()
    shown = page_of(tmp_path / "run")
    links = [value for _, name, value in shown.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert links == [f"#{section.lower().replace(' ', '-')}" for section in SECTIONS]
    ids = [value for _, name, value in shown.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)
    named = {ref for _, name, value in shown.attributes if name == "aria-labelledby" for ref in value.split()}
    assert named <= set(ids)
    assert set(re.findall(r"url\(([^)]*)\)", content)) <= {f"#{name}" for name in ids}
    assert "http" not in content.replace("http-equiv", "") and "@import" not in content
    assert "default-src 'none'; style-src 'unsafe-inline'" in content


def test_the_same_runs_give_the_same_page(tmp_path):
    path = make_workdir(tmp_path / "run")
    assert render(read_runs([path])) == render(read_runs([path]))


def test_colours_are_seen_on_their_paper():
    """WCAG 2.2: graphics against what is beside them 3 to 1, text 4.5 to 1."""
    style = page.TEMPLATES.joinpath("page.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): #(\w{6});", theme))
        paper = _luminance(colours["paper"])
        for name in ("ink", "faint", *(f"c{index}" for index in range(page.chart.NUM_COLOURS))):
            lighter, darker = sorted((paper, _luminance(colours[name])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= (4.5 if name in ("ink", "faint", "c0") else 3.0), name


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
