"""The tables of docs/evidence.md, as Markdown."""

from collections.abc import Sequence

from benchmarks.evidence.comparison import Results
from benchmarks.evidence.studies import STUDIES

# Mean test losses at 1, 2 and 4 times the training length of 4,096 tokens (arXiv 2507.04416, with 1.3 billion
# parameters), beside the kinds of ours that they are of.
PUBLISHED_LENGTHS = {"rat_swa": (2.58, 3.07, 3.59), "rat_swa_nope": (2.60, 2.59, 2.66)}
BASELINE = "attention"
_RATTENTION = {  # suffixes of its kinds, and what is said of them; normalised ones are compared with their like
    "": "",
    "_quiet": ", branches from 0.1",
    "_qk_norm": ", normalised",
    "_quiet_qk_norm": ", normalised, branches from 0.1",
}
_FLAT = (  # to 4 times the training length, by the papers
    *("attention_nope", "attention_swa_nope", "attention_swa_global_nope"),
    *("rat_nope", "rat_swa_nope", "rat_swa_global_nope", "rattention"),
)


def loss_table(results: Results, kinds: Sequence[str]) -> str:
    """Losses at the training length, with both errors, and speeds."""
    header = ["mixer", "parameters", "seeds", "loss", "± 2 standard errors of seeds", "95 % interval of the text"]
    header += [f"less {BASELINE}'s", "95 % interval of the text", "", "tokens/s"]
    rows = []
    for kind in kinds:
        if (result := results.by_kind.get(kind)) is None:
            continue
        length, error = results.length, results.error(kind)
        row = [kind, f"{result.parameters / 1e6:.2f} M", str(len(result.models)), f"{result.loss(length):.4f}"]
        row += ["" if error is None else f"{2 * error:.4f}", _range(results.interval(kind, length))]
        if kind == BASELINE or BASELINE not in results.by_kind:
            row += ["", "", ""]
        else:
            row += [
                f"{results.difference(kind, BASELINE):+.4f}",
                _range(results.difference_interval(kind, BASELINE, length)),
            ]
            row.append(results.verdict(kind, BASELINE) or "")
        speed = results.speeds.get(kind)
        rows.append([*row, "" if speed is None else f"{speed:,.0f}"])
    return _markdown(header, rows, right=range(1, len(header)))


def length_table(results: Results, kinds: Sequence[str]) -> str:
    """Losses of the same targets, read in sequences of one to eight times the training length."""
    known = [kind for kind in kinds if kind in results.by_kind]
    lengths = results.by_kind[known[0]].lengths if known else []
    header = ["mixer", *(f"{length // results.length}x ({length:,})" for length in lengths)]
    header += [f"{length // results.length}x less 1x, 95 % interval of the text" for length in lengths[2:]]
    rows = []
    for kind in known:
        result = results.by_kind[kind]
        row = [kind, *(f"{result.loss(length):.4f}" for length in lengths)]
        row += [_range(results.growth_interval(kind, length)) for length in lengths[2:]]
        rows.append(row)
    return _markdown(header, rows, right=range(1, len(header)))


def published_table(results: Results) -> str:
    """Beyond the training length: the RAT paper's losses and ours, each less that at 1x."""
    header = ["model", "whose", "1x", "2x less 1x", "4x less 1x"]
    rows = []
    for kind, (at_length, *beyond) in PUBLISHED_LENGTHS.items():
        rows.append([kind, "the paper's", f"{at_length:.2f}", *(f"{loss - at_length:+.2f}" for loss in beyond)])
        if (result := results.by_kind.get(kind)) is not None:
            ours = [result.loss(length) for length in result.lengths[:3]]
            rows.append([kind, "ours", f"{ours[0]:.2f}", *(f"{loss - ours[0]:+.2f}" for loss in ours[1:])])
    return _markdown(header, rows, right=range(2, len(header)))


def claims_table(results: Results) -> str:
    """What the papers say of these models, and whether it shows here."""
    claims = [
        ("RAT-SWA is no worse than attention", "rat_swa", "attention", ("lower", "tie")),
        ("attention is no worse than RAT (16)", "attention", "rat", ("lower", "tie")),
        ("RAT (16) is better than the RNN", "rat", "rnn", ("lower",)),
        *(
            (f"windows of {w} alone are worse than attention", f"windows_{w}", "attention", ("higher",))
            for w in (256, 16)
        ),
        *(claim for window in (256, 16) for suffix in _RATTENTION for claim in _rattention_claims(window, suffix)),
    ]
    rows = []
    for claim, kind, other, agreeing in claims:
        if kind in results.by_kind and other in results.by_kind:
            length, verdict = results.length, results.verdict(kind, other)
            difference = results.difference(kind, other)
            shown = "not known" if verdict is None else "yes" if verdict in agreeing else "no"
            interval = _range(results.difference_interval(kind, other, length))
            rows.append([claim, f"{difference:+.4f}", interval, verdict or "", shown])
    for kind in _FLAT:
        if kind in results.by_kind and len(results.by_kind[kind].lengths) > 2:
            length = results.by_kind[kind].lengths[2]
            growth = results.by_kind[kind].loss(length) - results.by_kind[kind].loss(results.length)
            interval = results.growth_interval(kind, length)
            rows.append(
                [f"{kind}: flat to 4x", f"{growth:+.4f}", _range(interval), "", "yes" if interval[0] <= 0 else "no"]
            )
    return _markdown(["claim", "difference, nats", "95 % interval of the text", "by seeds", "shown"], rows, range(1, 3))


def _rattention_claims(window: int, suffix: str) -> list[tuple[str, str, str, tuple[str, ...]]]:
    normalised = "_qk_norm" if suffix.endswith("_qk_norm") else ""
    kind = "rattention" if (window, suffix) == (256, "") else f"rattention_{window}{suffix}"
    name = f"RAttention ({window}{_RATTENTION[suffix]})"
    return [
        (f"{name} is no worse than attention", kind, f"attention{normalised}", ("lower", "tie")),
        (f"windows of {window} alone are worse than {name}", f"windows_{window}{normalised}", kind, ("higher",)),
    ]


def failures_table(results: Results) -> str:
    """Models without a result, and why; empty if there are none."""
    if not results.failures:
        return ""
    return _markdown(["model", "what it said"], [list(item) for item in results.failures.items()], ())


def question(study: str) -> str:
    """A heading."""
    return f"## {STUDIES[study].question}"


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval[0] < 1 else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    lines = [header, ["--:" if column in right else "---" for column in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
