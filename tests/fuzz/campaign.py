"""Many cases of a kind, in a process of their own that is begun anew after a case that ends it.

    python -m cascade_nodes.tests.fuzz.campaign graphs 0 1000

prints every seed that fails, grouped by what it ended in, and how many cases worked and were refused.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]  # kind, seed, message, fault, seconds
Tell = Callable[[Answer], None]
MOST_DEATHS = 20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
}


def run_cases(kind: str, first: int, count: int, tell: Tell = lambda answer: None) -> list[Answer]:
    """The answers of all cases. A case that ends its process has that as its fault, and the next begins another."""
    answers: list[Answer] = []
    for _ in range(MOST_DEATHS):
        answered, end = run_worker([f"{kind}:{count - len(answers)}"], first + len(answers), tell)
        answers += answered
        if len(answers) == count:
            break
        answers.append(
            {"kind": kind, "seed": first + len(answers), "message": None, "fault": end, "seconds": 0.0}
        )
        tell(answers[-1])
    return answers


def run_worker(kinds: list[str], first: int, tell: Tell = lambda answer: None) -> tuple[list[Answer], str]:
    """(the answers of the cases that were tried, what the process said at its end)"""
    command = [sys.executable, "-m", "cascade_nodes.tests.fuzz.worker", *kinds, str(first)]
    answers = []
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, env=os.environ | ENVIRONMENT
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "seed" in answer:
                answers.append(answer)
                tell(answer)
        process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    return answers, f"the process ended with {process.returncode}: {' | '.join(lines[-25:])}"


def tell_fault(answer: Answer) -> None:
    if answer["fault"]:
        print(f"{answer['seed']}: {answer['fault'][:2000]} {ascii(answer['message'])[:300]}", flush=True)  # noqa: T201


def failures(answers: list[Answer]) -> list[str]:
    return [
        f"{answer['kind']} {answer['seed']}: {answer['fault']} [{answer['message']}]"
        for answer in answers
        if answer["fault"]
    ]


def summary(answers: list[Answer]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        if answer["fault"]:
            groups[re.sub(r"[0-9]+|'[^']*'", "#", answer["fault"] + (answer["message"] or ""))[:200]].append(
                answer["seed"]
            )
    texts = {answer["seed"]: answer for answer in answers}
    lines = []
    for seeds in sorted(groups.values(), key=len, reverse=True):
        answer = texts[seeds[0]]
        lines.append(
            f"{len(seeds)} × {seeds[:8]}: {answer['fault'][:3000]}\n      {ascii(answer['message'])[:400]}"
        )
    works = sum(answer["message"] is None and answer["fault"] is None for answer in answers)
    bad = sum(answer["fault"] is not None for answer in answers)
    slow = sorted(answers, key=lambda answer: answer["seconds"], reverse=True)[:5]
    lines.append("slowest: " + ", ".join(f"{answer['seed']} ({answer['seconds']} s)" for answer in slow))
    return "\n".join(
        [
            *lines,
            f"{len(answers)} cases: {works} worked, {len(answers) - works - bad} were refused, {bad} failed",
        ]
    )


if __name__ == "__main__":
    print(summary(run_cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), tell_fault)))  # noqa: T201
