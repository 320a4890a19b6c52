"""One part of one case in its own process: `python -m bench.worker JOB` prints a line of JSON.

A job is {"part", "op", "case", "contenders", "device", "quick", "rounds", "eager"}. Its part is
"check", the contenders' results against float64; "memory", the peak memory of a single one; "time",
for the contenders that are right; or "all", the three in sequence, for a GPU, where starting
takes long and memory is counted exactly. "eager" names the contenders that no CUDA graph
can hold. The result {"uncaptured": [name, reason]} requests the same job with that name added.
"""

import gc
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.case import Case, Contender, Inputs, as_list, tensors_of
from bench.cases import find_cases
from bench.devices import DEVICES, CaptureFailed

WALL_ROUNDS = 15
QUICK_BYTES = 20_000  # stands for the cache in a quick run: a few sets of tiny inputs
# Relative L2 error that a contender may have against float64. They separate a wrong formula from
# rounding; the contract judges the rounding. 16-bit baselines round every
# intermediate result: log-probabilities of -13 to 1/16.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Uncaptured(Exception):
    """A contender that no CUDA graph can hold: its name and the reason."""


def make_inputs(
    case: Case, contender: Contender | None, seed: int, sizes: dict, where: str = "cpu"
) -> Inputs:
    """A set of inputs on a torch device; leaves require a gradient where the case takes one."""
    maker = contender.inputs if contender and contender.inputs else case.inputs
    inputs = maker(seed, where, **sizes)
    for tensor in wanted_tensors(case, inputs):
        tensor.requires_grad_()
    return inputs


def wanted_tensors(case: Case, inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradient is taken."""
    return tensors_of(inputs, case.wanted)


def input_bytes(inputs: Inputs) -> int:
    """The bytes of all tensors."""
    return sum(t.nbytes for value in inputs.values() for t in as_list(value))


def make_step(
    case: Case, call: Callable[..., Any], inputs: Inputs, gradient: float | None
) -> Callable[[], tuple[Any, tuple]]:
    """Forward, and backward with the incoming gradient; dropping the result releases both.

    torch.autograd.grad returns the gradient as the layer below the loss would receive it, without
    adding it to .grad.
    """
    wanted = wanted_tensors(case, inputs)
    incoming: dict[torch.dtype, Tensor] = {}  # a 16-bit baseline has a 16-bit loss

    def step() -> tuple[Any, tuple]:
        result = call(**inputs, **case.options)
        if gradient is None:
            return result, ()
        if result.dtype not in incoming:
            incoming[result.dtype] = torch.full_like(result.detach(), gradient)
        return result, torch.autograd.grad(result, wanted, incoming[result.dtype])

    return step


def discarding(step: Callable[[], Any]) -> Callable[[], None]:
    """`step` with its result released inside, as zero_grad does inside a training step."""

    def run() -> None:
        step()

    return run


def in_float64(value: Any) -> Any:
    """The tensors of an input in float64, as leaves that require a gradient where it does."""
    if isinstance(value, list):
        return [in_float64(v) for v in value]
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def true_result(case: Case, truth: Callable[..., Any], inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """The specification's result in float64, its gradients (incoming 1) stored in float32."""
    parts = [inputs]
    if case.one_by_one:  # all pairs at once would need several GB in float64
        count = len(next(iter(inputs.values())))
        parts = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(count)]
    total, gradients = None, []
    for part in parts:
        doubled = {name: in_float64(value) for name, value in part.items()}
        result = truth(**doubled, **case.options)
        if case.wanted:
            grads = torch.autograd.grad(result, wanted_tensors(case, doubled))
            gradients += [g.float() for g in grads]
            result = result.detach()
        total = result if total is None else total + result
    return total, gradients


