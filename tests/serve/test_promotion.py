"""The steps of a promotion, and what is left of it wherever it is killed. The cluster is a model of one: it holds the
contract that each step relies on, and a request may come between any two."""

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.promotion import Promotion, PromotionError
from serve.switch import Route, Target, settled
from serve.tally import Figures
from serve.verdict import Terms


class Killed(BaseException):
    """kill -9: nothing that the promotion would do afterwards happens."""


def route(digest: str) -> Route:
    return Route(application=f"bundle-{digest}", digest=digest, created=1, adapters=[])


OLD, NEW, THIRD = route("aaaaaaaaaaaa"), route("bbbbbbbbbbbb"), route("cccccccccccc")
TERMS = Terms(share=0.25, watch_seconds=5, requests=10, patience_seconds=30)


@dataclass
class World:
    """What outlives a promotion: applications, the gateway's target, the alias. Requests come at every step."""

    apps: set[str] = field(default_factory=lambda: {OLD["application"]})
    at: Target = field(default_factory=lambda: settled("tiny", OLD))
    alias: str = OLD["digest"]
    broken: set[str] = field(default_factory=set)
    """Digests that fail every request."""
    undeployable: set[str] = field(default_factory=set)
    quiet: bool = False
    steps_left: int = 1_000_000
    dead: bool = False
    counts: dict[str, Figures] = field(default_factory=dict)
    history: list[Target] = field(default_factory=list)
    sessions: dict[str, int] = field(default_factory=dict)
    """By digest, how many looks at the figures each still lasts."""
    now: float = 0.0

    def step(self) -> None:
        if self.dead or self.steps_left == 0:
            self.dead = True
            raise Killed
        self.steps_left -= 1
        self.serve()

    def serve(self) -> None:
        """Every request finds the application that the target sends it to."""
        routes = [(self.at["serving"], 1 - self.at["share"]), (self.at["canary"], self.at["share"])]
        for chosen, share in routes:
            if chosen and share:
                assert chosen["application"] in self.apps, "a request came to a bundle that is gone"
                figures = self.counts.setdefault(chosen["digest"], Figures())
                if not self.quiet:
                    figures.answered += max(1, round(share * 20))
                    figures.failed += max(1, round(share * 20)) * (chosen["digest"] in self.broken)

    def target(self) -> Target:
        self.step()
        return deepcopy(self.at)

    def turn(self, target: Target) -> None:
        self.step()
        self.at = target
        self.history.append(target)
        self.counts = {}
        self.step()

    def applications(self) -> set[str]:
        self.step()
        return set(self.apps)

    def deploy(self, new: Route) -> None:
        self.step()
        self.apps.add(new["application"])
        self.step()
        if new["digest"] in self.undeployable:
            raise PromotionError("the bundle does not come up")

    def remove(self, application: str) -> None:
        self.step()
        assert not self.sessions.get(application.removeprefix("bundle-")), "a session was cut off"
        self.apps.discard(application)
        self.step()

    def figures(self) -> dict[str, Figures]:
        self.step()
        self.sessions = {digest: left - 1 for digest, left in self.sessions.items() if left > 1}
        under_way = {digest: Figures(ongoing=1) for digest in self.sessions}
        return {
            digest: Figures.total(part for part in (self.counts.get(digest), under_way.get(digest)) if part is not None)
            for digest in {*self.counts, *under_way}
        }

    def move(self, digest: str) -> None:
        self.step()
        self.alias = digest
        self.step()

    def leave(self, new: str, old: str) -> None:
        self.step()
        if self.alias == new:
            self.alias = old

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def promotion(world: World, drain_seconds: float = 60.0) -> Promotion:
    return Promotion(world, world, TERMS, drain_seconds, clock=lambda: world.now, sleep=world.sleep)


def settled_on(world: World, route: Route) -> bool:
    return (world.apps, world.at, world.alias) == ({route["application"]}, settled("tiny", route), route["digest"])


def test_a_good_bundle_takes_all_by_and_by() -> None:
    world = World(sessions={OLD["digest"]: 15})
    told = promotion(world).perform(NEW)
    assert settled_on(world, NEW)
    shares = [target["share"] for target in world.history if target["canary"]]
    assert shares == [0.25, 1.0]
    assert told.new.answered >= TERMS.requests and told.old.answered > told.new.answered
    assert not world.sessions, "what began on the old one was finished"


