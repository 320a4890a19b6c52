"""The bookkeeping of `python -m bench`: statistics, rows, command, report; nothing is timed."""

import itertools
import sys

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import report, rows, timing, worker
from bench.cases import CASES
from bench.devices import CpuDevice
from bench.targets import (
    CPU_TARGETS,
    FASTER,
    FLOOR,
    MEMORY,
    SLOWER,
    Target,
    targets_of,
)
from kdkernels.backends import isa_levels

SHARED = {
    "date": "2026-01-31",
    "machine": "Some CPU (family 1 model 2)",
    "cores": "2",
    "device": "cpu",
    "driver": "",
    "torch": "2.0",
    "triton": "",
    "kdkernels": "0.1.0",
    "commit": "abc1234",
}
KD = CASES[0]


def worker_result(native: float = 2.0, baseline: float = 20.0, **changes) -> dict:
    """A worker's result with constant times: the floor takes 1 ms."""
    times = [
        [name, gradient, "call", [ms] * 5]
        for name, ms in (("native", native), ("torch", baseline))
        for gradient in (1.0, 0.37)
    ]
    times.append(["floor: copies", None, "call", [1.0] * 5])
    facts = {"load": 0.1, "isa": "v4", "threads": 2, "sets": 4, "set_mb": 20.0, "work": None}
    return {"times": times, **facts, **changes}


def rows_of(timed: dict, targets=(), peaks=None, shared=SHARED) -> list[rows.Row]:
    return rows.build_rows(shared, KD, timed, peaks or {}, list(targets))


def found(table: list[rows.Row], contender: str, gradient: str = "1") -> rows.Row:
    (row,) = [r for r in table if (r["contender"], r["gradient"]) == (contender, gradient)]
    return row


# Statistics


def test_quartiles_are_the_median_and_the_quarters():
    assert timing.quartiles(np.array([5.0, 1.0, 2.0, 4.0, 3.0])) == (3.0, 2.0, 4.0)


def test_the_ratio_is_of_medians_and_its_interval_holds_it():
    generator = np.random.default_rng(1)
    over, under = 6 + generator.random(31), 2 + generator.random(31)
    ratio, low, high = timing.ratio_of_medians(over, under)
    assert ratio == np.median(over) / np.median(under)
    assert 6 / 3 < low < ratio < high < 7 / 2
    assert timing.ratio_of_medians(over, under) == (ratio, low, high)


def test_noise_that_hits_both_in_the_same_round_cancels_out_of_the_interval():
    noise = 1 + np.random.default_rng(2).random(30)
    _, low, high = timing.ratio_of_medians(6 * noise, 2 * noise)
    assert low == pytest.approx(3)
    assert high == pytest.approx(3)


def test_interleaving_changes_the_order_and_takes_every_input_set():
    calls = []

    def timed(contender: int, inputs: int):
        def call() -> float:
            calls.append((contender, inputs))
            return float(len(calls))

        return call

    times = timing.interleave([[timed(c, i) for i in range(4)] for c in range(3)], 8, warmup=2)
    assert times.shape == (3, 8)
    assert [i for _, i in calls] == [n % 4 for n in range(30)]
    rounds = [
        [c for c, _ in calls[n : n + 3]] for n in range(6, 30, 3)
    ]  # the warm-up is not counted
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    followers = {pair for order in rounds for pair in itertools.pairwise(order)}
    assert len(followers) == 6  # each behind each
    assert times[rounds[0][0], 0] == 7.0


def test_input_sets_exceed_the_cache():
    assert timing.sets_needed(10 << 20, 32 << 20) == 7
    assert timing.sets_needed(1 << 30, 32 << 20) == 1
    assert CpuDevice().cache_bytes() >= 1 << 18


def test_peak_memory_counts_what_a_step_allocates_and_frees():
    def step():
        torch.ones(16 << 20)  # 64 MiB, released before the step ends

    measured = CpuDevice().peak_mb(step)
    if measured is None:
        pytest.skip("needs Linux with a writable /proc/self/clear_refs")
    assert 60 < measured < 90


