"""Compares training of two commits: `python tests/kdtrain/guard.py BASE [HEAD]`.

Trains tiny runs from both trees by the command line and compares, bitwise, the weights of last/ and
best/, items/*.npz, metrics.jsonl, and the numbers of results.json. Prints one line per case and
exits with 1 on any difference. HEAD is the working tree around this script unless a commit is
named. A commit is checked out in a temporary git worktree; its extension is copied from the working
tree where csrc/ is the same, else built. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]

# Cases are written in the old spelling. A tree whose `train --help-all` lists the new name gets the
# new one. Names that are not listed here are the same in both trees.
KEYS: dict[str, str] = {
    "data.people": "data.identities",
    "data.pictures": "data.images_per_identity",
    "triplet.people": "triplet.identities",
    "triplet.pictures": "triplet.images_per_identity",
}
"""Recipe keys: {"data.people": "data.identities"}."""
VALUES: dict[str, dict[str, str]] = {"teacher.cache_what": {"answers": "outputs"}}
"""Values of a key, by the key's old name: {"teacher.cache_what": {"answers": "outputs"}}."""
METRICS: dict[str, str] = {}
"""Names in metrics.jsonl, results.json and items/*.npz; renamed in both trees' files."""

RESULTS = ("steps", "parameters", "multiply_adds", "floors", "untrained", "metrics")
TRAINED = ("best", "last")
POLL_S = 0.02
RUN_LIMIT_S = 120

TINY: dict[str, Any] = {
    "data.people": 8,
    "data.pictures": 5,
    "data.test_fraction": 0.4,
    "data.store_size": 20,
    "data.input_size": 16,
    "data.noise": 0.0,
    "model.depth": 14,
    "model.width": 8,
    "model.stem": "small",
    "optim.batch_size": 4,
    "optim.phases": [{"epochs": 2, "lr": 0.05}, {"epochs": 1, "lr": 0.01}],
    "triplet.people": 3,
    "triplet.pictures": 2,
    "train.threads": 1,
    "train.log_every": 2,
    "train.save_every": 3,
}
ALIGNMENT = {"task": "alignment", "target.gamma": 0.0, "augment.crop": "jitter"}
VERIFICATION = {"task": "verification"}
SOFTMAX = {"task": "verification", "triplet.weight": 0.0}
STUDENT = {"model.divide": 2, "teacher.run": "@cls_teacher"}
COSINE = {"head.kind": "cosine", "head.scale": 16.0}
SCHEDULE = {
    "optim.schedule": "cosine",
    "optim.final_lr_fraction": 0.1,
    "optim.warmup_epochs": 0.5,
    "optim.accumulate": 2,
    "optim.clip_norm": 1.0,
    "optim.ema": 0.9,
    "optim.no_decay": "norm_and_bias",
}
FIXED_VIEWS = {"data.store_size": 16}  # the crop is the whole sample: two views of each sample
CACHE32 = {"teacher.cache": "float32"}
CACHE16 = {"teacher.cache": "float16"}
FOLDER = {
    "data.kind": "folder",
    "data.root": "FACES",  # replaced by the folder of generated PNG files
    "data.cache": "none",
    "data.workers": 2,
}
HELD_OUT = {"data.validation_fraction": 0.3, "train.early_stop": 1}
FACE_NETWORK = {
    "model.divide": 8,
    "model.embedding": 16,
    "optim.phases": [{"epochs": 1, "lr": 0.05}],
}
LONG = [{"epochs": 30, "lr": 0.01}]

