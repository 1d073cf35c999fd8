"""fpo doctor: every check, printed as it is made, and all of them as a text for a bug report."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from fpocli.config import DoctorConfig
from fpocli.diagnosis import machine, network
from fpocli.diagnosis.check import Check
from fpocli.system.console import data_console, say
from fpocli.system.errors import UserError

_STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Check this machine, print what was found, and return it.

    Args:
        config: what to check beside this machine, and whether to print JSON.

    Returns:
        `checks`, each with name, verdict, found and advice; `report`, the text for a bug report.

    Raises:
        UserError: a check failed; all of them are printed before.
    """
    out, checks = data_console(), []
    # Each is printed at once, in case that a later one hangs or ends the process.
    for check in _checks(config):
        checks.append(check)
        if not config.json:
            _show(check, out)
    lines = [f"{check.verdict:6}  {check.name}: {check.found}" for check in checks]
    result = {"checks": [asdict(check) for check in checks], "report": "\n".join(lines)}
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        out.print(f"\nFor a bug report:\n\n```\n{result['report']}\n```")
    if failed := [check.name for check in checks if check.verdict == "failed"]:
        raise UserError(f"failed: {'; '.join(failed)}", "the advice is printed with each of them")
    return result


def _checks(config: DoctorConfig) -> Iterator[Check]:
    """All checks, whatever state the packages are in."""

    def self_test() -> Iterator[Check]:
        from fpocli.diagnosis.self_test import self_test

        say("testing the kernels; on a GPU they are compiled first")
        return self_test()

    sections: dict[str, Callable[[], Iterator[Check]]] = {
        "software": machine.software,
        "devices": machine.devices,
        "compilers": machine.compilers,
        "disk": machine.disk,
        "hub": network.hub,
        "bucket": lambda: network.bucket(config.bucket) if config.bucket else iter(()),
        "Ray": lambda: network.ray(config.ray) if config.ray else iter(()),
        "self-test": self_test,
    }
    for name, section in sections.items():
        try:
            yield from section()
        except Exception as error:  # such as that of a library that cannot be imported
            found = f"{type(error).__name__}: {error}"
            yield Check(name, "failed", found, "install again what the error names")


def _show(check: Check, out: Console) -> None:
    verdict = Text(f"{check.verdict:6}", style=_STYLES[check.verdict])
    out.print(Text.assemble(verdict, f"  {check.name}: {check.found}"))
    if check.advice:
        out.print(f"{'':6}  -> {check.advice}")
