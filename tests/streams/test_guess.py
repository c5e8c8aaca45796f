"""A path is opened by what it is; pictures that cannot be read are one error, or left out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from memtool.errors import DataError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams import create_stream, load_image, open_table


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    for number in range(12):
        pixels = np.full((8, 16, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


def _rows():
    return [(f"{number}.png", "cat" if number % 2 else "dog") for number in range(12)]


def _write(root, kind):
    rows = _rows()
    match kind:
        case "csv":
            lines = ["file,class,camera", *(f"{file},{word},x" for file, word in rows)]
            (root / "all.csv").write_text("\n".join(lines))
            return root / "all.csv"
        case "jsonl":
            lines = [f'{{"img": "{file}", "target": "{word}"}}' for file, word in rows]
            (root / "all.jsonl").write_text("\n".join(lines))
            return root / "all.jsonl"
    import datasets

    words = [word for _, word in rows]
    data = datasets.Dataset.from_dict(
        {"image": [(root / f).read_bytes() for f, _ in rows], "y": words}
    )
    if kind == "parquet":
        data.to_parquet(root / "all.parquet")
        return root / "all.parquet"
    datasets.DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(root / "kept")
    return root / "kept"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved"])
def test_a_table_is_opened_by_what_it_is(pictures, kind):
    table = open_table(str(_write(pictures, kind)), 8)
    assert len(table) == (16 if kind == "saved" else 12)
    assert table.is_test.sum() == (4 if kind == "saved" else 0)
    assert table.class_names == ("cat", "dog")
    assert "taken for" in table.notes[0]
    assert kind != "csv" or "not used: camera" in table.notes[0]


def test_columns_that_say_nothing_are_listed(pictures):
    (pictures / "odd.csv").write_text("a,b\n1.png,cat\n")
    with pytest.raises(DataError, match=r"odd.csv: none of its columns .*\(a, b\)"):
        open_table(str(pictures / "odd.csv"), 8)


@pytest.mark.parametrize("setting", ["dil", "trace"])
def test_a_path_that_is_not_there_is_called_that(pictures, setting):
    path = pictures.parent / "dtaa" / "x.csv"
    with pytest.raises(NotFoundError, match=r"there is no file or folder .*dtaa/x.csv"):
        create_stream(StreamSettings(source=str(path), setting=setting), 8)


def test_all_that_cannot_be_read_is_one_error_or_left_out(pictures):
    source = str(_write(pictures, "csv"))
    whole = open_table(source, 8)
    (pictures / "3.png").write_bytes(b"no picture")
    (pictures / "8.png").unlink()
    with pytest.raises(DataError, match="2 of 12 images") as error:
        open_table(source, 8)
    assert "3.png" in str(error.value)
    assert "8.png" in str(error.value)
    assert "stream.skip_broken" in str(error.value)
    left = open_table(source, 8, skip_broken=True)
    assert len(left) == 10
    assert left.images.shape == (10, 8, 8, 3)
    assert {len(left.content), len(left.labels)} == {10}
    assert any("2 of 12" in note and "left out" in note for note in left.notes)
    assert set(left.content) < set(whole.content)
    assert np.array_equal(left.images, open_table(source, 8, skip_broken=True).images)
    with pytest.raises(DataError):
        open_table(source, 8)


def test_a_picture_becomes_square_as_it_is_said(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8], pixels[:, 16:] = 255, 255
    file = tmp_path / "wide.png"
    Image.fromarray(pixels).save(file)
    centre, squash, pad = (load_image(file, 24, crop) for crop in ("centre", "squash", "pad"))
    assert centre.max() < 128
    assert (squash[:, 0] > 250).all()
    assert (pad[0] == 0).all()
    assert (pad[12, 0] > 250).all()


def test_the_crop_is_of_what_was_learned_from(pictures):
    source = str(_write(pictures, "csv"))
    prints = {open_table(source, 8, crop=crop).fingerprint for crop in ("centre", "squash", "pad")}
    assert len(prints) == 3
