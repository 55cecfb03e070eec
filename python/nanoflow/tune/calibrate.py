"""What single ops do not tell of whole steps: how much energy a lower clock saves, and by how much
ops beside each other slow each other down. Steps that were measured tell it of all layers at once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nanoflow.schedule import schedule_from_json
from nanoflow.tune.costs import CostModel, Load, Spec
from nanoflow.tune.profile import MOST_EXPONENT
from nanoflow.tune.table import OpTable

_PAIRS = (("memory", "compute"), ("compute", "memory"))  # an op beside another
# Of the exponent of energy and the logarithms of the two slow-downs: how far off ops may tell them.
_DOUBT = np.array([0.4, 0.1, 0.1])
_STEP_DOUBT = 0.02  # of a step's time, as a part of it
_STRIDES = np.array([0.1, 0.03, 0.03])  # that tell the slopes
_ROUNDS = 3


def calibrated(table: OpTable, spec: Spec) -> OpTable:
    """The table with the exponent of energy and the slow-downs that its steps, which are of this
    model, make likely: by least squares of how far its predictions are off, and of how far these
    values are from those that single ops had told."""
    schedules = [schedule_from_json(step.schedule) for step in table.steps]
    loads = [Load(**step.load) for step in table.steps]
    measured = np.log([step.us for step in table.steps])

    def off(point: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of all predictions, in parts of their doubt."""
        model = CostModel(_with(table, point), spec)
        pairs = zip(schedules, loads, strict=True)
        return (np.log([model.predict(*one).step_us for one in pairs]) - measured) / _STEP_DOUBT

    slowdowns = [table.slowdown.get(pair, 1.0) for pair in _PAIRS]
    told = np.array([table.energy_exponent, *np.log(slowdowns)])
    point = told
    for _ in range(_ROUNDS if table.steps else 0):
        here = off(point)
        slopes = [(off(point + step) - here) / step.sum() for step in np.diag(_STRIDES)]
        matrix = np.vstack([np.transpose(slopes), np.diag(1 / _DOUBT)])
        aims = np.concatenate([-here, (told - point) / _DOUBT])
        point = point + np.linalg.lstsq(matrix, aims, rcond=None)[0]
        point[0] = min(max(point[0], 0.0), MOST_EXPONENT)
    return _with(table, point)


def _with(table: OpTable, point: NDArray[np.float64]) -> OpTable:
    factors = np.exp(point[1:]).tolist()
    slowdown = {**table.slowdown, **dict(zip(_PAIRS, factors, strict=True))}
    return replace(table, energy_exponent=float(point[0]), slowdown=slowdown)
