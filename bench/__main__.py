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
from bench.cases import CASES, OWN, Case, find_cases
from bench.targets import targets_of
from bench.timing import DEVICES
from kdkernels import library

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


class PartFailed(RuntimeError):
    """A worker process ended without an answer."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times kdkernels' ops against what users write today. "
        "`python -m bench report` renders docs/benchmarks.md from bench/results instead.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to measure; all without one")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="this case alone (repeatable)"
    )
    parser.add_argument("--device", default="cpu", choices=sorted(DEVICES))
    parser.add_argument(
        "--rounds", type=int, default=0, help="rounds a case; each case has its own default"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, a few rounds: does it work; no rows kept"
    )
    parser.add_argument(
        "--isa", default="", choices=library.LEVELS, help="lower kdkernels and torch to this level"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV file; default bench/results/<date>-<processor>.csv"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the cases and what they should reach"
    )
    return parser.parse_args(arguments)


def print_cases() -> None:
    """Every case with its contenders and its promises."""
    for case in CASES:
        print(f"{case.op} --case {case.name}\n    {case.about}")
        print(f"    against {', '.join(c.name for c in case.contenders[1:])}; {case.floor.name}")
        for target in targets_of(case.op, case.name):
            print(f"    {target.against or OWN}: {target.text()} at {target.isa}")


def ask(case: Case, part: str, contenders: list[str], options: argparse.Namespace) -> dict:
    """A worker's answer about a case, at the case's instruction-set level."""
    job = {
        "part": part,
        "op": case.op,
        "case": case.name,
        "contenders": contenders,
        "device": options.device,
        "quick": options.quick,
        "rounds": options.rounds or (QUICK_ROUNDS if options.quick else case.rounds),
    }
    return answer_of(job, case.isa or options.isa)


def answer_of(job: dict, level: str) -> dict:
    """The answer to a job from a fresh process at a level ("": the highest)."""
    environment = {**os.environ, **LEVEL_ENVIRONMENT.get(level, {})}
    # Inductor's default cache keeps no levels apart: code made for AVX-512 and compiled for AVX2
    # gave gradients of 1e21.
    cache = Path(tempfile.gettempdir()) / f"kdkernels-bench-inductor-{level or 'highest'}"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "bench.worker", json.dumps(job)],
            cwd=rows.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if done.returncode != 0:
            errors.seek(0)
            tail = "\n".join(errors.read().strip().splitlines()[-8:])
            raise PartFailed(f"{job['part']} ended with status {done.returncode}\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(
    case: Case, options: argparse.Namespace, shared: rows.Row
) -> tuple[list[rows.Row], bool]:
    """The rows of a case, and whether every contender that could run gave the right result."""
    names = []
    for contender in case.contenders:
        missing = contender.missing()
        if missing:
            print(f"  without {contender.name}: {missing}")
        else:
            names.append(contender.name)
    right = []
    for name, answer in ask(case, "check", names, options).items():
        what, error = max(answer["errors"].items(), key=lambda item: item[1])
        if answer["right"]:
            right.append(name)
            print(f"  {name}: right, worst error {error:.1e} ({what})")
        else:
            print(
                f"  {name}: WRONG, {what} is off by {error:.1e} from float64 "
                f"(at most {answer['tolerance']:g}); it is not timed"
            )
    if OWN not in right:
        return [], False
    peaks = {name: ask(case, "memory", [name], options)["peak_mb"] for name in right}
    answer = ask(case, "time", right, options)
    print(f"  timed on {answer['sets']} input sets of {answer['set_mb']:.1f} MB at {answer['isa']}")
    return rows.build_rows(
        shared,
        case.op,
        case.name,
        case.floor.name,
        answer,
        peaks,
        [] if options.quick else targets_of(case.op, case.name),
    ), len(right) == len(names)


def cannot_run(case: Case, options: argparse.Namespace) -> str:
    """Why a case cannot run here; empty where it can."""
    if case.op not in library.OPS:
        return f"kdkernels has no {case.op} yet"
    if OWN not in library.backends(case.op, options.device):
        return f"no native kernel here: {library.native_missing() or 'see python -m kdkernels'}"
    level = case.isa or options.isa
    if level and level not in library.isa_levels():
        return f"this processor or build lacks the level {level}"
    if case.isa and options.isa and case.isa != options.isa:
        return f"the case is for {case.isa}"
    return ""


def main(arguments: list[str]) -> int:
    """Runs the command; 0, or 1 where a case failed or a contender was wrong."""
    if arguments[:1] == ["report"]:
        return report.main(arguments[1:])
    options = parse(arguments)
    if options.list:
        print_cases()
        return 0
    try:
        cases = find_cases(options.ops, options.case)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    shared = rows.stamp(DEVICES[options.device]())
    out = options.out or (None if options.quick else rows.results_file(shared))
    average = f"load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    print(f"{shared['machine']}, {shared['cores']} cores, torch {shared['torch']}, "
          f"commit {shared['commit']}; {average}")  # fmt: skip
    measured: list[rows.Row] = []
    good = True
    for case in cases:
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
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if measured:
        report.show(measured)
        print(f"rows in {out}" if out else "quick run: no rows kept")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
