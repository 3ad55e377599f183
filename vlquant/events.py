"""What a long action tells whoever watches it; drawing it is somebody else's task."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One step of a stage is done, or something has to be said."""

    stage: str
    """What is being done, in a few words: "calibration", "layers"."""
    done: int = 0
    """Steps of the stage behind us."""
    total: int = 0
    """Steps of the stage; 0: this event is only a message."""
    message: str = ""
    """A line for the user, or nothing."""
    details: tuple[str, ...] = ()
    """Lines for a user who wants to know more."""

    def __str__(self) -> str:
        """The event as a line of text, for who draws no bars."""
        steps = f"{self.stage} {self.done}/{self.total}" if self.total else self.stage
        return f"{steps}: {self.message}" if self.message else steps


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Report to nobody."""
