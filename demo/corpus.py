"""The text of the demo model: the documentation that comes with CPython.

The docstrings of the standard library, those of the built-in types and functions, and pydoc_data/topics.py. Sources
are parsed, never imported, so that the text depends on the CPython version only; TEXT_PYTHON and TEXT_SHA256 name the
one that the committed model was trained on.
"""

import ast
import builtins
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEXT_PYTHON = "3.11.7"
TEXT_SHA256 = "2249c65d3a4811360230ed34501454b59a2c43aca189c32e619d0317e8ccb46b"

# Tests, and what distributions add or split off: with these the text would depend on more than the version.
NOT_TEXT = {"test", "tests", "site-packages", "dist-packages", "ensurepip"}
NOT_TEXT |= {"idlelib", "tkinter", "turtledemo", "turtle.py", "lib2to3", "distutils"}

SECTION_CHARACTERS = 2000  # longer documents are cut at a paragraph, so that the model sees where texts begin and end

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One piece of documentation: `kind` is module, class, function, method or topic."""

    name: str
    kind: str
    text: str


def documents() -> list[Document]:
    """Return the documentation of the running CPython, each text once, in an order that every machine repeats."""
    first_by_text: dict[str, Document] = {}
    for document in (*topics(), *builtin_docstrings(), *library_docstrings()):
        first_by_text.setdefault(document.text, document)
    return [document for text, document in first_by_text.items() if text]


def text_sha256(texts: list[Document]) -> str:
    """Return the SHA-256 of all texts in order, each ended by a zero byte."""
    return hashlib.sha256("".join(f"{document.text}\0" for document in texts).encode()).hexdigest()


def topics() -> Iterator[Document]:
    """Yield the language reference that `help()` shows."""
    from pydoc_data.topics import topics as text_by_name

    for name, text in sorted(text_by_name.items()):
        yield Document(name, "topic", text.strip())


def builtin_docstrings() -> Iterator[Document]:
    """Yield the docstrings of the built-in functions and types and of their methods."""
    for name, value in sorted(vars(builtins).items()):
        if isinstance(value, type):
            yield Document(name, "class", (value.__doc__ or "").strip())
            for method_name, method in sorted(vars(value).items()):
                if isinstance(method.__doc__, str) and not method_name.startswith("_"):
                    yield Document(f"{name}.{method_name}", "method", method.__doc__.strip())
        elif isinstance(value, type(len)):
            yield Document(name, "function", (value.__doc__ or "").strip())


def library_docstrings() -> Iterator[Document]:
    """Yield the docstrings in the standard library's Python sources."""

    def visit(node: Definition, name: str, kind: str) -> Iterator[Document]:
        yield Document(name, kind, (ast.get_docstring(node) or "").strip())
        prefix = f"{name}." if kind in ("class", "method") else ""
        for child in node.body:
            if isinstance(child, Definition):
                child_kind = "class" if isinstance(child, ast.ClassDef) else "method" if prefix else "function"
                yield from visit(child, prefix + child.name, child_kind)

    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if NOT_TEXT.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            yield from visit(ast.parse(path.read_bytes()), module, "module")


def sections(text: str) -> list[str]:
    """Cut a text at paragraphs into pieces of about SECTION_CHARACTERS."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) + len(paragraph) > SECTION_CHARACTERS:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return [piece.strip() for piece in pieces if piece.strip()]


def chat(document: Document) -> list[dict[str, str]] | None:
    """Return a question about a document and its first paragraph as the answer; None for private names and methods."""
    heading, *_ = document.text.split("\n")
    paragraphs = [
        part for part in document.text.split("\n\n") if not re.search(r"^(\*\*|==|--)|::=", part, re.MULTILINE)
    ]
    if document.kind == "method" or document.name.startswith("_") or not paragraphs:
        return None
    if document.kind == "function":
        question = f"Document the function {document.name}."
    elif document.kind == "topic" and heading.startswith("The "):  # The "with" statement
        question = f"What is the {heading.removeprefix('The ')}?".replace('"', "")
    else:
        question = f"What is {document.name}?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": paragraphs[0].strip()}]
