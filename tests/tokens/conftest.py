import json

import pytest

from dualpipe_jax.tokens import PublishedTokenizer
from dualpipe_jax.tokens.learning import END_TOKEN, learn_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "<|User|>{{ message['content'] }}"
    "{% else %}"
    "<|Assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tokenizer as DeepSeek publishes it: BOS by configuration, tokens of a chat."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text(
        "the quick brown fox jumps over the lazy dog\nnaïve café 東京\n" * 50
    )
    learn_tokenizer([text], 300, folder)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    size = len(described["model"]["vocab"])
    for number, token in enumerate(["<|begin|>", "<|User|>", "<|Assistant|>"], size):
        special = described["added_tokens"][0] | {"id": number, "content": token}
        described["added_tokens"].append(special)
    path.write_text(json.dumps(described))
    config = {
        "bos_token": {"content": "<|begin|>", "__type": "AddedToken"},
        "eos_token": END_TOKEN,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text.unlink()
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder):
    return PublishedTokenizer(folder)
