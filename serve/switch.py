"""Which bundle takes a request or session: by the shares in the gateway's `user_config`, once, at its start."""

import random
from collections.abc import Callable
from typing import NotRequired, TypedDict

from serve import visits
from serve.service import Service
from serve.tally import Tally

_STEP = (5**0.5 - 1) / 2
"""Of the golden ratio: its multiples fall evenly into every interval, and into none in step with the requests."""


class Route(TypedDict):
    """A bundle and the application that serves it, "" for the gateway's own. created: Unix seconds. adapters: names."""

    application: str
    digest: str
    created: int
    adapters: list[str]


class Stated(TypedDict):
    """bundle: as a Serve config file words it. address: what that was when it was first deployed, an alias' version."""

    bundle: str
    address: str


class Target(TypedDict):
    """The gateway's `user_config`. Changing it restarts no replica.

    name: what clients call the model, whichever bundle answers. canary: a bundle on trial beside `serving`, with
    `share` of the requests. watch: what the promotion that looks on calls this state of things; "" if there is none.
    stated: by the config file that the gateway was deployed from, if it was.
    """

    name: str
    serving: Route
    canary: Route | None
    share: float
    watch: str
    stated: NotRequired[Stated]


def settled(name: str, route: Route, watch: str = "") -> Target:
    """Everything to one bundle."""
    return Target(name=name, serving=route, canary=None, share=0.0, watch=watch)


class Switch:
    """A visit stays with the bundle that it got, for as long as it lasts, and whatever the target is by then."""

    def __init__(self, tally: Tally, make: Callable[[str, Route], Service]) -> None:
        """make: the Service of a model name and a route."""
        self._tally = tally
        self._make = make
        self._services: dict[str, Service] = {}
        # So that not every replica sends its first request to the canary.
        self._place = random.random()

    def turn(self, target: Target) -> None:
        """Requests from now on go by this one."""
        routes = [target["serving"], *([target["canary"]] if target["canary"] else [])]
        services = {route["digest"]: self._service_of(target["name"], route) for route in routes}
        for digest, service in self._services.items():
            if self._tally.of(digest).ongoing > 0:
                services.setdefault(digest, service)
        self._services = services
        self._target = target

    def service(self) -> Service:
        """Of the current visit."""
        visit = visits.current()
        if not visit.bundle:
            visit.bundle = self._choose()
            visit.trial = visit.bundle != self._target["serving"]["digest"]
            self._tally.begin(visit.bundle)
        return self._services[visit.bundle]

    def digest(self) -> str:
        """Of the current visit's bundle; of the one that serves, where the visit has come to none."""
        return visits.current().bundle or self._target["serving"]["digest"]

    def _choose(self) -> str:
        canary = self._target["canary"]
        if canary is None:
            return self._target["serving"]["digest"]
        self._place = (self._place + _STEP) % 1.0
        return (canary if self._place < self._target["share"] else self._target["serving"])["digest"]

    def _service_of(self, name: str, route: Route) -> Service:
        known = self._services.get(route["digest"])
        return known if known and known.served.name == name else self._make(name, route)
