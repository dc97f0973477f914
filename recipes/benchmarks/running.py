"""What benchmarks share: arguments, a process of their own, JSON file, tables of the README."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
README = HERE / "README.md"

Result = dict[str, Any]


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / f"{name}.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="renew the table, measure nothing")
    return parser


def run(
    arguments: argparse.Namespace,
    measure: Callable[[], Result],
    tables: Mapping[str, Callable[[Result], str]],
) -> None:
    """Measures and writes the JSON file, unless --table is given; then renews the tables.

    Args:
        arguments: The arguments of `make_parser`.
        measure: Returns what the file holds.
        tables: Name of a table in the README -> its text.
    """
    torch.set_num_threads(arguments.threads)
    if not arguments.table:
        arguments.out.write_text(json.dumps(measure(), indent=1) + "\n")
    result = json.loads(arguments.out.read_text())
    for name, table in tables.items():
        write_table(name, table(result))


def alone(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Calls a function in a fresh process with as many threads, so that no peak is another's."""
    with ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    ) as pool:
        return pool.submit(function, *arguments).result()


def machine(made: Result) -> str:
    """Where and when figures were made, for the end of a table."""
    return (
        f"{made['processor']}, {made['threads']} threads, torch {made['torch']}, "
        f"commit {made['commit']}, {made['date'][:10]}"
    )


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
