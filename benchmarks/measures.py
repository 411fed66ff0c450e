"""What all measures share: rounds in turn, medians of ratios, progress."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab import NAMES
from report import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PACE = 50
LIMIT = 120.0


@dataclass
class Bench:
    """What the measures share: how thorough to be, and who takes part."""

    is_quick: bool
    kinds: list[str]
    absent: dict[str, str] = field(default_factory=dict[str, str])
    begun: float = field(default_factory=time.monotonic)

    def pick(self, quick: Any, full: Any) -> Any:
        """Choose by thoroughness."""
        return quick if self.is_quick else full

    def say(self, text: str) -> None:
        """Show progress."""
        print(f"  {time.monotonic() - self.begun:5.0f} s  {text}", flush=True)

    def drop(self, kind: str, why: object) -> None:
        """Go on without a peer that does not run here."""
        self.kinds.remove(kind)
        self.absent[kind] = str(why)
        self.say(f"not run: {NAMES[kind]}: {why}")

    def among(self, *kinds: str) -> list[str]:
        """Return those of *kinds* that take part."""
        return [kind for kind in kinds if kind in self.kinds]

    def compare(self, title: str, names: list[str], run: Callable[[str], float]) -> dict[str, list[float]]:
        """Run what *names* stand for in turn, forwards and backwards; the first round warms up and does not count."""
        found: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self.pick(3, 4)):
            for name in names[:: -1 if turn % 2 else 1]:
                value = run(name)
                when = f"round {turn}" if turn else "warm-up"
                self.say(f"{title}, {when}: {NAMES.get(name, name)} {show(value)}")
                if turn:
                    found[name].append(value)
        return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def median(values: Iterable[float]) -> float:
    return statistics.median(values)
