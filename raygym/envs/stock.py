"""The state behind `raygym.envs.warehouse`: items, stock in warehouses, and orders, with the operations on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from raygym.tools import ToolError


class StockError(ToolError):
    """An operation that the state does not permit. The text says why."""


@dataclass(slots=True)
class Order:
    """`count` pieces of one item for one customer."""

    order_id: str
    customer: str
    sku: str
    count: int
    status: str = "open"
    """`open`, `shipped` or `cancelled`."""
    warehouse: str | None = None
    """Where it was shipped from."""


@dataclass(slots=True)
class Stock:
    """Everything that the tools read and change."""

    items: dict[str, str] = field(default_factory=dict)
    """Name by SKU."""
    warehouses: tuple[str, ...] = ()
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    """Pieces by (SKU, warehouse)."""
    orders: dict[str, Order] = field(default_factory=dict)

    def item(self, sku: str) -> str:
        """Its name. Raises StockError for an unknown SKU."""
        if sku not in self.items:
            raise StockError(f"there is no item with the SKU {sku!r}; find_items tells the SKUs")
        return self.items[sku]

    def count(self, sku: str, warehouse: str) -> int:
        """Pieces of an item in a warehouse. Raises StockError where either is unknown."""
        self.item(sku)
        if warehouse not in self.warehouses:
            raise StockError(f"there is no warehouse {warehouse!r}; expected one of {', '.join(self.warehouses)}")
        return self.counts.get((sku, warehouse), 0)

    def move(self, sku: str, source: str, target: str, count: int) -> None:
        """Between warehouses. Raises StockError when there is not enough."""
        there, here = self.count(sku, source), self.count(sku, target)
        if source == target:
            raise StockError(f"source and target are both {source}; expected two warehouses")
        if count > there:
            raise StockError(f"{source} holds only {there} of {sku}; {count} cannot be moved")
        self.counts[sku, source], self.counts[sku, target] = there - count, here + count

    def buy(self, sku: str, warehouse: str, count: int) -> None:
        """Add pieces."""
        self.counts[sku, warehouse] = self.count(sku, warehouse) + count

    def ship(self, order_id: str, warehouse: str) -> None:
        """Send an open order off. Raises StockError when it is not open, or there is not enough."""
        order = self.open_order(order_id)
        there = self.count(order.sku, warehouse)
        if order.count > there:
            raise StockError(f"{warehouse} holds only {there} of {order.sku}; order {order_id} needs {order.count}")
        self.counts[order.sku, warehouse] = there - order.count
        order.status, order.warehouse = "shipped", warehouse

    def cancel(self, order_id: str) -> None:
        """Cancel an open order. Raises StockError when it is not open."""
        self.open_order(order_id).status = "cancelled"

    def open_order(self, order_id: str) -> Order:
        """An order that can still be changed. Raises StockError for any other."""
        if order_id not in self.orders:
            raise StockError(f"there is no order {order_id!r}; find_orders tells the IDs")
        order = self.orders[order_id]
        if order.status != "open":
            raise StockError(f"order {order_id} is already {order.status}")
        return order

    def facts(self) -> dict[tuple[str, ...], object]:
        """The state as independent facts, to compare two states by."""
        facts: dict[tuple[str, ...], object] = {("stock", *key): count for key, count in self.counts.items() if count}
        for order in self.orders.values():
            facts["order", order.order_id] = (order.status, order.warehouse)
        return facts


def score(before: Stock, goal: Stock, after: Stock) -> tuple[float, float]:
    """How much of the way from `before` to `goal` was gone, and how many facts are wrong that should not have changed.

    With N facts that had to change, R of which are as wanted, and W others that are not as before: (R - W) / N, but at
    least 0; and W.
    """
    first, wanted, found = before.facts(), goal.facts(), after.facts()
    needed = {key for key in first.keys() | wanted.keys() if first.get(key) != wanted.get(key)}
    assert needed, "a task that asks for nothing"
    right = sum(found.get(key) == wanted.get(key) for key in needed)
    others = (first.keys() | found.keys()) - needed
    wrong = sum(found.get(key) != first.get(key) for key in others)
    return max(0.0, (right - wrong) / len(needed)), float(wrong)
