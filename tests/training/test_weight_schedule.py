"""Tests of WeightSchedule."""

import pytest

from lightning_dist import (
    DistillationCallback,
    WeightSchedule,
)
from plain import data, fitted, teacher_net


def test_a_weight_schedule_counts_epochs_or_steps(make_trainer):
    seen = []

    def spy(schedule):
        def weight(trainer):
            seen.append(schedule(trainer))
            return seen[-1]

        return weight

    for schedule, expected in [
        (WeightSchedule({0: 0.0, 2: 2.0}), [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]),
        (WeightSchedule({0: 3.0, 3: 0.0}, unit="step"), [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]),
    ]:
        seen.clear()
        callback = DistillationCallback(teacher_net(), weight=spy(schedule))
        fitted(make_trainer(callbacks=[callback], max_epochs=3), loader=data(2))
        assert seen == pytest.approx(expected)


@pytest.mark.parametrize("points", [{}, {-1: 1.0}])
def test_a_schedule_without_valid_points_is_refused(points):
    with pytest.raises(ValueError, match="points is"):
        WeightSchedule(points)