def test_what_began_on_a_bundle_that_a_config_file_named_is_finished_too() -> None:
    stated: Route = {**OLD, "application": "bundle-stated"}
    world = World(apps={"bundle-stated"}, at=settled("tiny", stated), sessions={OLD["digest"]: 15})
    promotion(world).perform(NEW)
    assert settled_on(world, NEW) and not world.sessions


def test_one_without_an_adapter_that_clients_ask_for_is_not_tried() -> None:
    world = World()
    world.at = settled("tiny", {**OLD, "adapters": ["pirate", "polite"]})
    with pytest.raises(PromotionError, match="lacks adapters that clients ask .* for: pirate"):
        promotion(world).perform({**NEW, "adapters": ["polite"]})
    assert NEW["application"] not in world.apps and world.at["serving"]["digest"] == OLD["digest"]


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (World(broken={NEW["digest"]}), "answers failed"),
        (World(undeployable={NEW["digest"]}), "does not come up"),
        (World(quiet=True), "too few to tell"),
        (World(broken={NEW["digest"]}, alias=NEW["digest"]), "answers failed"),
    ],
    ids=["fails requests", "does not start", "nobody tries it", "the alias was moved before"],
)
def test_a_bad_one_is_taken_back(world: World, reason: str) -> None:
    with pytest.raises(PromotionError, match=reason):
        promotion(world).perform(NEW)
    assert settled_on(world, OLD)


def test_one_that_does_not_start_never_reaches_the_gateway() -> None:
    world = World(undeployable={NEW["digest"]})
    with pytest.raises(PromotionError):
        promotion(world).perform(NEW)
    assert world.history == []


def test_one_that_breaks_under_all_the_load_is_taken_back_too() -> None:
    world = World()

    def break_at_last(seconds: float) -> None:
        world.sleep(seconds)
        if world.at["share"] == 1.0:
            world.broken = {NEW["digest"]}

    with pytest.raises(PromotionError, match="answers failed"):
        Promotion(world, world, TERMS, 60, clock=lambda: world.now, sleep=break_at_last).perform(NEW)
    assert settled_on(world, OLD)


def test_a_session_that_does_not_end_is_waited_for_no_longer_than_it_may_last() -> None:
    world = World(sessions={OLD["digest"]: 10_000})
    remove: Callable[[str], None] = world.apps.discard
    world.remove = remove  # type: ignore[method-assign]
    promotion(world, drain_seconds=30).perform(NEW)
    assert settled_on(world, NEW) and world.now < 60


def kill_everywhere(world: World, act: Callable[[World], object]) -> list[World]:
    """The world as it is left by a kill at each step of `act`."""
    left = []
    for step in range(1_000):
        tried = deepcopy(world)
        tried.steps_left = step
        try:
            act(tried)
        except Killed:
            tried.steps_left, tried.dead = 1_000_000, False
            left.append(tried)
            continue
        except PromotionError:
            pass
        return left
    raise AssertionError("it does not end")


GOOD = World()
BAD = World(broken={NEW["digest"]})


@pytest.mark.parametrize("world", [GOOD, BAD], ids=["good", "bad"])
def test_wherever_it_is_killed_requests_go_on_and_the_next_one_repairs_it(world: World) -> None:
    left = kill_everywhere(world, lambda tried: promotion(tried).perform(NEW))
    assert len(left) > 15
    for killed in left:
        killed.serve()
        for following, expected in ((NEW, OLD if killed.broken else NEW), (THIRD, THIRD), (OLD, OLD)):
            again = deepcopy(killed)
            try:
                promotion(again).perform(following)
            except PromotionError:
                assert following is NEW and again.broken
            assert settled_on(again, expected), (killed.at, following)


def test_wherever_it_is_killed_it_can_be_taken_back_unless_it_was_done() -> None:
    for killed in kill_everywhere(GOOD, lambda tried: promotion(tried).perform(NEW)):
        served = killed.at["serving"]
        promotion(killed).abort()
        assert (killed.apps, killed.at) == ({served["application"]}, settled("tiny", served))


@given(st.lists(st.tuples(st.sampled_from([OLD, NEW, THIRD]), st.integers(0, 60), st.booleans()), max_size=6))
def test_any_series_of_promotions_and_kills_ends_in_order(series: list[tuple[Route, int, bool]]) -> None:
    world = World()
    for following, steps, broken in series:
        world.broken = {following["digest"]} if broken and following != world.at["serving"] else set()
        world.steps_left, world.dead = steps, False
        with suppress(Killed, PromotionError):
            promotion(world).perform(following)
    world.steps_left, world.dead, world.broken = 1_000_000, False, set()
    promotion(world).perform(THIRD)
    assert settled_on(world, THIRD)
