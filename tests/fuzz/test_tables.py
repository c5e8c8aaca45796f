"""Tables of images and files of prompts as strangers write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memtool.errors import DataError
from memtool.streams.description import Description
from memtool.streams.labelled import DatasetsSource
from memtool.streams.text import read_samples
from tests.fuzz.door import NAMES, cases, damaged, long, refused_or_taken

pytestmark = long

_CELLS = st.one_of(
    NAMES,
    st.sampled_from(["1.png", "/etc/passwd", "../x.png", "lost.png", ".", "nan", "007", '"', ","]),
)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _CELLS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
_RECORDS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"image": _CELLS, "label": _JSON}),
        st.fixed_dictionaries({"prompt": _CELLS, "answer": _JSON}),
        _JSON,
    ),
    max_size=4,
)
_CSV = b'image,label,place\n1.png,007,a\n1.png,"7, or so",b\n'
_LINES = b'{"image": "1.png", "label": 7}\n{"image": "1.png", "label": "x"}\n'
_PAIRS = b'[{"prompt": "a", "answer": "b"}, {"prompt": "\\u00e9", "answer": "d"}]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    Image.new("RGB", (4, 4)).save(root / "1.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path_factory.getbasetemp() / "cache of tables"))


def opened(folder: Path, kind: str, content: bytes, **keys: object) -> dict[str, list[str]]:
    """The labels and domains of all rows, as text; every image is read as well."""
    (folder / f"rows.{kind}").write_bytes(content)
    described = Description(kind=kind, path=".", train=f"rows.{kind}", **keys)
    source = DatasetsSource("mine", described, folder)
    with source.open() as listing:
        found = {"label": [listing.class_names[label] for label in listing.labels]}
        if listing.domains is not None:
            found["domain"] = [listing.domain_names[domain] for domain in listing.domains]
        for row in range(len(listing.labels)):
            with refused_or_taken():
                listing.encoded([row])
            assert listing.where(row).isprintable()
    return found


@cases
@given(
    content=st.one_of(
        damaged(_CSV),
        st.lists(st.lists(_CELLS, min_size=2, max_size=3), max_size=4).map(
            lambda rows: "\n".join(["image,label", *map(",".join, rows)]).encode(errors="replace")
        ),
    ),
    names=st.sampled_from([None, ("x", "y"), ("007", "7")]),
)
def test_a_table_as_csv(folder: Path, content: bytes, names: tuple[str, ...] | None) -> None:
    with refused_or_taken():
        opened(folder, "csv", content, class_names=names)


@cases
@given(
    content=st.one_of(
        damaged(_LINES),
        _RECORDS.map(lambda records: json.dumps(records).encode()),
        _RECORDS.map(lambda records: "\n".join(map(json.dumps, records)).encode()),
    )
)
def test_a_table_as_json(folder: Path, content: bytes) -> None:
    with refused_or_taken():
        opened(folder, "json", content)


@cases
@given(
    content=st.one_of(damaged(_PAIRS), _RECORDS.map(lambda records: json.dumps(records).encode()))
)
def test_prompts_and_answers(folder: Path, content: bytes) -> None:
    (folder / "train.json").write_bytes(content)
    with refused_or_taken():
        read_samples(folder / "train.json")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_too_deep_is_refused(folder: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"too deep|cannot be read as JSON"):
        opened(folder, "json", content)
    (folder / "train.json").write_bytes(content)
    with pytest.raises(DataError, match=r"too deep|cannot be read as JSON"):
        read_samples(folder / "train.json")


_LABELS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@cases
@given(
    labels=st.lists(
        st.one_of(
            _LABELS, st.sampled_from(["007", "7", "7.0", "NA", "null", "None", "true", "1e3"])
        ),
        min_size=1,
        max_size=6,
    )
)
def test_labels_are_text_as_written(folder: Path, labels: list[str]) -> None:
    labels = [label for label in labels if label.lower() != "nan"] or ["7"]
    quoted = ['"' + label.replace('"', '""') + '"' for label in labels]
    table = "\n".join(["image,label", *(f"1.png,{label}" for label in quoted)])
    assert opened(folder, "csv", table.encode())["label"] == labels
    lines = [json.dumps({"image": "1.png", "label": label}) for label in labels]
    assert opened(folder, "json", "\n".join(lines).encode())["label"] == labels


@pytest.mark.parametrize(
    ("kind", "content", "where"),
    [
        ("csv", b"image,label\n1.png,a\n1.png,\n", "row 1 of rows.csv, line 3: no label"),
        ("csv", b"image,label\n1.png,NaN\n", "row 0 of rows.csv, line 2: no label"),
        ("csv", b"image,label\n1.png,a\n1.png\n", "rows.csv, line 3: 1 cells"),
        ("csv", b"image,label,label\n1.png,a,b\n", "two columns are called 'label'"),
        ("json", b'{"image": "1.png", "label": null}', "row 0 of rows.json, line 1: no label"),
        ("json", b'{"image": "1.png", "label": NaN}', "row 0 of rows.json, line 1: no label"),
        ("json", b'{"image": "1.png"}\n{"label": 1}', "row 0 of rows.json, line 1: no label"),
        ("json", b'{"image": "1.png", "label": [1]}', "row 0 of rows.json, line 1: label is"),
    ],
)
def test_what_is_missing_is_an_error_with_its_row(
    folder: Path, kind: str, content: bytes, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        opened(folder, kind, content)
    assert where in caught.value.message


def test_numbers_of_json_are_as_written(folder: Path) -> None:
    lines = b'{"image": "1.png", "label": 7}\n{"image": "1.png", "label": "007"}\n'
    assert opened(folder, "json", lines + b'{"image": "1.png", "label": 7.0}')["label"] == [
        *("7", "007", "7.0"),
    ]
    given = opened(folder, "json", lines, class_names=["007", *"abcdefg"])
    assert given["label"] == ["g", "007"]
