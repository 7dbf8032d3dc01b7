"""What PEFT's template of a model card leaves empty, and how to take it out."""

from __future__ import annotations

import re

_NEEDED = "[More Information Needed]"
_PLACEHOLDER = "# Model Card for Model ID"
_HEADING = re.compile(r"(#{1,6})\s")
_COMMENT = re.compile(r"<!--(?! peft-sparse:).*?-->", re.DOTALL)
# Lines that say nothing: placeholders behind a label, labels without a text, and sentences of the template.
_FILLER = re.compile(
    r"(- )?(\*\*[^*]+:?\*\*:?)?\s*(\[More Information Needed\])?"
    r"|Users \(both direct and downstream\) should be made aware of .*"
    r"|Use the code below to get started with the model\."
    r"|Carbon emissions can be estimated using the \[Machine Learning Impact calculator\].*"
)


def without_empty_sections(text: str) -> str:
    """The body of a card without the sections of PEFT's template that nobody filled in.

    Sections with a word of their own stay as they are, and so does a card that is not made of the template.

    Args:
        text: the body, or a part of it, without the metadata.
    """
    if _NEEDED not in text:
        return text
    kept: list[str] = []
    kept_level = 7  # of the heading that was kept last: from there on, those above it have something below them
    for level, lines in reversed(_sections(text)):
        body = "".join(lines[1:] if level else lines)
        is_empty = all(_FILLER.fullmatch(line.strip()) for line in _COMMENT.sub("", body).split("\n"))
        if level and lines[0].strip() == _PLACEHOLDER and is_empty:
            continue
        if not is_empty or (kept_level > level > 0 and kept_level < 7):
            kept.append("".join(lines) if not is_empty else lines[0] + ("\r\n" if "\r\n" in lines[0] else "\n"))
            kept_level = level or 7
    return "".join(reversed(kept))


def _sections(text: str) -> list[tuple[int, list[str]]]:
    """(level of the heading, its line and those below it), level 0 for what is above the first."""
    sections: list[tuple[int, list[str]]] = [(0, [])]
    is_code = False
    for line in text.splitlines(keepends=True):
        is_code ^= line.lstrip().startswith("```")
        heading = None if is_code else _HEADING.match(line)
        if heading:
            sections.append((len(heading[1]), []))
        sections[-1][1].append(line)
    return sections
