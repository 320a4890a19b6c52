"""The report page of synthetic run directories: numbers, verdicts, images, and missing parts."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from kdtrain.cli import commands
from kdtrain.config import Config, ModelConfig, OptimConfig, Phase, TargetConfig, TeacherConfig
from kdtrain.reports import charts, plots
from kdtrain.reports import report as page_of_curves
from kdtrain.reports.chain_table import answers, result_table
from kdtrain.reports.report import report
from kdtrain.reports.runs import read_stages
from kdtrain.reports.tables import verdicts

DASH = "\N{EN DASH}"
METRICS = {
    "classification": ("top1", {"top1": 0.5, "cross_entropy": 1.25, "pair_accuracy": 0.7}),
    "alignment": ("nrmse", {"nrmse": 0.1, "failure_rate": 0.3}),
    "verification": (
        "nn_top1",
        {"nn_top1": 0.4, "nn_lone": 7, "pair_accuracy": 0.8, "pair_accuracy_std": 0.02},
    ),
}
FLOORS = {
    "classification": {"top1": 0.2, "pair_accuracy": 0.6},
    "alignment": {"nrmse": 0.3},
    "verification": {"nn_top1": 0.15, "pair_accuracy": 0.6},
}


def make_run(
    root: Path, name: str, task: str, value: float, *, finished: bool = True, **changes: object
) -> Path:
    """A run directory as the engine writes it; `value` is the judging metric at the end."""
    directory = root / name
    directory.mkdir(parents=True)
    config = Config(
        task=task,
        model=ModelConfig(depth=14, width=32, divide=4, stem="small"),
        optim=OptimConfig(phases=[Phase(epochs=3, lr=0.1), Phase(epochs=2, lr=0.01)]),
    )
    config = dataclasses.replace(config, **changes)
    (directory / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    judge, metrics = METRICS[task]
    metrics = {**metrics, judge: value}
    lines, evaluations = [], []
    for number in range(5):
        phase, epoch = (0, number) if number < 3 else (1, number - 3)
        for step in (1, 2):
            place = {"step": 10 * number + 5 * step, "phase": phase, "epoch": epoch}
            terms = {"loss": 3.0, "hard": 2.0 - 0.3 * number, "soft": 4.0, "top1": 0.1 * number}
            lines.append({"kind": "train", **place, "lr": 0.1, **terms})
        place = {"step": 10 * number + 10, "phase": phase, "epoch": epoch}
        now = {**metrics, judge: value * (number + 1) / 5}
        record = {**place, "phase_ends": number in (2, 4)}
        evaluations.append({**record, "metrics": now})
        lines.append({"kind": "eval", **record, **now})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return directory
    results = {
        "status": "finished",
        "task": task,
        "metrics": metrics,
        "best": evaluations[3],
        "floors": FLOORS[task],
        "untrained": {"nn_top1": 0.05} if task == "verification" else {},
        "parameters": {"network": 78_575},
        "multiply_adds": {"network": 503_424},
        "data": {
            "name": "<script>alert(1)</script>",
            "images": 7000,
            "classes": 350,
            "train": 5600,
            "test": 1400,
            "skipped": 2,
        },
        "seconds": 62.0,
        "environment": {"device": "A Processor", "threads": 1, "workers": 0, "torch": "2.13.0"},
    }
    (directory / "results.json").write_text(json.dumps(results))
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (12, 3, 16, 16), dtype=np.uint8)
    points = random.rand(12, 5, 2).astype(np.float32) * 16
    if task == "alignment":
        samples = {
            "images": images,
            "true": points,
            "predicted": points + 1,
            "errors": np.full(12, 0.123),
            "ced_threshold": np.linspace(0, 0.1, 11),
            "ced_share": np.linspace(0, 1, 11),
        }
    else:
        samples = {
            "queries": images,
            "neighbours": images[::-1],
            "query_labels": np.arange(12),
            "neighbour_labels": np.where(np.arange(12) < 9, np.arange(12), 99),
            "distances": np.ones(12),
            "gallery": np.array(1400),
        }
        if task == "verification":
            samples |= {"roc_far": np.linspace(0, 1, 9), "roc_tar": np.linspace(0, 1, 9) ** 0.5}
    np.savez(directory / "samples.npz", **samples)
    return directory


def make_chain(root: Path) -> Path:
    make_run(root, "cls_teacher", "classification", 0.93)
    make_run(root, "cls_student", "classification", 0.66)
    make_run(root, "cls_control", "classification", 0.68, init_from="@cls_student")
    make_run(
        root,
        "cls_distilled",
        "classification",
        0.71,
        init_from="@cls_student",
        teacher=TeacherConfig(run="@cls_teacher"),
        target=TargetConfig(alpha=1.0),
    )
    make_run(root, "ali_teacher", "alignment", 0.09)
    make_run(root, "ali_distilled", "alignment", 0.11)
    make_run(root, "ver_teacher", "verification", 0.45)
    make_run(root, "ver_distilled", "verification", 0.42)
    return root


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of a whole chain."""
    root = make_chain(tmp_path_factory.mktemp("chain"))
    return write(root, command="python -m kdtrain pipeline <x>")


