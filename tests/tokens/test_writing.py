"""Folders of tokens: from every kind of file, continued after a kill, and refused."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dualpipe_jax.commands import main as cli
from dualpipe_jax.files import Lock
from dualpipe_jax.tokens import TokenDataset
from dualpipe_jax.tokens.documents import PIECE_CHARACTERS, read_pieces
from dualpipe_jax.tokens.writing import write_tokens
from dualpipe_jax.train import load_text

DOCUMENTS = ["the quick fox", "naïve\ncafé", "dog <|end_of_text|> dog"]


def tokens_of(folder):
    return np.load(folder / "tokens.npy").tolist()


def expected(tokenizer, texts):
    """Tokens of documents, each with the end token after it."""
    return [
        token
        for tokens in tokenizer.encode_documents(texts)
        for token in (*tokens, tokenizer.end_token)
    ]


@pytest.fixture
def files(tmp_path):
    """The documents as text files, JSON lines, compressed ones, and Parquet."""
    rows = [{"text": text, "id": i} for i, text in enumerate(DOCUMENTS)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    lines += '{"text": null}\n{"text": ""}\n'
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"id": [0, 1, 2, 3], "text": [*DOCUMENTS, None]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(DOCUMENTS[0])
    return [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


def test_every_kind_of_file_gives_the_same_documents(files, tokenizer, tmp_path):
    info = write_tokens(files, tokenizer, tmp_path / "out", source="files")
    texts = DOCUMENTS * 3 + DOCUMENTS[:1]
    assert tokens_of(tmp_path / "out") == expected(tokenizer, texts)
    assert info.num_tokens == len(tokens_of(tmp_path / "out"))
    assert info.num_documents == len(texts)
    assert info.num_bytes == sum(len(text.encode()) for text in texts)
    assert np.load(tmp_path / "out" / "tokens.npy").dtype == np.uint16
    # What the training job reads: the tokens, and what they mean.
    text = load_text([tmp_path / "out"], sequence_length=2, held_out_fraction=0.3)
    data = np.concatenate([text.train, text.held_out])
    assert text.tokenizer.decode(data.tolist()) == "".join(texts)
    assert text.count_bytes(data) == info.num_bytes and text.unit == "token"


@pytest.mark.parametrize("num_groups", [1, 2, 4, 6])
def test_a_killed_writer_continues(files, tokenizer, tmp_path, num_groups):
    out, options = tmp_path / "out", {"source": "", "group_characters": 20}
    seen = []

    def report(progress):
        seen.append(progress)
        if len(seen) == num_groups:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(files, tokenizer, out, report=report, **options)
    with pytest.raises(ValueError, match="is not complete; start the same `tokenize`"):
        TokenDataset.open(out)
    # The kill came after more was written than is recorded.
    with (out / "tokens.npy").open("ab") as file:
        file.write(b"more")
    (out / "progress.json.123.new").write_text("{")
    write_tokens(files, tokenizer, out, report=seen.append, **options)
    once = write_tokens(files, tokenizer, tmp_path / "once", **options)
    assert tokens_of(out) == tokens_of(tmp_path / "once")
    assert TokenDataset.open(out).info == once
    read = [progress.num_bytes_read for progress in seen]
    assert read == sorted(read) and read[-1] == seen[-1].num_bytes
    # What is complete stays, and is not written again.
    assert write_tokens(files, tokenizer, out, report=pytest.fail, **options) == once


def test_messages_are_written_by_the_chat_template(tokenizer, tmp_path):
    chat = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "dog"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"chat": chat}) + "\n" + json.dumps({"chat": "dog"}))
    write_tokens([path], tokenizer, tmp_path / "out", source="", field="chat")
    rendered = tokenizer.render(chat, add_generation_prompt=False)
    assert rendered.endswith("dog<|end_of_text|>")
    (first,) = tokenizer.encode_rendered([rendered])  # with its own end token
    assert tokens_of(tmp_path / "out") == first + expected(tokenizer, ["dog"])


@pytest.mark.parametrize("line", ["word " * 9 + "\n", "x", "é 東京"])
def test_pieces_of_large_documents_are_the_document(tokenizer, tmp_path, line):
    text = line * (3 * PIECE_CHARACTERS // len(line))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        pieces = list(read_pieces(tmp_path / name, "text"))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [
            True
        ]
        assert len(pieces) > 1
        assert max(len(piece.text) for piece in pieces) <= 2 * PIECE_CHARACTERS
    if line[-1] != "\n":
        return
    # Tokens do not go over a piece's end.
    end, start = pieces[0].text[-1000:], pieces[1].text[:1000]
    apart, then, whole = tokenizer.encode_documents([end, start, end + start])
    assert apart + then == whole


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    for name, content, message in (
        ("a.jsonl", b'{"text": "x"}\n{', r"a.jsonl, line 2 is not JSON"),
        ("b.jsonl", b'{"body": "x"}', r"has no field 'text', but body; name one"),
        ("c.jsonl", b"[1]", r"line 1 has no field 'text'\."),
        ("d.jsonl", b'{"text": 5}', r"text is '5'; it must be text or messages"),
        ("e.jsonl.gz", b"\x1f\x8bnothing", r"e.jsonl.gz cannot be read"),
        ("f.parquet", b"PAR1", r"f.parquet cannot be read as Parquet"),
        ("g.txt", b"", r"holds no text"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            out = tmp_path / f"{name}.out"
            write_tokens([path], tokenizer, out, source=name)


def test_a_folder_that_is_not_free(tokenizer, tmp_path):
    file, out = tmp_path / "a.txt", tmp_path / "out"
    file.write_text("the fox " * 99)
    write_tokens([file], tokenizer, out, source="")
    for options, name in (({"end_token": 5}, "end token"), ({"field": "x"}, "field")):
        with pytest.raises(ValueError, match=f"was written with another {name}"):
            write_tokens([file], tokenizer, out, source="", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"full holds thesis.txt; use an empty"):
        write_tokens([file], tokenizer, tmp_path / "full", source="")
    lock = Lock(out)
    assert lock.acquire() is None
    with pytest.raises(ValueError, match="is being written by process"):
        write_tokens([file], tokenizer, out, source="")
    lock.release()
    # Another tokenizer has come into the folder since.
    path = out / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="tokens of another tokenizer"):
        load_text([out], sequence_length=4)


def test_tokens_of_two_tokenizers_are_not_mixed(tokenizer, tmp_path, capsys):
    file = tmp_path / "a.txt"
    file.write_text("the quick brown fox jumps\n" * 99)
    for name in ("one", "two"):
        write_tokens([file], tokenizer, tmp_path / name, source="")
    both = load_text([tmp_path / "one", tmp_path / "two"], sequence_length=4)
    one = tokens_of(tmp_path / "one")
    assert np.concatenate([both.train, both.held_out]).tolist() == one + one
    with pytest.raises(ValueError, match=r"hold tokens \(.*\) and text \("):
        load_text([tmp_path / "one", file], sequence_length=4)
    learn = ["--train-tokenizer", "--vocab-size", "270", "--out", tmp_path / "three"]
    assert cli.main(["tokenize", str(file), *map(str, learn)]) == 0
    assert "99 tokens" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="of several tokenizers"):
        load_text([tmp_path / "one", tmp_path / "three"], sequence_length=4)


def test_the_command_learns_a_tokenizer_and_continues(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS * 20):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    learn = ["tokenize", str(folder), "--train-tokenizer", "--out", str(out)]
    assert cli.main([*learn, "--vocab-size", "280"]) == 0
    said = capsys.readouterr().out
    dataset = TokenDataset.open(out)
    size = dataset.info.num_bytes / dataset.info.num_tokens
    assert said == (
        f"{out}: {dataset.info.num_tokens:,} tokens of 60 documents, {size:.2f} bytes "
        "per token\n"
    )
    assert 257 < dataset.tokenizer.vocab_size <= 280
    assert cli.main([*learn, "--vocab-size", "280"]) == 0
    assert capsys.readouterr().out == said
    assert cli.main([*learn, "--vocab-size", "281"]) == 2
    assert "with another --vocab-size or --field" in capsys.readouterr().err
    # With the tokenizer of one folder, tokens of another.
    again = ["tokenize", str(folder), "--tokenizer", str(out), "--out"]
    assert cli.main([*again, str(tmp_path / "again")]) == 0
    assert tokens_of(tmp_path / "again") == tokens_of(out)
    end = ["--end-token", "the"]
    assert cli.main([*again, str(tmp_path / "end"), *end]) == 0
    assert tokens_of(tmp_path / "end")[-1] == dataset.tokenizer.number_of("the")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-tokenizer"], "--vocab-size N belong together"),
        (["--tokenizer", "x", "--vocab-size", "300"], "belong together"),
        (["--train-tokenizer", "--vocab-size", "256"], "must be at least 257"),
        (["--tokenizer", "nowhere"], "nowhere has no tokenizer.json"),
        (["nothing", "--tokenizer", "nowhere"], "nothing is not a file or folder"),
    ],
)
def test_bad_arguments_make_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["tokenize", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
