"""Thresholds that keep their promise, and names of files that mean what they say."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtool.errors import ConfigError, CorruptError, DataError, NotFoundError
from memtool.inference.predictor import Predicted
from memtool.inference.sources import files_named, prompts_in
from memtool.methods.calibration import Calibration, digest_of
from memtool_stores import MemoryStore, limits

FIXTURES = Path(__file__).parents[1] / "stores" / "fixtures"

IMAGES = st.lists(st.tuples(st.integers(0, 6).map(float), st.booleans()), min_size=19, max_size=60)


def calibration(pairs: list[tuple[float, bool]]) -> Calibration:
    sure, right = zip(*pairs, strict=True)
    return Calibration(measured="0", sure=sure, right=right)


@settings(max_examples=60, deadline=None)
@given(IMAGES, st.sampled_from([0.05, 0.1, 0.3]))
def test_the_threshold_is_the_lowest_that_vouches(
    pairs: list[tuple[float, bool]], wrong: float
) -> None:
    found = calibration(pairs).threshold(wrong)

    def vouches(least: float) -> bool:
        errors = sum(sure >= least and not right for sure, right in pairs)
        return (1 + errors) / (len(pairs) + 1) <= wrong + 1e-12

    assert vouches(found.sure)
    lower = [sure for sure, _ in pairs if 0 < sure < found.sure]
    assert not any(vouches(one) for one in lower)
    answered = [right for sure, right in pairs if sure >= found.sure]
    assert found.coverage == pytest.approx(len(answered) / len(pairs))
    assert found.accuracy == (pytest.approx(np.mean(answered)) if answered else None)
    assert found.sure > 0  # what is unlike all that was learned is sure 0, and never answered


def test_new_images_get_no_more_wrong_labels_than_were_allowed() -> None:
    rng = np.random.default_rng(0)
    wrong, shares = 0.1, []
    for _ in range(400):
        sure = rng.exponential(2.0, 60)
        right = rng.random(60) < 1 - 0.6 * np.exp(-sure)
        held, new = slice(0, 40), slice(40, 60)
        pairs = zip(sure[held].tolist(), right[held].tolist(), strict=True)
        least = calibration(list(pairs)).threshold(wrong).sure
        shares.append(((sure[new] >= least) & ~right[new]).mean())
    spread = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= wrong + 3 * spread
    assert np.mean(shares) > wrong / 2  # and it answers what it may


def test_too_few_images_vouch_for_a_larger_share_which_is_named() -> None:
    few = calibration([(1.0, True)] * 18)
    with pytest.raises(ConfigError, match="18 held-back images cannot vouch") as caught:
        few.threshold(0.05)
    assert "19 of them" in str(caught.value.expected)
    share = float(str(caught.value.remedy).split()[1].rstrip(","))
    assert few.threshold(share).coverage == 1.0
    assert calibration([(1.0, True)] * 19).threshold(0.05).coverage == 1.0


@pytest.mark.parametrize(
    "blob",
    [
        b"[]",
        b'{"measured": "0", "sure": [1.0], "right": []}',
        b'{"measured": "0", "sure": [-1.0], "right": [true]}',
        b'{"measured": "0", "sure": [NaN], "right": [true]}',
        b'{"measured": "0", "sure": [], "right": []}',
    ],
)
def test_a_blob_that_is_no_calibration_is_corrupt(blob: bytes) -> None:
    class View:
        version = "0"

        def has_blob(self, name: str) -> bool:
            return name == Calibration.blob

        def blob(self, name: str) -> bytes:
            del name
            return blob

    with pytest.raises(CorruptError, match="blob 'calibration'"):
        Calibration.load(View())  # type: ignore[arg-type]


def test_a_calibration_that_an_older_memtool_measured_holds(tmp_path: Path) -> None:
    """The digest is that of the code before schema 4, of a version with keys and a blob."""
    with zipfile.ZipFile(FIXTURES / "schema-1.zip") as archive:
        archive.extractall(tmp_path)
    view = MemoryStore.open(tmp_path).view()
    assert view.state.keys is not None
    measured = "1872b5f3f876bc0877f3b3b0534491758fc6fbd381d2330fba1f4414270883df"
    assert digest_of(view) == measured


def test_what_is_unlike_all_that_was_learned_is_not_sure() -> None:
    one = Predicted((("a", 1.0),), (), 1, 2.0, True, 40.0)
    assert (one.sure, one.label) == (0.0, "a")
    assert Predicted((("a", 1.0),), (), 1, 0.5, False, 40.0).sure == 40.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.png", "a/2.JPG", "a/1.png", "a/deep/x.webp", "a/no.txt", "[b].png", ".h.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["b.png", "a"], ["b.png", "a/1.png", "a/2.JPG", "a/deep/x.webp"]),
        (["a", "b.png", "b.png"], ["a/1.png", "a/2.JPG", "a/deep/x.webp", "b.png", "b.png"]),
        (["a/**"], ["a/1.png", "a/2.JPG", "a/deep/x.webp"]),
        (["a/*"], ["a/1.png", "a/2.JPG", "a/deep/x.webp"]),
        (["a/*.txt"], ["a/no.txt"]),
        (["a/no.txt"], ["a/no.txt"]),
        (["[b].png"], ["[b].png"]),
        (["?.png"], ["b.png"]),
        (["-", "b.png"], ["a/2.JPG", "lost.png", "b.png"]),
    ],
    ids=" ".join,
)
def test_words_name_files_in_their_order(words: list[str], files: list[str], folder: Path) -> None:
    found = files_named(words, io.BytesIO(b"a/2.JPG\n\nlost.png\n"))
    assert [str(file) for file in found.files] == files


def test_a_list_may_end_its_names_with_nul_and_hold_any_bytes(folder: Path) -> None:
    found = files_named(["-"], io.BytesIO(b"two\nlines.png\0caf\xe9.png\0"))
    assert [os.fsencode(file) for file in found.files] == [b"two\nlines.png", b"caf\xe9.png"]


def test_what_names_nothing_is_named_all_at_once(folder: Path) -> None:
    words = [f"lost {number}" for number in range(25)]
    with pytest.raises(NotFoundError) as caught:
        files_named(["b.png", *words], io.BytesIO())
    assert "lost 19 and 5 more" in str(caught.value)
    with pytest.raises(DataError, match="the list is empty"):
        files_named(["-"], io.BytesIO(b"\n"))
    before = limits.current()
    try:
        limits.use(limits.Limits(data_files=2))
        with pytest.raises(DataError, match="data_files"):
            files_named(["b.png", "b.png", "b.png"], io.BytesIO())
    finally:
        limits.use(before)


def test_prompts_are_lines_of_text_or_of_json(folder: Path) -> None:
    file = folder / "prompts"
    file.write_text('one\n\n{"prompt": "two {3}"}\n', encoding="utf-8")
    assert prompts_in(file) == ["one", "two {3}"]
    file.write_text('{"text": "two"}', encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        prompts_in(file)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompts"):
        prompts_in(file)
