"""Forms: what is found in whole ones, and what is refused."""

from __future__ import annotations

import random

import pytest
from starlette.exceptions import HTTPException

from memtool.serving.forms import parsed

KIND = "multipart/form-data; boundary=xyz"
PIECES = (
    b"\r\n",
    b"--",
    b"xyz",
    b"-",
    b"\r",
    b"\n",
    b"\r\n--xy",
    b"\0",
    b"a",
    b"\r\n\r\n",
    b"\xff",
)


def test_whatever_is_in_the_parts_of_a_form_is_found() -> None:
    chance = random.Random(0)
    for _ in range(300):
        parts = [
            b"".join(chance.choices(PIECES, k=chance.randrange(12)))
            for _ in range(chance.randrange(1, 5))
        ]
        parts = [one.replace(b"\r\n--xyz", b"") for one in parts]
        if any(b"\r\n--xyz" in b"\r\n" + one + b"\r\n--" for one in parts):
            continue  # no boundary of these
        body = b"".join(
            b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="%d"\r\n\r\n%b\r\n'
            % (number, one)
            for number, one in enumerate(parts)
        )
        body = b"\r\n" * chance.randrange(2) + body + b"--xyz--" + b"\r\n" * chance.randrange(2)
        found = parsed(body, KIND, most=8)
        assert found.files == [(str(number), one) for number, one in enumerate(parts)]


def one(head: bytes, data: bytes = b"1") -> bytes:
    return b"--xyz\r\n" + head + b"\r\n\r\n" + data + b"\r\n--xyz--\r\n"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b'content-disposition:form-data; name="file"; filename="a b.png"', "a b.png"),
        (b'X: y\r\nContent-Disposition:  form-data; filename="a.png"; name="file"', "a.png"),
        (rb'Content-Disposition: form-data; name="file"; filename="a\"b.png"', 'a"b.png'),
        (b"Content-Disposition: form-data; name=file; filename=a.png", "a.png"),
        ('Content-Disposition: form-data; name="file"; filename="ö.png"'.encode(), "ö.png"),
        (b'Content-Disposition: form-data; name="file"', "file 1"),
    ],
)
def test_names_are_read_as_their_grammar_says(head: bytes, name: str) -> None:
    assert parsed(one(head), KIND, most=1).files == [(name, b"1")]


WHOLE = one(b'Content-Disposition: form-data; name="file"; filename="a"', b"data")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "in the middle"),
        (b"--xy", "in the middle"),
        (b"--xyz and more\r\nA: b\r\n\r\n1\r\n--xyz--", "cannot be read"),
        (b"--xyz\r\nA: " + b"b" * 20_000 + b"\r\n\r\n1\r\n--xyz--", "cannot be read"),
        (one(b"Content-Disposition: form-data"), "no name"),
        (one(b'Content-Disposition: form-data;\r\n name="file"'), "cannot be read"),
        (one(b'Content-Disposition: form-data; name="file"; filename="a\nb"'), "cannot be read"),
        (one(b'Content-Disposition: form-data; name="file"; filename="a\0b"'), "cannot be read"),
        *((WHOLE[:end], "in the middle") for end in range(6, len(WHOLE) - 3, 7)),
    ],
)
def test_what_is_no_whole_form_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(HTTPException, match="400") as refused:
        parsed(body, KIND, most=4)
    assert said in refused.value.detail
