"""A step as it is handed on from the scheduler's state to the engine and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.offload.offload import NO_MOVES, PageMoves
from nanoflow.scheduler.policy import StepPlan
from nanoflow.scheduler.scoring import Scoring


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has been started."""

    number: int
    plan: StepPlan
    samples: NDArray[np.bool_]  # [R] whose next token is sampled
    scoring: Scoring
    loads: PageMoves = NO_MOVES  # to be begun before it
    stores: PageMoves = NO_MOVES  # to be begun behind it
