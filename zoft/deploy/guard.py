"""Watch the steps of a run for losses that are not finite and steps that move nothing."""

from collections.abc import Sequence

from zoft.errors import DivergedError
from zoft.events import Listener, Warned
from zoft.optim import StepRecord

SKIPPED_IN_A_ROW = 10  # steps with a loss that is not finite, after which a run gives up
FLAT_STEPS_WARNED = 20


class Guard:
    """Warns of steps that move nothing; gives up after ten losses in a row that are not finite."""

    def __init__(self, taken: Sequence[StepRecord], on_event: Listener) -> None:
        self._on_event = on_event
        self._skipped_in_a_row = 0
        self._flat = sum(record.flat for record in taken)

    def check(self, record: StepRecord) -> None:
        """Check one more step."""
        self._check_finite(record)
        self._flat += record.flat
        if record.flat and self._flat == FLAT_STEPS_WARNED:
            self._on_event(
                Warned(
                    f"{self._flat} of {record.step + 1} steps had a slope of exactly zero and moved nothing; "
                    "a larger --batch-size or --eps makes the objective change"
                )
            )

    def _check_finite(self, record: StepRecord) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.skipped else 0
        if self._skipped_in_a_row == 1:
            self._on_event(Warned(f"step {record.step}: the loss is not finite, the step is skipped"))
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the loss was not finite in {SKIPPED_IN_A_ROW} steps in a row, up to step {record.step}; "
                f"try a lower --lr (it was {record.lr[0]:g}) or --dtype fp32"
            )
