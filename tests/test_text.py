"""Text as tokens: what is read, on which side it comes to be, what is kept on disk, and counting against plain loops."""
import lzma
import math
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch

from tformer_lab.data import text as module
from tformer_lab.data.text import Document, NGrams, Vocabulary, even_starts, hub_documents, is_held_out, read_text, split_documents, stdlib_files, text_files, windows, xz_bits
from tformer_lab.storage import FileError


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFORMER_DATA", str(tmp_path / "data"))


@pytest.fixture
def corpus(tmp_path):
    """40 files of text, some of it in Greek."""
    folder = tmp_path / "corpus"
    for i in range(40):
        (folder / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part{i % 3}/{i}.txt").write_text(f"text {i} " + "λόγος " * (i % 4), encoding="utf-8")
    return folder


def documents(text, side):
    return text.vocabulary.decode(getattr(text, side)).split("\0")[:-1]


# Documents

def test_standard_library_is_sources_without_tests_or_what_depends_on_the_machine():
    files = stdlib_files()
    assert {"os.py", "json/decoder.py", "unittest/case.py"} <= files.keys() and list(files) == sorted(files)
    assert not any(set(name.split("/")[:-1]) & {"test", "tests", "site-packages", "idle_test"} or "sysconfigdata" in name for name in files)


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_every_document_is_on_one_side_whole_and_in_order(corpus, unit):
    text = read_text(corpus, unit)
    expected = [path.read_text(encoding="utf-8") for path in text_files(corpus).values()]
    for side, held_out, count in (("train", False, text.documents[0]), ("valid", True, text.documents[1])):
        own = [t for t in expected if is_held_out(t.encode(), .1) == held_out]
        assert documents(text, side) == own and count == len(own) > 0
    assert text.vocabulary.token_bytes[text.train].sum() + text.vocabulary.token_bytes[text.valid].sum() == sum(len(t.encode()) + 1 for t in expected)
    assert text.vocabulary.size == (256 if unit == "bytes" else len(set("\0" + "".join(expected))))


def test_side_follows_the_content_and_nothing_else(corpus):
    before = set(documents(read_text(corpus), "valid"))
    for path in list(corpus.rglob("*.txt"))[:20]: path.rename(path.with_name(f"renamed-{path.name}"))
    (corpus / "new.txt").write_text("one more")
    assert set(documents(read_text(corpus), "valid")) - {"one more"} == before < set(documents(read_text(corpus, valid_fraction=.5), "valid"))


def test_pattern_chooses_files_and_hidden_ones_are_left_out(corpus):
    (corpus / ".git").mkdir()
    (corpus / ".git/1.txt").write_text("no")
    (corpus / "1.md").write_text("no")
    assert list(text_files(corpus, "1?.txt")) == sorted(f"part{i % 3}/{i}.txt" for i in range(10, 20)) and len(text_files(corpus)) == 41


@pytest.mark.parametrize("fraction", [.01, .3, .5, .99])
def test_a_single_document_is_cut_between_characters(fraction):
    text = "aλ€😀" * 7
    (first, second) = split_documents([Document("one", text.encode())], fraction)
    assert not first[1] and second[1] and first[0].text.decode() + second[0].text.decode() == text
    assert abs(len(second[0].text) - fraction * len(text.encode())) <= 4


# Data sets of the hub

class Rows:
    """Counts how many were read."""
    def __init__(self, rows): self.rows, self.read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    """The package `datasets`, with one data set, and what was asked of it."""
    fake = ModuleType("datasets")
    fake.rows, fake.asked = Rows([{"text": f"story {i} " + "once " * 20} for i in range(1000)]), []
    def load_dataset(*args, **options):
        fake.asked.append((*args, options))
        return fake.rows
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_data_set_is_streamed_as_far_as_it_is_wanted(hub):
    text = read_text("hf://owner/stories/small", corpus_bytes=5000)
    assert hub.asked == [("owner/stories", "small", {"split": "train", "streaming": True})]
    found = documents(text, "train") + documents(text, "valid")
    assert sorted(found) == sorted(row["text"] for row in hub.rows.rows[:hub.rows.read]) and 5000 <= sum(map(len, found)) < 5200
    read_text("hf://owner/stories/small", corpus_bytes=5000)
    assert len(hub.asked) == 1  # it is on disk


def test_a_data_set_without_texts_is_refused(hub):
    hub.rows = [{"story": "a", "id": 3}]
    with pytest.raises(FileError, match="no text in a column 'text'; it has 'story', 'id'"): read_text("hf://owner/stories")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileError, match=r'hf://owner/stories needs the package datasets: pip install "tformer_lab\[datasets\]"'): read_text("hf://owner/stories")
    nothing_is_kept()


def nothing_is_kept(): assert not list(module.data_dir().glob("text-*"))


