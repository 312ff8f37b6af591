"""What is measured: a row has one figure a round for each contender, and what is asked of it."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

#: The contenders, in the order of the table's columns.
CONTENDERS = {"raw": "raw", "peer": "Wove 2.0.3", "wove": "Wove"}


@dataclass(frozen=True)
class Want:
    """What is asked of a row's figure of this project.

    Args:
        limit: without ``over`` the figure itself, in the row's unit, at least or at most by what is better; with it by
            what factor it has to be better than that contender's.
        over: ``"raw"``, ``"peer"``, or None.
    """

    limit: float
    over: str | None = None


@dataclass
class Row:
    """One line of the table.

    Args:
        key: unique, for scripts.
        group: the heading it stands under.
        title: what was measured.
        unit: of the figures; ``"/s"`` and ``"%"`` are better when they are more, all others when they are less.
        wants: what is asked of it.
        any_want: whether one of them is enough.
        samples: for each contender one figure a round.
        failures: why a contender has none.
    """

    key: str
    group: str
    title: str
    unit: str
    wants: list[Want] = field(default_factory=list)
    any_want: bool = False
    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def more_is_better(self) -> bool:
        """Whether a larger figure is the better one."""
        return self.unit in ("/s", "%")

    def add(self, contender: str, figure: float) -> None:
        """Take in one round's figure."""
        self.samples.setdefault(contender, []).append(figure)

    def median(self, contender: str) -> float | None:
        """Return the median of a contender's figures, None when there are none."""
        found = self.samples.get(contender)
        return statistics.median(found) if found else None

    def factors(self, over: str) -> list[float]:
        """Return by what factor this project was better than another contender, round by round."""
        pairs = zip(self.samples.get("wove", ()), self.samples.get(over, ()), strict=False)
        if self.more_is_better:
            return [ours / theirs for ours, theirs in pairs if theirs]
        return [theirs / ours for ours, theirs in pairs if ours]

    def factor(self, over: str) -> float | None:
        """Return the median of :meth:`factors`."""
        found = self.factors(over)
        return statistics.median(found) if found else None

    def reached(self) -> bool | None:
        """Tell whether the row has what is asked of it; None when nothing is, or nothing was measured."""
        verdicts = [verdict for want in self.wants if (verdict := self._verdict(want)) is not None]
        if not verdicts:
            return None
        return any(verdicts) if self.any_want else all(verdicts)

    def _verdict(self, want: Want) -> bool | None:
        if want.over is not None:
            factor = self.factor(want.over)
            return None if factor is None else factor >= want.limit
        median = self.median("wove")
        if median is None:
            return None
        return median >= want.limit if self.more_is_better else median <= want.limit

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """Return what :meth:`to_dict` was called on."""
        return cls(**{**data, "wants": [Want(**want) for want in data["wants"]]})


def number(value: float) -> str:
    """Write a figure with three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
