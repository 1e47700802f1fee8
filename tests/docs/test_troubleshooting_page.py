"""docs/troubleshooting.md: every message that it explains is one of the code's."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_its_messages_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page.split("## Messages")[1], re.MULTILINE)
    rooms = ("cascade_core", "headless", "nodes")
    code = "\n".join(
        path.read_text(encoding="utf-8") for room in rooms for path in (ROOT / room).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences go on in the next line
    assert len(messages) > 5
    assert [message for message in messages if message not in code] == []
