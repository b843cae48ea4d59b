"""Links, names and figures in the documents match the repository."""

import importlib.util
import re
import shlex

import pytest

from dualpipe_jax import dualpipe
from dualpipe_jax.commands import main as cli
from dualpipe_jax.pictures import show
from tests.docs.blocks import DOCUMENTS, ROOT, prose_of, read

README = read("README.md")
LINKS = re.compile(r"\]\(([^)\s]+)\)")


def anchors_of(path):
    """Returns the anchors of a page's headings, as on GitHub and the site."""
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\(.*?\)", "", title).strip().lower())
        .replace(" ", "-")
        .replace("--", "-")
        for title in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in LINKS.findall(prose_of(document)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{document} links to {link}"
        if anchor:
            assert anchor in {each.replace("--", "-") for each in anchors_of(target)}, (
                f"{document} links to {link}"
            )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_has_every_target_that_is_named(document):
    makefile = read("Makefile")
    targets = re.findall(r"(?:^\$ |`)make ([\w-]+)", read(document), re.M)
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets), targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_files_in_prose_exist(document):
    for command in re.findall(r"`(python [^`]*)`", prose_of(document)):
        words = shlex.split(command)
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]), command
            if words[2] == "dualpipe_jax":
                assert set(words[3].split("|")) <= {*cli.COMMANDS, "COMMAND"}, command
        else:
            assert (ROOT / words[1]).exists() or "first_model" in words[1], command
        named = [word for word in words[2:] if re.search(r"^(tests|configs)/", word)]
        assert all((ROOT / word).exists() for word in named), command


def test_the_picture_is_the_schedule_of_today():
    # To redraw it: python -m dualpipe_jax schedule dualpipe --ranks 8
    # --microbatches 20 --out docs/dualpipe.svg
    assert read("docs/dualpipe.svg") == show.svg(dualpipe(8, 20))


def test_the_table_of_times_is_what_the_simulator_says(capsys):
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+)x? \| (\d+)", README, re.M)
    assert [row[0] for row in rows] == ["DualPipe", "ZB1P", "1F1B", "GPipe"]
    times = {}
    for name, time, _, alive in rows:
        sizes = ["--ranks", "8", "--microbatches", "20", "--lowered"]
        costs = ["--costs", "F=97,I=104,W=35,B=139,FB=129,p2p=1.2"]
        assert cli.main(["simulate", name.lower(), *sizes, *costs]) == 0
        printed = capsys.readouterr().out
        times[name] = float(re.search(r"makespan: ([\d.]+)", printed)[1])
        assert round(times[name]) == int(time)
        peaks = [int(line.split()[-1]) for line in printed.splitlines()[-8:]]
        assert max(peaks) == int(alive)
    for name, _, ratio, _ in rows:
        assert float(ratio) == pytest.approx(times["1F1B"] / times[name], abs=0.005)
