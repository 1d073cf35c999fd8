"""The style measures of a text."""

from fpocli.interpretation.style import STYLE, measure_style

TEXT = """\
# Title
Some **bold** and __more__ text, 2 * 3 * 4 - NASA's ISS! I said: A!!
#hashtag
- one
  * two
• three
12) four
3. five
3.5 is no item, nor is -this
1990. Neither a year-
```python
x = 2 ** 3  # HTTP_ERROR
```
"""


def test_measures():
    assert dict(zip(STYLE, measure_style(TEXT, 99), strict=True)) == {
        "tokens": 99,
        "headings": 1,
        "bold": 2,
        # A sentence that starts with a number and a dot looks like an item, too.
        "list items": 6,
        "code fences": 2,
        "words in capitals": 3,
        "exclamation marks": 3,
    }
    assert measure_style("", 1) == (1, 0, 0, 0, 0, 0, 0)
