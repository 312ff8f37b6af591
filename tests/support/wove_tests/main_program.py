"""A user's script: what it defines lives in ``__main__`` and travels by value."""

import asyncio
import json
import sys
from dataclasses import dataclass

from wove import ExecutorRuntime


@dataclass
class Order:
    """A type that no worker can import."""

    amount: int


class OrderError(Exception):
    """An exception that no worker can import."""

    def __init__(self, order: Order, reason: str) -> None:
        super().__init__(f"{reason}: {order.amount}")
        self.order = order


def price(order: Order) -> Order:
    """A function that no worker can import."""
    return Order(order.amount + helper())


def helper() -> int:
    """Called by :func:`price` over there."""
    return 20


def refuse(order: Order) -> None:
    """Raise the script's own exception."""
    raise OrderError(order, "too much")


async def main() -> None:
    """Run both on the fleet given as JSON."""
    async with ExecutorRuntime({"fleet": json.loads(sys.argv[1])}) as runtime:
        fleet = runtime["fleet"]
        assert await fleet.run(price, Order(1)) == Order(21)
        try:
            await fleet.run(refuse, Order(99))
        except OrderError as exc:
            assert exc.order == Order(99), exc.order
            print("both worked")


if __name__ == "__main__":
    asyncio.run(main())
