"""What a reader follows, sees and sets: links, pictures, parameters. And what the pages say that can be looked up."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import papermill
import pytest

from benchmarks import real_models

ROOT = Path(__file__).resolve().parents[2]


def files(*patterns: str) -> list[Path]:
    """What git has, or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in dict.fromkeys(listed) if name and (ROOT / name).is_file()]


FILES = set(files())
FOLDERS = {parent for path in FILES for parent in path.parents}
PAGES = files("*.md", "*.ipynb")
NOTEBOOKS = files("notebooks/*.ipynb")
named = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def markdown(path: Path) -> str:
    """A page without its fenced code; of a notebook the Markdown cells, one after the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """A page without any code."""
    text = re.sub(r"(?<=\n\n)(?:    .*\n)+", "", markdown(path))
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


def links(text: str) -> list[str]:
    """Where inline links, pictures, reference definitions and HTML point."""
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    defined = re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", text, re.MULTILINE)
    return inline + defined + re.findall(r"\b(?:href|src)=[\"']([^\"']+)[\"']", text)


def anchors(path: Path) -> set[str]:
    """What may stand after # in a link to a page: its headings, as GitHub and as Jupyter name them, and HTML's ids."""
    text = markdown(path)
    found = set(re.findall(r"<\w+[^>]*\b(?:id|name)=[\"']([^\"']+)[\"']", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"<[^>]+>", "", heading)).strip()
        slug, number = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"), 1
        while slug in found:
            slug, number = f"{slug.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found |= {slug, heading.replace(" ", "-")}
    return found


def dead_links(path: Path) -> list[str]:
    """Links of a page that lead nowhere inside the repository."""
    dead = []
    for link in links(prose(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / unquote(place)).resolve() if place else path
        if target not in FILES | FOLDERS | {path}:
            dead.append(link)
        elif anchor and target.suffix in (".md", ".ipynb") and unquote(anchor) not in anchors(target):
            dead.append(link)
    return dead


def bare_pictures(path: Path) -> list[str]:
    """Pictures of a page that have no alternative text."""
    text = prose(path)
    bare = re.findall(r"!\[\s*\](?:\([^)]*\)|\[[^\]]*\])", text)
    for tag in re.findall(r"<img\b[^>]*>", text):
        if not re.search(r"\balt=[\"'][^\"']*\S[^\"']*[\"']", tag):
            bare.append(tag)
    return bare + [svg[:60] for svg in re.findall(r"<svg\b.*?</svg>", text, re.DOTALL) if not has_title(svg)]


def has_title(svg: str) -> bool:
    return re.search(r"<title\b[^>]*>\s*\S", svg) is not None


@named
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


@named
def test_pictures_have_alternative_text(path):
    assert bare_pictures(path) == []


@pytest.mark.parametrize("path", files("*.svg"), ids=lambda path: path.name)
def test_drawings_have_a_title(path):
    assert has_title(path.read_text(encoding="utf-8"))


def test_a_dead_link_and_a_bare_picture_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n\n[a](#one-two) [b](#three) [c](absent.md) [d](https://example.org/x) [e][1]\n\n"
        "    [f](code.md)\n\n`[g](code.md)` ![](x.png) <img src='y.png'> <img src=\"page.md\" alt='page'>\n\n"
        "[1]: gone.md\n\n<svg><path/></svg> <svg><title>A line</title></svg>\n",
        encoding="utf-8",
    )
    assert dead_links(page) == ["#three", "absent.md", "x.png", "gone.md", "y.png"]
    assert bare_pictures(page) == ["![](x.png)", "<img src='y.png'>", "<svg><path/></svg>"]
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("## A b\n[x](#A-b) [y](#a-b) [z](#c) ![ ](../z.png)")]
    path = tmp_path / "n.ipynb"
    nbformat.write(notebook, path)
    assert dead_links(path) == ["#c", "../z.png"] and bare_pictures(path) == ["![ ](../z.png)"]


# Parameters