CASES: dict[str, dict[str, Any]] = {
    "cls_teacher": {"seed": 1},
    "uninterrupted": {**STUDENT, **SCHEDULE, "target.alpha": 1.0, "optim.phases": LONG},
    "resumed": {**STUDENT, **SCHEDULE, "target.alpha": 1.0, "optim.phases": LONG},
    "cls_schedule": {"seed": 2, "model.width": 4, **SCHEDULE},
    "ali_teacher": {**ALIGNMENT, "optim.clip_norm": 1.0},
    "ver_teacher": {**VERIFICATION, **COSINE, "head.margin": "cosface"},
    "cls_targets": {
        **STUDENT,
        **CACHE32,
        "target.alpha": 1.0,
        "target.beta": 0.1,
        "target.logits": 0.01,
        "target.tau_squared": True,
        "target.label_smoothing": 0.1,
    },
    # reads the teacher outputs that cls_targets has cached
    "cls_cached": {**STUDENT, **CACHE32, "target.alpha": 0.5, "target.beta": 0.1,
                   "target.logits": 0.02, "optim.clip_norm": 1.0, "needs": "cls_targets"},
    "cls_relations": {
        **STUDENT,
        "data.store_size": 36,
        "data.crop_size": 32,
        "teacher.input_size": 32,
        "target.embedding_l2": 1.0,
        "target.embedding_cosine": 1.0,
        "target.rkd_distance": 1.0,
        "target.rkd_angle": 1.0,
        "target.attention": 10.0,
    },
    "cls_teacher_head": {
        **STUDENT,
        "target.teacher_head": 0.1,
        "target.teacher_head_temperature": 2.0,
        "head.streamed": True,
        "head.sample": 0.5,
    },
    "cls_hint": {**STUDENT, "target.gamma": 0.0, "target.hint": 0.1},
    "cls_two_teachers": {
        **STUDENT,
        "init_from": "@cls_hint",
        "teacher.more": ["@cls_schedule"],
        "teacher.weights": [2.0, 1.0],
        "target.alpha": 1.0,
        **CACHE16,
    },
    "cls_eager": {**STUDENT, "fused": False, "target.alpha": 1.0, "target.hidden_normalize": True,
                  "target.beta": 1.0, "target.hidden_reduction": "mean"},
    "cls_bfloat16": {**COSINE, "head.margin": "combined", "train.precision": "bfloat16"},
    "cls_folder": {**FOLDER, **HELD_OUT},
    "ali_targets": {
        **ALIGNMENT,
        "model.divide": 2,
        "teacher.run": "@ali_teacher",
        "target.beta": 0.1,
        "optim.clip_norm": 1.0,
        "eval.normalizer": "diagonal",
        **HELD_OUT,
    },
    "ver_hidden": {
        **VERIFICATION,
        **HELD_OUT,
        "init_from": "@ver_teacher",
        "head.kind": "cosine",
        "teacher.run": "@ver_teacher",
        "eval.gallery": "@ver_teacher",
        "data.split": "identity",
        "target.beta": 0.5,
        "target.gamma": 0.0,
        "triplet.mining": "hard",
        "triplet.reduction": "nonzero",
    },
    "ver_head_frozen": {**SOFTMAX, **COSINE, "head.margin": "cosface", "head.update": "none",
                        "head.run": "@ver_teacher"},
    "ver_head_adaptive": {
        **SOFTMAX,
        **COSINE,
        **FIXED_VIEWS,
        **CACHE16,
        "teacher.run": "@ver_teacher",
        "teacher.cache_what": "features",
        "head.run": "@ver_teacher",
        "head.update": "adaptive",
        "head.margin": "distillation",
    },
    "ver_folder": {**VERIFICATION, **FOLDER, "triplet.mining": "all", "triplet.squared": False,
                   "data.split": "identity"},
    "mobilefacenet": {**SOFTMAX, **COSINE, **FACE_NETWORK, "model.name": "mobilefacenet",
                      "head.margin": "adaface", "head.margin_grad": "straight_through"},
    "iresnet18": {**COSINE, **FACE_NETWORK, "model.name": "iresnet18", "head.margin": "arcface",
                  "head.sample": 0.5, "data.noise": 0.1},
}  # fmt: skip
INTERRUPTED = {"resumed": "uninterrupted"}
"""Cases that are stopped by SIGINT, resumed, killed, and resumed to the end: by the case without
interruption, whose files they must equal.
"""


