"""What the README shows runs, and the files it names are there."""

import re

import torch
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_python_block_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})
    hard, divergence = map(float, capsys.readouterr().out.split())
    assert hard > 0
    assert divergence > 0


def test_every_relative_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_command_is_one_that_kdtrain_has():
    from kdtrain.cli import COMMANDS

    named = set(re.findall(r"python -m kdtrain ([\w-]+)", TEXT))
    assert named <= set(COMMANDS), named - set(COMMANDS)
    assert {"demo", "pipeline", "train", "data", "recipes", "report"} <= named