def declared(path: Path) -> dict[str, str]:
    """Names and defaults in the cell that has the tag `parameters`, as they are written there."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    values = {}
    for statement in ast.parse("\n".join(cell.source for cell in cells)).body:
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        values[target.id] = ast.unparse(statement.value).replace("'", '"')
    return values


@pytest.mark.filterwarnings("error::nbformat.warnings.MissingIDFieldWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_papermill_lists_every_parameter_with_type_and_description(path):
    listed = papermill.inspect_notebook(path)
    assert set(listed) == set(declared(path)), "papermill cannot read a line: two signs of equality in it?"
    bare = [name for name, what in listed.items() if not what["help"] or what["inferred_type_name"] == "None"]
    assert bare == [], "needed: `name: type = value  # description`"


def test_papermill_alone_prints_no_warning_of_ours(tmp_path):
    command = [sys.executable, "-m", "papermill", "notebooks/00-environment.ipynb", str(tmp_path / "done.ipynb")]
    done = subprocess.run([*command, "-p", "out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    # The kernel's own word on its sockets, which every notebook gets, is not ours.
    said = [line for line in re.split("[\r\n]+", done.stdout + done.stderr) if "[IPKernelApp]" not in line]
    assert [line for line in said if re.search("warn|unknown|deprecat", line, re.IGNORECASE)] == []
    cells = nbformat.read(tmp_path / "done.ipynb", as_version=4).cells
    assert [o for cell in cells for o in cell.get("outputs", []) if o.get("name") == "stderr"] == []


@pytest.mark.parametrize("page", ["README.md", "docs/zh/README.md"])
def test_the_table_of_parameters_is_that_of_the_notebooks(page):
    wanted: dict[tuple[str, str], list[str]] = {}
    numbers = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*-*.ipynb")):
        numbers.append(path.name.partition("-")[0])
        for parameter in declared(path).items():  # name and default
            wanted.setdefault(parameter, []).append(numbers[-1])
    table = {}
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| `([^|]+)` \| .+ \|$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    for name, where, default in rows:
        places = re.findall(r"\d\d\w?", where)
        if "," not in where:  # the first and the last of a row of notebooks
            places = [number for number in numbers if places[0] <= number <= places[-1]]
        table[name, default] = places
    assert table == wanted


# What the pages say


def terms(page: str) -> list[tuple[str, list[str]]]:
    """Each entry of a glossary: its anchor, and what it refers to at its end."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for entry in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, body = entry.split("\n", 1)
        given = re.search(r'<a id="([^"]+)"', heading)
        anchor = given[1] if given else re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append((anchor, re.findall(r"\[(\d\d|7B|README)\](?!:)", body.split("\n## ")[0])))
    return found


def test_both_glossaries_have_the_same_terms_used_in_the_same_places():
    english, chinese = terms("docs/glossary.md"), terms("docs/zh/glossary.md")
    assert len(english) > 70 and english == chinese
    assert [term for term, places in english if not places] == []


@pytest.mark.parametrize("page", ["docs/glossary.md", "docs/zh/glossary.md"])
def test_what_a_glossary_refers_to_is_defined(page):
    defined = set(re.findall(r"^\[([^\]]+)\]: ", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert {place for _, places in terms(page) for place in places} == defined


@pytest.mark.parametrize("page", ["docs/qwen-7b-on-a-chip.md", "docs/zh/qwen-7b-on-a-chip.md"])
def test_what_real_models_take_is_what_the_benchmark_computes(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in text.split("| | 1.8B | 7B | 14B |")[1].splitlines()[2:14]]
    assert [row[1:] for row in rows] == [row[1:] for row in real_models.rows()]


def test_notice_has_every_package_that_is_named():
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    named = {re.split(r"[\[=<>~ #]", line)[0] for line in lines} - {""}
    listed = set(re.findall(r"^  ([\w-]+) {2,}\S", (ROOT / "NOTICE").read_text(encoding="utf-8"), re.MULTILINE))
    assert named - listed == set()


def test_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text and text.count("\n") > 200


def test_devcontainer_has_what_ci_installs_and_sets_up():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    wanted = re.findall(r"wanted\+=\(([^)]+)\)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(wanted) > 4
    assert set(" ".join(wanted).split()) <= set(container["onCreateCommand"].split())
    assert container["postCreateCommand"] == "make setup"


# Notebooks: the way through them, and something to do in each

TUTORIAL = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
numbered = pytest.mark.parametrize("path", TUTORIAL, ids=lambda path: path.stem)


@numbered
def test_a_notebook_names_the_one_before_the_contents_and_the_one_after(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    place = TUTORIAL.index(path)
    neighbours = [other.name for other in (*TUTORIAL[max(0, place - 1) : place], *TUTORIAL[place + 1 : place + 2])]
    for text in (cells[0], cells[-1]):
        assert set(neighbours) | {"../README.md#the-notebooks"} <= set(links(text))
    if path == TUTORIAL[-1]:
        assert "../docs/qwen-7b-on-a-chip.md" in links(cells[-1])


def exercises(path: Path) -> list[str]:
    return re.findall(r"^### (Exercise \d+)\b", markdown(path), re.MULTILINE)


@numbered
def test_a_notebook_has_three_exercises_and_each_its_solution(path):
    number = path.name.partition("-")[0]
    solution = path.parent / "solutions" / f"{number}.ipynb"
    assert exercises(path) == [f"Exercise {k}" for k in (1, 2, 3)]
    assert solution.is_file() and exercises(solution) == exercises(path)
    assert f"solutions/{number}.ipynb" in {link.partition("#")[0] for link in links(markdown(path))}


@pytest.mark.parametrize("path", files("notebooks/*.ipynb", "notebooks/solutions/*.ipynb"), ids=lambda path: path.stem)
def test_a_cell_is_short_enough_to_be_read(path):
    cells = nbformat.read(path, as_version=4).cells
    shown = [
        c for c in cells if c.cell_type == "code" and not {"hide-input", "parameters"} & set(c.metadata.get("tags", []))
    ]
    lengths = [len(cell.source.splitlines()) for cell in shown]
    assert max(lengths) <= 25 and sum(length < 10 for length in lengths) > len(lengths) / 2