class Cells(HTMLParser):
    """The text of every table row, cell by cell."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag, _attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        if tag == "small" and self.inside:
            self.rows[-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def rows_of(page: str) -> dict[str, list[str]]:
    parser = Cells()
    parser.feed(page)
    found: dict[str, list[str]] = {}
    for row in parser.rows:
        if row:
            found.setdefault(row[0].split(" | ")[0], row[1:])
    return found


def write(root: Path, **options) -> str:
    path = report(root, **options)
    assert path == root / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_table_holds_every_role_and_the_floor(page):
    rows = rows_of(page)
    assert rows["teacher"] == ["93.0", "9.0", "45.0", "80.0 | ± 2.0 over folds"]
    assert rows["scratch student"] == ["66.0", DASH, DASH, DASH]
    assert rows["control student, no teacher"][0] == "68.0"
    assert rows["distilled student"][:3] == ["71.0", "11.0", "42.0"]
    assert rows["floor (no training)"] == ["20.0", "30.0", "15.0", "60.0"]
    assert rows["untrained network"] == [DASH, DASH, "5.0", DASH]


def test_every_run_is_listed_with_its_initialisation_and_loss(page):
    rows = rows_of(page.split("<h2>Runs</h2>")[1])
    assert rows["distilled student "] == [
        "classification",
        "cls_student",
        "softmax + soft (tau 3); teacher cls_teacher",
        "3 at 0.1, 2 at 0.01",
        "42.6 → 71.0",
        "56.8 (epoch 4)",
        "1:02",
        "ResNet-14/4, 78.6 k parameters, 503 k multiply-adds",
    ]
    losses = re.findall(r"<td>scratch</td><td>(triplet[^<]*)", page)
    assert losses[0] == "triplet (semihard, margin 0.4) + softmax"


def test_the_header_states_command_data_machine_and_time(page):
    assert "python -m kdtrain pipeline &lt;x&gt;" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;, 7,000 images of 350 identities" in page
    assert "5,600 for training and 1,400 for testing" in page
    assert "2 skipped" in page
    assert "A Processor, 1 thread per run; torch 2.13.0" in page
    assert "8:16 in 8 of 8 runs" in page
    assert "NRMSE by interocular, in original pixels" in page
    assert "7 queries without another image of their identity left out" in page


def test_the_page_needs_nothing_from_outside(page):
    links = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_images_are_real_images_and_curves_are_drawings(page):
    sizes = []
    for code in re.findall(r"data:image/jpeg;base64,([^\"'\s>]+)", page):
        with Image.open(io.BytesIO(base64.b64decode(code))) as image:
            image.verify()
            sizes.append(image.size)
    assert set(sizes) == {(16, 16)}
    assert page.count("<figure class=chart>") == 12  # two of each task, and its loss terms
    assert len(page) < 250_000  # most of it 128 images of noise


def test_a_page_fits_a_phone_and_dark_mode(page):
    boxes = re.split(r"<div class=\"?'?scroll", page)
    assert len(re.findall("<table", page)) == sum("<table" in box for box in boxes[1:])
    assert "<table" not in boxes[0]
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page


def items_of(root: Path, **shares: float) -> None:
    """The items of some runs: a share of 400 test images is right, or has an error of 1."""
    for name, share in shares.items():
        (root / name / "items").mkdir()
        metric = METRICS[{"cls": "classification", "ali": "alignment"}[name[:3]]][0]
        right = (np.arange(400) < 400 * share).astype(np.float32)
        np.savez(root / name / "items" / "phase1.npz", **{metric: right})


def test_page_and_terminal_show_whether_distillation_helped(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    values = {"cls_control": 0.68, "cls_distilled": 0.71, "ali_scratch": 0.08}
    values |= {"ali_distilled": 0.11, "ver_distilled": 0.42}
    for name, value in values.items():
        task = {"c": "classification", "a": "alignment", "v": "verification"}[name[0]]
        make_run(tmp_path, name, task, value)
    items_of(tmp_path, cls_distilled=0.71, cls_control=0.68, ali_distilled=0.11, ali_scratch=0.08)
    lines = [
        "Classification: better (one seed).</strong> Top-1 (higher is better): 71.0 % with "
        "distillation, 68.0 % for the same student trained without a teacher; +3.0 [+1.5, +4.8] "
        "points.",
        "Alignment: worse (one seed).</strong> NRMSE (lower is better): 11.0 % with distillation, "
        "8.0 % for the student trained from scratch (no control has a result); +3.0 [+1.5, +4.8] "
        "points.",
        "Verification: not known.</strong> No student without a teacher has a result.",
    ]
    page = write(tmp_path)
    stream = io.StringIO()
    states = {path.parent.name: "done" for path in tmp_path.glob("*/config.yaml")}
    Console(file=stream, width=300).print(result_table(tmp_path, states))
    for line in lines:
        assert f"<strong>{line}" in page
        assert line[1:].replace("</strong>", "") in stream.getvalue()
    for shown in (page, stream.getvalue()):
        assert "Did distillation help?" in shown
        assert "One seed: no verdict." in shown


def answer(root: Path) -> tuple[str, str, str]:
    (found,) = answers(read_stages(root))
    return found


def test_an_answer_names_the_missing_part(tmp_path):
    optim = OptimConfig(phases=[Phase(epochs=3, lr=0.1), Phase(epochs=3, lr=0.01)])
    make_run(tmp_path, "cls_distilled", "classification", 0.5, finished=False)
    assert answer(tmp_path)[1:] == ("not known", "cls_distilled is not finished.")
    shutil.rmtree(tmp_path / "cls_distilled")
    make_run(tmp_path, "cls_distilled", "classification", 0.5)
    make_run(tmp_path, "cls_control", "classification", 0.5, optim=optim)
    assert answer(tmp_path)[1:] == (
        "not known",
        "Top-1 (higher is better): 50.0 % with distillation, 50.0 % for a control of another "
        "network or schedule; +0.0 points, without an interval, as the runs share no test items.",
    )
    items_of(tmp_path, cls_distilled=0.5, cls_control=0.5)
    assert answer(tmp_path)[1] == "no clear difference"
    other = {"top1": np.ones(3, dtype=np.float32), "index": np.arange(3)}
    np.savez(tmp_path / "cls_control" / "items" / "phase1.npz", **other)
    assert answer(tmp_path)[1] == "not known"  # measured on other images


def test_runs_outside_a_chain_get_no_answer(tmp_path):
    make_systems(tmp_path, teacher=0.9, student=0.5, soft=0.6)
    assert answers(read_stages(tmp_path)) == []
    assert "Did distillation help?" not in write(tmp_path)


def test_the_soft_term_is_shown_above_the_teachers_entropy(tmp_path):
    run = make_run(tmp_path, "cls_distilled", "classification", 0.7)
    journal = (run / "metrics.jsonl").read_text()
    entropy = '"soft": 4.0, "teacher_entropy": 3.5'
    (run / "metrics.jsonl").write_text(journal.replace('"soft": 4.0', entropy))
    points = page_of_curves._logged(read_stages(tmp_path)[0], "soft")
    assert [y for _, y in points] == [0.5] * 10
    assert points[-1][0] == 5.0
    assert "KL divergence from the teacher&#39;s prediction" in write(tmp_path)


def test_the_controls_line_is_dashed_and_drawn_last(page):
    chart = page.split("<figure class=chart>")[1]
    assert re.findall("<title>([^<]*)</title><polyline( class=dashed)?", chart) == [
        ("teacher", ""),
        ("scratch student", ""),
        ("distilled student", ""),
        ("control student, no teacher", " class=dashed"),
    ]


def drawn(*values: float, **looks: Any) -> dict[str, Any]:
    curve = charts.Curve("run", range(1, len(values) + 1), values, "#000000")
    return charts.drawn(charts.Panel("loss", "epoch", "nats", [curve], **looks))


def test_an_axis_begins_at_zero_and_is_logarithmic_over_a_large_span_only():
    small = drawn(1.28, 1.04, log_y=True)
    assert [text for _, text in small["y_ticks"]] == ["0", "0.5", "1", "1.5"]
    large = drawn(1000.0, 1.0, log_y=True)
    assert [text for _, text in large["y_ticks"]] == ["1", "10", "100", "1 k"]
    plots_alike = small, drawn(1000.0, 1.0), drawn(1000.0, 0.0, log_y=True)
    assert [plot["wide"] for plot in (large, *plots_alike)] == [True, False, False, False]


def test_a_curve_lies_between_its_ticks():
    found = drawn(0.0, 10.0, 5.0, floor=2.5)
    _, points, _ = found["curves"][0]
    assert points == [(158.7, 176.0), (275.3, 8.0), (392.0, 92.0)]
    assert found["y_ticks"][0] == (176.0, "0")
    assert found["y_ticks"][-1] == (8.0, "10")
    assert found["floor"] == 134.0


def test_a_long_curve_is_thinned_to_means():
    assert charts.thinned([1.0, 2.0]) == [1.0, 2.0]
    assert charts.thinned([0.0, 2.0] * 1500) == [1.0] * 150


def test_landmarks_are_drawn_at_their_places(tmp_path):
    make_run(tmp_path, "ali_teacher", "alignment", 0.1)
    page = write(tmp_path)
    with np.load(tmp_path / "ali_teacher" / "samples.npz") as samples:
        x, y = samples["true"][0, 0]
    assert f'<circle cx="{x:.2f}" cy="{y:.2f}"' in page
    assert f'<circle cx="{x + 1:.2f}" cy="{y + 1:.2f}"' in page
    assert page.count("<image ") == 12
    assert "12.3 %" in page


def test_neighbours_are_framed_right_or_wrong_by_their_labels(tmp_path):
    make_run(tmp_path, "ver_teacher", "verification", 0.4)
    page = write(tmp_path)
    assert page.count("<figure class='right'>") == 9
    assert page.count("<figure class='wrong'>") == 3
    assert "<small>ver_teacher</small>: 9 of 12 right" in page
    assert "among 1,400 test images" in page


def test_a_teacher_below_the_floor_makes_its_column_uninformative(tmp_path):
    make_run(tmp_path, "cls_teacher", "classification", 0.19)
    make_run(tmp_path, "ali_teacher", "alignment", 0.31)
    make_run(tmp_path, "ver_teacher", "verification", 0.16)
    page = write(tmp_path)
    assert "classification top-1 is uninformative" in page
    assert "alignment NRMSE is uninformative" in page
    assert "verification NN top-1 is uninformative" not in page
    assert rows_of(page)["teacher"][0] == "19.0 | does not beat the floor"


def test_an_unfinished_run_is_shown_with_its_curves(tmp_path):
    make_run(tmp_path, "cls_teacher", "classification", 0.9)
    make_run(tmp_path, "cls_student", "classification", 0.6, finished=False)
    rows = rows_of(write(tmp_path))
    assert rows["scratch student"][0] == "not finished"
    assert rows["scratch student "][4:] == ["36.0 → 60.0", "", "not finished", ""]


def test_a_planned_stage_is_shown_as_not_run(tmp_path):
    run = make_run(tmp_path, "cls_teacher", "classification", 0.9)
    (tmp_path / "recipes").mkdir()
    for name in ("cls_teacher", "cls_student"):
        text = (run / "config.yaml").read_text()
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text)
    page = write(tmp_path)
    assert rows_of(page)["scratch student"][0] == "not run"
    assert rows_of(page)["teacher"][0] == "90.0"
    assert "in 1 of 2 runs" in page
    assert page.count("<dt>images</dt>") == 1  # of the run with known images


def test_a_journal_cut_off_in_a_line_or_holding_null_is_read(tmp_path):
    run = make_run(tmp_path, "cls_teacher", "classification", 0.9, finished=False)
    with open(run / "metrics.jsonl", "a") as journal:
        journal.write('{"kind": "train", "step": 60, "phase": 1, "epoch": 1, "hard": null}\n')
        journal.write('{"kind": "train", "st')
    assert "not finished" in write(tmp_path)


def test_a_run_without_a_journal_is_shown_as_not_run(tmp_path):
    run = make_run(tmp_path, "cls_teacher", "classification", 0.9, finished=False)
    (run / "metrics.jsonl").unlink()
    assert rows_of(write(tmp_path))["teacher"][0] == "not run"


def test_a_run_outside_the_chain_has_its_own_row(tmp_path):
    make_run(tmp_path, "arm_3", "classification", 0.55)
    assert rows_of(write(tmp_path))["arm_3"][0] == "55.0"


def make_systems(root: Path, **values: float) -> Path:
    """Stages of a preset without a chain: two teachers, each with a student."""
    named = {"soft": "@teacher", "sh_kd": str(root / "sh_teacher")}
    for name, value in values.items():
        more: dict[str, object] = {}
        if name in named:
            teacher, target = TeacherConfig(run=named[name]), TargetConfig(alpha=1.0)
            more = {"teacher": teacher, "target": target}
        make_run(root, name, "classification", value, **more)
    return root


def test_stages_outside_the_chain_have_rows_and_numbers_of_their_own(tmp_path):
    values = {"teacher": 0.9, "student": 0.5, "soft": 0.6, "sh_teacher": 0.8, "sh_kd": 0.7}
    page = write(make_systems(tmp_path, **values, control=0.55, my_student=0.4))
    results = rows_of(page.split("<h2>Classification<")[0])
    for name, value in {**values, "control": 0.55, "my_student": 0.4}.items():
        assert results[name] == [f"{100 * value:.1f}"]
    assert results[""] == ["classification top-1 | %, higher is better"]
    assert results["floor (no training)"] == ["20.0"]
    assert len(results) == 10  # seven stages, header, floor and the untrained network
    assert "mean landmarks" not in page
    assert "uninformative" not in page


def test_a_stage_named_teacher_does_not_replace_the_chains(tmp_path):
    make_run(tmp_path, "cls_teacher", "classification", 0.9)
    make_run(tmp_path, "teacher", "classification", 0.8)
    page = write(tmp_path).split("<h2>Classification<")[0]
    assert re.findall(r'scope="row">teacher<.*?<td>([\d.]+)', page) == ["90.0", "80.0"]


def test_a_poor_teacher_is_found_by_the_config_of_its_students(tmp_path):
    values = {"student": 0.1, "soft": 0.5, "sh_kd": 0.6}
    page = write(make_systems(tmp_path / "one", **values, teacher=0.9, sh_teacher=0.1))
    doubt = "classification top-1 of sh_kd is uninformative:</strong> the teacher sh_teacher does"
    assert page.count(doubt) == page.count("uninformative") == 1
    page = write(make_systems(tmp_path / "both", **values, teacher=0.15, sh_teacher=0.1))
    assert "top-1 of soft is uninformative:</strong> the teacher teacher does not" in page
    assert page.count("uninformative") == 2
    page = write(make_systems(tmp_path / "none", student=0.5, teacher=0.1))
    assert "uninformative" not in page  # no student here names it


def test_a_single_run_directory_has_a_page(tmp_path):
    run = make_run(tmp_path, "mine", "verification", 0.5)
    rows = rows_of(write(run))
    assert rows["mine"] == ["50.0", "80.0 | ± 2.0 over folds"]
    assert rows["floor (no training)"] == ["15.0", "60.0"]


def test_a_directory_without_runs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no run directory \(config\.yaml\) in"):
        report(tmp_path)


NAMES = {
    "<script>alert('x')<b>": "&lt;script&gt;alert(&#39;x&#39;)&lt;b&gt;",
    "<title><img src=x onerror=y>": "&lt;title&gt;&lt;img src=x onerror=y&gt;",
    "escape \x1b[31m \x07": r"escape \x1b[31m \x07",
    "turned \u202eeman": r"turned \u202eeman",
    "not UTF-8 \udcff": r"not UTF-8 \udcff",
    "Müller 王小明 👩": "Müller 王小明 👩",
    "a$x^$b {{ title }} [red]": "a$x^$b {{ title }} [red]",
    "_first": "_first",
}
"""Names of runs, and their text in a page."""


@pytest.fixture(scope="module")
def odd_runs(tmp_path_factory) -> Path:
    """Runs whose names are markup, control characters, other scripts and mathematics."""
    root = tmp_path_factory.mktemp("odd") / "<i>\x1b root"
    for number, name in enumerate(NAMES):
        make_run(
            root,
            name,
            "classification",
            0.5 + 0.01 * number,
            init_from=f"@{name}",
            teacher=TeacherConfig(run=f"../{name}"),
            target=TargetConfig(alpha=1.0),
        )
    return root


def test_names_of_runs_are_shown_as_they_are_and_never_as_markup(odd_runs):
    page = write(odd_runs, command="train '<x>' \x1b")
    for written in NAMES.values():
        assert f'<th scope="row">{written}<small>' in page  # results
        assert re.search(
            rf'<th scope="row">{re.escape(written)}</th><td>classification</td>'
            rf"<td>{re.escape(written)}</td><td>softmax \+ soft",
            page,
        )  # runs
        assert f"</span>{written}</li>" in page  # legend
        assert f"<th>{written}</th>" in page  # every metric
        assert f"<h4>{written}: 9 of 12 right</h4>" in page  # neighbours
    assert r"<title>&lt;i&gt;\x1b root: distillation report</title>" in page
    assert r"<code>train &#39;&lt;x&gt;&#39; \x1b</code>" in page
    assert not re.search(r"<script|<img src=x|<i>|[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)


def test_the_result_table_of_a_terminal_shows_the_same_names(odd_runs):
    table = result_table(odd_runs, dict.fromkeys(NAMES, "done"))
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    shown = stream.getvalue()
    for written in map(html.unescape, NAMES.values()):
        assert re.search(rf"^ {re.escape(written)} +5\d\.0 *$", shown, re.MULTILINE)


def test_figures_of_tables_draw_names_in_any_script():
    shown = list(map(plots.drawable, NAMES))
    assert shown[2:6] == [
        *(r"escape \x1b[31m \x07", r"turned \u202eeman", r"not UTF-8 \udcff"),
        r"Müller \u738b\u5c0f\u660e \U0001f469",
    ]
    assert shown[6] == r"a\$x^\$b {{ title }} [red]"  # \$ is drawn as $


def test_the_command_prints_a_path_without_control_characters(monkeypatch, capsys):
    monkeypatch.setattr("kdtrain.reports.report.report", lambda root: root / "report.html")
    assert commands.report(["runs/\x1b[31m \udcff"]) == 0
    assert capsys.readouterr().out == "runs/\\x1b[31m \\udcff/report.html\n"
