"""What transformers makes of the same tokenizer: needs transformers.

It is not installed for the other tests: pip install 'dualpipe-jax[torch]'.
"""

import json

import pytest

from dualpipe_jax.tokens import PublishedTokenizer

pytestmark = pytest.mark.torch


def test_transformers_reads_our_tokenizers_alike(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=config["bos_token"]["content"],
        eos_token=config["eos_token"],
        chat_template=config["chat_template"],
    )
    messages = [{"role": "user", "content": "naïve café, 東京 𝄞\r\n"}]
    rendered = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.render(messages) == rendered
    text = messages[0]["content"]
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_documents([text]) == [ids]
    assert PublishedTokenizer(folder).decode(ids) == theirs.decode(ids)
