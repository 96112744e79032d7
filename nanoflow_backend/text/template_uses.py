"""TemplateUses says what a chat template does with one key of its messages, as read from its source.

A message may hold a key in several forms, and a template is written for one or two of them: a content that is a text or
a list of parts, arguments that are JSON or an object, a null. Which ones shows in the template's own questions, as vLLM
and SGLang find it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import msgspec
from jinja2 import nodes

KINDS = frozenset({"string", "iterable", "sequence", "mapping"})  # tests that tell one form from another
ITEMWISE = frozenset(
    {"batch", "first", "groupby", "last", "list", "map", "reject", "rejectattr", "select", "selectattr"}
)
KEYED = frozenset({"dictsort", "items", "tojson", "xmlattr"})
SAME = frozenset({"d", "default", "metered", "safe"})  # what they are given is what they give
NEUTRAL = SAME | {"count", "length"}


class TemplateUses(msgspec.Struct, frozen=True):
    """What a template does with a key, anywhere and whatever message it is of.

    Attributes:
        as_items: it walks over its items, or takes one by its number.
        as_text: it writes it, joins it with texts, or calls a text's methods and filters.
        as_object: it takes it for a mapping, or for what `tojson` writes.
        asks_kind: it asks whether it is a text, a list or a mapping.
        asks_text: it asks whether it is a text.
        asks_null: it asks whether it is null.
    """

    as_items: bool
    as_text: bool
    as_object: bool
    asks_kind: bool
    asks_text: bool
    asks_null: bool


NONE = TemplateUses(**dict.fromkeys(TemplateUses.__struct_fields__, False))


def read_uses(tree: nodes.Template) -> defaultdict[str, TemplateUses]:
    """What a template does with each key that it names; `NONE` for others."""
    sources = _Sources(tree)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for node in tree.find_all(nodes.Node):
        for use, value in _uses(node):
            for key in sources.keys(value):
                found[key].add(use)
    fields = TemplateUses.__struct_fields__
    uses = {key: TemplateUses(**{name: name in names for name in fields}) for key, names in found.items()}
    return defaultdict(lambda: NONE, uses)


def _uses(node: nodes.Node) -> Iterator[tuple[str, nodes.Node]]:
    """What a node of the tree does with the values that are given to it."""
    match node:
        case nodes.For():
            yield "as_items", node.iter
        case nodes.Getitem(arg=nodes.Const(value=int()) | nodes.Neg()):
            yield "as_items", node.node
        case nodes.Getitem(arg=nodes.Name() | nodes.Const()):
            yield "as_object", node.node
        case nodes.Getattr():
            yield "as_text" if hasattr(str, node.attr) else "as_object", node.node
        case nodes.Filter() if node.node is not None and node.name not in NEUTRAL:
            yield "as_items" if node.name in ITEMWISE else "as_object" if node.name in KEYED else "as_text", node.node
        case nodes.Test():
            if node.name == "none":
                yield "asks_null", node.node
            if node.name in KINDS:
                yield "asks_kind", node.node
            if node.name == "string":
                yield "asks_text", node.node
        case nodes.Compare() if any(_is_null(operand.expr) for operand in node.ops):
            yield "asks_null", node.expr
        case nodes.Output() | nodes.Concat():
            yield from (("as_text", part) for part in node.nodes)
        case nodes.Add():
            yield from (("as_text", part) for part in (node.left, node.right))


class _Sources:
    """Which keys of messages an expression may give the value of, by way of variables and macros too."""

    def __init__(self, tree: nodes.Template) -> None:
        self._given: defaultdict[str, list[nodes.Node]] = defaultdict(list)  # to variables, by name
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name | nodes.NSRef):
                self._given[_name(assign.target)].append(assign.node)
        macros = {macro.name: [argument.name for argument in macro.args] for macro in tree.find_all(nodes.Macro)}
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and (parameters := macros.get(call.node.name)):
                for name, value in zip(parameters, call.args, strict=False):
                    self._given[name].append(value)
                for word in call.kwargs:
                    self._given[word.key].append(word.value)
        self._known: dict[str, set[str]] = {}

    def keys(self, node: nodes.Node | None) -> set[str]:
        match node:
            case nodes.Name():
                return self._of_name(node.name)
            case nodes.Getattr():  # of a message or of a namespace
                return {node.attr} | self._of_name(f".{node.attr}")
            case nodes.Getitem(arg=nodes.Const(value=str(key))):
                return {key}
            case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=str(key)), *_]):
                return {key}
            case nodes.CondExpr():
                return self.keys(node.expr1) | self.keys(node.expr2)
            case nodes.Or() | nodes.And():
                return self.keys(node.left) | self.keys(node.right)
            case nodes.Filter() if node.name in SAME:
                return self.keys(node.node)
        return set()

    def _of_name(self, name: str) -> set[str]:
        if name not in self._known:
            self._known[name] = set()  # while it is looked for: a variable may be given its own value
            self._known[name] = set().union(*(self.keys(value) for value in self._given[name]))
        return self._known[name]


def _name(target: nodes.Name | nodes.NSRef) -> str:
    return target.name if isinstance(target, nodes.Name) else f".{target.attr}"


def _is_null(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value is None
