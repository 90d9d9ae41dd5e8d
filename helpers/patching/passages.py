"""Finding a passage in Python source by what it is, and changing the text at just that place.

A passage is found in the syntax tree, so line numbers, comments and white space do not matter; it is changed in the
text, so everything outside it stays byte for byte, line endings included.
"""

import ast
import re
from functools import lru_cache


class NotNeededError(Exception):
    """The file has nothing for a patch to change; the message says why."""


class MisfitError(Exception):
    """A passage should be there and is not one that a patch knows; the message shows what was found instead."""


# Nobody changes a tree, and the patches read the same text one after the other.
_parse = lru_cache(maxsize=16)(ast.parse)


class Source:
    """Python source with its syntax tree. Changes return a new Source."""

    def __init__(self, text: str):
        """Raises MisfitError where the text is not Python."""
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.newline = "\r\n" if text.count("\r\n") * 2 > len(self.lines) else "\n"
        try:
            self.tree = _parse(text)
        except (SyntaxError, ValueError) as error:
            raise MisfitError(f"it is not valid Python ({error})") from None

    def function(self, *path: str) -> ast.FunctionDef | None:
        """A function or class by its names from the outside in, e.g. ("QWenAttention", "_attn")."""
        node = self.tree
        for name in path:
            kinds = (ast.FunctionDef, ast.ClassDef)
            node = next((n for n in node.body if isinstance(n, kinds) and n.name == name), None)
            if node is None:
                return None
        return node

    def required(self, *path: str) -> ast.FunctionDef:
        """As `function`. Raises MisfitError where there is none."""
        node = self.function(*path)
        if node is None:
            raise MisfitError(f"there is no {'.'.join(path)} in it")
        return node

    def lines_of(self, first: ast.stmt, last: ast.stmt) -> list[str]:
        """The lines of the statements from `first` to `last`, without the indentation of `first`."""
        lines = [line.rstrip("\r\n") for line in self.lines[first.lineno - 1 : last.end_lineno]]
        # A comment may stand further left than the code around it.
        return [line.lstrip() if line[: first.col_offset].strip() else line[first.col_offset :] for line in lines]

    def replace(self, first: ast.stmt, last: ast.stmt, lines: list[str]) -> "Source":
        """Put lines, indented as `first` is, in the place of the statements from `first` to `last`."""
        self._own_lines(first, last)
        indent = " " * first.col_offset
        new = [f"{indent}{line}{self.newline}" if line else self.newline for line in lines]
        return Source("".join(self.lines[: first.lineno - 1] + new + self.lines[last.end_lineno :]))

    def insert_before(self, statement: ast.stmt, lines: list[str]) -> "Source":
        """Put lines, indented as the statement is, before it."""
        indent = " " * statement.col_offset
        new = [f"{indent}{line}{self.newline}" for line in lines]
        at = statement.lineno - 1
        return Source("".join(self.lines[:at] + new + self.lines[at:]))

    def comment_out(self, first: ast.stmt, last: ast.stmt, then: tuple[str, ...] = ()) -> "Source":
        """Turn the statements from `first` to `last` into comments, as the documentation shows it; add lines after."""
        return self.replace(first, last, [*(f"# {line}".rstrip() for line in self.lines_of(first, last)), *then])

    def replace_expression(self, node: ast.expr, text: str) -> "Source":
        """Put other text in the place of an expression."""
        rows = [line.encode() for line in self.lines]  # the tree counts columns in bytes
        head = b"".join(rows[: node.lineno - 1]) + rows[node.lineno - 1][: node.col_offset]
        tail = rows[node.end_lineno - 1][node.end_col_offset :] + b"".join(rows[node.end_lineno :])
        return Source((head + text.encode() + tail).decode())

    def excerpt(self, first: ast.AST, last: ast.AST | None = None) -> str:
        """The passage as a reader finds it: where it is and its first lines, for a message."""
        last = last or first
        lines = [line.rstrip() for line in self.lines[first.lineno - 1 : last.end_lineno]]
        shown = "\n".join(f"    {line}" for line in lines[:12])
        return f"line {first.lineno}:\n{shown}" + ("\n    …" if len(lines) > 12 else "")

    def _own_lines(self, first: ast.stmt, last: ast.stmt) -> None:
        before = self.lines[first.lineno - 1].encode()[: first.col_offset]
        after = self.lines[last.end_lineno - 1].encode()[last.end_col_offset :].strip()
        if before.strip() or (after and not after.startswith(b"#")):
            raise MisfitError(f"the passage shares a line with another statement, {self.excerpt(first, last)}")


def is_code(node: ast.AST, pattern: str) -> bool:
    """Whether a node is this code: `pattern` is a regular expression over its text in normal form."""
    return re.fullmatch(pattern, ast.unparse(node), re.DOTALL) is not None


def names(*nodes: ast.AST) -> set[str]:
    """Every name and attribute (as `self.bias`) that is mentioned in the nodes."""
    found = set()
    for node in nodes:
        for n in ast.walk(node):
            if isinstance(n, ast.Name):
                found.add(n.id)
            elif isinstance(n, ast.Attribute):
                found.add(ast.unparse(n))
    return found


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a function or method of this name, however it is reached."""
    return [
        n
        for n in ast.walk(node)
        if isinstance(n, ast.Call)
        and (n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", None)) == name
    ]


def body_with(function: ast.FunctionDef, statement: ast.stmt) -> list[ast.stmt]:
    """The list of statements that holds a statement."""
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list) and statement in block:
                return block
    raise ValueError("the statement is not in this function")
