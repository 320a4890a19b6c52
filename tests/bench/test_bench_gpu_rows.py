"""The rows of a GPU: ratios, floors, targets, and their tables."""

import pytest

from bench import report, rows
from bench.cases import find_cases
from bench.targets import (
    FASTER,
    FLOOR,
    GPU_TARGETS,
    MEMORY,
    MICROSECONDS,
    SHARE,
    Target,
    targets_of,
)

(KD,) = find_cases([], ["1024x10575-fp32"], "cuda")
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


def timings(table: list[rows.Row]) -> dict[tuple[str, str, str], rows.Row]:
    return {(r["contender"], r["gradient"], r["timing"]): r for r in table}


def worker_result(replay: float = 1.25, wall: float = 0.5) -> dict:
    """A worker's result: the copy takes 1 ms by the kernel and 2 by the driver."""
    times = [
        ["triton", 1.0, "replay", [replay] * 5],
        ["triton", 0.37, "replay", [2.0] * 5],
        ["triton", 1.0, "events", [4.0] * 5],
        ["torch", 1.0, "replay", [10.0] * 5],
        ["Liger, CE and KL", 1.0, "events", [12.0] * 5],
        ["floor: memory copy", None, "replay", [2.0] * 5],
        ["floor: copying kernel", None, "replay", [1.0] * 5],
        ["triton", 1.0, "wall", [wall] * 5],
        ["torch", 1.0, "wall", [1.0] * 5],
    ]
    facts = {"load": 0.1, "isa": "", "threads": None, "sets": 2, "set_mb": 80.0}
    return {"times": times, "work": (3e9, "GB/s"), **facts}


def table_of(timed: dict, targets=()) -> dict[tuple[str, str, str], rows.Row]:
    return timings(rows.build_rows(SHARED, KD, timed, {"triton": 40.0}, list(targets)))


def test_ratios_stay_within_a_timing_and_the_faster_floor_counts():
    table = table_of(worker_result())
    assert table["torch", "1", "replay"]["ratio"] == "8"
    assert table["Liger, CE and KL", "1", "events"]["ratio"] == "3"
    assert table["torch", "1", "wall"]["ratio"] == "2"
    own = table["triton", "1", "replay"]
    assert (own["floor_ms"], own["over_floor"], own["rate"]) == ("1", "1.25", "2400 GB/s")
    assert report.share_of_floor(own) == "80 %"
    assert report.microseconds("0.01234") == "12.34"
    assert rows.rate_text((5e12, "TFLOP/s"), 10.0) == "500 TFLOP/s"


@pytest.mark.parametrize(
    ("target", "row", "verdict"),
    [
        ({"kind": SHARE, "value": 0.8}, ("triton", "1", "replay"), "met"),
        ({"kind": SHARE, "value": 0.81}, ("triton", "1", "replay"), "missed"),
        ({"kind": FLOOR, "value": 1.3}, ("triton", "1", "replay"), "met"),
        ({"kind": MICROSECONDS, "value": 1250}, ("triton", "1", "replay"), "met"),
        ({"kind": MICROSECONDS, "value": 1249}, ("triton", "1", "replay"), "missed"),
        ({"kind": MEMORY, "value": 39}, ("triton", "1", "replay"), "missed"),
        ({"kind": FASTER, "value": 8, "against": "torch"}, ("torch", "1", "replay"), "met"),
        (
            {"kind": FASTER, "value": 2, "against": "torch", "wall": True},
            ("torch", "1", "wall"),
            "met",
        ),
        (
            {"kind": FASTER, "value": 2.1, "against": "torch", "wall": True},
            ("torch", "1", "wall"),
            "missed",
        ),
        (
            {"kind": FASTER, "value": 3, "against": "Liger, CE and KL"},
            ("Liger, CE and KL", "1", "events"),
            "met",
        ),
    ],
)
def test_a_gpu_target_is_judged_on_one_timing(target, row, verdict):
    target = Target(KD.op, KD.name, **{"against": "", "isa": "", "gradient": 1.0, **target})
    table = table_of(worker_result(), [target])
    assert {key for key, found in table.items() if found["met"]} == {row}
    assert table[row]["met"] == verdict
    assert table[row]["target"] == target.text()


def test_the_targets_of_the_table_are_those_of_the_issue():
    ours = [t for t in GPU_TARGETS if t.op != "linear_kd_cross_entropy"]
    texts = {t.case: [] for t in ours}
    for target in ours:
        texts[target.case].append(f"{target.against} {target.text()}".strip())
    assert texts["1024x10575-bf16"] == [">= 70% of floor", "torch >= 8x", "torch.compile >= 2.5x"]
    assert texts["256x93431-fp32"] == texts["1024x93431-fp32"] == [">= 58% of floor"]
    assert texts["128x10575-fp32"] == ["<= 12 us", "torch >= 1x wall"]
    assert texts["hard-16384"][:2] == ["<= 1.3x floor", "<= 128 MB"]
    heads = [t for t in GPU_TARGETS if t not in ours]
    assert len(heads) == 12
    assert {t.text() for t in heads} == {"<= 1.25x floor"}


def test_the_page_describes_gpus_only_where_it_has_rows_of_one(tmp_path):
    targets = targets_of(KD.op, KD.name)
    measured = rows.build_rows(SHARED, KD, worker_result(), {"triton": 40.0}, targets)
    rows.write_rows(tmp_path / "results" / "2026-01-31-some-gpu.csv", measured)
    report.render(tmp_path / "results", tmp_path / "docs")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "On a GPU:" in page
    assert "## Some GPU, driver 580.1, Triton 3.0" in page
    assert "2 of 2 targets met." in page
    assert (
        "| 1024x10575-fp32 | triton | replay | 1 | 1250 (1250 to 1250) | 2400 GB/s |  | 80 % | "
        "40 | >= 80% of floor | met |"
    ) in page
    assert "On a GPU:" not in report.markdown([{**r, "device": "cpu"} for r in measured])


def test_the_summary_has_one_line_per_gpu_case(tmp_path, capsys):
    targets = targets_of(KD.op, KD.name)
    measured = rows.build_rows(SHARED, KD, worker_result(replay=1.6), {"triton": 40.0}, targets)
    rows.write_rows(tmp_path / "2026-01-31-some-gpu.csv", measured)
    assert report.main(["--summary", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for part in (KD.name, "1600", "62 %", "torch 6.25x", "Liger, CE and KL 3x", "torch 2x"):
        assert part in lines[1]
    assert ">= 80% of floor (triton), >= 8x (torch)" in lines[1]
    assert report.main(["--summary", "--results", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "no rows of a GPU\n"


def test_a_copy_without_history_takes_its_commit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert rows.commit() == "none"
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert rows.commit() == "abc1234"
