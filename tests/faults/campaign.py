"""Runs faults and judges what came of them."""

import collections
import contextlib
import dataclasses
import io
import os
import pathlib
import random
import shutil
import tempfile
import time
import traceback
from typing import Any

from rat_jax.config import config_from_dict, config_to_dict
from rat_jax.errors import RatJaxError
from rat_jax.training import train
from tests.faults import mixtures, packed  # noqa: F401 (they enter their kinds)
from tests.faults.base import STOPPED_AT, Base, begun_at, copy, differences
from tests.faults.damage import KINDS, Case, Kind


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one fault."""

    kind: str
    seed: int
    done: str  # what the fault was
    outcome: str  # "continued", "refused"; else what is wrong
    detail: str
    secs: float
    live: bool = False

    @property
    def is_right(self) -> bool:
        return self.outcome in ("continued", "refused", "finished")


def judge(base: Base, kind: Kind, seed: int) -> Verdict:
    """Damages copies, starts the run again, and compares."""
    rng, start = random.Random(f"{kind.name} {seed}"), time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fault-"))
    try:
        data, workdir = copy(base, folder)
        case = Case(data, workdir, config_to_dict(base.config(data)), rng)
        saved = int(case.checkpoints[1 if kind.takes_newest else 0].name)  # the newest that the fault leaves good
        done = kind.inject(case)
        outcome, detail = _start_again(case.config, base.whole, workdir, saved, STOPPED_AT if kind.takes_log else 0)
        if outcome in ("continued", "refused") and outcome not in kind.outcomes:
            detail, outcome = f"{outcome}: {detail}", f"wrongly {outcome}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(kind.name, seed, done.replace(str(folder), ""), outcome, detail, time.monotonic() - start)


def judge_named(path: pathlib.Path, name: str, seed: int) -> Verdict:
    """`judge` by the folder of the bases and the kind's name, silently: for a process of its own."""
    kind = next(kind for kind in KINDS if kind.name == name)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return judge(Base(path / kind.reads, kind.reads), kind, seed)


def _start_again(
    config: dict[str, Any], whole: pathlib.Path, workdir: pathlib.Path, saved: int, logged_from: int
) -> tuple[str, str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            train(config_from_dict(config), workdir)
    except RatJaxError as error:
        return "refused", str(error)
    except Exception:
        return "traceback", traceback.format_exc()
    begun = begun_at(said.getvalue())
    if begun is None or begun < saved:  # the end is the same, but steps were done twice
        return "lost", f"step {saved} was saved, the next start began at {begun}"
    wrong = differences(workdir, whole, logged_from=logged_from)
    return ("continued", "") if wrong is None else ("diverged", wrong)


def table(verdicts: list[Verdict]) -> str:
    """One line a kind: how often, with what outcomes."""
    lines = [f"{'fault':<62} {'times':>5}  outcomes"]
    by_kind: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_kind.setdefault(verdict.kind, []).append(verdict)
    for name, some in by_kind.items():
        counts = collections.Counter(verdict.outcome for verdict in some)
        mark = "live: " if some[0].live else ""
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common())
        lines.append(f"{mark + name:<62} {len(some):>5}  {outcomes}")
    live, wrong = sum(verdict.live for verdict in verdicts), [verdict for verdict in verdicts if not verdict.is_right]
    lines.append(f"{len(verdicts)} faults of {len(by_kind)} kinds, {live} on live runs: {len(wrong)} wrong")
    for verdict in wrong[:40]:
        lines.append(f"\n{verdict.kind}, seed {verdict.seed}: {verdict.outcome}\n  {verdict.done}\n  {verdict.detail}")
    return "\n".join(lines)
