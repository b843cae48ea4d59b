"""What the documents show is what happens: snippets, commands, pictures and links."""

import doctest
import re
from pathlib import Path

import jax
import pytest

from dualpipe_jax import cli, dualpipe, show

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def commands(text):
    """Yields (command, what the text says it prints) of all console blocks."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield command.partition(" #")[0].strip(), output


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_snippets_run(document):
    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    parser = doctest.DocTestParser()
    test = parser.get_doctest("\n".join(blocks), {}, document, document, 0)
    assert test.examples or not blocks
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    # As readers have it: optax mixes floats with integer counts.
    with jax.numpy_dtype_promotion("standard"):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_commands_print_what_the_readme_says(capsys):
    ran = 0
    for command, expected in commands(README):
        words = command.split()
        if words[:3] == ["python", "-m", "dualpipe_jax"] and words[3] != "train":
            assert cli.main(words[3:]) == 0
            assert capsys.readouterr().out == expected, command
            ran += 1
    assert ran


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_has_every_target_that_is_named(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(
        r"(?:^\$ |`)make ([\w-]+)", (ROOT / document).read_text(), re.M
    )
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets), targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (path.parent / link).exists()]


def test_the_picture_is_the_schedule_of_today():
    # To draw it anew: python -m dualpipe_jax schedule dualpipe --ranks 8
    # --microbatches 20 --out docs/dualpipe.svg
    assert (ROOT / "docs/dualpipe.svg").read_text() == show.svg(dualpipe(8, 20))


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
