"""A published tokenizer: its special tokens, what tokens stand for, and bad folders."""

import json
import shutil

import numpy as np
import pytest

from dualpipe_jax.tokens import PublishedTokenizer, has_tokenizer, special_numbers

TEXTS = ["the fox", "naïve café, 東京 𝄞", "a\r\n\tb  c", "<|end_of_text|>", ""]


def changed(folder, tmp_path, **changes):
    """A copy of the folder with other files; values are text, or objects in JSON."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    for name, value in changes.items():
        path = copy / name.replace("_json", ".json").replace("_jinja", ".jinja")
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return copy


def test_a_prompt_begins_with_the_token_that_the_configuration_adds(
    folder, tokenizer, tmp_path
):
    begin = tokenizer.number_of("<|begin|>")
    tokens = tokenizer.encode("the fox")
    assert tokens[0] == begin and begin not in tokens[1:]
    assert tokenizer.encode("<|begin|>the fox") == tokens  # never twice
    plain = changed(folder, tmp_path, tokenizer_config_json={})
    assert PublishedTokenizer(plain).encode("the fox") == tokens[1:]
    assert special_numbers(folder) == {"bos_token_id": begin, "eos_token_id": 0}


@pytest.mark.parametrize("text", TEXTS)
def test_documents_are_text_and_nothing_else(tokenizer, text):
    (tokens,) = tokenizer.encode_documents([text])
    assert tokenizer.decode(tokens) == text
    assert not set(tokens) & set(tokenizer.stop_tokens)
    sizes = tokenizer.token_bytes
    assert sizes[tokens].sum() == len(text.encode())
    assert sizes[tokenizer.end_token] == 0


@pytest.mark.parametrize("text", TEXTS[:3])
def test_text_is_written_as_its_tokens_come(tokenizer, text):
    (tokens,) = tokenizer.encode_documents([text])
    decode = tokenizer.decoder()
    parts = [decode([token], False) for token in tokens] + [decode([], True)]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    # The characters are never taken back, and bytes wait for the rest of theirs.
    (note,) = tokenizer.encode_documents(["𝄞"])
    assert len(note) == 4  # of four bytes
    decode = tokenizer.decoder()
    assert [decode([token], False) for token in note] == ["", "", "", "𝄞"]
    cut = tokenizer.decoder()
    assert cut(note[:2], True) == "\ufffd"
    # Of a model's padded vocabulary.
    assert tokenizer.decode([*tokens, tokenizer.vocab_size + 7]) == text


def test_stop_tokens_are_those_of_generation_and_of_the_tokenizer(folder, tmp_path):
    several = changed(folder, tmp_path, generation_config_json={"eos_token_id": [7, 0]})
    found = PublishedTokenizer(several)
    assert found.stop_tokens == (0, 7) and found.end_token == 0


def test_a_conversation_is_written_by_the_template(folder, tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "café"},
    ]
    text = "<|begin|><|User|>the fox<|Assistant|>dog<|end_of_text|><|User|>café"
    assert tokenizer.render(messages) == f"{text}<|Assistant|>"
    assert tokenizer.render(messages, add_generation_prompt=False) == text
    tokens = tokenizer.encode_chat(messages)
    begin, user, assistant = map(
        tokenizer.number_of, ("<|begin|>", "<|User|>", "<|Assistant|>")
    )
    assert [t for t in tokens if t in (begin, user, assistant, 0)] == [
        *(begin, user, assistant, 0, user, assistant)
    ]
    # A file of its own replaces the one in the configuration.
    own = changed(folder, tmp_path, chat_template_jinja="{{ messages[0].content }}!")
    assert PublishedTokenizer(own).render(messages) == "the fox!"


def test_bytes_of_a_vocabulary_of_sentencepiece(folder, tmp_path):
    vocabulary = {"<unk>": 0, "<0xE6>": 1, "\u2581the": 2, "caf\u00e9": 3}
    described = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None},
    }
    other = changed(folder, tmp_path, tokenizer_json=described)
    np.testing.assert_array_equal(PublishedTokenizer(other).token_bytes, [5, 1, 4, 5])
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    unknown = changed(folder, tmp_path / "x", tokenizer_json=described)
    assert PublishedTokenizer(unknown).token_bytes is None


def test_a_vocabulary_must_fit_the_model(tokenizer):
    tokenizer.check_fits(tokenizer.vocab_size)
    tokenizer.check_fits(None)
    with pytest.raises(ValueError, match=r"has 303 tokens, .* vocab_size is 256"):
        tokenizer.check_fits(256)
    with pytest.raises(ValueError, match="has no token 'xyz'"):
        tokenizer.number_of("xyz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_json": "{"}, "is no tokenizer that tokenizers"),
        ({"tokenizer_json": '{"version": "1.0"}'}, "is no tokenizer that tokenizers"),
        ({"tokenizer_config_json": "[1]"}, "is not an object in JSON"),
        ({"generation_config_json": "{"}, "is not an object in JSON"),
    ],
)
def test_damaged_files_are_named(folder, tmp_path, changes, message):
    damaged = changed(folder, tmp_path, **changes)
    assert has_tokenizer(damaged)
    with pytest.raises(ValueError, match=message) as error:
        PublishedTokenizer(damaged)
    assert str(damaged) in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        PublishedTokenizer(tmp_path)


def test_a_template_that_does_not_parse_names_its_folder(folder, tmp_path):
    bad = changed(folder, tmp_path, chat_template_jinja="{% for %}")
    with pytest.raises(ValueError, match=r"changed: the chat template does not parse"):
        PublishedTokenizer(bad).encode_chat([{"role": "user", "content": "a"}])
    config = {"eos_token": "<|end_of_text|>"}
    none = changed(folder, tmp_path / "none", tokenizer_config_json=config)
    with pytest.raises(ValueError, match="has no chat template"):
        PublishedTokenizer(none).encode_chat([{"role": "user", "content": "a"}])
