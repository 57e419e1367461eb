#!/usr/bin/env python3
"""What promptsource itself makes of template files, by its own Template.apply.

    git clone https://github.com/bigscience-workshop/promptsource && cd promptsource
    pip install jinja2 pyyaml pandas "setuptools<81"
    python promptsource.py --promptsource CLONE            # golden.jsonl from templates.yaml and rows.jsonl beside it
    python promptsource.py --promptsource CLONE --all F    # F: every template of the clone, over rows made up for it

promptsource pins packages that no longer install (streamlit 0.82, black 21), none of which its templates.py needs, so it
is taken from a clone. Where a template draws at random, every output that it can have is written down: `random.choice`
is replaced by one that follows a script of choices. Checked: promptsource 7dab96a3, jinja2 3.1.6, PyYAML 6.0.3.

F is read by `PROMPTSOURCE_CASES=F cargo test -p unisono-coordinator --lib promptsource -- --ignored`. Its rows are made up
from how a template uses its variables; they are only as good as that guess, but there are many of them.
"""

import argparse
import copy
import glob
import json
import pathlib
import random
import sys

import yaml

HERE = pathlib.Path(__file__).parent / "promptsource"
MOST = 64


class Script:
    """random.choice, one path through the tree of choices after the other."""

    def __init__(self):
        self.path, self.at = [], 0

    def choice(self, items):
        if len(items) == 0:
            raise IndexError("Cannot choose from an empty sequence")
        if self.at == len(self.path):
            self.path.append([0, len(items)])
        index = self.path[self.at][0]
        self.at += 1
        return items[index]

    def advance(self):
        self.at = 0
        while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
            self.path.pop()
        if self.path:
            self.path[-1][0] += 1
        return bool(self.path)


def outputs(template, row):
    """All that apply can give, None where it raises; and whether the list is whole."""
    script, found = Script(), []
    random.choice = script.choice
    for _ in range(MOST):
        try:
            # A template may change the row's lists.
            out = template.apply(copy.deepcopy(row), truncate=False, highlight_variables=False)
        except Exception:
            out = None
        if out not in found:
            found.append(out)
        if not script.advance():
            return found, True
    return found, False


# Rows for templates whose data is not at hand: each variable gets the shape of its uses.


class Shape:
    def __init__(self):
        self.keys, self.item, self.values, self.kinds = {}, None, [], set()

    def key(self, name):
        return self.keys.setdefault(name, Shape())

    def element(self):
        self.item = self.item or Shape()
        return self.item


WORDS = "Yes No true False A B C 1 2.5 the cat's Élan über “quoted” |||x a||b  two  words\nline [UNK] 0 -3 neutral".split(" ")
METHODS = {"split": "str", "lower": "str", "upper": "str", "strip": "str", "replace": "str", "capitalize": "str",
           "startswith": "str", "join": "str", "append": "list", "index": "list", "pop": "list", "items": "dict",
           "keys": "dict", "update": "dict", "values": "dict"}
LISTS = {"join", "choice", "most_frequent", "random", "map", "select", "selectattr", "reject", "unique", "list", "sort",
         "first", "last", "min"}


def infer(tree, nodes):
    shapes, scopes = {}, [{}]

    def of(node):
        """The shape that an expression denotes, or None."""
        if isinstance(node, nodes.Name):
            for scope in reversed(scopes):
                if node.name in scope:
                    return scope[node.name]
            return shapes.setdefault(node.name, Shape())
        if isinstance(node, nodes.Getattr):
            base = of(node.node)
            if base is None:
                return None
            if node.attr in METHODS:
                base.kinds.add(METHODS[node.attr])
                return base if METHODS[node.attr] == "str" else None
            return base.key(node.attr)
        if isinstance(node, nodes.Getitem):
            base = of(node.node)
            if base is None:
                return None
            if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                return base.key(node.arg.value)
            if isinstance(node.arg, nodes.Slice):
                return base
            index = of(node.arg)
            if index is not None:
                index.kinds.add("int")
            return base.element()
        if isinstance(node, nodes.Filter) and node.node is not None:
            base = of(node.node)
            if base is not None and node.name in LISTS:
                base.element()
                return base.element() if node.name in ("choice", "random", "first", "last") else base
            return base if node.name in ("trim", "lower", "string", "replace", "default") else None
        if isinstance(node, nodes.Call):
            base = of(node.node)
            return base.element() if isinstance(node.node, nodes.Getattr) and node.node.attr == "split" and base else None
        return None

    def bind(target, shape):
        if isinstance(target, nodes.Name):
            scopes[-1][target.name] = shape or Shape()
        elif isinstance(target, nodes.Tuple):
            for item in target.items:
                bind(item, None)

    def walk(node):
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            walk(node.node)
            shape = of(node.node)
            scopes[-1][node.target.name] = shape or Shape()
            return
        if isinstance(node, nodes.For):
            walk(node.iter)
            base = of(node.iter)
            scopes.append({"loop": Shape()})
            bind(node.target, base.element() if base else None)
            for child in node.body + node.else_ + ([node.test] if node.test else []):
                walk(child)
            scopes.pop()
            return
        if isinstance(node, nodes.Compare):
            left = of(node.expr)
            for operand in node.ops:
                right = of(operand.expr)
                for shape, other in ((left, operand.expr), (right, node.expr)):
                    if shape is not None and isinstance(other, nodes.Const):
                        shape.values.append(other.value)
                    if shape is not None and isinstance(other, (nodes.List, nodes.Tuple)):
                        shape.values += [i.value for i in other.items if isinstance(i, nodes.Const)]
        if isinstance(node, (nodes.Sub, nodes.Mul, nodes.Div, nodes.Mod)):
            for side in (node.left, node.right):
                if (shape := of(side)) is not None:
                    shape.kinds.add("int")
        of(node) if isinstance(node, (nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Call)) else None
        for child in node.iter_child_nodes():
            walk(child)

    walk(tree)
    for name in ("answer_choices", "range", "zip", "namespace", "dict", "loop"):
        shapes.pop(name, None)
    return shapes