@dataclasses.dataclass(frozen=True)
class Tree:
    """One checked-out state of the project, and the folder of its run directories."""

    name: str
    place: Path
    runs: Path
    help: str = ""
    """Text of `train --help-all`, or --help in older trees, without line breaks."""

    def key(self, old: str) -> str:
        """The tree's spelling of a recipe key."""
        new = KEYS.get(old, old)
        return new if self.knows(f"--{new}") else old

    def value(self, key: str, old: Any) -> Any:
        """The tree's spelling of a value."""
        new = VALUES.get(key, {}).get(old) if isinstance(old, str) else None
        # --key a|b, in older trees --key {a,b}
        choices = re.search(rf"--{re.escape(self.key(key))} \{{?(\w+(?:[|,]\w+)+)", self.help)
        known = re.split("[|,]", choices[1]) if choices else []
        return old if new is None or (known and new not in known) else new

    def knows(self, option: str) -> bool:
        """Whether `train` has an option."""
        return re.search(rf"(?<![\w.-]){re.escape(option)}(?![\w.])", self.help) is not None

    def start(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command of the tree's kdtrain; its output is appended to `log`."""
        known = {k: v for k, v in os.environ.items() if not k.startswith(("KDTRAIN_", "KDKERNELS"))}
        environment = {**known, "PYTHONPATH": str(self.place), "OMP_NUM_THREADS": "1"}
        with open(log, "ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "kdtrain", *words],
                cwd=self.runs,
                env=environment,
                stdout=out,
                stderr=out,
            )


class GuardError(RuntimeError):
    """A case or tree that cannot be compared; the message names it."""


def main() -> int:
    """Compare two trees; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="commit to compare with")
    parser.add_argument("head", metavar="HEAD", nargs="?", help="default: this working tree")
    parser.add_argument("--only", metavar="NAME", nargs="+", help=f"of {', '.join(CASES)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    options = parser.parse_args()
    cases = options.only or list(CASES)
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"--only: no case {unknown[0]!r}; known: {', '.join(CASES)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdtrain-guard-") as place, contextlib.ExitStack() as s:
        work = Path(place)
        faces = write_faces(work / "faces")
        trees = [
            s.enter_context(tree(name, commit, work))
            for name, commit in (("base", options.base), ("head", options.head))
        ]
        for one in trees:
            write_recipes(one, faces)
        differing = compare_all(trees, cases, options.jobs)
    seconds = time.monotonic() - started
    print(f"{len(cases) - differing} of {len(cases)} cases bitwise identical, {seconds:.0f} s")
    return 1 if differing else 0


@contextlib.contextmanager
def tree(name: str, commit: str | None, work: Path) -> Iterator[Tree]:
    """The working tree, or a commit checked out for as long as the context lasts."""
    runs = work / name / "runs"
    runs.mkdir(parents=True)
    if commit is None:
        yield known(Tree(name, ROOT, runs))
        return
    place = work / name / "tree"
    git("worktree", "add", "--detach", "--quiet", str(place), commit)
    try:
        add_extension(place, commit)
        yield known(Tree(name, place, runs))
    finally:
        git("worktree", "remove", "--force", str(place))


def git(*words: str, check: bool = True) -> int:
    """The exit status of a git command in the working tree."""
    status = subprocess.run(["git", *words], cwd=ROOT).returncode
    if status and check:
        raise GuardError(f"git {' '.join(words)}: exit status {status}")
    return status


def add_extension(place: Path, commit: str) -> None:
    """Copy the working tree's extension into a checked-out commit, or build it there."""
    built = list((ROOT / "kdkernels").glob("_native*"))
    if built and not git("diff", "--quiet", commit, "--", "csrc", "setup.py", check=False):
        for file in [*built, ROOT / "kdkernels" / "_build_info.py"]:
            shutil.copy(file, place / "kdkernels")
        return
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(words, cwd=place, check=True)


def known(one: Tree) -> Tree:
    """The tree with the options of its `train`."""
    for option in ("--help-all", "--help"):
        log = one.runs / f"{option}.log"
        if one.start("train", option, log=log).wait(RUN_LIMIT_S) == 0:
            return dataclasses.replace(one, help=" ".join(log.read_text().split()))
    raise GuardError(f"{one.name}: train --help fails: {last_line(log)}")


def write_faces(root: Path) -> Path:
    """A folder of six identities with five PNG files each: noise around a colour per identity."""
    random = np.random.default_rng(0)
    for identity in range(6):
        folder = root / f"identity_{identity}"
        folder.mkdir(parents=True)
        colour = random.integers(40, 216, 3)
        for number in range(5):
            noise = random.integers(-40, 40, (24, 20, 3))
            image = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{number}.png")
    return root


def write_recipes(one: Tree, faces: Path) -> None:
    """Write CASE.yaml for every case in the tree's spelling."""
    for name, own in CASES.items():
        recipe: dict[str, Any] = {}
        for key, given in {**TINY, **own}.items():
            if key == "needs":
                continue
            value = str(faces) if given == "FACES" else one.value(key, given)
            section, _, leaf = one.key(key).rpartition(".")
            (recipe.setdefault(section, {}) if section else recipe)[leaf] = value
        (one.runs / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def inputs_of(name: str) -> list[str]:
    """The cases whose runs a case reads."""
    found = [CASES[name]["needs"]] if "needs" in CASES[name] else []
    found += [INTERRUPTED[name]] if name in INTERRUPTED else []
    for value in CASES[name].values():
        named = value if isinstance(value, list) else [value]
        found += [v[1:] for v in named if isinstance(v, str) and v.startswith("@")]
    return list(dict.fromkeys(found))


def compare_all(trees: list[Tree], cases: list[str], jobs: int) -> int:
    """Train the cases and their inputs in both trees, print a line per case; how many differ."""
    order: list[str] = []  # every case after its inputs

    def place(name: str) -> None:
        for one in inputs_of(name):
            place(one)
        if name not in order:
            order.append(name)

    for name in cases:
        place(name)
    futures: dict[tuple[str, str], Future[str]] = {}
    differing = 0
    with ThreadPoolExecutor(jobs) as pool:
        for name in order:
            for one in trees:
                needs = [futures[one.name, i] for i in inputs_of(name)]
                # inputs stand earlier in the queue, so that waiting for them cannot block it
                futures[one.name, name] = pool.submit(trained, one, name, needs)
        for name in order:
            problems = [futures[one.name, name].result() for one in trees]
            if name not in cases:
                continue
            found = first_failure(trees, problems) or difference(*(t.runs / name for t in trees))
            differing += bool(found)
            print(f"{name}: {found or 'bitwise identical'}", flush=True)
    return differing


def first_failure(trees: list[Tree], problems: list[str]) -> str:
    """The errors of both trees' runs; "" where both were trained."""
    return "; ".join(f"{t.name}: {p}" for t, p in zip(trees, problems, strict=True) if p)


def trained(one: Tree, name: str, needs: list[Future[str]]) -> str:
    """Train a case in one tree; the error, or "" where it was trained."""
    if any(need.result() for need in needs):
        return "an input was not trained"
    log = one.runs / f"{name}.log"
    command = ["train", f"{name}.yaml", "--run-dir", name]
    if name in INTERRUPTED:
        for number, rows in ((signal.SIGINT, 8), (signal.SIGKILL, 40)):
            if problem := stopped(one.start(*command, log=log), one.runs / name, number, rows):
                return problem
            command = ["train", name, "--resume"]
    status = one.start(*command, log=log).wait(RUN_LIMIT_S)
    if status:
        return f"exit status {status}: {last_line(log)}"
    if name in INTERRUPTED and (found := difference(one.runs / INTERRUPTED[name], one.runs / name)):
        return f"differs from the run without interruption: {found}"
    return ""


def stopped(process: subprocess.Popen[bytes], run: Path, number: int, rows: int) -> str:
    """Send a signal as soon as metrics.jsonl has some rows; the error, or "" where it stopped."""
    journal = run / "metrics.jsonl"
    end = time.monotonic() + RUN_LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        if journal.exists() and journal.read_bytes().count(b"\n") >= rows:
            process.send_signal(number)
            process.wait(RUN_LIMIT_S)
            break
        time.sleep(POLL_S)
    process.kill()
    process.wait()
    wanted = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[signal.Signals(number)]
    if process.returncode != wanted or (run / "results.json").exists():
        return f"exit status {process.returncode} after {signal.Signals(number).name}"
    return ""


def last_line(log: Path) -> str:
    """The error in a log: its last line that names one, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1]


def difference(base: Path, head: Path) -> str:
    """The first difference between two runs, in the order in which they computed; "" for none."""
    results = [renamed(json.loads((run / "results.json").read_text())) for run in (base, head)]
    journals = [journal(run / "metrics.jsonl") for run in (base, head)]
    for name in ("parameters", "multiply_adds"):
        if found := unequal(results[0][name], results[1][name]):
            return f"results.json, {name}: {found}"
    for number, (ours, theirs) in enumerate(zip(*journals, strict=False), 1):
        if found := unequal(ours, theirs):
            return f"metrics.jsonl, line {number}, step {ours.get('step')}: {found}"
    if found := unequal(*map(len, journals)):
        return f"metrics.jsonl, lines: {found}"
    for folder, pattern, read in (
        ("items", "items/*.npz", arrays),
        *((name, f"{name}/*.safetensors", load_file) for name in TRAINED),
    ):
        files = [sorted(p.relative_to(run).as_posix() for p in run.glob(pattern))
                 for run in (base, head)]  # fmt: skip
        if files[0] != files[1] or not files[0]:
            return f"{folder}/ holds {', '.join(files[0])} | {', '.join(files[1])}"
        for name in files[0]:
            if found := unequal_arrays(read(base / name), read(head / name)):
                return f"{name}, {found}"
    for name in RESULTS:
        if found := unequal(results[0][name], results[1][name]):
            return f"results.json, {name}: {found}"
    return ""


def journal(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [renamed(json.loads(line)) for line in path.read_text().splitlines()]


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    with np.load(path) as content:
        return renamed(dict(content))


def renamed(value: Any) -> Any:
    """The value with every name of METRICS replaced by the new one."""
    if isinstance(value, dict):
        return {METRICS.get(key, key): renamed(one) for key, one in value.items()}
    return [renamed(one) for one in value] if isinstance(value, list) else value


def unequal(ours: Any, theirs: Any, where: str = "") -> str:
    """The first place where two JSON values differ, as 'NAME 1 | 2'; "" where they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if missing := sorted(ours.keys() ^ theirs.keys()):
            return f"{where}{missing[0]} is in one of them only"
        return next(filter(None, (unequal(ours[k], theirs[k], f"{k} ") for k in ours)), "")
    # by text, as nan is not equal to itself
    return "" if json.dumps(ours) == json.dumps(theirs) else f"{where}{ours} | {theirs}"


def unequal_arrays(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """The same for named arrays, compared bitwise."""
    if missing := sorted(ours.keys() ^ theirs.keys()):
        return f"{missing[0]} is in one of them only"
    for name, one in ours.items():
        other = theirs[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{name}: {one.dtype} {one.shape} | {other.dtype} {other.shape}"
        if one.tobytes() != other.tobytes():
            size = one.dtype.itemsize
            bits = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other)]
            places = (bits[0] != bits[1]).reshape(-1, size).any(axis=1)
            first = int(places.argmax())
            values = f"{one.reshape(-1)[first]} | {other.reshape(-1)[first]}"
            return f"{name}: {int(places.sum())} of {one.size} values differ, first {values}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
