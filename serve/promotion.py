"""One bundle takes another's place in a running service, step by step; no Ray here.

What has been reached stands in the gateway's `user_config` and in which applications there are, so a promotion that
was killed is taken up, or back, by the next one. The alias moves last: until then the old bundle is the one that a
service would start with.
"""

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from serve.switch import Route, Target, settled
from serve.tally import Figures
from serve.verdict import Terms, fault, median

LOOK_SECONDS = 1.0


class PromotionError(RuntimeError):
    """A bundle that was not promoted; the one that served before serves on. The message says why."""


class Cluster(Protocol):
    """The service, as a promotion changes it."""

    def target(self) -> Target: ...

    def turn(self, target: Target) -> None:
        """Returns when every replica of the gateway goes by it."""
        ...

    def applications(self) -> set[str]:
        """Of bundles, whether the gateway knows them or not."""
        ...

    def deploy(self, route: Route) -> None:
        """Returns when it is warm. Raises PromotionError if it does not get there."""
        ...

    def remove(self, application: str) -> None: ...

    def figures(self) -> dict[str, Figures]:
        """By digest, counted since the last turn to a target with a watch."""
        ...


class Alias(Protocol):
    """The registry's name for what is served."""

    def move(self, digest: str) -> None:
        """Let it name this bundle. Where the registry knows none of this digest, nothing happens."""
        ...

    def leave(self, new: str, old: str) -> None:
        """If it names `new` already, let it name `old` again."""
        ...


@dataclass(frozen=True)
class Promoted:
    """Figures of both bundles while the new one was on trial; empty where it served already."""

    old: Figures = field(default_factory=Figures)
    new: Figures = field(default_factory=Figures)

    def told(self) -> dict[str, float | int]:
        lines: dict[str, float | int] = {}
        for name, figures in (("old", self.old), ("new", self.new)):
            lines |= {f"{name}_answered": figures.answered, f"{name}_failed": figures.failed}
            for kind, seconds in figures.seconds.items():
                if seconds:
                    lines[f"{name}_first_sound_{kind}_seconds"] = round(median(list(seconds)), 4)
        return lines


@dataclass
class Promotion:
    """drain_seconds: how long what began on a bundle may last once nothing new comes to it."""

    cluster: Cluster
    alias: Alias
    terms: Terms
    drain_seconds: float
    say: Callable[[str], None] = lambda line: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def perform(self, new: Route) -> Promoted:
        """Raises PromotionError once the old bundle serves all again."""
        target = self.cluster.target()
        name, old = target["name"], target["serving"]
        if old["digest"] == new["digest"]:
            self.say(f"{short(new)} serves already")
            self.abort()
            self.alias.move(new["digest"])
            return Promoted()
        if target["canary"] and target["canary"]["digest"] != new["digest"]:
            self.say(f"{short(target['canary'])} was left on trial: back to {short(old)} first")
            self._turn(settled(name, old))
        if lost := sorted({*old["adapters"]} - {*new["adapters"]}):
            raise PromotionError(f"{short(new)} lacks adapters that clients ask {short(old)} for: {', '.join(lost)}")
        self._clear(keep=(old, new))
        try:
            self.say(f"{short(new)} comes up beside {short(old)}")
            self.cluster.deploy(new)
            trial = self._try(name, old, new, self.terms.share, self.terms.requests)
            self._try(name, old, new, 1.0, 0, trial.old)
        except BaseException as reason:
            self._return(name, old, new, reason)
            raise
        self._turn(settled(name, new))
        self.alias.move(new["digest"])
        self.say(f"{short(new)} serves; {short(old)} finishes what began on it")
        self._clear(keep=(new,))
        self.cluster.turn(settled(name, new))
        return trial

    def abort(self) -> None:
        """Back to the bundle that serves; what else is there goes when it has finished what began on it."""
        target = self.cluster.target()
        name, serving, canary = target["name"], target["serving"], target["canary"]
        if canary:
            self._turn(settled(name, serving))
            self.alias.leave(canary["digest"], serving["digest"])
        self._clear(keep=(serving,))
        if self.cluster.target()["watch"]:
            self.cluster.turn(settled(name, serving))

    def _try(
        self, name: str, old: Route, new: Route, share: float, requests: int, before: Figures | None = None
    ) -> Promoted:
        """before: the old bundle's figures, where it gets no requests any more. Raises PromotionError."""
        self.say(f"{short(new)} gets {share:.0%} of the requests for {self.terms.watch_seconds:g} s")
        self._turn(Target(name=name, serving=old, canary=new, share=share, watch=""))
        began = self.clock()
        while True:
            figures = self.cluster.figures()
            seen = Promoted(before or figures.get(old["digest"], Figures()), figures.get(new["digest"], Figures()))
            if worse := fault(seen.old, seen.new, self.terms):
                raise PromotionError(worse)
            passed = self.clock() - began
            if passed >= self.terms.watch_seconds:
                if seen.new.answered >= requests:
                    return seen
                if passed >= self.terms.patience_seconds:
                    raise PromotionError(
                        f"only {seen.new.answered} answers in {passed:.0f} s, too few to tell: {requests} are asked "
                        "for (--requests), or let more come to it (--canary)"
                    )
            self.sleep(LOOK_SECONDS)

    def _return(self, name: str, old: Route, new: Route, reason: BaseException) -> None:
        self.say(f"back to {short(old)}: {str(reason) or type(reason).__name__}")
        if self.cluster.target()["canary"]:
            self._turn(settled(name, old))
            self._clear(keep=(old,))
        else:
            # Nobody was sent to it yet.
            self.cluster.remove(new["application"])
        self.alias.leave(new["digest"], old["digest"])
        if self.cluster.target()["watch"]:
            self.cluster.turn(settled(name, old))

    def _turn(self, target: Target) -> None:
        """With somebody who watches, from zero."""
        self.cluster.turn({**target, "watch": secrets.token_hex(6)})

    def _clear(self, keep: Iterable[Route]) -> None:
        """Remove every bundle that no request can come to any more, once those that came have gone."""
        kept = {route["application"]: route["digest"] for route in keep}
        for application in sorted(self.cluster.applications() - {*kept}):
            if not self.cluster.target()["watch"]:
                self._turn(self.cluster.target())
            self._drain(application, {*kept.values()})
            self.cluster.remove(application)

    def _drain(self, application: str, kept: set[str]) -> None:
        """Wait until nothing is left of any bundle but those with the digests `kept`: not every application is called
        after its bundle."""
        until = self.clock() + self.drain_seconds
        while self.clock() < until:
            figures = self.cluster.figures()
            if not any(part.ongoing for digest, part in figures.items() if digest not in kept):
                return
            self.sleep(LOOK_SECONDS)
        self.say(f"{application} still had work after {self.drain_seconds:g} s")


def short(route: Route) -> str:
    return route["digest"][:12]
