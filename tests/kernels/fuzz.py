"""Random calls of every op on native and eager, judged by an independent oracle in float64.

    python tests/kernels/fuzz.py --op OP --cases N --first K --backend native|eager

prints the rate, the worst error in units of its tolerance, and for each failing case the command
that runs it alone. A case is made from (seed, op, number); without --op the ops take turns. With
--tally FILE the results so far are written there every few seconds, and a later call with the same
file continues where the last one ended.

The tolerance of an output is the bound of fuzz_rows.py or fuzz_distances.py (a forward error bound
of its arithmetic: unit roundoff times the sum of the sizes of the terms), plus the rounding to its
dtype: half a unit in the last place (twice where a 16-bit gradient is stored before the incoming
gradient is known), half the spacing of the dtype's smallest numbers, and for a stored
float16 gradient KEPT_HALF of its largest. NaN and infinities have to be in the same places; a
number within its tolerance of the dtype's end may be infinite.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from fuzz_cases import OPS, Case, arguments, draw
from fuzz_claim import LARGEST, ROUNDING, TINY, UNIT, Claim
from fuzz_distances import batch_op, hidden_op, nearest_op, triplet_op
from fuzz_rows import linear_op, logits_op
from torch import Tensor

import kdkernels

BACKENDS = ("native", "eager")
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: TINY, torch.float32: TINY, torch.float64: 0.0}
# A stored float16 gradient is multiplied by a power of two that brings its bound to 2^9 at least.
# The error is then half of float16's smallest spacing of 2^-24, relative to that.
KEPT_HALF = 2.0**-34
# Selections are decided in double by native and in the dtype of the computation by eager.
SELECTING = ("batch_triplet_loss", "nearest_neighbor")
CHECKPOINT_SECONDS = 5.0
SHOWN_FAILURES = 20


def values_of(case: Case) -> dict[str, np.ndarray]:
    """The numbers that the tensors hold: integers, float64, or extended for a call in float64."""
    found = {}
    for name, t in case.tensors.items():
        if not t.is_floating_point():
            found[name] = t.long().numpy()
        else:
            wide = t.to(torch.float64).numpy()
            found[name] = wide.astype(np.longdouble) if case.is_wide else wide
    return found


def oracle(case: Case) -> list[Claim]:
    """The right outputs and gradients of the call."""
    u = UNIT[torch.float64 if case.is_wide else torch.float32]
    incoming = case.incoming.to(torch.float64).numpy()
    values, options = values_of(case), case.options
    with np.errstate(all="ignore"):
        if case.op == "kd_cross_entropy":
            return logits_op(values, options, incoming, u)
        if case.op == "linear_kd_cross_entropy":
            return linear_op(values, options, incoming, u)
        if case.op == "triplet_loss":
            return triplet_op(values, options, incoming, u, case.exact)
        if case.op == "batch_triplet_loss":
            return batch_op(values, options, incoming, u, case.exact)
        if case.op == "hidden_l2":
            return hidden_op(values, options, incoming, u)
        return nearest_op(values, u, case.exact)


def call(case: Case, backend: str, function: Callable) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    tensors = {
        name: t.detach().requires_grad_() if name in case.wanted else t
        for name, t in case.tensors.items()
    }
    result = function(**arguments(case, tensors), backend=backend)
    if case.op == "nearest_neighbor":
        return result._asdict()
    found: dict[str, Tensor] = {}
    loss = result
    if case.options.get("return_terms"):
        loss, terms = result
        found = {"terms": terms if case.op == "hidden_l2" else torch.stack(terms)}
    found["loss"] = loss
    if case.wanted:
        leaves = [tensors[name] for name in case.wanted]
        gradients = torch.autograd.grad(loss, leaves, case.incoming.to(loss.dtype))
        found |= {f"d {name}": g for name, g in zip(case.wanted, gradients, strict=True)}
    return {name: t.detach() for name, t in found.items()}


@dataclass
class Verdict:
    """The worst error of a case in units of its tolerance, and the messages of a failure."""

    worst: float = 0.0
    judged: int = 0
    undecided: int = 0
    messages: list[str] = field(default_factory=list)


def judge(case: Case, claims: list[Claim], backend: str, function: Callable) -> Verdict:
    """Runs the case on a backend and compares it with the claims."""
    found = Verdict()
    before = {name: t.clone() for name, t in case.tensors.items()}
    try:
        got = call(case, backend, function)
    except Exception as error:
        found.messages.append(f"{type(error).__name__}: {error}")
        return found
    for name, was in before.items():
        now = case.tensors[name]
        if not (torch.equal(was, now) or torch.equal(was.nan_to_num(), now.nan_to_num())):
            found.messages.append(f"{name} was written to")
    unit = UNIT[torch.float64 if case.is_wide else torch.float32]
    if backend == "native" and case.op in SELECTING:
        unit = UNIT[torch.float64]
    for claim in claims:
        if claim.name in got:
            with np.errstate(all="ignore"):
                _compare(claim, got.pop(claim.name), unit, found)
    found.messages += [f"{name}: no claim" for name in got]
    return found


def tolerance(claim: Claim, dtype: torch.dtype) -> np.ndarray:
    """The claim's bound with the rounding to the output's dtype."""
    if dtype not in claim.tolerances:
        claim.tolerances[dtype] = _tolerance(claim, dtype)
    return claim.tolerances[dtype]


def _tolerance(claim: Claim, dtype: torch.dtype) -> np.ndarray:
    value = claim.value
    if dtype not in ROUNDING:  # integers
        return np.zeros_like(value)
    finite = np.where(np.isfinite(value), np.abs(value), 0.0)
    is_gradient = claim.name.startswith("d ")
    roundings = claim.roundings if is_gradient and dtype not in UNIT else 1
    bound = claim.bound + roundings * ROUNDING[dtype] * (finite + claim.bound) + SMALLEST[dtype]
    if dtype == torch.float16 and is_gradient and finite.size:
        bound += KEPT_HALF * (finite.max() if claim.largest is None else claim.largest)
    return bound


def _compare(claim: Claim, got: Tensor, unit: float, found: Verdict) -> None:
    """Adds the comparison of one output to the verdict."""
    value, numbers = claim.value, got.to(torch.float64).numpy()
    if numbers.shape != value.shape:
        found.messages.append(f"{claim.name}: shape {numbers.shape}, not {value.shape}")
        return
    if not numbers.size:
        return
    bound = tolerance(claim, got.dtype)
    error = np.abs(numbers - value)
    ratio = np.where(error == 0, 0.0, error / bound)
    if not np.isfinite(error.sum()):
        same = (np.isnan(value) & np.isnan(numbers)) | (value == numbers)
        largest = LARGEST.get(got.dtype, np.inf)
        overflows = np.isinf(numbers) & (np.sign(numbers) * value + bound >= largest)
        ratio = np.where(np.isfinite(error), ratio, np.where(same | overflows, 0.0, np.inf))
    if claim.is_judged is not True or claim.decided_at is not np.inf:
        is_judged = (claim.decided_at > unit) & np.broadcast_to(claim.is_judged, value.shape)
        skipped = int((~is_judged).sum())
        found.undecided += skipped
        found.judged -= skipped
        ratio = np.where(is_judged, ratio, 0.0)
    found.judged += numbers.size
    worst = float(ratio.max())
    if worst <= 1:
        found.worst = max(found.worst, worst)
        return
    if np.isnan(worst):  # the bound overflowed
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
    at = np.unravel_index(int(ratio.argmax()), value.shape)
    found.messages.append(
        f"{claim.name}{list(map(int, at))}: got {float(numbers[at]):.9g}, right "
        f"{float(value[at]):.9g}, tolerance {float(bound[at]):.3g} ({got.dtype}, "
        f"{int((ratio > 1).sum())} of {ratio.size} wrong)"
    )


@dataclass
class Count:
    """Results of one op on one backend."""

    cases: int = 0
    judged: int = 0
    undecided: int = 0
    worst: float = 0.0
    worst_case: int = -1
    failures: list[str] = field(default_factory=list)

    def add(self, case: Case, backend: str, verdict: Verdict) -> None:
        self.cases += 1
        self.judged += verdict.judged
        self.undecided += verdict.undecided
        if verdict.messages:
            self.failures.append(f"{case.repro} --backend {backend}: {'; '.join(verdict.messages)}")
        elif verdict.worst > self.worst:
            self.worst, self.worst_case = verdict.worst, case.number


@dataclass
class Tally:
    """All results so far; `next` is the number of the first case that has not run."""

    seed: int
    ops: list[str]
    backends: list[str]
    next: int
    seconds: float = 0.0
    counts: dict[str, Count] = field(default_factory=dict)

    def run(self, number: int, functions: dict[str, Callable]) -> list[str]:
        """Judges one case on each backend; its failures."""
        op = self.ops[number % len(self.ops)]
        case = draw(op, self.seed, number)
        claims = oracle(case)
        failed = []
        for backend in self.backends:
            if case.is_wide and backend != "eager":
                continue
            verdict = judge(case, claims, backend, functions[op])
            count = self.counts.setdefault(f"{op} {backend}", Count())
            count.add(case, backend, verdict)
            failed += count.failures[-1:] if verdict.messages else []
        self.next = number + 1
        return failed

    def lines(self) -> list[str]:
        """A table, a line for each op and backend."""
        cases = sum(c.cases for c in self.counts.values())
        failures = sum(len(c.failures) for c in self.counts.values())
        rate = cases / max(self.seconds, 1e-9)
        found = [
            f"{cases} cases, {failures} failing, {rate:.0f} per second, seed {self.seed}, "
            f"next {self.next}"
        ]
        for name, c in sorted(self.counts.items()):
            found.append(
                f"{name:<32} {c.cases:>8} cases  {len(c.failures):>4} failing  "
                f"worst {c.worst:.3f} of the tolerance (case {c.worst_case})  "
                f"undecided {c.undecided} of {c.judged + c.undecided}"
            )
        return found

    def write(self, path: Path) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1))
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Tally":
        stored = json.loads(path.read_text())
        stored["counts"] = {name: Count(**c) for name, c in stored["counts"].items()}
        return cls(**stored)


FUNCTIONS: dict[str, Callable] = {op: getattr(kdkernels, op) for op in OPS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", choices=OPS, help="one op alone; otherwise the ops take turns")
    parser.add_argument("--backend", choices=BACKENDS, help="one backend alone; otherwise both")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tally", type=Path, help="file of the results so far, which the run continues"
    )
    chosen = parser.parse_args(argv)
    backends = [chosen.backend] if chosen.backend else list(BACKENDS)
    ops = [chosen.op] if chosen.op else list(OPS)
    tally = Tally(chosen.seed, ops, backends, chosen.first)
    if chosen.tally and chosen.tally.exists():
        tally = Tally.read(chosen.tally)
    torch.set_num_threads(1)
    end = tally.next + chosen.cases
    begun, before = time.monotonic(), tally.seconds
    shown = begun
    try:
        for number in range(tally.next, end):
            for failure in tally.run(number, FUNCTIONS)[:SHOWN_FAILURES]:
                print(failure, flush=True)
            now = time.monotonic()
            if now - shown > CHECKPOINT_SECONDS:
                shown, tally.seconds = now, before + now - begun
                print(f"{number + 1} of {end}: {tally.lines()[0]}", file=sys.stderr, flush=True)
                if chosen.tally:
                    tally.write(chosen.tally)
    except KeyboardInterrupt:
        print(f"stopped: --first {tally.next} continues", file=sys.stderr)
    tally.seconds = before + time.monotonic() - begun
    if chosen.tally:
        tally.write(chosen.tally)
    print("\n".join(tally.lines()))
    return int(any(c.failures for c in tally.counts.values()))


if __name__ == "__main__":
    sys.exit(main())
