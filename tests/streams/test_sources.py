from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from memtool.errors import ConfigError, DataError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams import create_stream, list_sources, open_table
from memtool.streams.description import read_description
from memtool.streams.sources import built_in_descriptions, task_names

Folder = Callable[..., Path]


def _describe(folder: Path, **keys: object) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"path": ".", **keys}))
    return str(file)


def _parquet(
    file: Path, labels: list[object], names: list[str] | None = None, **columns: list[object]
) -> None:
    """Images whose grey level is ten times their row."""
    pictures = [Image.new("RGB", (8, 8), (10 * row,) * 3) for row in range(len(labels))]
    content = {"picture": pictures, "kind": labels, **columns}
    rows = datasets.Dataset.from_dict(content).cast_column("picture", datasets.Image())
    if names:
        rows = rows.cast_column("kind", datasets.ClassLabel(names=names))
    datasets.disable_progress_bars()
    rows.to_parquet(file)
    datasets.enable_progress_bars()


COLUMNS = {"kind": "parquet", "train": "a.parquet", "image": "picture", "label": "kind"}


def _greys(source: str) -> dict[int, tuple[str, bool]]:
    """{row of its part: (class name, is it for testing)} of a table made by `_parquet`."""
    table = open_table(source, 8)
    return {
        int(image[0, 0, 0]) // 10: (table.class_names[label], bool(is_test))
        for image, label, is_test in zip(table.images, table.labels, table.is_test, strict=True)
    }


