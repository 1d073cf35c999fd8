"""The commands of the documentation, block by block, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import typer

from fpocli.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
)
# What a block of commands begins with.
_FIRST = re.compile(
    r"(\$ )?(\.|cat|docker|fpo|git|head|hf|kubectl|make|pip|python3?|sh|sed|torchrun|vllm|\w+=\S+) "
)
_MARK = re.compile(r"<!-- (needs|run by): (.+) -->")


@dataclass
class Block:
    """Lines of code in a page.

    Args:
        page: relative to the repository.
        line: where it begins, from 1.
        language: of a fence; empty for an indented block.
        text: without indentation.
        needs: what the tests lack for it: a GPU, the hub, ...
        run_by: the test that runs it in place of test_docs.py.
    """

    page: str
    line: int
    language: str = ""
    text: str = ""
    needs: str = ""
    run_by: str = ""

    @property
    def is_commands(self) -> bool:
        """Whether it is to be typed in a shell."""
        return self.language in ("", "sh") and bool(_FIRST.match(self.text))

    @property
    def is_python(self) -> bool:
        """Whether it is a program."""
        return self.language == "python"

    @property
    def commands(self) -> list[str]:
        """Of a shell, one by one, without comments; a here-document belongs to its command."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found: list[str] = []
        end = ""
        for line in lines:
            if end:
                found[-1] += f"\n{line}"
                end = "" if line == end else end
            elif shlex.split(line.removeprefix("$ "), comments=True):
                found.append(line.removeprefix("$ "))
                end = "".join(re.findall(r"<<'(\w+)'", line))
        return found


def blocks(page: Path) -> Iterator[Block]:
    """All code of a page, in its order."""
    mark: dict[str, str] = {}
    state = _State(str(page.relative_to(ROOT)))
    for number, line in enumerate([*page.read_text().splitlines(), "end"], 1):
        if done := state.read(number, line):
            for name, value in mark.items():
                setattr(done, name, value)
            mark = {}
            yield done
        if not state.inside and (found := _MARK.match(line)):
            mark = {found[1].replace(" ", "_"): found[2]}
    assert not mark, f"{page}: {mark} marks no code"


def parse(words: list[str]) -> None:
    """Have the command line take the words after `fpo`, without running anything."""
    command, name = typer.main.get_command(app), "fpo"
    if words[0].startswith("--"):
        assert words[0] in {option for flag in command.params for option in flag.opts}
        return
    context = command.make_context(name, words.copy())
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, words.copy(), parent=context)


@dataclass
class _State:
    page: str
    inside: Block | None = None
    fence: str = ""
    blank: bool = True
    lines: list[str] = field(default_factory=list)

    def read(self, number: int, line: str) -> Block | None:
        """The next line of the page; a block that it ends."""
        done = None
        if self.inside and not self.fence and line.strip() and not line.startswith("    "):
            done = self._end()
        opening = re.match(r"(`{3,})(\w*)", line)
        if self.inside and self.fence:
            if line.startswith(self.fence):
                done = self._end()
            else:
                self.lines.append(line)
        elif opening:
            self.inside, self.fence = Block(self.page, number, opening[2]), opening[1]
        elif self.inside or (self.blank and line.startswith("    ")):
            self.inside = self.inside or Block(self.page, number)
            self.lines.append(line[4:])
        self.blank = not line.strip()
        return done

    def _end(self) -> Block:
        done = self.inside
        assert done is not None
        done.text = "\n".join(self.lines).rstrip() + "\n"
        self.inside, self.fence, self.lines = None, "", []
        return done
