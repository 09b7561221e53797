"""Checks every link of the built site with lychee (https://github.com/lycheeverse/lychee): `make docs` runs it.

python docs/scripts/dead_links.py [--online] [site]

Pages, anchors, images, scripts and styles must exist, and no page may load anything from another site: the
documentation can be read without a network. Links to other sites are requested with `--online` only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
URL = "https://gspo-kernels.github.io/gspo-kernels/"  # mkdocs.yml's site_url: what is below it is below `site` here
TAG = re.compile(r"<(?:script|img|iframe|link)\b[^>]*>")
ELSEWHERE = re.compile(r"""\b(?:src|href)=["']((?:https?:)?//[^"']*)["']""")


def command(site: Path, *, online: bool) -> list[str]:
    """lychee's, with addresses of the published site mapped to the built one. 404.html has such addresses only."""
    lychee = Path(sys.executable).with_name("lychee")
    published = "/" + URL.split("/", 3)[3]
    return [
        str(lychee), "--no-progress", "--include-fragments", "--include-verbatim", "--root-dir", str(site),
        "--remap", f"^{re.escape(URL)} {site.as_uri()}/",
        "--remap", f"^{re.escape(site.as_uri() + published)}? {site.as_uri()}/",
        *(() if online else ("--offline",)),
        f"{site}/**/*.html",
    ]  # fmt: skip


def loaded_from_elsewhere(site: Path) -> list[str]:
    """What a browser would request from another site to show a page."""
    found = []
    for page in sorted(site.rglob("*.html")):
        tags = [tag for tag in TAG.findall(page.read_text()) if not tag.startswith("<link") or "stylesheet" in tag]
        found += [f"{page.relative_to(site)}: {url}" for tag in tags for url in ELSEWHERE.findall(tag)]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "site")
    parser.add_argument("--online", action="store_true", help="request links to other sites too")
    options = parser.parse_args(arguments)
    site = options.site.resolve()
    if not (site / "index.html").exists():
        parser.error(f"{site} has no index.html: build the site first, by make docs")
    elsewhere = loaded_from_elsewhere(site)
    if elsewhere:
        print("A page may load nothing from another site:", *elsewhere, sep="\n  ", file=sys.stderr)
    return subprocess.run(command(site, online=options.online)).returncode or bool(elsewhere)


if __name__ == "__main__":
    sys.exit(main())
