"""Hooks of the documentation's build: pages and plots outside of docs/ join it, and every public name must be in it.

A name is public if `__all__` of `gspo_kernels`, or of a module of `gspo_kernels.integrations`, has it. What the package
itself imports from an integration is public by the package's name alone. The check only reads the source and the built
pages, so neither torch nor a trainer needs to be installed.
"""

from __future__ import annotations

import ast
import html
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gspo_kernels"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md")
PLOTS = "benchmarks/results"

documented: set[str] = set()  # anchors of the pages that this build has written


def public_names() -> Iterator[str]:
    package = PACKAGE / "__init__.py"
    yield from (f"gspo_kernels.{name}" for name in exported(package))
    for path in sorted((PACKAGE / "integrations").glob("[!_]*")):
        source = path / "__init__.py" if path.is_dir() else path
        if source.suffix == ".py" and source.exists():
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            known = imported(package, f"integrations.{path.stem}")
            yield from (f"{module}.{name}" for name in exported(source) if name not in known)


def exported(source: Path) -> list[str]:
    for statement in ast.parse(source.read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(statement.value)
            return names
    raise ValueError(f"{source}: expected __all__, the list of its public names")


def imported(source: Path, module: str) -> set[str]:
    """The names that a source imports from a module of its own package."""
    statements = [each for each in ast.parse(source.read_text()).body if isinstance(each, ast.ImportFrom)]
    return {alias.name for each in statements if each.module == module for alias in each.names}


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # where the tests import this file there is no mkdocs

    plots = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / PLOTS).glob("*.png"))]
    for name in (*PAGES, *plots):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links are written for the repository, where a page of the root is not beside those of docs/."""
    page.meta.setdefault("description", description(markdown))
    if page.file.src_uri in PAGES:
        return markdown.replace("](docs/", "](")
    for name in (*PAGES, PLOTS):
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown


def description(markdown: str) -> str:
    """The first paragraph of more than a few words, for search engines and for links to the page."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    paragraphs = re.findall(r"^[\w`*[].*(?:\n\S.*)*", prose, flags=re.MULTILINE)
    first = next((each for each in paragraphs if len(each) > 60), "")
    text = re.sub(r"[`*]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", first))
    return html.escape(textwrap.shorten(text, 200, placeholder="..."))


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """A plot is a link to itself, to be read in full size. Numbers and ranges in a table stay on one line each."""
    if page.file.src_uri.startswith("api/"):
        documented.update(re.findall(r'id="(gspo_kernels[\w.]*)"', content))
    content = re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', content)
    short = r"[^<]{1,12}|[^<(]{1,18}"  # such as 2.3e-09, 0.58 (101%) and 48.8% -&gt; 82.8%
    content = re.sub(rf'(?<=<td style="text-align: right;)(?=">({short})</td>)', " white-space: nowrap;", content)
    ranged = r"([^<(]{1,12}) (\([^<()]{1,24}\))"  # such as 84% (77% to 88%), which may take two lines
    whole = [rf'<span style="white-space: nowrap;">\{part}</span>' for part in (1, 2)]
    return re.sub(rf'(?<=<td style="text-align: right;">){ranged}(?=</td>)', " ".join(whole), content)


def on_post_build(**_: Any) -> None:
    missing = [name for name in public_names() if name not in documented]
    if missing:
        raise SystemExit(f"docs/api: expected every public name; there is no `::: {'`, `::: '.join(missing)}`")
