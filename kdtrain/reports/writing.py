"""Numbers as text, and pages from templates, with every value printable and escaped."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from kdtrain.config.program import printable
from kdtrain.training.journal.journal import unit

if TYPE_CHECKING:
    from jinja2 import Environment

DASH = "\N{EN DASH}"
LOWER_IS_BETTER = ("nrmse", "nme", "failure_rate", "cross_entropy", "hint")
FORMATS = {"nats": ".3f", "squared error": ".4f", "count": ",.0f"}


def decimal(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """'93.1' of 93.08, '+93.1' with the sign; a dash for none."""
    return DASH if value is None else f"{value:{'+' * sign}.{digits}f}"


def percent(value: float | None) -> str:
    """'93.1' of 0.931; a dash for none."""
    return decimal(None if value is None else 100 * value)


def brief(metric: str, value: float | None) -> str:
    """A metric without its unit: '93.1' of 0.931, '0.0123' of a squared error; a dash for none."""
    form = FORMATS.get(unit(metric))
    return percent(value) if value is None or form is None else f"{value:{form}}"


def full(metric: str, value: float | None) -> str:
    """`brief`, with '%' behind a fraction."""
    known = value is not None and unit(metric) == "fraction"
    return brief(metric, value) + " %" * known


def plotted(metric: str, value: float | None) -> float | None:
    """A metric as curves show it: a fraction in %."""
    return value if value is None or unit(metric) != "fraction" else 100 * value


def count(number: float) -> str:
    """'4.11 G' of 4.11e9."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def direction(lower: bool) -> str:
    """'lower is better' or 'higher is better'."""
    return f"{'lower' if lower else 'higher'} is better"


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.startswith(LOWER_IS_BETTER)


def render(template: str, **values: Any) -> str:
    """The page of a template in templates/."""
    return _templates().get_template(template).render(values)


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def load(name: str) -> str:
        text = resources.files("kdtrain.reports").joinpath("templates", name).read_text("utf-8")
        # an indented line of a template continues the line before it
        return re.sub(r"\n+ +", "", text) if name.endswith(".j2") else text

    def shown(value: object) -> str:
        return value if isinstance(value, Markup) else printable(str(value), lines=True)

    return Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
