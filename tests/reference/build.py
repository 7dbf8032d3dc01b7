"""Build the API reference from the docstrings, with README and guides as pages: python tests/reference/build.py FOLDER

Fails if a public name of the package has no entry, so that a broken reference is seen in CI. Needs the extra `docs`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import markdown2
import pdoc

import peft_sparse

ROOT = Path(__file__).parents[2]
PAGE = '<!doctype html><meta charset="utf-8"><title>{title}</title><style>body{{max-width:60rem;margin:2rem auto;\
font-family:sans-serif;line-height:1.5}}table{{border-collapse:collapse}}td,th{{border:1px solid #ccc;padding:.3rem}}\
pre{{background:#f4f4f4;padding:.7rem;overflow:auto}}</style><p>{menu}</p>{body}'


def pages(folder: Path) -> None:
    """Write README and guides as HTML, with links to each other."""
    guides = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]}
    menu = " | ".join([*(f'<a href="{name}.html">{name}</a>' for name in guides), '<a href="peft_sparse.html">API</a>'])
    for name, path in guides.items():
        body = markdown2.markdown(path.read_text("utf-8"), extras=["fenced-code-blocks", "tables", "cuddled-lists"])
        body = re.sub(r'href="(?:\.\./|examples/)?(\w+)\.md"', r'href="\1.html"', body)
        (folder / f"{name}.html").write_text(PAGE.format(title=name, menu=menu, body=body), encoding="utf-8")


def main(folder: Path) -> None:
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("peft_sparse", output_directory=folder)
    html = (folder / "peft_sparse.html").read_text("utf-8")
    missing = [name for name in peft_sparse.__all__ if f'id="{name}"' not in html]
    if missing:
        raise SystemExit(f"the reference lacks {', '.join(missing)}")
    pages(folder)
    print(f"{len(peft_sparse.__all__)} names in {folder / 'peft_sparse.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
