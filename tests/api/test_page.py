"""The page at /, as a browser shows it."""

import re
import shutil
import subprocess

import httpx
import pytest

from tests.api import running
from tests.api.recited import RecitingEngine

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)


class MeasuredEngine(RecitingEngine):
    """Two layers on two devices, the second of which has three quarters of the load."""

    def metrics(self):
        return super().metrics() | {
            "num_tokens": 1234.0,
            "num_moves": 56.0,
            "num_refused": 0.0,
            "balancedness": 0.75,
        }

    def layer_metrics(self):
        measured = super().layer_metrics()
        measured["device_loads"][:] = [0.5, 1.5]
        return measured


def shown(url, folder):
    """What the page's document holds after three seconds of a browser's time."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run(
        [*command, url], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_the_page_needs_nothing_else(tokenizer):
    with running.running(MeasuredEngine, tokenizer, api_key="secret") as (_, api, url):
        running.wait_until(lambda: api.worker.engine is not None)
        answer = httpx.get(url)  # without the key
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"(src|href)=|https?://|@import|url\(", answer.text)
        assert f"<h1>{running.MODEL}</h1>" in answer.text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(tokenizer, tmp_path):
    with running.running(MeasuredEngine, tokenizer) as (_, api, url):
        running.wait_until(lambda: api.worker.engine is not None)
        fields = {"model": running.MODEL, "prompt": "a", "max_tokens": 9}
        httpx.post(f"{url}/v1/completions", json=fields)
        document = shown(url, tmp_path)
    pairs = re.findall(r"<div><b>([^<]*)</b>([^<]*)</div>", document)
    figures = {name: value for value, name in pairs}
    assert figures["balancedness"] == "0.750" and figures["experts moved"] == "56"
    assert figures["tokens/s"] == "0.0" and figures["running"] == "0"
    assert re.search(r"≤ [\d.]+ s</b>between tokens, median", document)
    assert ">live</p>" in document
    # The heat map says in words what it shows.
    assert 'aria-label="least balanced: layer 0 of 2, 0.500"' in document
    assert 'height="2"' in document
    widths = re.findall(r'<i [^>]*style="width: ([\d.]+)%', document)
    assert [round(float(width)) for width in widths] == [33, 100]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_asks_for_a_key(tokenizer, tmp_path):
    with running.running(MeasuredEngine, tokenizer, api_key="secret") as (_, api, url):
        running.wait_until(lambda: api.worker.engine is not None)
        document = shown(url, tmp_path)
    assert "no answer (needs a key)" in document and '<form id="key">' in document
