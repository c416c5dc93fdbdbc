"""Faults put into the library one by one: which tests find each of them, those of the short suite or others.

    python -m pytest --all -n 2 --cov=fastpeft --cov-context=test --cov-report=    # leaves .coverage
    python -m pytest --collect-only -q > short.txt
    PYTHONPATH=tests python -m reliability.mutations .coverage short.txt bench/data/mutations.csv

A fault is one change of one expression or statement, drawn by a seed from all lines that run; three of ten are in what
a run consists of (training, methods, comparison, serving, the command line). Tests that reach the line run to the first
failure, those of the short suite first; a fault in a line that none reaches is found by none. Of lines that run once,
as a module is imported, and of Triton's kernels, which coverage does not see, it is the tests that reach the file. Rows
that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import coverage

OF_A_RUN = ("training", "methods", "comparison", "serving")  # and the modules of the command line, in no package
COLUMNS = ("fault", "file", "line", "change", "tests", "found_by", "test", "seconds")
SECONDS = 600  # and one a test: a fault that keeps the tests from ending is found, too
_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What can take the place of a node: of each kind of fault one."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        yield ast.Compare(node.left, [_COMPARED[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        yield ast.BinOp(node.left, _COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


class _Replace(ast.NodeTransformer):
    """Puts the n-th possible change into a tree."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        self.line, self.text = 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        for new in changes(node):
            self.count += 1
            if self.count - 1 == self.number:
                short = [ast.unparse(each).partition("\n")[0] for each in (node, new)]
                self.line, self.text = node.lineno, " -> ".join(short)  # type: ignore[attr-defined]
                return ast.copy_location(new, node)
        return self.generic_visit(node)


def faulty(source: str, number: int) -> tuple[str, int, str]:
    """`source` with a fault; its line and what it is."""
    change = _Replace(number)
    tree = ast.fix_missing_locations(change.visit(ast.parse(source)))
    return ast.unparse(tree), change.line, change.text


def count(source: str) -> int:
    """How many faults a file can have."""
    return sum(1 for node in ast.walk(ast.parse(source)) for _ in changes(node))


def lines_of(source: str, line: int) -> range:
    """The lines of the innermost statement that has a line, of a compound one those of its head."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [each for each in statements if each.lineno <= line <= (each.end_lineno or each.lineno)]
    if not around:  # a decorator
        return range(line, line + 1)
    innermost = max(around, key=lambda each: each.lineno)
    body = getattr(innermost, "body", None)
    end = body[0].lineno - 1 if body else innermost.end_lineno or line
    return range(innermost.lineno, max(end, line) + 1)


def reaching(contexts: dict[int, set[str]], lines: Iterable[int], *, hidden: bool) -> set[str]:
    """The tests that reach lines of a file, by their ids.

    Args:
        contexts: of each line of the file that ran, the tests in which it did; "" is outside of tests.
        lines: those of a statement.
        hidden: whether coverage does not see what runs there, as in a kernel of Triton.
    """
    found = set().union(*(contexts.get(line, set()) for line in lines))
    if hidden or found == {""}:
        found = set().union(*contexts.values())
    return {each.rpartition("|")[0] for each in found} - {""}


def draw(places: Iterable[tuple[Path, int]], faults: int, seed: int) -> list[tuple[Path, int]]:
    """So many places of faults, three of ten in what a run consists of."""
    of_run: dict[bool, list[tuple[Path, int]]] = {True: [], False: []}
    for file, number in places:
        of_run[len(file.parts) == 2 or file.parts[1] in OF_A_RUN].append((file, number))
    for each in of_run.values():
        random.Random(seed).shuffle(each)
    return [of_run[fault % 10 < 3].pop() for fault in range(faults)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coverage", type=Path)
    parser.add_argument("short", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="which of several processes this is, each in a tree of its own")
    arguments = parser.parse_args()
    data = coverage.CoverageData(str(arguments.coverage))
    data.read()
    measured = {"fastpeft/" + file.rpartition("/fastpeft/")[2]: file for file in data.measured_files()}
    short = {line.strip() for line in arguments.short.read_text().splitlines() if "::" in line}
    files = sorted(Path("fastpeft").rglob("*.py"))
    places = ((file, number) for file in files for number in range(count(file.read_text())))
    part, parts = map(int, arguments.part.split("/"))
    done = set()
    if arguments.table.exists():
        with arguments.table.open(newline="") as stream:
            done = {int(row["fault"]) for row in csv.DictReader(stream)}
    for drawn, (file, number) in enumerate(draw(places, arguments.faults, arguments.seed), 1):
        if drawn in done or drawn % parts != part:
            continue
        source = file.read_text()
        text, line, change = faulty(source, number)
        contexts = {each: set(tests) for each, tests in data.contexts_by_lineno(measured.get(str(file), "")).items()}
        tests = reaching(contexts, lines_of(source, line), hidden=file.parent.name == "kernels")
        ordered = sorted(tests, key=lambda test: (test not in short, test))
        begin = time.perf_counter()
        try:
            file.write_text(text)
            by, test = _run(ordered, short)
        finally:
            file.write_text(source)
        row = [drawn, file, line, change, len(tests), by, test, round(time.perf_counter() - begin)]
        new = not arguments.table.exists()
        with arguments.table.open("a", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([COLUMNS, row] if new else [row])


def _run(tests: list[str], short: set[str]) -> tuple[str, str]:
    """Which suite finds a fault, `short`, `long` or none, and by which test."""
    if not tests:
        return "none", ""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "-rfE", *tests], capture_output=True, text=True, timeout=SECONDS + len(tests), env={**os.environ}
        )
    except subprocess.TimeoutExpired:
        return "short", "it does not end"
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            test = line.split(" ", 1)[1].partition(" - ")[0]
            return ("long" if test in set(tests) - short else "short"), test
    if done.returncode == 0:
        return "none", ""
    if "while loading conftest" in done.stderr:
        return "short", "the tests cannot be loaded"
    raise SystemExit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
