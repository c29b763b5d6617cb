"""What Ray says of nodes that will soon be taken away."""

import os


class Departures:
    """Tells the training loop when Ray has announced that a worker's node drains (a spot instance that is reclaimed, a
    node that the cluster's autoscaler or Kubernetes takes down), once for each node."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self) -> bool:
        """Every worker calls it at the same steps, and all get the same answer."""
        import ray.train

        notice = ray.train.get_preemption_info()
        leaving = set(notice.preempted_node_ids) if notice else set()
        new = leaving - self._known
        self._known |= leaving
        return bool(new)


def detect_hangs(seconds: int, gpus: bool) -> None:
    """Let Ray Train's own meetings of workers fail after so long, and its watch over NCCL fail a stage that hangs.

    For the driver, before training begins. What the user's environment says stands.
    """
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(seconds))
    # The default is to look every 5 s; some clouds give notice of no more than 30 s.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    if gpus:
        os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", str(seconds))
