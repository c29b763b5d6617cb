"""Ray's own metrics, of every node, as one Prometheus page."""

import asyncio
from collections.abc import Iterable

TIMEOUT_SECONDS = 3.0


def exporters() -> list[str]:
    """URLs of the metrics exporter of each living node."""
    import ray

    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"]
    ]


async def collect(urls: Iterable[str]) -> str:
    """The pages merged; a node that does not answer in time is left out, and said so in a comment."""
    import httpx

    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as client:
        pages = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    texts = [page.text for page in pages if isinstance(page, httpx.Response) and page.is_success]
    missing = len(pages) - len(texts)
    return merge(texts) + (f"# {missing} nodes did not answer\n" if missing else "")


def merge(pages: Iterable[str]) -> str:
    """One page in which each family's HELP and TYPE stand once, above all of its samples, as the format demands."""
    families: dict[str, list[str]] = {}
    described: set[str] = set()
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line in described:
                    continue
                described.add(line)
            if line.strip():
                families.setdefault(family, []).append(line)
    return "".join(
        f"{line}\n" for lines in families.values() for line in sorted(lines, key=lambda x: not x.startswith("#"))
    )
