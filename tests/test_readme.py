"""README and docs: the code blocks run, the commands and files they name exist."""

import re
import shlex

import pytest
import torch
from conftest import ROOT
from tiny_runs import tiny_config, train
from torch.nn import functional as F

import kdkernels

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md"]  # of the past


def test_before_and_after_in_the_readme_have_the_same_gradients():
    before, after = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    values = {
        "x": torch.randn(16, 8, requires_grad=True),
        "weight": torch.randn(40, 8, requires_grad=True),
        "label": torch.randint(40, (16,)),
        "x_teacher": torch.randn(16, 12),
        "weight_teacher": torch.randn(40, 12),
        "F": F,
        "torch": torch,
        "kd": kdkernels,
    }
    leaves = (values["x"], values["weight"])
    exec(compile(before, "README.md", "exec"), values)
    want = torch.autograd.grad(values["loss"], leaves)
    exec(compile(after, "README.md", "exec"), values)
    for leaf, gradient in zip(leaves, want, strict=True):
        # logits of 64 in float32: both sides round them by 64 * 2^-24 before the exponential
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-3, atol=1e-5)
    assert max(before.count("\n"), after.count("\n")) <= 6


@pytest.mark.parametrize(
    "call",
    [
        "kd_cross_entropy(s, t, y, temperature=T, alpha=1, tau_squared=True)",
        'BatchTripletLoss(margin=m, mining="hard", squared=False)',
        "linear_kd_cross_entropy(x, weight, y, normalize=True, scale=64, margin=ArcFace(0.5))",
        "sample_classes(y, C, 0.1)",
        "CombinedMargin(m2, m3)",
    ],
)
def test_calls_of_the_readmes_table_run(call):
    assert f"`{call}`" in README or f"={call}" in README
    values = {"s": torch.randn(4, 40), "t": torch.randn(4, 40), "y": torch.arange(4), "T": 3.0}
    values |= {"x": torch.randn(4, 8), "weight": torch.randn(40, 8), "C": 40}
    eval(call, {**vars(kdkernels), **values, "m": 0.2, "m2": 0.5, "m3": 0.0})


def test_the_readme_fits_150_lines():
    assert README.count("\n") <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_command_of_a_page_exists(page):
    from kdtrain.cli import COMMANDS

    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text):
        target = "".join(link)
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        other = (page.parent / anchor[0] if anchor[0] else page).read_text()
        titles = re.findall(r"^#+ (.*)$", other, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
        assert anchor[1] in slugs, anchor
    named = re.findall(r"python -m kdtrain ([a-z][\w-]*)", text)
    assert set(named) <= set(COMMANDS) | {"help"}, set(named) - set(COMMANDS)


def test_the_tutorial_s_student_embeds_and_exports(tmp_path, capsys):
    config = tiny_config(optim__phases=[{"epochs": 1, "lr": 0.01}])
    train(config, tmp_path / "run")
    text = (ROOT / "docs/training.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    block = block.replace("runs/demo/ver_distilled", str(tmp_path / "run"))
    values = {}
    exec(compile(block.replace("32, 32", "16, 16"), "training.md", "exec"), values)
    assert -1 <= float(capsys.readouterr().out.split()[-1]) <= 1
    exported = torch.export.export(values["network"], (values["images"],)).module()
    with torch.no_grad():
        want, got = values["network"](values["images"]), exported(values["images"])
    torch.testing.assert_close(got.hidden, want.hidden)


def commands_of(page):
    """The `python -m kdtrain` lines of a page's indented blocks, continuation lines joined."""
    text = re.sub(r"\\\n\s+", "", page.read_text())
    return re.findall(r"^ {4}(?:  )?python -m kdtrain (.*)$", text, re.MULTILINE)


def test_every_option_in_a_command_of_a_page_is_one_that_exists():
    from kdtrain.config.settings import keys

    known = {f"--{name}" for name in keys()}
    for page in PAGES:
        for line in commands_of(page):
            if "RECIPE" in line or "[" in line.split("'")[0]:
                continue  # a form of command, not a command
            for word in shlex.split(line, comments=True):
                if re.match(r"--[a-z_]+\.[a-z_]+$", word):
                    assert re.sub(r"^--(second|alignment|ali_teacher)\.", "--", word) in known, (
                        page.name,
                        line,
                    )
