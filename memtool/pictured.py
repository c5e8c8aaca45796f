"""Prompts that come with pictures: text as any other, which a model of images and text reads whole.

    prompt = Prompt("<image> What colour is it?", [picture])

Where text is all that is asked for, a `Prompt` is its text. Two are equal when their text and the
content of their pictures are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from memtool.errors import ConfigError


class Picture(Protocol):
    """A picture that has not been decoded: `name` says where it is from, `sha256` what is in it."""

    @property
    def name(self) -> str:
        """Where it is from, for messages."""

    @property
    def sha256(self) -> str:
        """The hash of its content."""

    def rgb(self) -> Any:
        """It as a PIL image of three channels. Raises DataError for what cannot be decoded."""


class Album:
    """The pictures of one prompt, in their order; two albums are never equal."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.pictures = tuple(pictures)

    @property
    def content(self) -> tuple[str, ...]:
        """The hashes of the pictures."""
        return tuple(one.sha256 for one in self.pictures)


class Prompt(str):
    """A text with pictures, which belong where the text has a model's mark for one (`<image>`).

    What is cut out of it or put together with `+` is text alone: see `together`.
    """

    album: Album

    def __new__(cls, text: str, pictures: Sequence[Picture]) -> Self:
        """`pictures` in the order of their marks."""
        made = super().__new__(cls, text)
        made.album = Album(pictures)
        return made

    def __getnewargs__(self) -> tuple[str, tuple[Picture, ...]]:  # type: ignore[override]
        """What a copy is made of."""
        return str(self), self.album.pictures

    def __eq__(self, other: object) -> bool:
        """Whether text and pictures are the same."""
        if not isinstance(other, str):
            return NotImplemented
        return super().__eq__(other) and self.album.content == content_of(other)

    def __ne__(self, other: object) -> bool:
        """As `==` says."""
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        """By text and pictures; without pictures that of the text."""
        return (
            hash((str.__hash__(self), self.album.content))
            if self.album.pictures
            else super().__hash__()
        )


def album_of(prompt: str) -> Album | None:
    """The pictures of a prompt; None for text alone."""
    return prompt.album if isinstance(prompt, Prompt) and prompt.album.pictures else None


def content_of(prompt: str) -> tuple[str, ...]:
    """The hashes of the pictures of a prompt, none for text alone."""
    album = album_of(prompt)
    return () if album is None else album.content


def require_text_alone(prompts: Sequence[str], what: str) -> None:
    """Raise ConfigError for prompts with pictures, where `what` keeps or reads their text alone."""
    if any(album_of(one) is not None for one in prompts):
        raise ConfigError(
            f"{what} with prompts that come with pictures",
            expected="prompts of text alone",
            remedy=f"leave {what} out",
        )


def together(parts: Sequence[str]) -> str:
    """Texts one after another, with all their pictures."""
    albums = [album for part in parts if (album := album_of(part)) is not None]
    text = "".join(str(part) for part in parts)
    pictures = [one for album in albums for one in album.pictures]
    return Prompt(text, pictures) if pictures else text


def as_json(prompts: Sequence[str]) -> list[Any]:
    """What identifies prompts: text as it is, one with pictures as a list with their hashes."""
    return [[str(one), *content_of(one)] if album_of(one) else one for one in prompts]
