# SPDX-License-Identifier: Apache-2.0
"""The promises of tests/README.md have tests, and the documentation names things that exist.

    python -m pytest tests/test_promises.py
"""

import ast
import re
from pathlib import Path

import pytest
import torch

from model import PRESETS, Transducer

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPO / "README.md", REPO / "tests/README.md", *sorted(REPO.glob("docs/*.md"))]


def read_promises() -> dict[str, list[tuple[str, str]]]:
    """Sentence -> (file, test) of each test behind it, from the sections of tests/README.md."""
    _, *sections = (REPO / "tests/README.md").read_text(encoding="utf-8").split("\n## ")
    promises = {}
    for section in sections:
        for item in re.findall(r"^- (.*\n(?:  .*\n)*)", section, re.MULTILINE):
            sentence = item.partition("\n  `test_")[0]
            assert sentence not in promises
            promises[sentence] = re.findall(r"`(test_\w+\.py)::(\w+)`", item)
    return promises


def names_of_functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_every_promise_names_tests_that_exist():
    promises = read_promises()
    existing = {(path.name, test) for path in REPO.glob("tests/test_*.py")
                for test in names_of_functions(path)}
    assert len(promises) > 100
    assert [sentence for sentence, tests in promises.items() if not tests] == []
    named = {test for tests in promises.values() for test in tests}
    assert named - existing == set()


def test_every_test_file_is_named():
    named = {file for tests in read_promises().values() for file, _ in tests}
    assert named == {path.name for path in REPO.glob("tests/test_*.py")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_documents_name_only_files_that_exist(document):
    """Commands and code spans start at the project's root or in tests/, links at the document."""
    text = document.read_text(encoding="utf-8")
    links = [document.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    spans = re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|md|json|yaml)|(?:docs|tests|tools)/)`", text)
    spans += re.findall(r"\b(docs/[\w.-]*\w)", text)
    spans += [f"tools/{name}.py" for name in re.findall(r"-m tools\.(\w+)", text)]
    spans += re.findall(r"\b(?:python3?|bash) (\w+\.(?:py|sh))\b", text)
    absent = [link for link in links if not link.exists()]
    for span in spans:
        if not (REPO / span).exists() and not (REPO / "tests" / span).exists():
            absent.append(span)
    assert absent == []
    assert links or spans


def test_readme_has_the_sizes_of_every_preset():
    """The columns are encoder, stack, prediction, J, V and parameters."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    printed = {row[0].strip("`"): row[2:] for row in rows if row[0].strip("`") in PRESETS}
    expected = {}
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Transducer(cfg).parameters())
        convolutions = f"conv {cfg.conv_layers} + " if cfg.conv_layers else ""
        expected[name] = [
            f"{convolutions}{cfg.pre_layers} + {cfg.post_layers} x {cfg.enc_hidden}",
            str(cfg.stack),
            f"{cfg.pred_layers} x {cfg.pred_hidden}", str(cfg.joint_hidden), str(cfg.vocab_size),
            f"{parameters:,}",
        ]
    assert printed == expected
