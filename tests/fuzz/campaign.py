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
    """The answers of all cases: seed, message, fault. A case that ends its process has that as its fault."""
    answers: list[dict[str, Any]] = []
    deaths = 0
    while len(answers) < count and deaths < MOST_DEATHS:
        seed = first + len(answers)
        command = [
            sys.executable,
            "-m",
            "cascade_nodes.tests.fuzz.worker",
            kind,
            str(seed),
            "--count",
            str(count - len(answers)),
        ]
        done = subprocess.run(command, capture_output=True, env=os.environ | ENVIRONMENT, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        answers += [line for line in lines if "seed" in line]
        if len(answers) < count:
            deaths += 1
            end = " | ".join(done.stderr.decode(errors="replace").splitlines()[-25:])
            fault = f"the process ended with {done.returncode}: {end}"
            answers.append({"seed": first + len(answers), "message": None, "fault": fault, "seconds": 0.0})
    return answers


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
