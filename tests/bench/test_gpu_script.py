"""The plan of bench/gpu.sh and its resumption, with stubs for its commands."""

import os
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT

from bench import __main__ as command
from bench.cases import find_cases
from bench.gpu import sanitize

STUB = """\
#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
  -c*xdist*) exit 1 ;;
  *"-m bench report"*) echo table ;;
  *"-m bench $BROKEN_BENCH "*) printf '  finished: %s one, 3 s\\n' "$BROKEN_BENCH"; exit 1 ;;
  *"-m pytest"*"cuda and $BROKEN_CONTRACT "*) exit 1 ;;
esac
"""

OPS = len(sanitize.CALLS)


@pytest.fixture
def script(tmp_path):
    """Runs a copy of bench/gpu.sh with a stub for python; returns status, output and stub calls."""
    root = tmp_path / "checkout"
    for folder in (
        "bench",
        "kdkernels",
        *(f"kdkernels/{op}" for op in sanitize.CALLS),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "some.py").write_text(folder)
    (root / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    for name in ("python3", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> SimpleNamespace:
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(root / "bench" / "gpu.sh"), *arguments],
            env={
                "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
                "CALLS": str(calls),
                "BROKEN_BENCH": "none",
                "BROKEN_CONTRACT": "none",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        asked = [c for c in calls.read_text().splitlines() if not c.startswith("-c")]
        return SimpleNamespace(
            status=done.returncode, printed=done.stdout + done.stderr, asked=asked, root=root
        )

    return run


def test_the_script_is_valid_and_its_plan_runs_nothing(script):
    path = ROOT / "bench" / "gpu.sh"
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    plan = script("--dry-run")
    assert (plan.status, plan.asked) == (0, [])
    parts = [line.split(" (")[0] for line in plan.printed.splitlines()]
    assert parts[:3] == ["== install", "== contract kd_cross_entropy", "== bench kd_cross_entropy"]
    assert len(parts) == 1 + 4 * OPS
    for line in plan.printed.splitlines():
        if " -m bench " in line:
            options = command.parse(line.split(" -m bench ")[1].split())
            assert find_cases(options.ops, [], options.device)
    assert not (plan.root / "bench" / "gpu-state").exists()
    assert script("--quick").status == 2
    assert script("one", "two").status == 2


def test_a_finished_part_is_not_run_again_until_its_sources_change(script, tmp_path):
    first = script()
    assert first.status == 0, first.printed
    assert first.printed.splitlines()[-3:] == [
        "table",
        "failed: none",
        "left for the next call with this state: none",
    ]
    for word, times in (
        ("-m pytest", OPS),
        ("--device cuda", OPS),
        ("--tool", 2 * OPS),
        ("--summary", 1),
    ):
        assert sum(word in call for call in first.asked) == times, word
    assert len(script().asked) == 2  # pip and the table
    (first.root / "kdkernels" / "triplet_loss" / "some.py").write_text("changed")
    again = script()
    assert again.status == 0
    assert sum("-m pytest" in call for call in again.asked) == 2  # batch_triplet_loss builds on it
    (first.root / "kdkernels" / "kd_cross_entropy" / "some.py").write_text("changed")
    # and the head, which builds on it; an op's name must not run the tests of another
    tests = [call for call in script().asked if "-m pytest" in call]
    assert len(tests) == 2
    assert "kd_cross_entropy and not eager-cuda and not linear_kd_cross_entropy" in tests[0]
    assert "cuda and linear_kd_cross_entropy and not eager-cuda" in tests[1]


def test_a_failing_part_stops_no_other_and_runs_again(script):
    first = script(BROKEN_CONTRACT="hidden_l2", BROKEN_BENCH="kd_cross_entropy")
    assert first.status == 1
    assert "failed: bench kd_cross_entropy contract hidden_l2" in first.printed
    assert sum("--tool" in call for call in first.asked) == 2 * OPS
    second = script()
    assert second.status == 0
    ours = [call for call in second.asked if "pip" not in call and "report" not in call]
    assert len(ours) == 2
    assert ours[0].startswith("-m bench kd_cross_entropy")
    assert "--skip one" in ours[0], "the case that was finished is not measured again"
    assert "cuda and hidden_l2" in ours[1]


def test_without_time_parts_are_left_for_the_next_call(script, tmp_path):
    first = script(GPU_SECONDS="0")
    assert first.status == 3
    assert "left for the next call with this state: install contract kd_cross_entropy bench" in (
        first.printed
    )
    assert not any("-m pytest" in call for call in first.asked)


def test_results_go_to_out_and_an_earlier_state_is_taken_from_a_folder(script, tmp_path):
    out, state = tmp_path / "out", tmp_path / "state"
    assert script(OUT=str(out), BROKEN_CONTRACT="hidden_l2").status == 1
    assert len((out / "finished").read_text().splitlines()) == 4 * OPS - 1
    (out / "rows.csv").write_text("rows\n")
    out.rename(state)
    second = script(str(state), OUT=str(out))
    assert second.status == 0
    assert sum("-m pytest" in call for call in second.asked) == 1
    assert (out / "rows.csv").read_text() == "rows\n"
    assert len((out / "finished").read_text().splitlines()) == 4 * OPS
    assert len(list(out.glob("gpu-*.log"))) == 1


def test_without_a_gpu_the_script_reports_it(script, tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    done = script()
    assert done.status == 2
    assert "has no torch that finds a GPU here" in done.printed
