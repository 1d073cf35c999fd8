"""Plain style of a response: its length and counts of what is easy to see in its text.

Chatbot Arena's style control has the first four ("Does style matter?", lmsys.org, 2024). All but
the first are counts, not shares of the length, since the length is a measure of its own.
"""

import re

STYLE = (
    "tokens", "headings", "bold", "list items", "code fences", "words in capitals",
    "exclamation marks",
)  # fmt: skip

_HEADING = re.compile(r"^ {0,3}#{1,6}\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
# A line that starts with -, * or •, or with a number and a dot or parenthesis.
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d{1,9}[.)])[ \t]", re.MULTILINE)
_CODE_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_WORD = re.compile(r"\w+")


def measure_style(text: str, tokens: int) -> tuple[int, ...]:
    """The measures of one response, in the order of `STYLE`.

    Args:
        text: decoded, without special tokens.
        tokens: n(y), its length.
    """
    return (
        tokens,
        len(_HEADING.findall(text)),
        len(_BOLD.findall(text)),
        len(_LIST_ITEM.findall(text)),
        len(_CODE_FENCE.findall(text)),
        # Of two characters or more, so that neither "I" nor "A" counts.
        sum(len(word) > 1 and word.isupper() for word in _WORD.findall(text)),
        text.count("!"),
    )
