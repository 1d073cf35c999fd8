"""What mkdocs needs to make a site of docs/: pages from outside it, and generated references.

README.md is the first page. A link from docs/ to another file of the repository, as GitHub shows
it, leads to a page that has the file, so that the site needs no network and no repository's URL.
"""

import dataclasses
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import fpocli
from fpocli.cli.commands import app

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# The address of a relative link, or of an image; a fragment may follow.
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)")
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".jsonl": "json"}
# Of every page, by its address in the site, the file that it shows.
SHOWN: dict[str, Path] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the references, README.md, and all files that are linked to."""
    for name, content in (("cli", cli_reference()), ("api", api_reference())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    waiting = [ROOT / "README.md", *DOCS.rglob("*.md")]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        address = site_address(path)
        SHOWN[address] = path
        if not path.is_relative_to(DOCS):
            # A picture is copied, everything else is shown as a page.
            picture = path.suffix in PICTURES
            source = {"abs_src_path": str(path)} if picture else {"content": text(path)}
            outside = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, address, inclusion=outside, **source))
        linked = {target(path, link) for link in LINK.findall(text(path))}
        linked = {one for one in linked if one and one not in seen}
        seen |= linked
        waiting += sorted(linked)
    return files


def on_page_markdown(markdown: str, page: Page, **settings: Any) -> str:
    """Let the links of the repository lead to the pages of the site."""
    here = page.file.src_uri

    def replace(match: re.Match) -> str:
        if found := target(SHOWN[here], match[0]):
            return posixpath.relpath(site_address(found), posixpath.dirname(here))
        return match[0]

    return LINK.sub(replace, markdown) if here in SHOWN else markdown


def target(path: Path, link: str) -> Path | None:
    """The file, or folder without a README.md, that a link in a file leads to, if it exists."""
    found = ((path if path.is_dir() else path.parent) / link).resolve()
    if (found / "README.md").is_file():
        found /= "README.md"
    return found if found.exists() and found.is_relative_to(ROOT) else None


def site_address(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    address = f"repository/{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{address}/index.md"
    return address if path.suffix in {".md", *PICTURES} else f"{address}.md"


def text(path: Path) -> str:
    """A file as Markdown."""
    name = path.relative_to(ROOT).as_posix()
    hidden = "---\nsearch: {exclude: true}\n---\n"
    if path.suffix in PICTURES:
        return ""
    if path.is_dir():
        entries = sorted(one.name for one in path.iterdir() if not one.name.startswith(("_", ".")))
        return f"{hidden}# {name}\n\n" + "\n".join(f"- [{one}]({one})" for one in entries)
    if path.suffix != ".md":
        language = LANGUAGES.get(path.suffix, "text")
        return f"{hidden}# {name}\n\n````{language}\n{path.read_text()}\n````\n"
    return path.read_text()


def cli_reference() -> str:
    """Every command with its flags, as --help prints them."""
    program = typer.main.get_command(app)
    return (
        "# Commands\n\nWhat `--help` prints, made from the same definitions. Flags of `fpo cache`, "
        "`fpo train` and `fpo eval` can also be set in a YAML file (`--config FILE`).\n\n"
        + "\n".join(command_reference(name, command) for name, command in commands(program))
    )


def commands(group: Any, above: str = "fpo") -> list[tuple[str, Any]]:
    """All commands under a group, with their full names."""
    found: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        full = f"{above} {name}"
        found += commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return found


def command_reference(name: str, command: Any) -> str:
    """One command: what it does, its flags by group, and examples."""
    context = command.make_context(name, [], resilient_parsing=True)
    parts = [f"## {name}", inspect.cleandoc(command.help)]
    if command.epilog:
        _, heading, *lines = command.epilog.splitlines()
        parts.append("\n".join([heading, "", *(f"  {line}" for line in lines)]))
    groups: dict[str, list[str]] = {}
    for flag in command.get_params(context):
        record = flag.get_help_record(context)
        if record and flag.name != "help":
            title = getattr(flag, "rich_help_panel", None)
            if flag.param_type_name == "argument":
                title = "Arguments"
            groups.setdefault(title or "Options", []).append(row([f"`{record[0]}`", record[1]]))
    for title, rows in groups.items():
        if len(groups) > 1:
            parts.append(f"### {title}")
        parts.append("\n".join([row(["flag", "what it does"]), row(["---", "---"]), *rows]))
    return "\n\n".join(parts) + "\n"


def row(cells: list[str]) -> str:
    """A line of a table."""
    # Not an HTML tag.
    escaped = [cell if cell[0] == "`" else cell.replace("<", "&lt;") for cell in cells]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in escaped) + " |"


def api_reference() -> str:
    """Every public name by its docstring, and the fields of the configs."""
    names = [name for name in fpocli.__all__ if not name.endswith("Config")]
    configs = [name for name in fpocli.__all__ if name.endswith("Config")]
    parts = [
        "# Python",
        inspect.cleandoc(fpocli.__doc__ or "").replace("\n    ", "\n\n    ", 1),
        "## Functions and classes",
        *(f"::: fpocli.{name}" for name in names),
        "## Settings",
        "Each is a frozen dataclass; its arguments are keywords. What a field does is in the table "
        "of [the command's flags](cli.md), under the same name with dashes.",
        *(config_reference(getattr(fpocli, name)) for name in configs),
    ]
    return "\n\n".join(parts)


def config_reference(config: type) -> str:
    """The fields of a config: name, type and default."""
    lines = [row(["field", "type", "default"]), row(["---", "---", "---"])]
    for field in dataclasses.fields(config):
        kind = getattr(field.type, "__origin__", field.type)
        kind = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else kind
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        kind = str(kind).replace("typing.", "")
        lines.append(row([f"`{field.name}`", f"`{kind}`", shown]))
    about = inspect.cleandoc(config.__doc__ or "")
    return "\n\n".join([f"### {config.__name__}", about, "\n".join(lines)])