def test_importing_streams_is_light() -> None:
    program = (
        "import sys, memtool.streams\n"
        "from memtool.streams import list_sources\n"
        "from memtool.settings import StreamSettings\n"
        "from memtool.streams.sources import task_names\n"
        "assert task_names(StreamSettings())[0] == 'upright', list_sources()\n"
        "heavy = {'torch', 'datasets', 'sklearn', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_every_built_in_description_is_valid() -> None:
    for name, file in built_in_descriptions().items():
        description = read_description(file)
        assert description.about, name
        assert description.licence, name
        assert name in list_sources()
    assert list_sources()[0] == "digits"
    assert {"pacs", "cifar100", "omniglot"} <= set(list_sources())


def test_parquet_with_class_names_in_the_file(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", [1, 0, 1, 0], ["cat", "ant"])
    _parquet(tmp_path / "b.parquet", [0, 1], ["cat", "ant"])
    source = _describe(tmp_path, **COLUMNS)
    assert open_table(source, 8).class_names == ("cat", "ant")
    assert {row: name for row, (name, _) in _greys(source).items()} == {
        0: "ant",
        1: "cat",
        2: "ant",
        3: "cat",
    }
    table = open_table(_describe(tmp_path, **COLUMNS, test="b.parquet"), 8)
    assert table.is_test.tolist() == [False] * 4 + [True] * 2


def test_text_labels_are_sorted_and_numbers_by_size(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", ["bee", "ant", "cat"])
    assert open_table(_describe(tmp_path, **COLUMNS), 8).class_names == ("ant", "bee", "cat")
    _parquet(tmp_path / "a.parquet", [10, 9, 100])
    table = open_table(_describe(tmp_path, **COLUMNS), 8)
    assert table.class_names == ("9", "10", "100")


def test_names_from_the_description(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", [1, 0], place=["sea", "land"])
    source = _describe(
        tmp_path,
        **COLUMNS,
        domain="place",
        class_names=["zebra", "ant"],
        domain_names=["sea", "land"],
    )
    table = open_table(source, 8)
    assert table.class_names == ("zebra", "ant")
    assert table.domain_names == ("sea", "land")
    assert _greys(source) == {0: ("ant", False), 1: ("zebra", False)}
    assert task_names(StreamSettings(source=source)) == ["sea", "land"]


def test_parts_with_classes_of_their_own(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", [0, 1], ["x", "y"])
    _parquet(tmp_path / "b.parquet", [0, 0], ["x", "z"])
    keys = {**COLUMNS, "train": ["a.parquet", "b.parquet"]}
    apart = open_table(_describe(tmp_path, **keys, separate_classes=True), 8)
    assert apart.class_names == ("a/x", "a/y", "b/x", "b/z")
    assert np.bincount(apart.labels).tolist() == [1, 1, 2]
    shared = open_table(_describe(tmp_path, **keys), 8)
    assert shared.class_names == ("x", "y", "z")
    assert np.bincount(shared.labels).tolist() == [3, 1]


def test_json_with_relative_paths(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(["images"], each=4)
    rows = [
        {"file": f"images/{row:02}.png", "label": label, "domain": domain}
        for row, (label, domain) in enumerate([("b", "x"), ("a", "x"), ("b", "y"), ("a", "y")])
    ]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = _describe(root, kind="json", train="rows.jsonl", image="file", domain="domain")
    table = open_table(source, 12)
    assert table.class_names == ("a", "b")
    assert table.domain_names == ("x", "y")
    # The pictures are part of what the cache looks at.
    Image.new("RGB", (12, 12), (1, 2, 3)).save(root / "images" / "02.png")
    assert (open_table(source, 12).images == (1, 2, 3)).all((1, 2, 3)).sum() == 1
    (root / "images" / "02.png").unlink()
    with pytest.raises(DataError, match=r"row 2 of rows\.jsonl.*no such image file"):
        open_table(source, 12)


def test_a_table_names_images_of_its_folder_only(image_folder: Folder, tmp_path: Path) -> None:
    root = image_folder(["images"])
    Image.new("RGB", (4, 4)).save(tmp_path / "private.png")
    for path in ("../private.png", str(tmp_path / "private.png"), "images/../../private.png"):
        (root / "rows.csv").write_text(f"image,label\nimages/00.png,a\n{path},b\n")
        with pytest.raises(DataError, match=r"row 1 of rows\.csv, line 3 .*outside") as error:
            open_table(_describe(root, kind="csv", train="rows.csv"), 12)
        assert "path: of the description" in str(error.value)
    (root / "rows.csv").write_text(f"image,label\n{root}/images/00.png,a\nimages/01.png,b\n")
    assert len(open_table(_describe(root, kind="csv", train="rows.csv"), 12)) == 2


def test_labels_of_csv_are_text_as_written(image_folder: Folder) -> None:
    root = image_folder(["."])
    labels = ["007", "7", "NA", "None", " a", "1e3"]
    rows = [f"{row % 5:02}.png,{label}" for row, label in enumerate(labels)]
    (root / "rows.csv").write_text("\n".join(["image,label", *rows]))
    table = open_table(_describe(root, kind="csv", train="rows.csv"), 12)
    assert set(table.class_names) == set(labels)
    (root / "rows.csv").write_text("image,label\n00.png,a\n\n01.png,\n")
    with pytest.raises(DataError, match=r"row 1 of rows\.csv, line 4: no label"):
        open_table(_describe(root, kind="csv", train="rows.csv"), 12)


@pytest.mark.parametrize("labels", [["a", "", "b"], ["a", "  ", "b"], [0.5, float("nan"), 1.0]])
def test_a_label_that_is_missing_in_parquet(tmp_path: Path, labels: list[object]) -> None:
    _parquet(tmp_path / "a.parquet", labels)
    with pytest.raises(DataError, match=r"row 1 of a\.parquet: no kind"):
        open_table(_describe(tmp_path, **COLUMNS), 8)


def test_imagefolder_says_what_it_leaves_out(image_folder: Folder) -> None:
    image_folder(["train/ant", "train/bee"])
    root = image_folder(["validation/ant", "validation/bee"], each=2)
    (root / "train" / "ant" / "1.heif").write_text("")
    notes = open_table(_describe(root, kind="imagefolder", train="train"), 12).notes
    assert notes == (
        "mine: no part for testing, so a fifth of every class is held out",
        "mine: left out: .yaml (1), .heif (1)",
        "mine: 4 of 14 images are in no part that the description names",
    )


def test_imagefolder_through_datasets(image_folder: Folder) -> None:
    leaves = ["ant", "bee"]
    image_folder([f"train/{leaf}" for leaf in leaves])
    root = image_folder([f"validation/{leaf}" for leaf in leaves], each=2)
    source = _describe(root, kind="imagefolder", train="train", test="validation")
    table = open_table(source, 12)
    assert table.class_names == ("ant", "bee")
    assert table.is_test.sum() == 4
    with pytest.raises(DataError, match="cannot be read"):
        open_table(_describe(root, kind="imagefolder", train="no_such_split"), 12)


def test_a_described_folder(image_folder: Folder) -> None:
    root = image_folder(["photo/ant", "photo/bee"])
    table = open_table(_describe(root, kind="folder"), 12)
    assert table.name == "mine"
    assert table.domain_names == ("photo",)


def test_stdout_and_the_progress_bars_stay_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _parquet(tmp_path / "a.parquet", [0, 1, 1], ["x", "y"])
    capfd.readouterr()
    had = datasets.are_progress_bars_disabled()
    open_table(_describe(tmp_path, **COLUMNS), 8)
    assert datasets.are_progress_bars_disabled() == had
    assert capfd.readouterr() == ("", "")


def test_datasets_leaves_nothing_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    _parquet(tmp_path / "a.parquet", [0, 1, 1], ["x", "y"])
    open_table(_describe(tmp_path, **COLUMNS), 8)
    assert [path.name for path in own_cache.iterdir()] == ["images"]


def test_an_unknown_key(tmp_path: Path) -> None:
    source = _describe(tmp_path, **COLUMNS, domian="place")
    with pytest.raises(ConfigError, match=r"mine\.yaml:\d: unknown key 'domian'") as error:
        open_table(source, 8)
    assert "did you mean 'domain'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: [parquet", "yaml:1: not YAML"),
        ("- a\n- b\n", "not a description"),
        ("kind: parquet\n", "'path' is missing"),
        ("kind: zip\npath: .\n", "kind: Input should be"),
    ],
)
def test_a_description_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        open_table(str(tmp_path / "mine.yaml"), 8)
    assert "mine.yaml" in str(error.value)


def test_a_description_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no file .*gone\.yaml"):
        open_table(str(tmp_path / "gone.yaml"), 8)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no folder"):
        open_table(_describe(tmp_path, **{**COLUMNS, "path": "gone"}), 8)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    _parquet(tmp_path / "aa.parquet", [0, 1], ["x", "y"])
    with pytest.raises(NotFoundError, match=r"there is no file .*a\.parquet") as error:
        open_table(_describe(tmp_path, **COLUMNS), 8)
    assert "did you mean 'aa.parquet'" in str(error.value)


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMTOOL_DATA", raising=False)
    with pytest.raises(ConfigError, match="MEMTOOL_DATA is not set") as error:
        create_stream(StreamSettings(source="pacs"), 32)
    assert "export MEMTOOL_DATA=" in str(error.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", [0, 1], ["x", "y"])
    with pytest.raises(DataError, match="no column 'picure'") as error:
        open_table(_describe(tmp_path, **{**COLUMNS, "image": "picure"}), 8)
    assert "did you mean 'picture'" in str(error.value)


def test_a_column_that_holds_no_images(tmp_path: Path) -> None:
    columns = {"size": [3, 4], "grey": [[1, 2], [3, 4]], "squares": [[[1, 2]], [[3, 4]]]}
    _parquet(tmp_path / "a.parquet", [0, 1], **columns, word=["x", "y"])
    for column in columns:
        with pytest.raises(DataError, match=f"'{column}' of a.parquet holds .* not images"):
            open_table(_describe(tmp_path, **{**COLUMNS, "image": column}), 8)
    with pytest.raises(DataError, match=r"row \d of a\.parquet \([xy]\): there is no such image"):
        open_table(_describe(tmp_path, **{**COLUMNS, "image": "word"}), 8)


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no columns here")
    with pytest.raises(DataError, match="mine cannot be read"):
        open_table(_describe(tmp_path, **COLUMNS), 8)


@pytest.mark.parametrize(("labels", "names"), [([0, None, 1], None), ([0, -1, 1], ["x", "y"])])
def test_a_row_without_a_label(
    tmp_path: Path, labels: list[object], names: list[str] | None
) -> None:
    _parquet(tmp_path / "a.parquet", labels, names)
    with pytest.raises(DataError, match=r"row 1 of a\.parquet: no kind"):
        open_table(_describe(tmp_path, **COLUMNS), 8)


def test_too_few_names(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", [0, 1, 2])
    with pytest.raises(DataError, match="kind is 2, but there are 2 names"):
        open_table(_describe(tmp_path, **COLUMNS, class_names=["x", "y"]), 8)
    _parquet(tmp_path / "a.parquet", ["x", "why"])
    with pytest.raises(DataError, match="'why' has no name"):
        open_table(_describe(tmp_path, **COLUMNS, class_names=["x", "y"]), 8)


def test_a_broken_image_is_named_by_row_and_part(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", [0, 1, 0], ["x", "y"])
    rows = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
    rows = rows.cast_column("picture", datasets.Image(decode=False))
    content = rows.to_list()
    content[1]["picture"]["bytes"] = b"broken"
    features = datasets.Features({**rows.features, "picture": datasets.Image()})
    datasets.Dataset.from_list(content, features=features).to_parquet(tmp_path / "b.parquet")
    source = _describe(tmp_path, **COLUMNS, test="b.parquet")
    with pytest.raises(DataError, match=r"mine, row 1 of b\.parquet.*not an image"):
        open_table(source, 8)


def test_the_hub_without_internet_names_the_remedy(tmp_path: Path) -> None:
    program = (
        "from memtool.errors import DataError\n"
        "from memtool.streams import open_table\n"
        "try:\n"
        "    open_table('cifar10_hub', 32)\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "MEMTOOL_CACHE": str(tmp_path / "cache"),
        },
    )
    assert "cifar10_hub cannot be read from the hub (uoft-cs/cifar10)" in answer.stdout
    assert "download it on another machine" in answer.stdout
