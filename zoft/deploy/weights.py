"""Restore the weights of any step of a run: the last snapshot before it, then the journal."""

from collections.abc import Callable

from zoft.deploy.journal import Contents
from zoft.deploy.snapshots import Snapshots
from zoft.errors import RunError
from zoft.events import Listener, Progress, Warned
from zoft.optim import RecordOptimizer


def bring_to(
    step: int,
    optimizer: RecordOptimizer,
    contents: Contents,
    snapshots: Snapshots,
    *,
    pristine: bool,
    anew: Callable[[], RecordOptimizer],
    measure: Callable[[int], object],
    on_event: Listener,
) -> None:
    """Bring the weights and the optimizer to what they were after ``step`` steps of ``contents``.

    ``pristine`` says that the weights are still the base's; ``anew`` loads the base again and returns its optimizer.
    ``measure`` measures a step again, needed by methods whose records hold no gradient.
    """
    for candidate in reversed([saved for saved in snapshots.steps() if saved <= step]):
        try:
            snapshots.load(candidate, optimizer, contents.checksums.get(candidate))
            break
        except RunError as error:
            pristine = False
            on_event(Warned(f"{error}; replaying from an earlier step"))
    else:
        candidate = 0
        if not pristine:
            del optimizer  # the old weights, before the new ones are read
            optimizer = anew()
    for record in contents.records(0, candidate):
        optimizer.observe(record)
    for record in contents.records(candidate, step):
        if optimizer.needs_gradient:
            measure(record.step)
        optimizer.apply(record)
        on_event(Progress("replaying", record.step + 1 - candidate, step - candidate))
