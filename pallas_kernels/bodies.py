"""Which back end computes RAT's attention to summaries on a GPU; the recurrence is Triton's with all of them."""

import dataclasses
import importlib
from types import ModuleType
from typing import Literal

from pallas_kernels.triton.problem import Problem

Body = Literal["triton", "mosaic_gpu", "cudnn"]
_MODULES = {"mosaic_gpu": "pallas_kernels.mosaic_gpu", "cudnn": "pallas_kernels.cudnn.attention"}
_HOPPER = (9, 0)


@dataclasses.dataclass(frozen=True)
class Bodies:
    """One back end for the forward pass, one for the backward pass."""

    forward: Body
    backward: Body


TRITON = Bodies("triton", "triton")


def module(body: Body) -> ModuleType:
    """What holds `forward`, `backward` and `refusal` of a body other than Triton's."""
    return importlib.import_module(_MODULES[body])


def refusal(body: Body, p: Problem) -> str | None:
    """Why a body cannot run a problem that Triton takes, and what comes nearest; None where it can."""
    if body == "triton":
        return None
    if body == "mosaic_gpu" and p.capability is not None and p.capability[0] != _HOPPER[0]:
        return f"it needs a card of compute capability 9.0, this one has {p.capability[0]}.{p.capability[1]}"
    return module(body).refusal(p)


def fastest(p: Problem) -> Bodies:
    """The bodies that are fastest where they take the problem: Mosaic GPU's on Hopper, at every length measured there.

    Elsewhere Triton's, because cuDNN, which beats them on Hopper from 4096 slots on, was not measured on other cards.
    """
    on_hopper = p.capability is not None and p.capability[0] == _HOPPER[0]
    body = "mosaic_gpu" if on_hopper and refusal("mosaic_gpu", p) is None else "triton"
    return Bodies(body, body)
