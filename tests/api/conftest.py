"""The tokenizer of the tests' models."""

import pytest

from tests.api import running


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return running.tokenizer_in(tmp_path_factory.mktemp("model") / "tokenizer")
