"""The documents: their code runs, their files and commands are understood, their links lead somewhere.

Python blocks run; TOML and commands are held against the parsers that will read them. The three READMEs say the same.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from itertools import pairwise

import commands
import documents
import pytest
import toml
from documents import DOCUMENTS, READMES, ROOT
from sd_scripts.options import HAS_PARSERS, check_document, check_optimizer, flat

from library.automagic_cameamp import OptimizerConfig
from library.cameamp_demo.options import parse

BLOCKS = [block for path in DOCUMENTS if path not in READMES[1:] for block in documents.blocks(path)]
COMMANDS = [found for path in DOCUMENTS for found in documents.commands(path)]
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def of_language(language):
    chosen = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def test_there_is_something_to_test():
    assert len(BLOCKS) > 20
    assert len(COMMANDS) > 20
    assert {block.language for block in BLOCKS} == {"python", "toml", "bash", "text"}


@of_language("python")
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.place, "exec"), {})


@of_language("toml")
def test_toml_is_understood(block, tmp_path, monkeypatch):
    document = toml.loads(block.text)
    if document.get("embedded"):
        path = tmp_path / "run.toml"
        path.write_text(block.text, "utf-8")
        parse(["--config_file", str(path)])
        return
    check_optimizer(*flat(document), block.place)
    if HAS_PARSERS:
        check_document("train_network", document, monkeypatch)


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[f"{place} {command[:40]}" for place, command in COMMANDS])
def test_commands_are_understood(place, command, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    commands.check(command, monkeypatch)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("python bootstrap.py demo --max_train_step 9", "--max_train_step"),
        ("python bootstrap.py demonstrate", "Set up this project"),
        ("python tests/versions.py FOLDER newer", "newer"),
        ("python -m benchmarks step", "step"),
        ("python -m benchmarks.growth", "benchmarks.growth"),
        ("python -m benchmarks steps --models sd15", "sd15"),
        ("python -m benchmarks step_profile --optimizer AdamW", "AdamW"),
        ("python -m benchmarks pictures masks", "masks"),
        ("python train_network_patch.py --sd_scripts DIR --optimizer_type Automagic_CameAMP9bit", "CameAMP9bit"),
        ("accelerate launch --gpus 2 train_network_patch.py --sd_scripts DIR", "--gpus"),
        ("accelerate launch train_network_patch.py --sd_scripts DIR --config_file configs/none.toml", "none.toml"),
        (
            "accelerate launch train_network_patch.py --sd_scripts DIR --optimizer_type Automagic_CameAMP"
            " --optimizer_args warmup_step=9",
            "warmup_step",
        ),
        ("pip install -r requirement.txt", "requirement.txt"),
        ('pip install ".[benchmark]"', "benchmark"),
        ("python -m automagic_cameamp.sd_scripts --sd_scripts DIR --optimizer_type Automagic_CameAMP9", "CameAMP9"),
        ("accelerate launch -m automagic_cameamp.sd_scripts --optimizer_type Automagic_CameAMP9", "CameAMP9"),
    ],
)
def test_a_wrong_command_would_be_found(command, word, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, SystemExit)) as raised:
        commands.check(command, monkeypatch)
    assert word in f"{raised.value} {capsys.readouterr()}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_and_pictures_exist(path):
    for target in documents.links(documents.read(path)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in documents.anchors(found), target


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_every_page_is_in_the_index(path):
    index = ROOT / "docs" / "README.md"
    techniques = ROOT / "docs" / "techniques" / "README.md"
    targets = {(i.parent / link).resolve() for i in (index, techniques) for link in documents.links(documents.read(i))}
    assert path == index or path in targets


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small_and_used(path):
    assert path.stat().st_size < 150_000
    assert any(path.name in documents.read(document) for document in DOCUMENTS)


def test_every_technique_has_its_page():
    files = {path.stem for path in (ROOT / "library" / "cameamp" / "techniques").glob("*.py")}
    pages = {path.stem for path in (ROOT / "docs" / "techniques").glob("*.md")}
    # Multi-scale momentum is in docs/c_optim.md, and sums are no technique: they are what several of them ask for.
    assert pages - {"README"} == files - {"__init__", "multiscale", "sums"}


# The README and its translations ------------------------------------------------------------------------------------


def test_every_option_is_in_the_table_with_its_default():
    written = {}
    for names, default, *_ in (row for table in documents.tables(READMES[0]) for row in table):
        known = [name for name in re.findall(r"`(\w+)`", names) if name in OptimizerConfig().as_dict()]
        if known:
            written.update(zip(known, eval(f"[{default}]")))
    assert written == OptimizerConfig().as_dict()


TRANSLATIONS = pytest.mark.parametrize("path", READMES[1:], ids=lambda path: path.name)


@TRANSLATIONS
def test_translations_have_the_same_code(path):
    assert [block[1:] for block in documents.blocks(path)] == [block[1:] for block in documents.blocks(READMES[0])]


@TRANSLATIONS
def test_translations_have_the_same_headings_numbers_and_links(path):
    def content(text):
        found = Counter(target for target in documents.links(text) if not target.startswith("README"))
        return found, documents.names(text), documents.numbers(text)

    english, translated = READMES[0], path
    levels = [[level for level, _ in documents.headings(readme)] for readme in (english, translated)]
    assert levels[0] == levels[1]
    for number, (one, other) in enumerate(zip(documents.sections(english), documents.sections(translated))):
        assert content(one) == content(other), f"section {number}"


@TRANSLATIONS
def test_translations_have_the_same_tables(path):
    def content(readme):
        return [
            [[(documents.names(cell), documents.numbers(cell)) for cell in row] for row in table]
            for table in documents.tables(readme)
        ]

    assert content(path) == content(READMES[0])


def test_the_readmes_name_one_another_at_the_top():
    for readme in READMES:
        head = documents.read(readme).split("\n\n")[1]
        assert {other.name for other in READMES} - {readme.name} == set(documents.links(head))


def test_english_sections_are_in_order_of_need():
    """What it is comes first, then the two commands, then everything else."""
    text = documents.read(READMES[0])
    places = [
        text.index(words) for words in ("# Automagic_CameAMP", "bootstrap.py demo", "bootstrap.py test", "## Use")
    ]
    assert all(one < other for one, other in pairwise(places))