def test_the_load_of_others_is_a_share_of_the_cores():
    load = timing.OtherLoad().per_core()
    if load is None:
        pytest.skip("needs Linux's /proc/stat")
    assert load >= 0


# Rows


def test_a_row_compares_with_native_at_the_same_gradient_and_with_the_floor():
    timed = worker_result(native=2.0, baseline=20.0)
    timed["times"][1][3] = [4.0] * 5  # native at 0.37
    table = rows_of(timed, peaks={"native": 12.0})
    assert len(table) == 5
    assert all(set(row) == set(rows.COLUMNS) for row in table)
    assert found(table, "torch")["ratio"] == "10"
    assert found(table, "torch", "0.37")["ratio"] == "5"
    assert found(table, "native")["ratio"] == ""
    assert found(table, "native")["over_floor"] == "2"
    assert found(table, "native", "0.37")["over_floor"] == "4"
    assert found(table, "native")["peak_mb"] == "12"
    assert found(table, "torch")["peak_mb"] == ""
    assert found(table, "floor: copies", "")["ratio"] == "0.5"


@pytest.mark.parametrize(
    ("target", "contender", "verdict"),
    [
        (Target(KD.op, KD.name, FASTER, "torch", 10), "torch", "met"),
        (Target(KD.op, KD.name, FASTER, "torch", 10.5), "torch", "missed"),
        (Target(KD.op, KD.name, SLOWER, "torch", 0.1), "torch", "met"),
        (Target(KD.op, KD.name, SLOWER, "torch", 0.09), "torch", "missed"),
        (Target(KD.op, KD.name, FLOOR, "", 2), "native", "met"),
        (Target(KD.op, KD.name, FLOOR, "", 1.9), "native", "missed"),
        (Target(KD.op, KD.name, MEMORY, "", 12), "native", "met"),
        (Target(KD.op, KD.name, MEMORY, "", 11), "native", "missed"),
    ],
)
def test_a_target_is_judged_beside_the_contender_it_names(target, contender, verdict):
    table = rows_of(worker_result(), [target], {"native": 12.0})
    assert {r["contender"] for r in table if r["met"]} == {contender}
    assert found(table, contender)["met"] == verdict
    assert found(table, contender)["target"] == target.text()


def test_a_target_is_unknown_without_memory_and_left_out_at_another_level():
    target = Target(KD.op, KD.name, MEMORY, "", 12)
    assert found(rows_of(worker_result(), [target]), "native")["met"] == "unknown"
    table = rows_of(worker_result(isa="v3"), [target], {"native": 12.0})
    assert {row["met"] for row in table} == {""}


