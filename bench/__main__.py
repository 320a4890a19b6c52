"""`python -m bench [op ...]` measures, `python -m bench report` renders docs/benchmarks.md."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import report, rows
from bench.case import OWN, Case
from bench.cases import cases_on, find_cases
from bench.devices import DEVICES
from bench.targets import targets_of
from kdkernels.backends import LEVELS, OPS, backends, isa_levels, native_missing, triton_missing

QUICK_ROUNDS = 3
# What makes torch, MKL, oneDNN and Inductor run at the level that kdkernels is lowered to.
LEVEL_ENVIRONMENT = {
    "v4": {"KDKERNELS_ISA": "v4"},
    "v3": {
        "KDKERNELS_ISA": "v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "baseline": {
        "KDKERNELS_ISA": "baseline",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


# The default of a container image may allow TF32 in float32 matrix products.
DEVICE_ENVIRONMENT = {"cpu": {}, "cuda": {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}}


class PartFailed(RuntimeError):
    """A worker process ended without a result."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times kdkernels' ops against what users write today. "
        "`python -m bench report` renders docs/benchmarks.md from bench/results instead.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to measure; default: all")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="this case alone (repeatable)"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="not this case (repeatable)"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="leave this contender out, such as one that takes minutes per call (repeatable)",
    )
    parser.add_argument("--device", default="cpu", choices=sorted(DEVICES))
    parser.add_argument(
        "--rounds", type=int, default=0, help="rounds per case; each case has its own default"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test: tiny sizes, a few rounds, no rows written",
    )
    parser.add_argument(
        "--isa", default="", choices=LEVELS, help="lower kdkernels and torch to this level"
    )
    parser.add_argument(
        "--results", type=Path, default=rows.RESULTS, help="folder for <date>-<processor>.csv"
    )
    parser.add_argument("--out", type=Path, help="the CSV file itself")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="stop a case that takes longer"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and their targets")
    return parser.parse_args(arguments)


def print_cases(device: str) -> None:
    """Prints every case of a device type with its contenders and its targets."""
    for case in cases_on(device):
        print(f"{case.op} --case {case.name}\n    {case.about}")
        floors = ", ".join(floor.name for floor in case.floors)
        print(f"    against {', '.join(c.name for c in case.contenders[1:])}; {floors}")
        for target in targets_of(case.op, case.name):
            level = f" at {target.isa}" if target.isa else ""
            print(f"    {target.against or case.own}: {target.text()}{level}")


def measure_part(case: Case, part: str, contenders: list[str], options: argparse.Namespace) -> dict:
    """A worker's result for one part of a case, at the case's instruction-set level."""
    job = {
        "part": part,
        "op": case.op,
        "case": case.name,
        "contenders": contenders,
        "device": options.device,
        "quick": options.quick,
        "rounds": options.rounds or (QUICK_ROUNDS if options.quick else case.rounds),
        "eager": [],
    }
    while True:
        result = run_worker(job, case.isa or options.isa, options.limit)
        if "uncaptured" not in result:
            return result
        name, reason = result["uncaptured"]
        assert name not in job["eager"]
        print(f"  {name}: no CUDA graph, timed as eager calls: {reason}", flush=True)
        job["eager"].append(name)


