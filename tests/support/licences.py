"""The licences of all that the package installs, by extra; exit code 1 on one that is not allowed.

python tests/support/licences.py
"""

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What obliges a program that imports it; the Lesser and the Mozilla licence do not.
REFUSED = re.compile(r"\b(A?GPL|Affero|(?<!Lesser )General Public)", re.IGNORECASE)
NOT_SHIPPED = ("dev", "test")  # tools of this repository


def licence_of(name):
    """What a distribution says of its licence, in a line."""
    found = metadata.metadata(name)
    classified = [
        entry.rpartition(" :: ")[2]
        for entry in found.get_all("Classifier", [])
        if entry.startswith("License :: ")
    ]
    said = found.get("License-Expression") or "; ".join(classified) or found.get("License", "")
    return " ".join((said or "not stated").split())[:80]


def installed(requirements, seen):
    """The distributions behind requirements and all that these need, where they are installed."""
    for requirement in requirements:
        name = re.split(r"[\s\[<>=!~;(]", requirement.strip(), maxsplit=1)[0]
        if not name or name.lower() in seen or "extra ==" in requirement:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen[name.lower()] = licence_of(name)
        installed(needed, seen)
    return seen


def main():
    """Prints a table; returns the distributions whose licence is refused."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    groups = {"(always)": parser["options"]["install_requires"]}
    groups |= {n: t for n, t in parser["options.extras_require"].items() if n not in NOT_SHIPPED}
    refused = []
    for group, text in groups.items():
        print(f"\n{group}")
        found = installed([line for line in text.splitlines() if line.strip()], {})
        for name, licence in sorted(found.items()):
            print(f"  {name:28} {licence}")
            if REFUSED.search(licence) and "Lesser" not in licence and "LGPL" not in licence:
                refused.append(f"{name}: {licence}")
    print("\n" + ("refused: " + "; ".join(refused) if refused else "no GPL"))
    return refused


if __name__ == "__main__":
    sys.exit(bool(main()))