def test_a_hub_that_cannot_be_reached_is_said(hub):
    def refuse(*args, **options): raise ConnectionError("no route to host")
    hub.load_dataset = refuse
    with pytest.raises(FileError, match="hf://owner/stories cannot be read beyond 0 rows: ConnectionError: no route to host. Is the name right, and is there a connection"): read_text("hf://owner/stories")
    nothing_is_kept()


def test_a_stream_that_breaks_is_said_with_its_row_and_read_anew(hub):
    class Broken(Rows):
        def __iter__(self):
            yield from self.rows[:7]
            raise ConnectionError("reset by peer")
    good, hub.rows = hub.rows, Broken(hub.rows.rows)
    with pytest.raises(FileError, match="beyond 7 rows: ConnectionError: reset by peer"): read_text("hf://owner/stories", corpus_bytes=5000)
    nothing_is_kept()
    hub.rows = good
    assert sum(read_text("hf://owner/stories", corpus_bytes=5000).documents) == good.read


@pytest.mark.parametrize("text, said", [("a\0b", "row 3 of hf://owner/stories is no text: it has a byte 0"), ("\ud800", "row 3 of hf://owner/stories is no text: .*surrogate")], ids=["zero", "surrogate"])
def test_a_row_that_is_no_text_is_named(hub, text, said):
    hub.rows.rows[3] = {"text": text}
    with pytest.raises(FileError, match=said): read_text("hf://owner/stories", corpus_bytes=5000)
    nothing_is_kept()


def test_an_empty_name_is_no_corpus():
    with pytest.raises(FileError, match="corpus is empty"): read_text("")


@pytest.mark.parametrize("name", ["hf://", "hf://stories", "hf://a/../b", "hf://a/b/c/d", "hf://a/b?x", "hf:///etc/passwd", "hf://a/..", "hf://a/b\n"])
def test_no_other_name_reaches_the_hub(hub, name):
    with pytest.raises(FileError, match="is no data set"): next(hub_documents(name))
    assert hub.asked == []


# On disk

def test_a_corpus_is_written_once_and_mapped(corpus, monkeypatch):
    first = read_text(corpus)
    monkeypatch.setattr(module, "_write_text", None)
    again = read_text(corpus)
    assert isinstance(again.train, np.memmap) and not again.train.flags.writeable
    assert (again.train == first.train).all() and again.fingerprint == first.fingerprint


def test_a_changed_corpus_is_read_anew(corpus):
    before = read_text(corpus)
    path = corpus / "part1/1.txt"
    path.write_text(path.read_text(encoding="utf-8").upper(), encoding="utf-8")
    after = read_text(corpus)
    assert after.fingerprint != before.fingerprint and any("TEXT 1 " in d for d in documents(after, "train") + documents(after, "valid"))
    assert "TEXT 1 " not in "".join(documents(before, "train") + documents(before, "valid"))


def test_fingerprint_tells_content_split_and_unit_apart_but_not_places(corpus, tmp_path):
    found = [read_text(corpus, **other).fingerprint for other in ({}, {"unit": "characters"}, {"valid_fraction": .2}, {"pattern": "1*.txt"})]
    assert len(set(found)) == 4
    corpus.rename(tmp_path / "moved")
    assert read_text(tmp_path / "moved").fingerprint == found[0]


def test_a_folder_of_another_corpus_is_refused(corpus, tmp_path):
    read_text(corpus, folder=tmp_path / "kept")
    with pytest.raises(FileError, match="unit is 'bytes', and 'characters' is asked for"): read_text(corpus, "characters", folder=tmp_path / "kept")


@pytest.mark.parametrize("harm, said", [(lambda folder: (folder / "train.tokens").write_bytes(b"ab"), "has 2 bytes"), (lambda folder: (folder / "valid.tokens").unlink(), "has 0 bytes"), (lambda folder: (folder / "corpus.json").write_text("{"), "cannot be read"),
                                        (lambda folder: (folder / "corpus.json").write_text("[]"), "something else")])
def test_a_damaged_folder_is_named(corpus, tmp_path, harm, said):
    read_text(corpus, folder=tmp_path / "kept")
    harm(tmp_path / "kept")
    with pytest.raises(FileError, match=said): read_text(corpus, folder=tmp_path / "kept")


def test_what_a_killed_process_leaves_is_no_corpus(corpus, tmp_path):
    whole = read_text(corpus, folder=tmp_path / "kept")
    expected = whole.train.copy()
    del whole
    (tmp_path / "kept/corpus.json").unlink()
    (tmp_path / "kept/train.tokens").write_bytes(b"half")
    (tmp_path / "kept/.valid.tokens.1.tmp").write_bytes(b"half")
    assert (read_text(corpus, folder=tmp_path / "kept").train == expected).all()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".lock", "corpus.json", "train.tokens", "valid.tokens"]


