"""The documentation: its examples run, its links lead somewhere, and no public name or setting is missing from it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import dead_links  # docs/scripts/dead_links.py
import logit_table  # docs/scripts/logit_table.py
import objective_table  # docs/scripts/objective_table.py
import pytest
import torch
from modes import DEFAULT_MODE

import gspo_kernels
from gspo_kernels.rows.dispatch import Backend

ROOT = Path(__file__).parents[2]
EXAMPLES = (
    "README.md", "docs/index.md", "docs/concepts.md", "docs/extending.md", "docs/objectives.md", "docs/ppo.md",
    "docs/kept-sets.md", "docs/clip-range.md",
)  # fmt: skip
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
REPOSITORY = "https://github.com/gspo-kernels/gspo-kernels/blob/main/"
FILES = "https://raw.githubusercontent.com/gspo-kernels/gspo-kernels/main/"  # of the same; an image needs this address

pytestmark = DEFAULT_MODE


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_in_order(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one namespace: the first block needs nothing, and each later one may use what came before it."""
    blocks = blocks_of(ROOT / page)
    assert blocks
    names: dict[str, Any] = {"__name__": "example"}
    with torch.random.fork_rng():
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}, example {number + 1}", "exec", dont_inherit=True), names)
    if page == "README.md":
        losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
        assert len(losses) == 3 and losses[-1] < losses[0], "the first example is three steps of training"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_every_python_block_is_python(page: Path) -> None:
    for block in blocks_of(page):
        ast.parse(block)


def test_the_readme_is_short_and_begins_with_what_it_is_speed_and_memory() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:40])
    assert "## Speed and memory" in first and "![" in first and "<!-- measured: end -->" in first
    assert all(not line.startswith("    ") for line in first.splitlines()), "code is fenced"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in targets_of(page):
        own = target.startswith((REPOSITORY, FILES))
        if "://" in target and not own:
            continue
        name, _, anchor = target.removeprefix(REPOSITORY).removeprefix(FILES).partition("#")
        found = ((ROOT if own else page.parent) / name).resolve() if name else page
        assert found.exists() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors_of(found), target


def test_links_of_the_readme_work_on_the_package_index() -> None:
    """It has no folder beside the README, and shows images from their own address."""
    readme = ROOT / "README.md"
    assert [target for target in targets_of(readme) if not target.startswith(("https://", "#"))] == []
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", readme.read_text())
    assert images and all(image.startswith(FILES) for image in images)


