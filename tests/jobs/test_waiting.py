"""Demands that no node can take: told with the key that asks, and an error in the end; busy nodes are none."""

import pytest

from jobs import waiting
from jobs.waiting import Demand, Supply, WaitingError, Waits, explain, keys_of, unplaceable
from speechgpt.recipe import load

SMALL, LARGE, HEAD = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}, {"memory": 8.0 * 2**30}
WORKERS = Demand({"CPU": 4.0}, 3, together=True)
ACTOR = Demand({"CPU": 4.0}, 3, together=False)


@pytest.mark.parametrize(
    ("demand", "nodes", "waits"),
    [
        (ACTOR, (HEAD, SMALL), True),
        (ACTOR, (HEAD, SMALL, LARGE), False),
        (WORKERS, (LARGE,), True),
        (WORKERS, (LARGE, LARGE), False),
        (WORKERS, (), True),
        (Demand({"GPU": 1.0, "CPU": 1.0}, 1, together=False), (SMALL, LARGE), False),
        (Demand({"GPU": 1.0, "CPU": 1.0}, 2, together=True), (SMALL, LARGE), True),
        (Demand({"accelerator_type:A100": 0.001, "GPU": 1.0}, 1, together=False), (LARGE,), True),
        (Demand({}, 1, together=False), (HEAD,), False),
    ],
)
def test_what_idle_nodes_could_take_only_waits_for_its_turn(demand, nodes, waits):
    assert unplaceable([demand], Supply(nodes)) == ([demand] if waits else [])


def test_the_reason_and_the_remedy_fit_the_case():
    keys = ["engine.cpus_per_worker"]
    assert "largest there is has 2 CPUs" in explain(WORKERS, Supply((HEAD, SMALL)), keys)
    assert explain(WORKERS, Supply((HEAD, SMALL)), keys).startswith("3 × 4 CPUs at once (engine.cpus_per_worker): no")
    assert "hold 2 of them at once" in explain(WORKERS, Supply((LARGE,)), keys)
    assert "largest there is has 0 CPUs" in explain(ACTOR, Supply(()), [])
    refused = explain(WORKERS, Supply((), refused=("gpu-spot: InsufficientInstanceCapacity",)), [])
    assert "gpu-spot: InsufficientInstanceCapacity" in refused and ["resources", "node_type_gpu"][1] in refused
    assert "64 GiB memory" in explain(Demand({"memory": 64.0 * 2**30}, 1, together=False), Supply((HEAD,)), [])


def test_the_recipes_keys_are_found_by_what_they_ask_for():
    recipe = load("nano", ("engine.cpus_per_worker=4", "resources.tokenisation={cpus: 4}"))
    assert keys_of({"CPU": 4.0}, recipe) == ["engine.cpus_per_worker", "resources.tokenisation.cpus"]
    assert keys_of({"CPU": 4.0, "GPU": 1.0}, recipe) == []


def test_it_is_said_once_and_ends_the_job_when_patience_ends():
    said: list[str] = []
    waits = Waits(load("nano", ("engine.cpus_per_worker=4",)), patience=100, say=said.append)
    bare = Supply((HEAD,))
    assert [waits.look([WORKERS], bare, now) for now in (0, 10, 20, 30, 99)] == [None] * 5
    assert len(said) == 1
    assert said[0].startswith(waiting.SIGN + "3 × 4 CPUs at once (engine.cpus_per_worker)")
    coming = Supply((HEAD,), coming=("train",))
    assert waits.look([WORKERS], coming, 100) is None
    assert waits.look([WORKERS], Supply((LARGE, LARGE)), 150) is None
    assert said[1:] == [waiting.OVER]
    assert waits.look([WORKERS], bare, 200) is None, "a new wait has all its time"
    reason = waits.look([WORKERS], bare, 301)
    assert reason is not None and "Waited 1.7 min (resources.node_wait_minutes)" in reason


def test_a_node_that_is_being_started_is_nothing_to_tell():
    said: list[str] = []
    waits = Waits(load("nano"), patience=1000, say=said.append)
    for now in range(0, 600, 10):
        assert waits.look([WORKERS], Supply((HEAD,), coming=("gpu",)), now) is None
    assert said == []
    refused = Supply((HEAD,), coming=("gpu",), refused=("gpu: Quota exceeded",))
    waits.look([WORKERS], refused, 600)
    assert "Quota exceeded" in said[0], "a refusal is told, also while the next attempt is on its way"


def test_the_log_tells_what_is_waited_for_now():
    line = f"train-base: {waiting.SIGN}2 × 4 CPUs"
    assert waiting.latest(f"train-base: started\n{line}\n") == "2 × 4 CPUs"
    assert waiting.latest(f"{line}\ntrain-base: {waiting.OVER}\nmore\n") == ""
    assert waiting.latest("") == ""


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_real_cluster_the_job_ends_with_the_reason(ray_cluster, monkeypatch):
    import ray

    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(waiting, "SAY_SECONDS", 1.0)
    said: list[str] = []
    recipe = load("nano", ("resources.synthesis={cpus: 64}", "resources.node_wait_minutes=0.1"))

    @ray.remote(num_cpus=64)
    def enormous():
        return 1

    @ray.remote(num_cpus=4)
    def everything():
        return 2

    task = enormous.remote()
    with pytest.raises(WaitingError) as caught, waiting.watched(recipe, said.append):
        assert ray.get([everything.remote() for _ in range(3)], timeout=60) == [2, 2, 2]
        ray.get(task, timeout=60)
    ray.cancel(task)
    assert "64 CPUs (resources.synthesis.cpus): no node can hold one" in str(caught.value)
    assert "the largest there is has 4 CPUs" in str(caught.value)
    assert said and said[0].startswith(waiting.SIGN)

    group = ray.util.placement_group([{"CPU": 3}] * 2)
    with pytest.raises(WaitingError) as caught, waiting.watched(recipe, said.append):
        ray.get(group.ready(), timeout=60)
    assert "2 × 3 CPUs at once: the nodes that there are, and may be, hold 1 of them" in str(caught.value)
    ray.util.remove_placement_group(group)
