"""Tests that setup.cfg lists all packages and data files, and that public names have docs."""

import configparser
from pathlib import Path

import lightning_dist

ROOT = Path(__file__).resolve().parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed_in_setup_cfg():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("hydra_plugins", "lightning_dist")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(setup_cfg()["options"]["packages"].split()) == found | {"lightning_dist.conf"}


def test_every_data_file_is_listed_in_setup_cfg():
    package = ROOT / "lightning_dist"
    patterns = setup_cfg()["options.package_data"]["lightning_dist"].split()
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"}
    files = {path for path in files if "__pycache__" not in path.parts}
    assert files == {path for pattern in patterns for path in package.glob(pattern)}


def test_every_public_name_has_a_docstring_with_its_arguments():
    for name in lightning_dist.__all__:
        assert "Args:" in getattr(lightning_dist, name).__doc__
