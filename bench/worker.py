"""One part of one case in its own process: `python -m bench.worker JOB` prints a line of JSON.

A job is {"part", "op", "case", "contenders", "device", "quick", "rounds"}. Its part is "check", the
contenders' results against float64; "memory", the peak memory of a single one; or "time", for those
that were found right.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kdkernels
from bench import timing
from bench.cases import Case, Contender, Inputs, as_list, find_cases

WARMUP = 2
QUICK_BYTES = 20_000  # stands for the cache in a quick run: a few sets of tiny inputs
# Relative L2 error that a contender may have against float64. They tell a wrong formula from
# rounding; how good the rounding is, the contract decides. 16-bit baselines round every
# intermediate result: log-probabilities of -13 to 1/16.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def make_inputs(case: Case, contender: Contender | None, seed: int, sizes: dict) -> Inputs:
    """A set of inputs, leaves that want a gradient where the case takes one."""
    inputs = (contender.inputs if contender and contender.inputs else case.inputs)(seed, **sizes)
    for name in case.wanted:
        for tensor in as_list(inputs[name]):
            tensor.requires_grad_()
    return inputs


def wanted_tensors(case: Case, inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradient is taken."""
    return [t for name in case.wanted for t in as_list(inputs[name])]


def input_bytes(inputs: Inputs) -> int:
    """The bytes of all tensors."""
    return sum(t.nbytes for value in inputs.values() for t in as_list(value))


def make_step(
    case: Case, call: Callable[..., Any], inputs: Inputs, gradient: float | None
) -> Callable[[], tuple[Any, tuple]]:
    """Forward, and backward with the incoming gradient; dropping the result releases both.

    torch.autograd.grad hands over the gradient as the layer below the loss would get it, without
    adding it to .grad.
    """
    wanted = wanted_tensors(case, inputs)
    incoming: dict[torch.dtype, Tensor] = {}  # a 16-bit baseline has a 16-bit loss

    def step() -> tuple[Any, tuple]:
        result = call(**inputs, **case.options)
        if gradient is None:
            return result, ()
        if result.dtype not in incoming:
            incoming[result.dtype] = torch.tensor(gradient, dtype=result.dtype)
        return result, torch.autograd.grad(result, wanted, incoming[result.dtype])

    return step


def discarding(step: Callable[[], Any]) -> Callable[[], None]:
    """`step` with its result released inside, as zero_grad does inside a training step."""

    def run() -> None:
        step()

    return run


def in_float64(value: Any) -> Any:
    """The tensors of an input in float64, as leaves that want a gradient where the input does."""
    if isinstance(value, list):
        return [in_float64(v) for v in value]
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def true_result(case: Case, truth: Callable[..., Any], inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """The specification's result in float64, its gradients (incoming 1) kept in float32."""
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
    """Every how manyth row of the first input, and of the results, is compared with float64."""
    rows = len(next(iter(inputs.values())))
    return max(1, rows // case.check_rows) if case.check_rows else 1


def thinned(inputs: Inputs, step: int) -> Inputs:
    """The inputs with every `step`th row of the first one."""
    name, value = next(iter(inputs.items()))
    return inputs if step == 1 else {**inputs, name: value[::step]}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The larger of two relative L2 errors: of all elements, and of those not above their RMS.

    The second one sees what a few large elements, the labels' columns for instance, would cover up.
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
    case: Case, contender: Contender, inputs: Inputs, truth: Any, true_gradients: list[Tensor]
) -> dict[str, float]:
    """The contender's errors at every incoming gradient: {"result 0": relative error, ...}."""
    errors: dict[str, float] = {}
    step = check_step(case, inputs)
    for gradient in case.gradients or (None,):
        result, gradients = make_step(case, contender.call, inputs, gradient)()
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


def memory(case: Case, contender: Contender, sizes: dict, device: timing.CpuDevice) -> dict:
    """A contender's peak memory beyond the inputs, forward and backward."""
    inputs = make_inputs(case, contender, 0, sizes)
    gradient = case.gradients[-1] if case.gradients else None
    # Libraries and threads are started first; compiling at full size, since another shape would
    # compile again.
    first = inputs if contender.compiles else make_inputs(case, contender, 0, case.quick)
    discarding(make_step(case, contender.call, first, gradient))()
    return {"peak_mb": device.peak_mb(make_step(case, contender.call, inputs, gradient))}


def check(case: Case, names: list[str], sizes: dict) -> dict:
    """{contender: its errors against float64, whether they are small enough}."""
    true_results: dict[Any, tuple] = {}
    answers = {}
    for name in names:
        contender = case.contender(name)
        inputs = make_inputs(case, contender, 0, sizes)
        key = (contender.inputs, contender.truth)
        if key not in true_results:
            some = thinned(inputs, check_step(case, inputs))
            true_results[key] = true_result(case, contender.truth or case.truth(), some)
        found = errors_of(case, contender, inputs, *true_results[key])
        tensors = [t for value in inputs.values() for t in as_list(value)]
        tolerance = TOLERANCES[next(t.dtype for t in tensors if t.is_floating_point())]
        right = all(e <= tolerance for e in found.values())
        answers[name] = {"errors": found, "tolerance": tolerance, "right": right}
    return answers


def measure(
    case: Case,
    names: list[str],
    sizes: dict,
    rounds: int,
    device: timing.CpuDevice,
    cache_bytes: int,
) -> dict:
    """Times of the contenders at every incoming gradient, and of the floor, interleaved."""
    made: dict[Any, list[Inputs]] = {}
    keys: list[tuple[str, float | None]] = []
    timed: list[list[timing.Timed]] = []

    def input_sets(contender: Contender | None) -> list[Inputs]:
        maker = contender.inputs if contender else None
        if maker not in made:
            first = make_inputs(case, contender, 0, sizes)
            count = timing.sets_needed(input_bytes(first), cache_bytes)
            rest = [make_inputs(case, contender, seed, sizes) for seed in range(1, count)]
            made[maker] = [first, *rest]
        return made[maker]

    for name in names:
        contender = case.contender(name)
        for gradient in case.gradients or (None,):
            steps = [make_step(case, contender.call, i, gradient) for i in input_sets(contender)]
            keys.append((name, gradient))
            timed.append([device.prepare(discarding(step)) for step in steps])
    keys.append((case.floor.name, None))
    timed.append([device.prepare(case.floor.prepare(i)) for i in input_sets(None)])

    timing.interleave(timed, 0, WARMUP)
    load = timing.OtherLoad()
    times = timing.interleave(timed, rounds, 0)
    return {
        "times": [[*key, list(map(float, row))] for key, row in zip(keys, times, strict=True)],
        "load": load.per_core(),
        "isa": kdkernels.isa(),
        "threads": torch.get_num_threads(),
        "sets": len(input_sets(None)),
        "set_mb": input_bytes(input_sets(None)[0]) / 2**20,
    }


def run(job: dict) -> dict:
    """The answer to a job."""
    case = next(c for c in find_cases([job["op"]], [job["case"]]))
    device = timing.DEVICES[job["device"]]()
    sizes = case.quick if job["quick"] else case.sizes
    if job["part"] == "memory":
        return memory(case, case.contender(job["contenders"][0]), sizes, device)
    if job["part"] == "check":
        return check(case, job["contenders"], sizes)
    cache_bytes = QUICK_BYTES if job["quick"] else device.cache_bytes()
    return measure(case, job["contenders"], sizes, job["rounds"], device, cache_bytes)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