def targets_of(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """In backticks, such as `csrc/row_math.h`; in a log of changes too."""
    names = re.findall(r"`((?:gspo_kernels|csrc|tests|benchmarks|examples|docs)/[\w/.-]+)`", page.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


# --- the built site ---------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    if not Path(dead_links.command(tmp_path, online=False)[0]).exists():
        pytest.skip("needs lychee, which make docs installs")
    (tmp_path / "style.css").touch()
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="style.css"><h2 id="here">A page</h2>'
        f'<a href="#here">here</a><a href="{dead_links.URL}index.html#here">published</a>'
    )
    return tmp_path


def test_links_of_the_site_that_lead_somewhere_pass(site: Path) -> None:
    assert dead_links.main([str(site)]) == 0


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ('<a href="#there">', "#there"),
        ('<a href="index.html#there">', "#there"),
        (f'<a href="{dead_links.URL}gone.html">', "gone.html"),
        ('<img src="gone.png">', "gone.png"),
        ('<script src="gone.js"></script>', "gone.js"),
        ('<link rel="stylesheet" href="gone.css">', "gone.css"),
        ('<script src="https://example.com/far.js"></script>', "far.js"),
        ('<link href="//example.com/far.css" rel="stylesheet">', "far.css"),
        ("<img src='https://example.com/far.png'>", "far.png"),
    ],
)
def test_a_dead_link_of_the_site_fails_the_build(
    broken: str, named: str, site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (site / "page.html").write_text(broken)
    assert dead_links.main([str(site)]) != 0
    assert named in "".join(capfd.readouterr())


def test_a_plot_is_a_link_to_itself_and_short_numbers_stay_whole() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    image, cell = '<img alt="A plot" src="a.png" />', '<td style="text-align: right;">{}</td>'
    short, long = ["2.3e-09", "0.58 (101%)", "48.8% -&gt; 82.8%"], ["84% (77% to 88%)", "its kernel needs a GPU"]
    html = hooks().on_page_content(image + "".join(map(cell.format, short + long)), page)
    assert html.startswith(f'<a href="a.png">{image}</a>')
    assert re.findall(r"; white-space: nowrap;\">(.+?)</td>", html) == short
    assert re.findall(r"<span style=\"white-space: nowrap;\">(.+?)</span>", html) == ["84%", "(77% to 88%)"]


def test_the_description_of_a_page_is_its_first_paragraph() -> None:
    code = "```bash\npip install a-package-whose-name-has-more-characters-than-are-needed\n```"
    first = "[`GSPOTrainer`](api.md) is a **trainer** that computes the loss,\nand nothing < else."
    page = f"# TRL\n\n{code}\n\nTwo lines change:\n\n{first}\n\nNot this.\n"
    assert hooks().description(page) == "GSPOTrainer is a trainer that computes the loss, and nothing &lt; else."
    assert len(hooks().description(first * 9)) < 210
    assert hooks().description("# Only\n\n## Headings\n") == ""


def test_the_gallery_shows_every_plot() -> None:
    gallery = ROOT / "docs" / "gallery.md"
    shown = {(gallery.parent / path).resolve() for path in re.findall(r"!\[.+?\]\((\S+)\)", gallery.read_text())}
    assert shown == {*ROOT.glob("docs/**/*.png"), *ROOT.glob("benchmarks/results/*.png")}


# --- the release ------------------------------------------------------------------------------------------------------


def test_the_citation_is_of_the_newest_release() -> None:
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    released = re.search(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released and (cited["version"], cited["date-released"]) == released.groups()


# --- the reference ----------------------------------------------------------------------------------------------------


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented() -> set[str]:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))


def test_the_reference_has_every_public_name_and_no_other() -> None:
    assert documented() == set(hooks().public_names())


def test_the_public_names_are_those_of_the_package() -> None:
    names = {name.removeprefix("gspo_kernels.") for name in hooks().public_names()}
    own = {name for name in names if not name.startswith("integrations.")}
    assert own == set(gspo_kernels.__all__)
    modules = {path.stem for path in (ROOT / "gspo_kernels" / "integrations").glob("[!_]*")}
    assert {name.split(".")[1] for name in names - own} == modules - {"transformers"}  # whose names the package has


@pytest.mark.parametrize("name", gspo_kernels.__all__)
def test_a_public_name_is_described(name: str) -> None:
    value = getattr(gspo_kernels, name)
    text = inspect.getdoc(value)
    assert text and not text.startswith(f"{name}("), "a dataclass's generated docstring says nothing"


@pytest.mark.parametrize("name", [name for name in gspo_kernels.__all__ if name.islower()])
def test_a_function_has_the_arguments_that_its_docstring_describes(name: str) -> None:
    function = getattr(gspo_kernels, name)
    sections = re.findall(r"^Args:(.*)\n((?: {4}.*\n?|\n)*)", inspect.getdoc(function) or "", flags=re.MULTILINE)
    assert all(re.fullmatch(r"( [\w ]+)?", title) for title, _ in sections), "the reference drops it"
    lists = [names for _, text in sections for names in re.findall(r"^ {4}(\w[\w, ]*):", text, flags=re.MULTILINE)]
    assert {name for names in lists for name in names.split(", ")} <= set(inspect.signature(function).parameters)


def test_a_name_without_a_page_fails_the_build() -> None:
    module = hooks()
    module.documented.update(module.public_names())
    module.on_post_build()
    module.documented.remove("gspo_kernels.gspo_loss")
    with pytest.raises(SystemExit, match=r"`::: gspo_kernels\.gspo_loss`"):
        module.on_post_build()


def test_an_integration_says_which_of_its_names_are_public(tmp_path: Path) -> None:
    source = tmp_path / "trainer.py"
    source.write_text("def policy_loss(): ...\n")
    with pytest.raises(ValueError, match="expected __all__"):
        hooks().exported(source)