def check_step(case: Case, inputs: Inputs) -> int:
    """The step between the rows that are compared with float64, of first input and results."""
    rows = len(next(iter(inputs.values())))
    return max(1, rows // case.check_rows) if case.check_rows else 1


def thinned(inputs: Inputs, step: int) -> Inputs:
    """The inputs with every `step`th row of the first one."""
    name, value = next(iter(inputs.items()))
    return inputs if step == 1 else {**inputs, name: value[::step]}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The larger of two relative L2 errors: of all elements, and of those not above their RMS.

    The second one shows errors that a few large elements, such as the labels' columns, would hide.
    """
    if value.shape != truth.shape:
        return float("inf")
    value, truth = value.detach().double().reshape(-1), truth.double().reshape(-1)
    error = value - truth
    small = truth.abs() <= truth.square().mean().sqrt()
    errors = [error.norm() / truth.norm().clamp(min=1e-30)]
    if small.any() and truth[small].norm() > 0:
        errors.append(error[small].norm() / truth[small].norm())
    worst = max(float(e) for e in errors)
    return worst if worst == worst else float("inf")


def errors_of(
    case: Case,
    contender: Contender,
    inputs: Inputs,
    truth: Any,
    true_gradients: list[Tensor],
    run: Callable[[Callable[[], Any]], Any] = lambda step: step(),
) -> dict[str, float]:
    """The contender's errors at every incoming gradient: {"result 0": relative error, ...}.

    run: runs a step and returns its results; a graph's replay where the replay is judged.
    """
    errors: dict[str, float] = {}
    step = check_step(case, inputs)
    for gradient in case.gradients or (None,):
        result, gradients = run(make_step(case, contender.call, inputs, gradient))
        for number, (value, wanted) in enumerate(
            zip(as_list(result), as_list(truth), strict=False)
        ):
            if step > 1:
                value = value[::step]
            if wanted.is_floating_point():
                error = relative_error(value, wanted)
            else:  # an index is right or wrong; inputs on a grid leave no near ties
                error = float((value != wanted).double().mean())
            key = f"result {number}"
            errors[key] = max(error, errors.get(key, 0.0))
        for number, (value, wanted) in enumerate(zip(gradients, true_gradients, strict=True)):
            key = f"gradient {number} at {gradient:g}"
            errors[key] = relative_error(value.double() / gradient, wanted)
    return errors


def memory(case: Case, contender: Contender, sizes: dict, device: Any) -> dict:
    """A contender's peak memory beyond the inputs, forward and backward."""
    inputs = make_inputs(case, contender, 0, sizes, device.where)
    gradient = case.gradients[-1] if case.gradients else None
    # Libraries and threads are started first; compiling at full size, since another shape would
    # compile again.
    on_small = not contender.compiles and device.where == "cpu"
    first = make_inputs(case, contender, 0, case.quick) if on_small else inputs
    discarding(make_step(case, contender.call, first, gradient))()
    return {"peak_mb": device.peak_mb(make_step(case, contender.call, inputs, gradient))}


def check(
    case: Case, names: Sequence[str], sizes: dict, device: Any, eager: Sequence[str] = ()
) -> dict:
    """{contender: its errors against float64, whether they are small enough}.

    On a GPU kdkernels' own kernel is judged a second time by the results of its graph's replays.
    """
    true_results: dict[Any, tuple] = {}
    results = {}
    for name in names:
        contender = case.contender(name)
        inputs = make_inputs(case, contender, 0, sizes, device.where)
        key = (contender.inputs, contender.truth)
        if key not in true_results:
            some = thinned(inputs, check_step(case, inputs))
            true_results[key] = true_result(case, contender.truth or case.truth(), some)
        try:
            found = errors_of(case, contender, inputs, *true_results[key])
            if name == case.own and device.name != "cpu" and name not in eager:
                replayed = errors_of(case, contender, inputs, *true_results[key], device.replayed)
                found |= {f"replayed {what}": error for what, error in replayed.items()}
        except CaptureFailed as error:
            raise Uncaptured(name, str(error)) from error
        except Exception as error:
            # Another library may fail in any way; the remaining contenders are still measured.
            if name == case.own or device.name == "cpu":
                raise
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            results[name] = {"errors": {}, "tolerance": 0.0, "right": False, "failed": reason}
            continue
        tensors = [t for value in inputs.values() for t in as_list(value)]
        dtype = next(t.dtype for t in tensors if t.is_floating_point())
        tolerance = max(TOLERANCES[dtype], contender.tolerance)
        right = all(e <= tolerance for e in found.values())
        results[name] = {"errors": found, "tolerance": tolerance, "right": right}
    return results


class InputSets:
    """The sets of inputs that calls rotate over, made once per maker of inputs."""

    def __init__(self, case: Case, sizes: dict, where: str, cache_bytes: int) -> None:
        self.case, self.sizes, self.where, self.cache_bytes = case, sizes, where, cache_bytes
        self.made: dict[Any, list[Inputs]] = {}

    def of(self, contender: Contender | None) -> list[Inputs]:
        """The contender's sets, or the case's own."""
        maker = contender.inputs if contender else None
        if maker not in self.made:
            first = make_inputs(self.case, contender, 0, self.sizes, self.where)
            count = timing.sets_needed(input_bytes(first), self.cache_bytes)
            rest = [
                make_inputs(self.case, contender, seed, self.sizes, self.where)
                for seed in range(1, count)
            ]
            self.made[maker] = [first, *rest]
        return self.made[maker]

    def steps(self, name: str, gradient: float | None) -> list[Callable[[], None]]:
        """A contender's step on each of its sets, which releases its result."""
        contender = self.case.contender(name)
        return [
            discarding(make_step(self.case, contender.call, inputs, gradient))
            for inputs in self.of(contender)
        ]


def measure(
    case: Case,
    names: Sequence[str],
    sizes: dict,
    rounds: int,
    device: Any,
    cache_bytes: int,
    eager: Sequence[str] = (),
) -> dict:
    """Times of the contenders at every incoming gradient, and of the floors, interleaved: each as
    [contender, incoming gradient, timing, milliseconds].

    Contenders in `eager` are timed between events, and kdkernels' own kernel once more with them,
    for comparison. On a GPU all contenders also have a wall time at the first incoming gradient.
    """
    sets = InputSets(case, sizes, device.where, cache_bytes)
    keys: list[tuple[str, float | None, str]] = []
    timed: list[list[timing.Timed]] = []
    gradients = case.gradients or (None,)
    for name in names:
        for gradient in gradients:
            steps = sets.steps(name, gradient)
            if name not in eager:
                try:
                    calls = [device.prepare(step, place) for place, step in enumerate(steps)]
                except CaptureFailed as error:
                    raise Uncaptured(name, str(error)) from error
                keys.append((name, gradient, device.timing))
                timed.append(calls)
            if name in eager or (name == case.own and set(names) & set(eager)):
                keys.append((name, gradient, "events"))
                timed.append([device.events(step) for step in steps])
    for floor in case.floors:
        keys.append((floor.name, None, device.timing))
        runs = [floor.prepare(inputs) for inputs in sets.of(None)]
        timed.append([device.prepare(run, place) for place, run in enumerate(runs)])

    timing.interleave(timed, 0, device.warmup)
    load = timing.OtherLoad()
    times = list(timing.interleave(timed, rounds, 0, device.between_rounds))
    if device.name != "cpu":
        walls = [[device.wall(sets.steps(name, gradients[0]))] for name in names]
        timing.interleave(walls, 0, 1)
        wall_rounds = min(rounds, WALL_ROUNDS)
        times += list(timing.interleave(walls, wall_rounds, 0, device.between_rounds))
        keys += [(name, gradients[0], "wall") for name in names]
    return {
        "times": [[*key, list(map(float, row))] for key, row in zip(keys, times, strict=True)],
        "load": load.per_core(),
        "isa": device.isa(),
        "threads": device.threads(),
        "sets": len(sets.of(None)),
        "set_mb": input_bytes(sets.of(None)[0]) / 2**20,
        "work": case.work(sets.of(None)[0]) if case.work else None,
    }


def everything(
    case: Case,
    names: Sequence[str],
    sizes: dict,
    rounds: int,
    device: Any,
    cache_bytes: int,
    eager: Sequence[str],
) -> dict:
    """The three parts in sequence for the contenders that are right; "time" is None where
    kdkernels' own is wrong."""
    eager = [*eager, *(name for name in names if case.contender(name).waits)]
    checked = check(case, names, sizes, device, eager)
    right = [name for name in names if checked[name]["right"]]
    if case.own not in right:
        return {"check": checked, "memory": {}, "time": None}
    peaks = {}
    for name in right:
        peaks[name] = memory(case, case.contender(name), sizes, device)["peak_mb"]
        gc.collect()
    timed = measure(case, right, sizes, rounds, device, cache_bytes, eager)
    return {"check": checked, "memory": peaks, "time": timed}


def run(job: dict) -> dict:
    """The result of a job."""
    (case,) = find_cases([job["op"]], [job["case"]], job["device"])
    device = DEVICES[job["device"]]()
    sizes = case.quick if job["quick"] else case.sizes
    names = job["contenders"]
    cache_bytes = QUICK_BYTES if job["quick"] else device.cache_bytes()
    if job["part"] == "memory":
        return memory(case, case.contender(names[0]), sizes, device)
    if job["part"] == "check":
        return check(case, names, sizes, device)
    if job["part"] == "time":
        return measure(case, names, sizes, job["rounds"], device, cache_bytes)
    assert job["part"] == "all"
    try:
        return everything(case, names, sizes, job["rounds"], device, cache_bytes, job["eager"])
    except Uncaptured as error:
        return {"uncaptured": list(error.args)}


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")  # a float32 baseline is one in float32
    print(json.dumps(run(json.loads(sys.argv[1]))))
