"""One version, said in three places."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_changelog_opens_with_the_version_of_the_project():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert versions, "CHANGELOG.md has no heading of the form '## [1.2.3] - 2030-01-31'"
    assert versions[0] == VERSION


def test_changelog_lists_no_version_twice():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", changelog, flags=re.MULTILINE)
    assert len(versions) == len(set(versions))


def test_installed_version_is_that_of_the_project():
    assert metadata.version("sparkdl-torch") == VERSION, "the environment is older: make install"
