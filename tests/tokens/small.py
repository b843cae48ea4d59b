"""A tokenizer of a few tokens, the first of which ends texts."""

import json

from dualpipe_jax.tokens import PublishedTokenizer


def small_tokenizer(folder, tokens):
    """Writes a tokenizer into a folder; token i is `tokens[i]`."""
    folder.mkdir()
    end = {
        "id": 0,
        "content": tokens[0],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    described = {
        "version": "1.0",
        "added_tokens": [end],
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    config = {"eos_token": tokens[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return PublishedTokenizer(folder)