def run_worker(job: dict, level: str, limit: float | None = None) -> dict:
    """The result of a job in a fresh process at a level ("": the highest); PartFailed after
    `limit` seconds."""
    environment = {
        **os.environ,
        **LEVEL_ENVIRONMENT.get(level, {}),
        **DEVICE_ENVIRONMENT[job["device"]],
    }
    # Inductor's default cache does not separate levels: code generated for AVX-512 and compiled
    # for AVX2 gave gradients of 1e21.
    cache = Path(tempfile.gettempdir()) / f"kdkernels-bench-inductor-{level or 'highest'}"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bench.worker", json.dumps(job)],
                cwd=rows.ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            raise PartFailed(f"{job['part']} took more than {limit:g} s") from error
        if done.returncode != 0:
            errors.seek(0)
            tail = "\n".join(errors.read().strip().splitlines()[-8:])
            raise PartFailed(f"{job['part']} ended with status {done.returncode}\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(
    case: Case, options: argparse.Namespace, shared: rows.Row
) -> tuple[list[rows.Row], bool]:
    """Returns the rows of a case, and whether every contender that could run was right."""
    names = []
    for contender in case.contenders:
        missing = "left out" if contender.name in options.without else contender.missing()
        if missing:
            print(f"  without {contender.name}: {missing}")
        else:
            names.append(contender.name)
    if case.device == "cpu":
        right = print_check(measure_part(case, "check", names, options))
        if case.own not in right:
            return [], False
        peaks = {name: measure_part(case, "memory", [name], options)["peak_mb"] for name in right}
        timed = measure_part(case, "time", right, options)
    else:
        result = measure_part(case, "all", names, options)
        right = print_check(result["check"])
        if case.own not in right:
            return [], False
        peaks, timed = result["memory"], result["time"]
    level = f" at {timed['isa']}" if timed["isa"] else ""
    print(f"  timed on {timed['sets']} input sets of {timed['set_mb']:.1f} MB{level}")
    targets = [] if options.quick else targets_of(case.op, case.name)
    return rows.build_rows(shared, case, timed, peaks, targets), len(right) == len(names)


def print_check(results: dict) -> list[str]:
    """Prints the results of a check and returns the contenders that are right."""
    for name, result in results.items():
        if "failed" in result:
            print(f"  {name}: FAILED, it is not timed: {result['failed']}")
            continue
        what, error = max(result["errors"].items(), key=lambda item: item[1])
        if result["right"]:
            print(f"  {name}: right, worst error {error:.1e} ({what})")
        else:
            print(
                f"  {name}: WRONG, {what} is off by {error:.1e} from float64 "
                f"(at most {result['tolerance']:g}); it is not timed"
            )
    return [name for name, result in results.items() if result["right"]]


def check_without(cases: list[Case], names: list[str]) -> None:
    """Raises ValueError for a name that is no contender, or that is kdkernels' own."""
    others = sorted({c.name for case in cases for c in case.contenders[1:]})
    for name in names:
        if name not in others:
            raise ValueError(f"bench: no contender {name!r}; there are {'; '.join(others)}")


def cannot_run(case: Case, options: argparse.Namespace) -> str:
    """The reason why a case cannot run here; empty where it can."""
    if case.op not in OPS:
        return f"kdkernels has no {case.op} yet"
    backend = OWN[case.device]
    if backend not in backends(case.op, case.device)[:1]:
        missing = native_missing if backend == "native" else triton_missing
        return f"no {backend} kernel here: {missing() or 'see python -m kdkernels'}"
    level = case.isa or options.isa
    if level and level not in isa_levels():
        return f"this processor or build lacks the level {level}"
    if case.isa and options.isa and case.isa != options.isa:
        return f"the case is for {case.isa}"
    return ""


def main(arguments: list[str]) -> int:
    """Runs the command. Returns 1 where a case failed or a contender was wrong, else 0."""
    if arguments[:1] == ["report"]:
        return report.main(arguments[1:])
    options = parse(arguments)
    if options.list:
        print_cases(options.device)
        return 0
    try:
        cases = find_cases(options.ops, options.case, options.device)
        check_without(cases, options.without)
        shared = rows.stamp(DEVICES[options.device]())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    out = options.out or (None if options.quick else rows.results_file(shared, options.results))
    average = f"load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    print(f"{shared['machine']}, {shared['cores']} cores, torch {shared['torch']}, "
          f"commit {shared['commit']}; {average}", flush=True)  # fmt: skip
    measured: list[rows.Row] = []
    good = True
    for case in cases:
        if case.name in options.skip:
            continue
        reason = cannot_run(case, options)
        if reason:
            print(f"{case.op} {case.name}: skipped, {reason}")
            continue
        print(f"{case.op} {case.name}: {case.about}", flush=True)
        start = time.perf_counter()
        try:
            found, clean = run_case(case, options, shared)
        except PartFailed as error:
            print(f"  FAILED: {error}")
            found, clean = [], False
        good &= clean
        measured += found
        if out and found:
            rows.write_rows(out, found)
        print(f"  {'finished' if clean else 'not finished'}: {case.op} {case.name}, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    if measured:
        report.show(measured)
        print(f"rows in {out}" if out else "quick run: no rows written")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
