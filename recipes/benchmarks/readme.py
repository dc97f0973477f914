"""The generated tables of this folder's README.md, each between two comments that name it."""

import re
from pathlib import Path

README = Path(__file__).with_name("README.md")


def write_table(name: str, table: str) -> None:
    """Prints a table and replaces it in the README.

    Raises:
        ValueError: If the README has no place for it.
    """
    print(table)
    text = README.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{README.name} has no place for the table {name!r}; add its two comments")
    new = place.sub(lambda found: f"{found[1]}\n{table.strip()}\n\n{found[2]}", text)
    README.write_text(new, encoding="utf-8")
