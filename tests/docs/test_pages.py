"""README and docs promise only what is there: their commands, options, targets, imports and links."""

from __future__ import annotations

import ast
import importlib
import re
import shlex

import click
import pytest

from sparsek.cli import COMMANDS, cli

from . import markdown

TESTS = ("quick", "long", "clean", "ci")


def test_each_block_says_a_way_to_test_it_that_exists() -> None:
    for block in markdown.blocks():
        assert block.test in TESTS or block.test.startswith("no, "), block
        assert block.language in ("sh", "python", "text"), block


def test_commands_have_the_options_that_are_shown() -> None:
    found = list(markdown.commands("sparsek"))
    assert len(found) > 30
    context = click.Context(cli)
    for page, line in found:
        name, *given = shlex.split(line, comments=True)
        if name.startswith("-"):
            continue
        command = cli.get_command(context, name) if name in COMMANDS else None
        assert command is not None, f"{page}: there is no sparsek {name}"
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        known |= {"-h", "--help"}
        if command.context_settings.get("allow_interspersed_args") is False:  # the rest is another program's
            command.make_parser(context).parse_args(list(given))
            continue
        for word in given:
            option = word.split("=")[0]
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", option):
                assert option in known, f"{page}: sparsek {name} has no option {option}"


def test_make_has_the_targets_that_are_shown() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (markdown.ROOT / "Makefile").read_text(), re.MULTILINE))
    found = [(page, line.split()[0]) for page, line in markdown.commands("make") if line]
    assert len(found) > 10
    for page, target in found:
        if re.fullmatch(r"[a-z][a-z-]*", target):
            assert target in targets, f"{page}: there is no make {target}"


def test_continuous_integration_runs_what_readme_says() -> None:
    script = (markdown.ROOT / ".ci" / "run").read_text().splitlines()
    found = [block for block in markdown.blocks() if block.test == "ci"]
    assert found
    for block in found:
        for line in block.code.splitlines():
            command = line.split("#")[0].strip()
            assert command in script, f"{block.name}: .ci/run does not run {command!r}"


@pytest.mark.parametrize(
    "block", [b for b in markdown.blocks() if b.language == "python"], ids=lambda b: b.name
)
def test_what_is_imported_is_there(block: markdown.Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsek":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def test_links_lead_somewhere() -> None:
    found = list(markdown.links())
    assert len(found) > 20
    for page, target in found:
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in markdown.anchors(file), f"{page.name}: {target}"
