"""Settings that change during training."""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "exponential")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from ``start`` to ``end`` over so many updates, and stays there.

    With t the share of the updates that are done, in [0, 1]: ``"linear"``: start + (end - start) t;
    ``"exponential"``: start (end / start)^t; ``"constant"``: start.

    Args:
        name: of the option, for messages.
        start: the number at the first update.
        end: the number after ``updates`` updates.
        updates: how many updates that takes.
        kind: one of :data:`SCHEDULES`.

    Raises:
        ValueError: if ``kind`` is unknown, ``updates`` does not fit it, or an exponential schedule has an end
            that is not positive.
    """

    name: str
    start: float
    end: float
    updates: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"{self.name}-schedule must be one of {', '.join(SCHEDULES)}, got {self.kind}")
        if self.kind == "constant":
            if self.updates != 0:
                raise ValueError(
                    f"{self.name}-updates must be 0 without a {self.name}-schedule, got {self.updates}"
                )
            return
        if self.updates < 1:
            raise ValueError(
                f"{self.name}-updates must be at least 1 with {self.name}-schedule {self.kind}, "
                f"got {self.updates}"
            )
        if self.kind == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError(
                f"{self.name} and {self.name}-end must be positive with {self.name}-schedule exponential, "
                f"got {self.start} and {self.end}"
            )

    def at(self, num_updates: float | None) -> float:
        """The number after so many updates; None stands for all of them."""
        if self.kind == "constant":
            return self.start
        done = 1.0 if num_updates is None else min(max(num_updates / self.updates, 0.0), 1.0)
        if done == 1:
            return self.end  # exactly
        if self.kind == "linear":
            return self.start + (self.end - self.start) * done
        return self.start * (self.end / self.start) ** done
