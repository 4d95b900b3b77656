"""A clerk's desk: carry out a few linked requests with seven tools, on a hidden state that they change.

Data: three warehouses, eight items in pairs of similar names, their stock, and orders of four customers, drawn by the
task's seed, with `requests` requests of four kinds, each about an item of its own:
    ship      send a customer's open order from a given warehouse; what is missing there must be moved from another one
    cancel    cancel one customer's open order of an item, not the shipped one and not the one of the similar item
    fill      buy so much of an item that a warehouse holds a given number
    gather    move all pieces of an item into one warehouse
What is needed for a request (SKUs, order IDs, numbers) has to be found out first. A fifth of the tasks, chosen by a
hash of their text, is held out for validation.

Tools: find_items, find_orders, get_stock, move_stock, buy_stock, ship_order, cancel_order. The calls of one message are
made one after the other. Wrong calls come back as text and change nothing.

Reward, given when the policy says that it is done (a message without calls) or after `max_turns` messages with calls
(truncated), in [0, 1]: of the N facts (an item's number in a warehouse, an order's status) that had to change, those
that are as wanted, minus all others that were changed, over N. Doing nothing scores 0.

Scores, averaged over 1,000 seeds of each split (train / validation): a clerk that looks everything up and does it
1.0 / 1.0; the same clerk without moving what is missing 0.671 / 0.681; random calls with IDs and names of the state, 11
of them, 0 / 0, since they change what nobody asked for; silence 0 / 0. (`tests/test_envs_tools.py` checks them on fewer
seeds.)
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import Field

from raygym.envs.generated import in_split
from raygym.envs.stock import Order, Stock, score
from raygym.tool_env import End, ToolEnv, tool
from raygym.types import Message

_PLACES = ("Ashford", "Birch Lane", "Castleton", "Dover Road", "Eastgate", "Fenwick")
_FIRST = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_LAST = ("Moreau", "Moretti", "Park", "Parker", "Silva", "Silver")
_THINGS = ("lamp", "kettle", "chair", "clock", "blanket", "mirror", "basket", "stool", "fan", "rug")
_KINDS = ("red", "blue", "small", "large", "steel", "oak")
_WARNING = "Change nothing that you are not asked to change."

Count = Annotated[int, Field(ge=1, le=1000)]


class Warehouse(ToolEnv):
    """Look things up, change them, say that it is done."""

    parallel = False

    def __init__(self, requests: int = 2, max_turns: int = 12) -> None:
        """Ask for `requests` things (1 to 4); `rollout.max_turns` should be larger than `max_turns` by one.

        Raises:
            ValueError: a number is out of range.
        """
        for name, value, low, high in (("requests", requests, 1, 4), ("max_turns", max_turns, 1, 1000)):
            if not low <= value <= high:
                raise ValueError(f"{name}: {value}; expected {low} to {high}")
        self._requests, self._max_turns = requests, max_turns
        self._stock = self._before = self._goal = Stock()
        self._turns = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[Message], dict[str, Any]]:
        """Draw a state and requests of the split."""
        super().reset(seed=seed)
        while True:
            self._before = self._drawn()
            self._goal = copy.deepcopy(self._before)
            requests = self._ask()
            text = "\n".join(f"{number}. {request}" for number, request in enumerate(requests, start=1))
            if in_split(options, text):
                break
        self._stock = copy.deepcopy(self._before)
        self._turns = 0
        system = (
            f"You keep the stock of the warehouses {', '.join(self._stock.warehouses)}. Look up what you need with the "
            f"tools, carry out the requests, then say that you are done. {_WARNING}"
        )
        return [{"role": "system", "content": system}, {"role": "user", "content": text}], {"requests": requests}

    @tool
    def find_items(self, text: str = "") -> list[dict[str, str]]:
        """Find items by their name.

        Args:
            text: A part of the name; all items without it.
        """
        return [{"sku": sku, "name": name} for sku, name in self._stock.items.items() if text.lower() in name]

    @tool
    def find_orders(
        self, customer: str = "", status: Literal["open", "shipped", "cancelled"] | None = None
    ) -> list[dict[str, Any]]:
        """Find orders.

        Args:
            customer: A part of the customer's name; orders of all customers without it.
            status: Only orders in this state.
        """
        return [
            {"order_id": o.order_id, "customer": o.customer, "sku": o.sku, "count": o.count, "status": o.status}
            for o in self._stock.orders.values()
            if customer.lower() in o.customer.lower() and status in (None, o.status)
        ]

    @tool
    def get_stock(self, sku: str) -> dict[str, int]:
        """Get the number of pieces of an item in each warehouse.

        Args:
            sku: The item.
        """
        return {warehouse: self._stock.count(sku, warehouse) for warehouse in self._stock.warehouses}

    @tool
    def move_stock(self, sku: str, source: str, target: str, count: Count) -> str:
        """Move pieces of an item from one warehouse to another.

        Args:
            sku: The item.
            source: The warehouse that they are in.
            target: The warehouse that they shall be in.
            count: How many.
        """
        self._stock.move(sku, source, target, count)
        return f"moved {count} of {sku} from {source} to {target}"

    @tool
    def buy_stock(self, sku: str, warehouse: str, count: Count) -> str:
        """Buy new pieces of an item for a warehouse.

        Args:
            sku: The item.
            warehouse: Where they shall be.
            count: How many.
        """
        self._stock.buy(sku, warehouse, count)
        return f"bought {count} of {sku} for {warehouse}"

    @tool
    def ship_order(self, order_id: str, warehouse: str) -> str:
        """Ship an open order; the warehouse must hold all of it.

        Args:
            order_id: The order.
            warehouse: Where to ship it from.
        """
        self._stock.ship(order_id, warehouse)
        return f"shipped {order_id} from {warehouse}"

    @tool
    def cancel_order(self, order_id: str) -> str:
        """Cancel an open order.

        Args:
            order_id: The order.
        """
        self._stock.cancel(order_id)
        return f"cancelled {order_id}"

    def after_calls(self) -> End | None:
        """Out of turns?"""
        self._turns += 1
        return self._end(truncated=True) if self._turns >= self._max_turns else None

    def answer(self, text: str) -> End:
        """Grade the state; what is said does not matter."""
        return self._end(truncated=False)

    def _end(self, *, truncated: bool) -> End:
        reward, wrong = score(self._before, self._goal, self._stock)
        metrics = {"solved": float(reward == 1.0), "wrong_changes": wrong, "turns": float(self._turns)}
        return End(reward, truncated=truncated, metrics=metrics)

    def _drawn(self) -> Stock:
        stock = Stock(warehouses=tuple(self._some(_PLACES, 3)))
        skus = [f"S{number}" for number in self._some(range(100, 1000), 8)]
        names = [f"{kind} {thing}" for thing in self._some(_THINGS, 4) for kind in self._some(_KINDS, 2)]
        stock.items = dict(zip(skus, names, strict=True))
        for sku in skus:
            for warehouse in stock.warehouses:
                stock.counts[sku, warehouse] = self._whole(2, 30)
        customers = [f"{first} {last}" for first in self._some(_FIRST, 2) for last in self._some(_LAST, 2)]
        order_ids = iter([f"O{number}" for number in self._some(range(1000, 10000), 3 * len(skus))])
        for position, sku in enumerate(skus):
            # Of each item: an open order of one customer, a shipped one of the same, an open one of another.
            one, other = self._some(customers, 2)
            for customer, status in ((one, "open"), (one, "shipped"), (other, "open")):
                order_id = next(order_ids)
                shipped_from = stock.warehouses[position % 3] if status == "shipped" else None
                stock.orders[order_id] = Order(order_id, customer, sku, self._whole(2, 20), status, shipped_from)
        shuffled = self._some(list(stock.orders), len(stock.orders))
        stock.orders = {order_id: stock.orders[order_id] for order_id in shuffled}
        return stock

    def _ask(self) -> list[str]:
        """Requests in words; what they ask for is done to the goal on the way."""
        kinds = [self._ship, self._cancel, self._fill, self._gather]
        # Items of different pairs, so that each has its similar one as a distractor.
        skus = list(self._goal.items)
        pairs = self._some(range(4), self._requests)
        chosen = [skus[2 * pair + self._whole(0, 1)] for pair in pairs]
        return [kind(sku) for kind, sku in zip(self._some(kinds, self._requests), chosen, strict=True)]

    def _ship(self, sku: str) -> str:
        order = self._open_order(sku)
        warehouse, other = self._some(self._goal.warehouses, 2)
        lacking, spare = self._whole(1, order.count - 1), self._whole(1, 20)
        for stock in (self._before, self._goal):
            stock.counts[sku, warehouse] = order.count - lacking
            stock.counts[sku, other] = lacking + spare
        self._goal.move(sku, other, warehouse, lacking)
        self._goal.ship(order.order_id, warehouse)
        return (
            f"Ship {order.customer}'s open order of the {self._goal.items[sku]} from {warehouse}. If {warehouse} holds "
            f"too few, first move exactly the missing number there from {other}."
        )

    def _cancel(self, sku: str) -> str:
        order = self._open_order(sku)
        self._goal.cancel(order.order_id)
        return f"Cancel {order.customer}'s open order of the {self._goal.items[sku]}."

    def _fill(self, sku: str) -> str:
        [warehouse] = self._some(self._goal.warehouses, 1)
        missing = self._whole(1, 30)
        self._goal.buy(sku, warehouse, missing)
        wanted = self._goal.count(sku, warehouse)
        return f"Buy as many of the {self._goal.items[sku]} for {warehouse} as it takes to hold {wanted} there."

    def _gather(self, sku: str) -> str:
        [target] = self._some(self._goal.warehouses, 1)
        for source in self._goal.warehouses:
            if source != target:
                self._goal.move(sku, source, target, self._goal.count(sku, source))
        return f"Move all pieces of the {self._goal.items[sku]} that are in other warehouses to {target}."

    def _open_order(self, sku: str) -> Order:
        orders = [order for order in self._goal.orders.values() if order.sku == sku and order.status == "open"]
        return orders[self._whole(0, len(orders) - 1)]

    def _some(self, choices: Any, count: int) -> list[Any]:
        return [choices[int(index)] for index in self.np_random.choice(len(choices), count, replace=False)]

    def _whole(self, low: int, high: int) -> int:
        return int(self.np_random.integers(low, high + 1))
