"""In which order stages that wait for each other run, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def longest_chain_first(
    seconds: Mapping[str, float], inputs: Mapping[str, Iterable[str]]
) -> list[str]:
    """Stages by the time from their start to the end of the longest chain that follows, longest
    first; inputs come before what reads them, and several jobs end together.

    seconds: of each stage, more than 0. Raises ValueError for stages that wait for each other.
    """
    chains: dict[str, float] = {}

    def chain(name: str, above: tuple[str, ...] = ()) -> float:
        if name in above:
            raise ValueError(f"stages wait for each other: {', '.join(above)}")
        if name not in chains:
            after = [chain(n, (*above, name)) for n in seconds if name in inputs.get(n, ())]
            chains[name] = seconds[name] + max(after, default=0.0)
        return chains[name]

    return sorted(seconds, key=lambda name: (-chain(name), name))


def wall_time(
    seconds: Mapping[str, float], inputs: Mapping[str, Sequence[str]], jobs: int
) -> float:
    """Seconds on the clock until every stage is done, `jobs` of them side by side.

    As the scheduler runs them: the stage with the longest chain of followers first, as soon as its
    inputs are done; an input that is no stage here is done already. seconds: of each stage while
    others run beside it (two jobs that share caches and memory are each slower than alone). Raises
    ValueError for jobs below 1 or stages that wait for each other.
    """
    if jobs < 1:
        raise ValueError(f"wall_time: jobs must be at least 1, got {jobs}")
    order = longest_chain_first(seconds, inputs)
    ends: dict[str, float] = {}
    running: dict[str, float] = {}
    now = 0.0
    waiting = list(order)
    while waiting or running:
        for name in list(waiting):
            needs = [n for n in inputs.get(name, ()) if n in seconds]
            if len(running) < jobs and all(ends.get(n, now + 1) <= now for n in needs):
                waiting.remove(name)
                running[name] = now + seconds[name]
        now = min(running.values())
        for name in [n for n, end in running.items() if end == now]:
            ends[name] = running.pop(name)
    return now
