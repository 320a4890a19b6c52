"""What a reproduction will do: the command's request, the runs that it needs, what they cost, and
what a budget takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdtrain.config import SETTINGS, ConfigError
from kdtrain.config.settings import nearest
from kdtrain.experiments.campaign import Campaign, make_campaign
from kdtrain.experiments.tables.paper import NARROWEST, WIDTHS, TableSpec, table_specs
from kdtrain.experiments.tables.stages import Request, RunOf, groups, schedules, stages

TABLES = tuple(table_specs())
OWN = tuple(setting.key for setting in SETTINGS if setting.own)
"""What makes the cells of a table what they are."""


def request_from(
    options: Mapping[str, Any],
    common: Mapping[str, Any],
    special: Mapping[str, Mapping[str, Any]],
) -> Request:
    """The request that a command line makes; raises ConfigError.

    special: keys of the runs of one task, by its name, and of those on the "second" data source.
    """
    names = list(dict.fromkeys(options["tables"]))
    if "all" in names:
        names = sorted(TABLES)
    for name in names:
        if name not in TABLES:
            raise ConfigError(f"no table {name!r}; {nearest(name, [*TABLES, 'all'])}")
    fixed = [key for keys in (common, *special.values()) for key in OWN if key in keys]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} is each run's own in the tables; leave --{fixed[0]} out (schedules: a "
            "--scale folder of your own)"
        )
    if "second" in special and "table2" not in names:
        raise ConfigError("--second.KEY: only table2 has a second data source; ask for it too")
    count, first = (
        default if options.get(name) is None else options[name]
        for name, default in (("seeds", 3), ("first_seed", 1))
    )
    if count < 1 or first < 0:
        raise ConfigError(f"--seeds, --first-seed: at least 1 and 0, got {count} and {first}")
    text = options.get("widths") or "2,4,8"
    widths = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not widths or not set(widths) <= set(WIDTHS) or len(widths) != text.count(",") + 1:
        raise ConfigError(f"--widths: expected some of 2,4,8, as --widths 8,4; got {text!r}")
    narrow = [name for name in names if name in ("table1", "table3")]
    if narrow and NARROWEST not in widths:
        raise ConfigError(f"--widths: {narrow[0]} is of the student of 1/{NARROWEST}; add it")
    teachers = options.get("teachers") or "each"
    if teachers not in ("each", "one"):
        raise ConfigError(f"--teachers: expected each or one, got {teachers!r}")
    scale = options.get("scale") or "two-cores"
    schedules(scale)  # known, before anything is timed
    return Request(
        tables=tuple(names),
        scale=scale,
        seeds=tuple(range(first, first + count)),
        widths=tuple(sorted(set(widths))),
        common=dict(common),
        second=special.get("second"),
        tasks={name: keys for name, keys in special.items() if name != "second"},
        shared_teachers=teachers == "one",
        cache=options.get("cache") or "float32",
    )


def make_plan(
    request: Request, root: Path, *, jobs: int, budget_min: float | None, say: Callable[[str], None]
) -> Campaign[RunOf]:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget (minutes on the clock; None: all).
    """
    specs = table_specs(request.second is not None)
    asked = groups(specs, request)
    runs = _known([run for group in asked for run in group.runs], specs, request, root)
    planned = dict(zip(runs, stages(runs, request), strict=True))
    return make_campaign(asked, planned, root, jobs=jobs, budget_min=budget_min, say=say)


def _known(
    asked: Sequence[RunOf], specs: Mapping[str, TableSpec], request: Request, root: Path
) -> list[RunOf]:
    """The runs that were asked for, and those of any table whose folders are there, with their
    inputs, in an order that can be run: what is finished is shown whatever was asked.
    """
    everything = replace(request, tables=TABLES, widths=WIDTHS)
    ordered = [run for group in groups(specs, everything) for run in group.runs]
    ordered = list(dict.fromkeys([*asked, *ordered]))
    kept = set(asked) | {run for run in ordered if (root / run.name).is_dir()}
    by_name = {run.name: run for run in ordered}
    for stage in reversed(stages([run for run in ordered if run in kept], request)):
        kept |= {by_name[name] for name in stage.inputs}
    return [run for run in ordered if run in kept]
