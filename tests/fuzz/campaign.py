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
from collections import defaultdict
from typing import Any

MOST_DEATHS = 20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
}


def run_cases(kind: str, first: int, count: int) -> list[dict[str, Any]]:
    """The answers of all cases. A case that ends its process has that as its fault, and the next begins another."""
    answers: list[dict[str, Any]] = []
    for _ in range(MOST_DEATHS):
        answered, end = run_worker([f"{kind}:{count - len(answers)}"], first + len(answers))
        answers += answered
        if len(answers) == count:
            break
        answers.append(
            {"kind": kind, "seed": first + len(answers), "message": None, "fault": end, "seconds": 0.0}
        )
    return answers


def run_worker(kinds: list[str], first: int) -> tuple[list[dict[str, Any]], str]:
    """(the answers of the cases that were tried, what the process said at its end)"""
    command = [sys.executable, "-m", "cascade_nodes.tests.fuzz.worker", *kinds, str(first)]
    done = subprocess.run(command, capture_output=True, env=os.environ | ENVIRONMENT, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    said = " | ".join(done.stderr.decode(errors="replace").splitlines()[-25:])
    return [line for line in lines if "seed" in line], f"the process ended with {done.returncode}: {said}"


def failures(answers: list[dict[str, Any]]) -> list[str]:
    return [
        f"{answer['seed']}: {answer['fault']} [{answer['message']}]" for answer in answers if answer["fault"]
    ]


def summary(answers: list[dict[str, Any]]) -> str:
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
    print(summary(run_cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201
