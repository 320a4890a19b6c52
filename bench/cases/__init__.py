"""All cases, and how the command line finds them."""

from bench.case import Case
from bench.cases import cpu, cuda, head

CASES: tuple[Case, ...] = (
    *cpu.CASES,
    *head.CPU_CASES,
    *cuda.CASES,
    *head.CUDA_CASES,
)


def cases_on(device: str) -> list[Case]:
    """The cases of a kind of device."""
    return [c for c in CASES if c.device == device]


def find_cases(ops: list[str], names: list[str], device: str = "cpu") -> list[Case]:
    """The cases of the named ops and names (all without any); ValueError for an unknown one."""
    cases = cases_on(device)
    known_ops = sorted({c.op for c in cases})
    known_names = sorted({c.name for c in cases})
    for given, known, what in ((ops, known_ops, "op"), (names, known_names, "case")):
        for name in given:
            if name not in known:
                raise ValueError(f"bench: no {what} {name!r}; there are {', '.join(known)}")
    return [c for c in cases if (not ops or c.op in ops) and (not names or c.name in names)]
