"""The address of the project's repository: one setting, [tool.speedrun] in pyproject.toml. Whatever names the address takes it from here."""

import os
import re
import tomllib
from pathlib import Path

from speedrun.lab.errors import UserError, visible
from speedrun.lab.provenance import root

ADDRESS = re.compile(
    r"(https?://[^@/]+/|ssh://([^@:/]+@)?[^@/]+/|file://|[\w.-]+@[\w.-]+:)[^\s\"'\\]+"
)


def repository(settings: Path | None = None) -> str:
    """The address as `git clone` takes it; "" while nobody has set it. SPEEDRUN_REPOSITORY overrides the setting for one build.

    It is printed on pages, so an https address with a name or a password in it is refused, as is what is no address.
    """
    path = settings or root() / "pyproject.toml"
    tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    address = os.environ.get("SPEEDRUN_REPOSITORY", tools.get("speedrun", {}).get("repository", ""))
    if address and not (isinstance(address, str) and ADDRESS.fullmatch(address)):
        shown = re.sub(r"//[^@/]*@", "//…@", visible(address))
        what = f"the repository's address ({path.name}, or SPEEDRUN_REPOSITORY) is “{shown}”"
        raise UserError(
            what,
            "give it as git clone takes it, without a name or password: https://github.com/OWNER/NAME",
        )
    return address


def web_address(address: str) -> str:
    """The repository's page in a browser, made from its address; "" where that cannot be known."""
    found = re.fullmatch(
        r"(?:https?://|ssh://git@|git@)([\w.:-]+?)[/:]([^:]+?)(?:\.git)?/?", address
    )
    return f"https://{found[1]}/{found[2]}" if found else ""


def page_of(path: str, address: str) -> str:
    """Where a file of the repository, such as notebooks/13_muon.py, is read in a browser; "" if that cannot be known."""
    web = web_address(address)
    return f"{web}/blob/HEAD/{path}" if web else ""
