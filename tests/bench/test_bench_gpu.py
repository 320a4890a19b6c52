"""The GPU side of `python -m bench` without a GPU: a device of the same form on CPU tensors, the
real one on a recorder in place of torch.cuda, and the calls that a memory checker watches."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kdkernels
from bench import __main__ as command
from bench import devices, rows, worker
from bench.cases import cases_on, find_cases
from bench.gpu import sanitize
from bench.targets import (
    GPU_TARGETS,
)
from kdkernels.backends import OPS, native_missing

(KD,) = find_cases([], ["1024x10575-fp32"], "cuda")
(HARD,) = find_cases([], ["hard-1024"], "cuda")
SHARED = {
    "date": "2026-01-31",
    "machine": "Some GPU",
    "cores": "16",
    "device": "cuda",
    "driver": "580.1",
    "torch": "2.0",
    "triton": "3.0",
    "kdkernels": "0.1.0",
    "commit": "abc1234",
}


class FakeGpu:
    """CudaDevice's methods on CPU tensors: a replay takes 1 ms, an eager call 2, a wall time 3."""

    name, where, timing, warmup = "cuda", "cpu", "replay", 1
    capturing = False

    def describe(self):
        return "Some GPU"

    def versions(self):
        return {"driver": "580.1", "triton": "3.0"}

    def threads(self):
        return None

    def isa(self):
        return ""

    def cache_bytes(self):
        return 1 << 20

    def between_rounds(self):
        pass

    def peak_mb(self, step):
        step()
        return 5.0

    def prepare(self, step, place):
        FakeGpu.capturing = True
        try:
            step()
        finally:
            FakeGpu.capturing = False
        return lambda: (step(), 1.0)[1]

    def replayed(self, step):
        self.prepare(step, 0)
        return step()

    def events(self, step):
        return lambda: (step(), 2.0)[1]

    def wall(self, steps):
        return lambda: ([step() for step in steps], 3.0)[1]


def uncapturable(**inputs):
    """A contender that a capture refuses."""
    if FakeGpu.capturing:
        raise devices.CaptureFailed("operation not permitted when stream is capturing")
    return KD.contender("torch").call(**inputs)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU in name only, whose workers run in this process, and the jobs that they received."""
    jobs = []

    def run_worker(job: dict, level: str, limit: float | None = None) -> dict:
        jobs.append({**job, "eager": list(job["eager"])})
        return worker.run(job)

    monkeypatch.setitem(devices.DEVICES, "cuda", FakeGpu)
    monkeypatch.setattr(command, "run_worker", run_worker)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(command, "cannot_run", lambda case, options: "")
    return jobs


def with_contenders(monkeypatch, case, **calls) -> None:
    """Makes `calls` the case's contenders behind its own."""
    extra = [replace(case.contenders[1], name=name, call=call) for name, call in calls.items()]
    changed = replace(case, contenders=(case.contenders[0], *extra))
    monkeypatch.setattr(
        "bench.cases.CASES", [changed if c is case else c for c in cases_on("cuda")]
    )


def timings(table: list[rows.Row]) -> dict[tuple[str, str, str], rows.Row]:
    return {(r["contender"], r["gradient"], r["timing"]): r for r in table}


# The command