@pytest.mark.parametrize("data, unit, said", [(b"a\0b", "bytes", "x.txt is no text: it has a byte 0"), (b"\xff\xfe", "characters", "x.txt is no text in UTF-8")])
def test_what_is_no_text_is_named_and_leaves_nothing(corpus, tmp_path, data, unit, said):
    (corpus / "x.txt").write_bytes(data)
    with pytest.raises(FileError, match=said): read_text(corpus, unit, folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("wrong, said", [({"corpus": "nowhere"}, "no file or folder nowhere"), ({"unit": "words"}, "'bytes' or 'characters'"), ({"valid_fraction": 0}, "between 0 and 1"), ({"corpus_bytes": 0}, "corpus_bytes"),
                                         ({"corpus": "stdlib", "pattern": "*.py"}, "for a folder"), ({"pattern": "*.tex"}, "no file whose name matches"), ({"pattern": "[12].txt", "valid_fraction": 1e-6}, "none is for valid")])
def test_wrong_requests_are_named(corpus, wrong, said):
    with pytest.raises(ValueError, match=said): read_text(**{"corpus": corpus, **wrong})


# Tokens and windows

@pytest.mark.parametrize("alphabet", ["abc", "\0aa", ""])
def test_an_alphabet_has_the_end_first_and_each_character_once(alphabet):
    with pytest.raises(ValueError, match="an alphabet should"): Vocabulary(alphabet)


def test_a_character_that_the_corpus_lacks_is_named():
    with pytest.raises(ValueError, match="'z'"): Vocabulary("\0ab").encode("abz")


def test_windows_are_parts_of_the_text_and_reach_both_ends():
    tokens = np.arange(100, dtype=np.uint8)
    starts = even_starts(100, 7, 12)
    found = windows(tokens, starts, 12)
    assert found.dtype == torch.int64 and all(torch.equal(window, torch.arange(start, start + 12)) for start, window in zip(starts, found))
    assert (found[0, 0], found[-1, -1]) == (0, 99) and set(np.diff(starts)) <= {14, 15}


# Counting

def counted(tokens, x, order, vocab_size):
    """Witten and Bell's estimate of the probability of the last token of x, with dictionaries."""
    p = 1 / vocab_size
    for n in range(1, min(order, len(x)) + 1):
        context = tuple(x[len(x) - n:-1])
        after = Counter(tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tuple(tokens[i:i + n - 1]) == context)
        if after: p = (after[x[-1]] + len(after) * p) / (after.total() + len(after))
    return p


@pytest.mark.parametrize("vocab_size", [5, 300])  # by tables, and by sorting
def test_smoothed_probabilities_are_those_of_plain_loops(vocab_size):
    rng = np.random.default_rng(0)
    tokens, x = (rng.geometric(.4, size) % 5 * (vocab_size // 5) for size in (200, (3, 9)))
    losses = NGrams(tokens, vocab_size).losses(x)
    expected = [[[-math.log(counted(tokens.tolist(), row[:t + 1].tolist(), order, vocab_size)) for t in range(1, 9)] for row in x] for order in (1, 2, 3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_smoothed_probabilities_add_up_to_one_after_seen_and_unseen_contexts():
    grams = NGrams(np.random.default_rng(1).integers(0, 4, 50), 7)
    x = np.array([[a, b, c] for a in (0, 3, 6) for b in (1, 5) for c in range(7)])
    np.testing.assert_allclose(np.exp(-grams.losses(x)).reshape(3, 6, 7, 2)[..., 1].sum(-1), 1)


@pytest.mark.parametrize("vocab_size", [6, 600])
def test_plug_in_entropies_are_those_of_frequencies(vocab_size):
    tokens = np.random.default_rng(2).integers(0, 6, 400) * (vocab_size // 6)
    joint = [0] + [-sum(c / total * math.log(c / total) for c in counts.values()) for n in (1, 2, 3) for counts in [Counter(tuple(tokens[i:i + n].tolist()) for i in range(401 - n))] for total in [counts.total()]]
    np.testing.assert_allclose(NGrams(tokens, vocab_size).entropies(), np.diff(joint))


def test_a_markov_chain_has_its_entropy_rate_from_the_bigram_on():
    p, rng, tokens = .2, np.random.default_rng(3), [0]
    for stay in rng.random(100_000) > p: tokens.append(tokens[-1] if stay else 1 - tokens[-1])
    rate = -p * math.log(p) - (1 - p) * math.log(1 - p)
    unigram, bigram, trigram = NGrams(np.array(tokens[:50_000]), 2).losses([tokens[50_000:]]).mean((1, 2))
    assert abs(unigram - math.log(2)) < .005 and abs(bigram - rate) < .01 and abs(trigram - rate) < .01


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="has 2 tokens"): NGrams(np.array([1, 2]), 3)


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_xz_is_of_the_held_out_text_in_utf_8(corpus, unit):
    text = read_text(corpus, unit)
    data = "".join(f"{d}\0" for d in documents(text, "valid")).encode()
    assert xz_bits(text) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
