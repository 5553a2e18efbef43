"""The method's prompt: `[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ...`."""

import re
from dataclasses import dataclass, fields


# Any case, so that a tag that is nearly right is an error rather than part of a free text.
_TAG = re.compile(r"\[([A-Za-z_]+)\]:")


@dataclass(frozen=True)
class IDLoRAPrompt:
    """
    A prompt in the three parts that the released adapters were trained on (method section 7). Parts may be empty.
    `str(prompt)` formats it and [`~IDLoRAPrompt.parse`] reads it back.

    Attributes:
        visual (`str`): Scene and appearance.
        speech (`str`): The exact words that are spoken.
        sounds (`str`): Speaking style and ambience.

    Raises:
        ValueError: If all parts are empty, or a part itself contains a tag such as `[SPEECH]:`.
    """

    visual: str = ""
    speech: str = ""
    sounds: str = ""

    def __post_init__(self):
        for part in fields(self):
            value = getattr(self, part.name)
            if not isinstance(value, str):
                raise ValueError(f"`{part.name}` is of the type {type(value).__name__}; give a string.")
            value = value.strip()
            if tag := _TAG.search(value):
                raise ValueError(f"`{part.name}` contains the tag {tag[0]!r}: {value!r}; write the text without tags.")
            object.__setattr__(self, part.name, value)
        if not (self.visual or self.speech or self.sounds):
            raise ValueError("`prompt` is empty; give at least one of `visual`, `speech` and `sounds`.")

    def __str__(self) -> str:
        parts = ((part.name.upper(), getattr(self, part.name)) for part in fields(self))
        return " ".join(f"[{tag}]: {value}" for tag, value in parts if value)

    @classmethod
    def parse(cls, text: str) -> "IDLoRAPrompt":
        """
        Reads a tagged prompt; the inverse of `str(prompt)`.

        Args:
            text (`str`): For example `"[VISUAL]: a man at a desk [SPEECH]: Good evening. [SOUNDS]: calm, a clock"`.

        Raises:
            ValueError: If a tag is unknown or stands twice, or there is text before the first tag.
        """
        known = {part.name.upper(): part.name for part in fields(cls)}
        before, *rest = _TAG.split(text)
        tags, values = rest[0::2], rest[1::2]
        if before.strip():
            raise ValueError(f"`prompt` has text before its first tag: {before.strip()!r}; put it behind a tag.")
        for tag in tags:
            if tag not in known:
                raise ValueError(f"`prompt` has the unknown tag [{tag}]; the tags are {', '.join(map(repr, known))}.")
            if tags.count(tag) > 1:
                raise ValueError(
                    f"`prompt` has the tag [{tag}] {tags.count(tag)} times; join its texts under one tag."
                )
        return cls(**{known[tag]: value for tag, value in zip(tags, values)})


def prompt_text(prompt: "str | IDLoRAPrompt") -> str:
    """
    The text that is encoded: an [`IDLoRAPrompt`] formatted, a string as it is. A string with a tag in it is checked to
    be a well-formed tagged prompt.

    Raises:
        ValueError: If the prompt is empty, of another type, or its tags are unknown or repeated.
    """
    if isinstance(prompt, IDLoRAPrompt):
        return str(prompt)
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` is of the type {type(prompt).__name__}; give a string or an `IDLoRAPrompt`.")
    if not prompt.strip():
        raise ValueError(f"`prompt` is {prompt!r}; say what is seen, said and heard.")
    if _TAG.search(prompt):
        IDLoRAPrompt.parse(prompt)
    return prompt