def test_the_list_of_gpu_cases_needs_no_gpu(capsys):
    assert command.main(["--list", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    for case in cases_on("cuda"):
        assert f"{case.op} --case {case.name}\n" in printed
    assert sum(printed.count(f": {t}\n") for t in {t.text() for t in GPU_TARGETS}) == len(
        GPU_TARGETS
    )


def test_measuring_without_a_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda", "--quick"]) == 2
    assert "bench: --device cuda needs a GPU, and torch" in capsys.readouterr().err


def test_a_run_has_replay_wall_and_floors_of_every_contender(gpu, tmp_path, capsys):
    arguments = ["kd_cross_entropy", "--case", KD.name, "--device", "cuda", "--quick"]
    assert command.main([*arguments, "--rounds", "3", "--out", str(tmp_path / "rows.csv")]) == 0
    assert [job["part"] for job in gpu] == ["all"]
    table = rows.read_rows(tmp_path / "rows.csv")
    ours = [("triton", g, "replay") for g in ("1", "0.37")] + [("triton", "1", "wall")]
    theirs = [(name, g, t) for name in ("torch", "torch.compile") for _, g, t in ours]
    floors = [(floor.name, "", "replay") for floor in KD.floors]
    assert set(timings(table)) == {*ours, *theirs, *floors}
    for row in table:
        facts = ("driver", "triton", "device", "threads", "isa", "commit")
        assert [row[k] for k in facts[:5]] == ["580.1", "3.0", "cuda", "", ""]
        assert row["median_ms"] == ("3" if row["timing"] == "wall" else "1")
        assert (row["rate"] == "") == (row["over_floor"] == "") == (row["timing"] == "wall")
    printed = capsys.readouterr().out
    assert f"  finished: kd_cross_entropy {KD.name}, " in printed
    assert "triton is faster by" in printed


def test_cases_can_be_skipped(gpu, capsys):
    skip = [word for case in cases_on("cuda") for word in ("--skip", case.name)]
    assert command.main(["--device", "cuda", "--quick", *skip]) == 0
    assert gpu == []


def test_what_no_graph_can_hold_is_timed_by_events_beside_our_own(gpu, monkeypatch, capsys):
    with_contenders(monkeypatch, KD, torch=KD.contender("torch").call, waiting=uncapturable)
    options = command.parse(["--device", "cuda", "--quick", "--rounds", "2"])
    (case,) = find_cases([], [KD.name], "cuda")
    table, clean = command.run_case(case, options, SHARED)
    assert clean
    assert [job["eager"] for job in gpu] == [[], ["waiting"]]  # a process of its own for each try
    assert "waiting: no CUDA graph, timed as eager calls: operation not" in capsys.readouterr().out
    found = timings(table)
    assert {t for name, _, t in found if name == "waiting"} == {"events", "wall"}
    assert {t for name, _, t in found if name == "triton"} == {"replay", "events", "wall"}
    assert {t for name, _, t in found if name == "torch"} == {"replay", "wall"}
    assert found["waiting", "1", "events"]["ratio"] == "1"  # 2 ms over 2 ms, not over a replay


def test_a_contender_known_to_wait_is_never_captured(gpu):
    device, names = FakeGpu(), ["triton", "torch"]
    waits = HARD.contender("torch")
    assert waits.waits
    result = worker.everything(HARD, names, HARD.quick, 2, device, 1 << 20, [])
    assert {t for name, _, t, _ in result["time"]["times"] if name == "torch"} == {"events", "wall"}


def test_another_librarys_failure_removes_its_own_rows_alone(gpu, monkeypatch, capsys):
    def broken(**inputs):
        raise TypeError("an argument that this version does not know")

    with_contenders(monkeypatch, KD, torch=KD.contender("torch").call, library=broken)
    options = command.parse(["--device", "cuda", "--quick", "--rounds", "2"])
    (case,) = find_cases([], [KD.name], "cuda")
    table, clean = command.run_case(case, options, SHARED)
    assert not clean
    assert {r["contender"] for r in table} == {"triton", "torch", *(f.name for f in KD.floors)}
    assert "library: FAILED, it is not timed: TypeError: an argument" in capsys.readouterr().out


def test_a_gradient_that_is_only_wrong_under_replay_is_found():
    class ScaledTwice(FakeGpu):
        def replayed(self, step):
            result, gradients = step()
            incoming = next(g for g in gradients if g is not None)
            return result, (incoming * 0.37,)

    found = worker.check(KD, ["triton"], KD.quick, ScaledTwice())["triton"]
    assert not found["right"]
    assert found["errors"]["gradient 0 at 0.37"] < 1e-5
    assert found["errors"]["replayed gradient 0 at 0.37"] > 0.5
    assert worker.check(KD, ["triton"], KD.quick, FakeGpu())["triton"]["right"]


def test_a_wrong_own_kernel_is_not_timed(gpu, monkeypatch):
    def doubled(student, teacher, target, temperature):
        return 2 * KD.contender("torch").call(student, teacher, target, temperature=temperature)

    wrong = replace(KD, contenders=(replace(KD.contenders[0], call=doubled), *KD.contenders[1:]))
    result = worker.everything(wrong, ["triton", "torch"], KD.quick, 2, FakeGpu(), 1 << 20, [])
    assert result["time"] is None
    assert result["check"]["torch"]["right"]


# CudaDevice, without CUDA


@pytest.fixture
def cuda(monkeypatch):
    """A CudaDevice on a recorder in place of torch.cuda, and the calls it received."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 0.25

    class Graph:
        def replay(self):
            done.append("replay")

    class Inside:
        def __init__(self, *_, pool=None, **__):
            self.pool = pool

        def __enter__(self):
            done.append(("in", self.pool))

        def __exit__(self, *_):
            done.append("out")

    pools = iter("abcdef")
    properties = SimpleNamespace(name="Some GPU", L2_cache_size=60 << 20)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "synchronize": lambda: done.append("synchronize"),
        "_sleep": lambda cycles: done.append("spin"),
        "graph_pool_handle": lambda: next(pools),
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": object,
        "stream": lambda _: Inside(pool="side"),
        "graph": Inside,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    return devices.CudaDevice(), done


def test_a_replay_is_timed_behind_a_spin_and_a_graph_is_made_after_warm_up(cuda):
    device, done = cuda
    timed = device.prepare(lambda: done.append("step"), 0)
    steps = ["step"] * devices.BEFORE_CAPTURE
    assert done == [
        "synchronize", ("in", "side"), *steps, "out", "synchronize",
        ("in", "a"), "step", "out", "replay", "synchronize",
    ]  # fmt: skip
    done.clear()
    assert timed() == 0.25
    assert done == ["spin", "record", "replay", "record", "wait"]


def test_graphs_share_memory_in_one_place_only(cuda):
    device, done = cuda
    for place in (0, 1, 0):
        device.prepare(lambda: None, place)
    assert [x[1] for x in done if isinstance(x, tuple) and x[1] != "side"] == ["a", "b", "a"]


def test_an_error_while_capturing_differs_from_one_before(cuda):
    device, _ = cuda
    calls = []

    def refuses_to_be_captured():
        calls.append(1)
        if len(calls) > devices.BEFORE_CAPTURE:
            raise RuntimeError("CUDA error: operation not permitted\nmore lines")

    with pytest.raises(devices.CaptureFailed, match=r"^CUDA error: operation not permitted$"):
        device.prepare(refuses_to_be_captured, 0)

    def fails_anyway():
        raise RuntimeError("out of range")

    with pytest.raises(RuntimeError, match="out of range") as error:
        device.prepare(fails_anyway, 0)
    assert not isinstance(error.value, devices.CaptureFailed)


def test_an_eager_call_between_events_and_a_wall_time_have_no_spin(cuda):
    device, done = cuda
    assert device.events(lambda: done.append("step"))() == 0.25
    assert done == ["step", "record", "step", "record", "wait"]
    done.clear()
    timed = device.wall([lambda: done.append("first"), lambda: done.append("second")])
    done.clear()
    assert timed() > 0
    assert done[0] == done[-1] == "synchronize"
    assert done.count("first") + done.count("second") == devices.MOST_WALL_CALLS
    assert abs(done.count("first") - done.count("second")) <= 1
    assert device.cache_bytes() == 60 << 20
    assert device.describe() == "Some GPU"


@pytest.mark.skipif(bool(torch.version.hip), reason="needs torch without ROCm")
def test_the_drivers_version_comes_from_its_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.159.04\necho 580.159.04\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert devices.driver_version() == "580.159.04"
    tool.write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setattr(devices, "read", lambda _: "NVRM version: Kernel Module  575.51.03  Fri")
    assert devices.driver_version() == "575.51.03"
    monkeypatch.setattr(devices, "read", lambda _: "")
    assert devices.driver_version() == "unknown"


@pytest.mark.parametrize("op", sanitize.CALLS)
def test_the_sanitizers_calls_are_valid(op, capsys):
    assert set(sanitize.CALLS) == set(OPS)
    if kdkernels.backends(op, "cpu")[0] == "eager":
        pytest.skip(f"needs the native kernels: {native_missing()}")
    assert sanitize.main([op, "--device", "cpu"]) == 0
    assert f"{op}: " in capsys.readouterr().out.splitlines()[-1]
