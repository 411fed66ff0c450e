"""What the measures hand over, and how it is told: goals with verdicts, tables, the document, the plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Goal:
    """A figure, and the most or the least that it should be."""

    name: str
    value: float
    limit: float
    unit: str = ""
    is_most: bool = True

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit if self.is_most else self.value >= self.limit

    @property
    def cells(self) -> list[str]:
        sign = "≤" if self.is_most else "≥"
        verdict = "met" if self.is_met else f"**missed** by {abs(self.value / self.limit - 1):.0%}"
        return [self.name, self.measured, f"{sign} {self.limit:g}{self.unit}", verdict]

    @property
    def measured(self) -> str:
        return f"{f'{self.value:g}' if 'trip' in self.unit else show(self.value)}{self.unit}"


@dataclass
class Section:
    """One measure: what was done, what came out, and how that stands to the goals."""

    title: str
    about: str
    header: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list[list[str]])
    goals: list[Goal] = field(default_factory=list[Goal])
    notes: list[str] = field(default_factory=list[str])
    is_measured: bool = True
    bars: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    @property
    def text(self) -> str:
        parts = [f"## {self.title}", self.about]
        if self.rows:
            parts.append(table(self.header, self.rows))
        if self.goals:
            parts.append(table(["figure", "measured", "goal", "verdict"], [goal.cells for goal in self.goals]))
        return "\n\n".join([*parts, *self.notes])


def show(value: float) -> str:
    """Write a figure with two or three digits that say something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table whose columns line up in a terminal as well."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def document(head: Sequence[str], sections: Sequence[Section]) -> str:
    """Write the whole document, the verdicts first."""
    goals = [goal for section in sections for goal in section.goals]
    met = sum(goal.is_met for goal in goals)
    missed = [f"- {goal.name}: {goal.measured}, {goal.cells[3]}" for goal in goals if not goal.is_met]
    summary = [
        f"**{met} of {len(goals)} goals met.**" + (" Missed:" if missed else ""),
        *(["\n".join(missed)] * bool(missed)),
    ]
    return "\n\n".join(["# Benchmarks", *head, *summary, *(section.text for section in sections)]) + "\n"


def plot(file: Path, sections: Sequence[Section]) -> bool:
    """Draw the ratios that the sections hold, one panel each; False where matplotlib is not installed."""
    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "chat_session"
    pyplot = import_module("matplotlib.pyplot")
    panels = [panel for section in sections for panel in section.bars.items() if panel[1]]
    if not panels:
        return False
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 0.6 + 2.3 * len(panels)), squeeze=False)
    for axis, (title, bars) in zip(axes[:, 0], panels, strict=True):
        draw(axis, title, bars)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True


def draw(axis: Any, title: str, bars: dict[str, float]) -> None:
    """Draw one panel of bars, ours in a colour of its own."""
    names = list(bars)[::-1]
    colours = ["#8a4b2a" if name == "chat_session" else "#b9b2ab" for name in names]
    drawn = axis.barh(names, [bars[name] for name in names], color=colours)
    axis.bar_label(drawn, labels=[show(bars[name]) for name in names], padding=3, fontsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