def in_tables(page: str, *headings: str) -> set[str]:
    """The names that begin the rows of the tables under these headings."""
    sections = re.split(r"^#+ ", (ROOT / page).read_text(), flags=re.MULTILINE)
    text = "\n".join(section for section in sections if section.split("\n", 1)[0] in headings)
    return set(
        re.findall(r"`(?:tokens\.)?(\w+)(?:\(.*?\))?`", "\n".join(re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)))
    )


def test_the_tables_of_what_to_implement_are_complete() -> None:
    public = {name for name in vars(Backend) if not name.startswith("_")} | set(inspect.get_annotations(Backend))
    assert in_tables("docs/extending.md", "A kernel") == public
    assert in_tables("docs/extending.md", "What a class declares") == set(
        inspect.get_annotations(gspo_kernels.Objective)
    )


# --- the table of objectives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", objective_table.PAGES, ids=lambda page: page.name)
def test_the_table_of_objectives_is_that_of_the_classes(page: Path) -> None:
    text = page.read_text()
    assert text == objective_table.with_table(text), "python docs/scripts/objective_table.py rewrites it"


def test_the_table_has_every_objective_that_needs_no_argument() -> None:
    public = [getattr(gspo_kernels, name) for name in gspo_kernels.__all__]
    kinds = {kind for kind in public if inspect.isclass(kind) and issubclass(kind, gspo_kernels.Objective)}
    assert kinds - set(objective_table.objectives()) == {gspo_kernels.Objective, gspo_kernels.TopEntropy}


def test_an_objective_says_what_it_does_and_where_it_is_from() -> None:
    @dataclass(frozen=True)
    class Stated(gspo_kernels.Objective):
        """Some Policy Optimization: each token
        counts twice (arXiv 1234.56789, section 3).

        More of it.
        """

        eps: float = 0.25
        most: float | None = None

    @dataclass(frozen=True)
    class Unstated(gspo_kernels.Objective):
        """Some Policy Optimization."""

    row = ("`Stated`", "each token counts twice", "per token", "`eps=0.25`", "`sequence_mean`")
    assert objective_table.cells(Stated) == (*row, "[1234.56789](https://arxiv.org/abs/1234.56789)")
    with pytest.raises(ValueError, match=r"Unstated: expected a docstring .* got 'Some Policy Optimization\.'"):
        objective_table.cells(Unstated)


def test_the_table_of_what_models_do_to_their_logits_is_that_of_the_package() -> None:
    text = logit_table.PAGE.read_text()
    assert text == logit_table.with_table(text), "python docs/scripts/logit_table.py rewrites it"


# --- the settings -----------------------------------------------------------------------------------------------------

READ = re.compile(r"""(?:environ(?:\.get|\.setdefault)?|getenv|getenv_or)\W{1,3}["'](\w+)["']""")
OWN = re.compile(r"\b(GSPO_(?:KERNELS|BENCH|CUDA|WARM)_[A-Z_]*[A-Z])\b")


def test_the_page_of_environment_variables_has_all_of_ours() -> None:
    """Those that Python or C++ reads; macros of the C++ source are not among them."""
    folders = ("gspo_kernels", "csrc", "benchmarks", "examples", "tests/support", "tests")
    files = [ROOT / "setup.py", *(path for name in folders for path in (ROOT / name).rglob("*.*"))]
    files = [path for path in files if path.parent.name != "doctor"]  # which tells about all of them
    source = [path.read_text() for path in files if path.suffix in (".py", ".cpp", ".h", ".sh")]
    ours = {name for text in source for name in (*READ.findall(text), *OWN.findall(text)) if name.startswith("GSPO_")}
    assert len(ours) > 8
    page = (ROOT / "docs" / "environment.md").read_text()
    tests_own = {"GSPO_RANKS_TEST"}
    assert {name for name in ours - tests_own if f"`{name}`" not in page} == set()
    rows = re.findall(r"^\| `(GSPO_\w+)`", page, flags=re.MULTILINE)
    assert set(rows) <= ours, "a variable that nothing reads any more"
