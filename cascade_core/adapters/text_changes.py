"""An adapter's changes of the text encoder: checks that they fit, and names the tokens that they teach."""

from collections.abc import Sequence
from typing import Any

from ..errors import printable
from .adapter import Adapter
from .compatibility import check_finite_changes, check_fits
from .tokens import NewToken, name_in_prompt


def check_text_changes(adapter: Adapter, network: Any, new_tokens: Sequence[NewToken]) -> list[str]:
    """Checks an adapter's part for a text encoder; returns sentences about the tokens that it teaches.

    new_tokens: names for tokens that its file does not name. Raises CascadeError where a change does not fit.
    """
    check_fits(adapter, network, "text")
    check_finite_changes(adapter.text, adapter.name)
    size = len(network.get_input_embeddings().weight)
    numbers = sorted({t.index - size for t in adapter.tokens if t.index is not None and t.index >= size})
    unnamed = [number for number in numbers if number >= len(new_tokens)]
    names = [token.name for token in adapter.tokens if token.index is None]
    names += [new_tokens[number].name for number in numbers if number < len(new_tokens)]
    notes = []
    if names:
        written = ", ".join(printable(name_in_prompt(name)) for name in dict.fromkeys(names))
        notes.append(f"Write {written} in the prompt.")
    if unnamed:
        notes.append(
            f"{adapter.name} teaches {len(unnamed)} new tokens that it does not name, and they are left out; give "
            "their names in new_tokens."
        )
    return notes