def test_a_case_measured_again_replaces_its_rows_in_the_file(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows.write_rows(path, rows_of(worker_result(native=2.0)))
    rows.write_rows(path, rows_of(worker_result(native=8.0, isa="v3")))
    rows.write_rows(path, rows_of(worker_result(native=4.0)))
    assert path.read_text().splitlines()[0] == ",".join(rows.COLUMNS)
    table = rows.read_rows(path)
    assert len(table) == 10
    native = [r for r in table if (r["contender"], r["gradient"]) == ("native", "1")]
    assert {r["isa"]: r["median_ms"] for r in native} == {"v3": "8", "v4": "4"}


def test_a_file_with_other_columns_is_rejected(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("op,case\na,b\n")
    with pytest.raises(ValueError, match=r"bench: .*rows\.csv must have the columns date,machine"):
        rows.read_rows(path)


# The command


@pytest.fixture
def in_process(monkeypatch):
    """Workers run inside this process; `wrong` names contenders that are reported as wrong."""
    wrong: set[str] = set()

    def run_worker(job: dict, level: str, limit: float | None = None) -> dict:
        result = worker.run(job)
        if job["part"] == "check":
            for name in wrong & set(result):
                result[name]["right"] = False
        return result

    monkeypatch.setattr(command, "run_worker", run_worker)
    return wrong


SPREAD = ["kd_cross_entropy", "--case", "256x10575-spread64", "--quick", "--rounds", "2"]


@pytest.mark.skipif(not isa_levels(), reason="needs the native kernels")
def test_a_quick_run_writes_rows_of_every_contender(in_process, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert command.main([*SPREAD, "--out", str(out)]) == 0
    table = rows.read_rows(out)
    assert {r["contender"] for r in table} == {
        "native",
        "native, ordinary logits",
        "torch",
        "floor: copies",
    }
    assert all(r["rounds"] == "2" and float(r["median_ms"]) > 0 for r in table)
    assert {r["target"] for r in table} == {""}  # tiny sizes have no targets
    assert "native is faster by" in capsys.readouterr().out


@pytest.mark.skipif(not isa_levels(), reason="needs the native kernels")
def test_a_wrong_contender_is_not_timed_and_fails_the_run(in_process, tmp_path, capsys):
    in_process.add("torch")
    out = tmp_path / "rows.csv"
    assert command.main([*SPREAD, "--out", str(out)]) == 1
    assert "torch" not in {r["contender"] for r in rows.read_rows(out)}
    assert "torch: WRONG" in capsys.readouterr().out
    in_process.add("native")
    out.unlink()
    assert command.main([*SPREAD, "--out", str(out)]) == 1
    assert not out.exists()


@pytest.mark.skipif(not isa_levels(), reason="needs the native kernels")
def test_a_contender_can_be_left_out(in_process, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert command.main([*SPREAD, "--without", "torch", "--out", str(out)]) == 0
    assert "torch" not in {r["contender"] for r in rows.read_rows(out)}
    assert "without torch: left out" in capsys.readouterr().out
    assert command.main([*SPREAD, "--without", "native"]) == 2
    assert (
        "no contender 'native'; there are native, ordinary logits; torch" in capsys.readouterr().err
    )


def test_an_op_that_does_not_exist_is_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(command, "OPS", ())
    assert command.main(["triplet_loss", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "triplet_loss 1024x512: skipped, kdkernels has no triplet_loss yet" in printed


def test_a_failed_worker_is_reported_with_the_end_of_its_error_output():
    job = {"part": "time", "op": "no such op", "case": KD.name, "device": "cpu", "quick": True}
    with pytest.raises(command.PartFailed, match=r"time ended with status 1[\s\S]*no op 'no such"):
        command.run_worker(job, "")


def test_the_list_shows_every_case_and_target(capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for case in CASES:
        assert (f"{case.op} --case {case.name}\n" in printed) == (case.device == "cpu")
    assert printed.count(" at v") == len(CPU_TARGETS)
    assert command.main(["no_such_op"]) == 2


# The report


def test_the_report_renders_tables_and_a_chart(tmp_path, capsys):
    targets = targets_of(KD.op, KD.name)
    old = {**SHARED, "date": "2026-01-30"}
    results, docs = tmp_path / "results", tmp_path / "docs"
    rows.write_rows(
        results / "2026-01-30-some-cpu.csv", rows_of(worker_result(native=77.0), shared=old)
    )
    rows.write_rows(
        results / "2026-01-31-some-cpu.csv",
        rows_of(worker_result(native=2.0, baseline=10.0, load=0.9), targets, {"native": 11.0}),
    )
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    page = (docs / "benchmarks.md").read_text()
    assert "## Some CPU (family 1 model 2), 2 threads of 2 cores, cpu" in page
    assert "2 of 4 targets met." in page  # twice at most 2.2x floor; 5x of 9x twice
    assert (
        "| 256x10575 | torch | 1 | 10 (10 to 10) | 5x (5 to 5) | 10x |  | >= 9x | missed (busy) |"
    ) in page
    assert "77" not in page, "the older file's rows of the same case are replaced"
    for theme in ("light", "dark"):
        assert f"benchmarks-{theme}.png" in page
        assert (docs / f"benchmarks-{theme}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_without_rows_is_an_error(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path)]) == 1
    assert "has no rows yet: run python -m bench" in capsys.readouterr().err


def test_a_terminal_gets_a_rich_table_and_a_file_plain_text(monkeypatch, capsys):
    table = rows_of(worker_result())
    report.show(table)
    plain = capsys.readouterr().out
    assert plain.splitlines()[2].startswith("case ")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report.show(table)
    assert "┃" in capsys.readouterr().out
