"""Every host has the functions that nodes call, with their arguments."""

import ast
import inspect
from pathlib import Path

import pytest

from cascade_nodes.nodes.hosts import Host, headless

HOSTS = Path(__file__).parents[2] / "nodes" / "hosts"
FUNCTIONS = {name: function for name, function in vars(Host).items() if name[0] != "_"}


@pytest.mark.parametrize("package", sorted(path.parent.name for path in HOSTS.glob("*/__init__.py")))
def test_a_host_offers_every_function(package):
    tree = ast.parse((HOSTS / package / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(FUNCTIONS) > 20
    assert FUNCTIONS.keys() - imported - defined == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_are_those_of_the_protocol(name):
    expected = list(inspect.signature(FUNCTIONS[name]).parameters)[1:]
    assert list(inspect.signature(getattr(headless, name)).parameters)[: len(expected)] == expected
