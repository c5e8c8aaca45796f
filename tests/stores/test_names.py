"""The one rule for names: what passes is one part of a path, whatever a stranger writes."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ulid import ULID

from memtool_stores import SchemaError
from memtool_stores.names import below, check_id, check_name, check_path, check_ref
from memtool_stores.printable import printable, shown
from tests.fuzz.door import NAMES


@given(NAMES)
def test_a_name_that_passes_is_one_printable_part_of_a_path(tmp_path_factory, name):
    with suppress(SchemaError):
        assert check_name(name, "an adapter") == name
        _is_one_part_of_a_path(name, tmp_path_factory.getbasetemp())


def _is_one_part_of_a_path(name, folder):
    assert name.isprintable()
    assert below(folder, name).parent == folder
    assert os.path.normpath(folder / name) == str(folder / name)
    check_path(name, "a file")


@given(NAMES)
def test_a_ref_that_passes_is_a_name_too(name):
    with suppress(SchemaError):
        check_ref(name, "tag")
        assert check_name(name, "a tag") == name


@pytest.mark.parametrize("name", [None, 7, b"x", ["x"], "", ".", "..", "a/b", "/a", "a\\b", "a\0"])
def test_what_no_adapter_is_called(name):
    with pytest.raises(SchemaError, match="cannot be the name of an adapter"):
        check_name(name, "an adapter")


@pytest.mark.parametrize("name", ["task-3-seed-0", "Müller 2", "a~b", "x.y", "名前"])
def test_what_an_adapter_may_be_called(name):
    assert check_name(name, "an adapter") == name


def test_an_id_is_a_ulid():
    assert check_id(str(ULID()), "a store")
    for wrong in (
        "../../victim",
        "",
        "0" * 25,
        "8" + "0" * 25,
        "O" * 26,
        str(ULID()).lower(),
        None,
    ):
        with pytest.raises(SchemaError, match="cannot be the id of a store"):
            check_id(wrong, "a store")


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/../b", "a/.x", "", "a\\b", "a/\0", None])
def test_paths_that_no_file_of_a_bundle_has(path):
    with pytest.raises(SchemaError, match="cannot be the path of a file"):
        check_path(path, "a file")


def test_no_path_leads_out_by_a_link(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "inside").symlink_to(folder)
    assert below(folder, "inside") == folder / "inside"
    for names in (("link",), ("link", "x"), ("..",), ("a/b",), ("/etc",), ("",)):
        with pytest.raises(SchemaError, match="leads out of"):
            below(folder, *names)


@given(st.text())
def test_what_is_shown_can_be_printed_and_says_the_same(text):
    assert printable(text).isprintable()
    assert text.isprintable() == (printable(text) == text)
    assert shown(text).isprintable()
    assert len(shown(text)) <= 80
