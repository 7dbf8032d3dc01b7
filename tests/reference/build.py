"""Build the API reference from the docstrings, with README, guides and pictures: python tests/reference/build.py FOLDER

Fails if a public name of the package has no entry, a page links to one that is not there, or a plot cannot be drawn, so
that a broken reference is seen in CI. Needs the extra `docs`.
"""

from __future__ import annotations

import html
import re
import sys
import tempfile
from pathlib import Path

import markdown2
import pdoc
from pictures import PICTURES, draw

import peft_sparse

ROOT = Path(__file__).parents[2]
PAGE = '<!doctype html><meta charset="utf-8"><title>{title}</title><style>body{{max-width:60rem;margin:2rem auto;\
font-family:sans-serif;line-height:1.5}}table{{border-collapse:collapse}}td,th{{border:1px solid #ccc;padding:.3rem}}\
pre{{background:#f4f4f4;padding:.7rem;overflow:auto}}</style><p>{menu}</p>{body}'


def pages(folder: Path) -> None:
    """Write README and guides as HTML, with links to each other, and a page with a picture of each plot."""
    others = [ROOT / "CONTRIBUTING.md", ROOT / "peft_sparse" / "checkpoints" / "FORMAT.md"]
    guides = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md")), *others]}
    bodies = {}
    for name, path in guides.items():
        body = markdown2.markdown(path.read_text("utf-8"), extras=["fenced-code-blocks", "tables", "cuddled-lists"])
        bodies[name] = re.sub(r'href="[\w./]*?(\w+)\.md"', r'href="\1.html"', body)
    bodies["pictures"] = "<h1>Pictures</h1>" + "".join(
        f"<h2>{one.name}</h2><p>{one.caption}</p><pre>{html.escape(one.call)}</pre>"
        f'<img src="pictures/{one.name}.svg" alt="{html.escape(one.caption)}" style="max-width:100%">'
        for one in PICTURES
    )
    menu = " | ".join([*(f'<a href="{name}.html">{name}</a>' for name in bodies), '<a href="peft_sparse.html">API</a>'])
    for name, body in bodies.items():
        (folder / f"{name}.html").write_text(PAGE.format(title=name, menu=menu, body=body), encoding="utf-8")


def pictures(folder: Path) -> None:
    """Draw what the page of pictures shows."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        draw(folder, Path(scratch))


def load_names() -> None:
    """Put names that are loaded when asked for into the package: pdoc asks its dictionary, and knows no others."""
    for name in peft_sparse.__all__:
        setattr(peft_sparse, name, getattr(peft_sparse, name))


def main(folder: Path) -> None:
    pdoc.render.configure(docformat="google")
    load_names()
    pdoc.pdoc("peft_sparse", output_directory=folder)
    text = (folder / "peft_sparse.html").read_text("utf-8")
    entries = {name: re.search(rf'<section id="{name}">.*?</section>', text, re.S) for name in peft_sparse.__all__}
    # pdoc gives a class that goes by another name (DistillationTrainer, made by distilled_trainer) no docstring.
    own = {name for name in entries if getattr(getattr(peft_sparse, name), "__name__", name) == name}
    missing = [
        name
        for name, entry in entries.items()
        if entry is None or (name in own and 'class="docstring"' not in entry[0])
    ]
    if missing:
        raise SystemExit(f"the reference lacks {', '.join(missing)}, or what their docstrings say")
    pictures(folder / "pictures")
    pages(folder)
    broken = [
        f"{page.name}: {link}"
        for page in folder.glob("*.html")
        for link in re.findall(r'(?:href|src)="([\w/]+\.(?:html|svg))"', page.read_text("utf-8"))
        if not (folder / link).is_file()
    ]
    if broken:
        raise SystemExit(f"pages lead nowhere: {', '.join(broken)}")
    print(f"{len(peft_sparse.__all__)} names in {folder / 'peft_sparse.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