def make(shape, rng, depth=0):
    if shape.keys and not (shape.item and rng.random() < 0.3):
        whole = {name: make(inner, rng, depth + 1) for name, inner in shape.keys.items()}
        if "list" in shape.kinds or (shape.item and rng.random() < 0.5):
            return [whole, copy.deepcopy(whole)]
        return whole
    if shape.item or "list" in shape.kinds:
        return [make(shape.element(), rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 3, 4, 5]))]
    if "dict" in shape.kinds:
        return {word: make(Shape(), rng) for word in rng.sample(WORDS, 2)}
    if shape.values and rng.random() < 0.7:
        value = rng.choice(shape.values)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.3:
            value += rng.choice([-1, 1])
        return value
    if "int" in shape.kinds or rng.random() < 0.15:
        return rng.choice([0, 0, 1, 1, 2, 3, True, 0.5, 4.75, 1e-7, -1])
    if rng.random() < 0.04:
        return rng.choice([None, [], ["a", 1, None, 2.0, {"k": "it's"}], {"x": [True]}, 12345678901234567890])
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 1, 2, 3, 8, 20])))


def guess(template, templates, rng):
    tree = templates.env.parse(template.jinja)
    choices = templates.env.parse(template.answer_choices or "")
    from jinja2 import nodes

    tree.body = choices.body + tree.body
    return {name: make(shape, rng) for name, shape in infer(tree, nodes).items()}


def features(template, templates):
    """What of Jinja a template uses, as far as Python's own parser names it."""
    from jinja2 import nodes

    for source in (template.jinja, template.answer_choices or ""):
        for node in templates.env.parse(source).find_all(nodes.Node):
            yield type(node).__name__
            if isinstance(node, (nodes.Filter, nodes.Test)):
                yield f"{type(node).__name__} {node.name}/{len(node.args)} {[k.key for k in node.kwargs]}"
            if isinstance(node, nodes.Call):
                callee = node.node
                name = "." + callee.attr if isinstance(callee, nodes.Getattr) else getattr(callee, "name", "")
                yield f"call {name}/{len(node.args)}"
            if isinstance(node, nodes.Operand):
                yield f"compare {node.op}"
            if isinstance(node, nodes.Const):
                yield f"constant {type(node.value).__name__}"
            if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
                yield f"loop.{node.attr}"


def read(path):
    return list(yaml.load(open(path), Loader=yaml.FullLoader)["templates"].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promptsource", required=True, help="a clone of promptsource")
    parser.add_argument("--all", metavar="FILE", help="cases of every template of the clone")
    parser.add_argument("--rows", type=int, default=8, help="rows made up for each of them")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.promptsource)
    from promptsource import templates

    if arguments.all:
        counts = [0, 0, 0]
        with open(arguments.all, "w") as out:
            root = pathlib.Path(arguments.promptsource) / "promptsource" / "templates"
            for path in sorted(glob.glob(f"{root}/**/templates.yaml", recursive=True)):
                for template in read(path):
                    for number in range(arguments.rows):
                        rng = random.Random(f"{template.id} {number}")
                        row = guess(template, templates, Rng(rng))
                        row = json.loads(json.dumps(row))
                        found, whole = outputs(template, row)
                        case = {"file": path, "template": template.name, "row": row, "outputs": found, "whole": whole}
                        out.write(json.dumps(case) + "\n")
                        counts[0] += 1
                        counts[1] += found == [None]
                        counts[2] += len(found) > 1
        print(f"{counts[0]} cases, {counts[1]} of them errors, {counts[2]} with several outputs")
        return
    own = {f for template in read(HERE / "templates.yaml") for f in features(template, templates)}
    root = pathlib.Path(arguments.promptsource) / "promptsource" / "templates"
    paths = sorted(glob.glob(f"{root}/**/templates.yaml", recursive=True))
    missing = {f for path in paths for template in read(path) for f in features(template, templates)} - own
    assert not missing, f"templates.yaml lacks {sorted(missing)}"
    rows = [json.loads(line) for line in open(HERE / "rows.jsonl")]
    with open(HERE / "golden.jsonl", "w") as out:
        for template in read(HERE / "templates.yaml"):
            for number, row in enumerate(rows):
                found, whole = outputs(template, row)
                assert whole, template.name
                out.write(json.dumps({"template": template.name, "row": number, "outputs": found}) + "\n")


class Rng:
    """The same draws whatever random.choice has become."""

    def __init__(self, rng):
        self.random = rng.random

    def choice(self, items):
        return items[int(self.random() * len(items))]

    def sample(self, items, count):
        return sorted(items, key=lambda _: self.random())[:count]


if __name__ == "__main__":
    main()
