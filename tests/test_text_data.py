"""Words and sentence pairs are read as written, and every mistake is named by file and line."""

import gzip
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from egtrain.data.pairs import PairData, load_pairs
from egtrain.data.subwords import EOS
from egtrain.data.text import TextData, load_text
from egtrain.errors import DataError, UsageError

TEXT = {"train.txt": "b a b\n\n a  c b \n", "valid.txt": "a d\n", "test.txt": "<unk> b\r\nc"}
PAIRS = {
    f"{part}.{language}": "".join(f"{word} {number} {language}\n" for number in range(lines))
    for part, lines in (("train", 8), ("valid", 3), ("test", 2))
    for language, word in (("en", "house"), ("de", "haus"))
}


@pytest.fixture(autouse=True)
def no_other_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def text_in(folder: Path, **changes: Any) -> TextData:
    options: dict[str, Any] = {
        "data_dir": None,
        "offline": True,
        "max_vocabulary": None,
        "train_tokens": None,
    }
    return load_text(f"text:{folder}", **(options | changes))


def pairs_in(folder: Path, **changes: Any) -> PairData:
    options: dict[str, Any] = {
        "data_dir": None,
        "offline": True,
        "source": "en",
        "target": "de",
        "subwords": 40,
    }
    return load_pairs(
        f"pairs:{folder}", **(options | {"max_length": 40, "train_samples": None} | changes)
    )


# Words.


def test_words_stand_between_spaces_and_every_line_ends(tmp_path: Path) -> None:
    data = text_in(put(tmp_path / "t", TEXT))
    assert data.vocabulary == ("<unk>", "<eos>", "b", "a", "c")
    assert data.train.tolist() == [2, 3, 2, 1, 1, 3, 4, 2, 1]
    assert data.validation.tolist() == [3, 0, 1]
    assert data.test.tolist() == [0, 2, 1, 4, 1]
    assert data.floor is None


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    data = text_in(put(tmp_path / "t", TEXT | {"train.txt": "a\u2028b\x0bc\x85d\n"}))
    assert data.train.tolist().count(1) == 1


def test_a_byte_order_mark_is_not_part_of_the_first_word(tmp_path: Path) -> None:
    plain = text_in(put(tmp_path / "t", TEXT))
    marked = {name: f"\ufeff{text}" for name, text in TEXT.items()}
    assert text_in(put(tmp_path / "u", marked)).vocabulary == plain.vocabulary
    assert text_in(tmp_path / "u").digest == plain.digest
    pairs = pairs_in(put(tmp_path / "p", PAIRS))
    marked = {name: f"\ufeff{text}" for name, text in PAIRS.items()}
    assert pairs_in(put(tmp_path / "q", marked)).digest == pairs.digest
    packed = {f"{name}.gz": gzip.compress(text.encode()) for name, text in marked.items()}
    assert pairs_in(put(tmp_path / "r", packed)).digest == pairs.digest
    with pytest.raises(DataError, match="the file is empty"):
        text_in(put(tmp_path / "u", {"test.txt": "\ufeff"}))


def test_whoever_trains_on_a_part_of_a_text_is_told(tmp_path: Path) -> None:
    folder, pairs = put(tmp_path / "t", TEXT), put(tmp_path / "p", PAIRS)
    assert text_in(folder).notes == pairs_in(pairs).notes == ()
    assert text_in(folder, train_tokens=4).notes == (
        "only 5 of your 9 training words are used; --set data.train_samples=null uses all",
    )
    assert pairs_in(pairs, train_samples=8).notes == ()
    (note,) = pairs_in(pairs, train_samples=3).notes
    assert note.startswith("only 3 of your 8 training pairs are used; ")


def test_equal_texts_have_equal_digests_and_others_do_not(tmp_path: Path) -> None:
    first = text_in(put(tmp_path / "t", TEXT)).digest
    assert text_in(put(tmp_path / "u", TEXT)).digest == first
    assert text_in(put(tmp_path / "v", TEXT | {"test.txt": "b"})).digest != first


def test_a_smaller_training_text_is_the_beginning_and_keeps_the_vocabulary(tmp_path: Path) -> None:
    folder = put(tmp_path / "t", TEXT)
    data = text_in(folder, train_tokens=4)
    assert data.train.tolist() == [2, 3, 2, 1, 1]
    assert len(data.vocabulary) == 5
    with pytest.raises(
        DataError,
        match=r"asks for 10 words, but the training text has 9; lower it, or .* null",
    ):
        text_in(folder, train_tokens=9)


def test_a_folder_is_looked_for_here_and_where_data_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "home" / "mine", TEXT)
    options: dict[str, Any] = {"offline": True, "max_vocabulary": None, "train_tokens": None}
    assert len(load_text("text:mine", data_dir=tmp_path / "home", **options).train) == 9
    with pytest.raises(
        DataError, match=r"mine: no such .*, here or in .*; give a folder that holds train"
    ):
        load_text("text:mine", data_dir=None, **options)
    monkeypatch.chdir(tmp_path / "home")
    assert len(load_text("text:mine", data_dir=None, **options).train) == 9


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("valid.txt", b"", "valid.txt: the file is empty"),
        ("test.txt", b" \n\n", "test.txt: the file is empty"),
        ("train.txt", b"a\nb \xff c\n", "train.txt:2: the line is not UTF-8"),
        (
            "train.txt",
            b"a\n" + b"x" * 1_000_001,
            "train.txt:2: the line has 1,000,001 bytes, and the limit is 1,000,000",
        ),
    ],
)
def test_a_damaged_text_is_named_with_file_and_line(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    folder = put(tmp_path / "t", {**TEXT, file: content})
    with pytest.raises(DataError, match=re.escape(message)) as error:
        text_in(folder)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "t", TEXT)
    (folder / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"valid.txt: the file is missing; put it there"):
        text_in(folder)


def test_a_vocabulary_larger_than_asked_is_named_with_its_line(tmp_path: Path) -> None:
    folder = put(tmp_path / "t", TEXT)
    assert len(text_in(folder, max_vocabulary=5).vocabulary) == 5
    with pytest.raises(
        DataError, match=r"train.txt:3: the vocabulary of 5 words is larger than task.max_voc"
    ):
        text_in(folder, max_vocabulary=4)


def test_an_altered_wikitext_is_refused(tmp_path: Path) -> None:
    put(
        tmp_path / "wikitext-2",
        {"wiki.train.tokens": "a", "wiki.valid.tokens": "b", "wiki.test.tokens": "c"},
    )
    with pytest.raises(DataError, match=r"wiki.train.tokens: not the official file .* text:FOLDER"):
        load_text(
            "wikitext2", data_dir=tmp_path, offline=True, max_vocabulary=None, train_tokens=None
        )


def test_a_missing_wikitext_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"WikiText-2 was not found in .*--offline, .* that holds wikitext-2 with"
    ):
        load_text(
            "wikitext2", data_dir=tmp_path, offline=True, max_vocabulary=None, train_tokens=None
        )


# Pairs of sentences.


def test_sentences_come_back_from_their_subwords(tmp_path: Path) -> None:
    data = pairs_in(put(tmp_path / "p", PAIRS))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 3, 2)
    for split in (data.train, data.validation, data.test):
        for text, ids in ((split.source_text, split.source), (split.target_text, split.target)):
            assert all(sentence[-1] == EOS and EOS not in sentence[:-1] for sentence in ids)
            assert [data.subwords.decode(sentence.tolist()) for sentence in ids] == list(text)
    assert data.train.target_text[1] == "haus 1 de"


def test_the_other_direction_is_the_same_text_turned(tmp_path: Path) -> None:
    folder = put(tmp_path / "p", PAIRS)
    assert (
        pairs_in(folder, source="de", target="en").train.source_text
        == pairs_in(folder).train.target_text
    )


def test_files_may_be_packed_and_the_validation_part_be_called_val(tmp_path: Path) -> None:
    packed = {
        f"{name.replace('valid', 'val')}.gz": gzip.compress(text.encode())
        for name, text in PAIRS.items()
    }
    assert (
        pairs_in(put(tmp_path / "p", packed)).digest == pairs_in(put(tmp_path / "q", PAIRS)).digest
    )


def test_subwords_are_learned_once_and_learned_again_where_what_is_kept_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "p", PAIRS)
    first = pairs_in(folder)
    (kept,) = (tmp_path / "cache" / "egtrain" / "subwords").iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])
    assert pairs_in(folder).digest == first.digest
    assert kept.read_bytes() == content
    monkeypatch.setattr("egtrain.data.subwords._train", lambda *_: pytest.fail("learned again"))
    assert pairs_in(folder).digest == first.digest


def test_what_is_kept_serves_only_the_text_and_the_number_that_it_was_learned_for(
    tmp_path: Path,
) -> None:
    folder = put(tmp_path / "p", PAIRS)
    assert [pairs_in(folder, subwords=size).subwords.size for size in (40, 30, 40)] == [40, 30, 40]
    other = {name: text.replace("haus", "heim") for name, text in PAIRS.items()}
    assert "heim 0 de" in pairs_in(put(tmp_path / "q", other)).train.target_text


def test_fewer_subwords_than_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"task.subwords: 16 is too small, as the training text has \d+ different"
    ):
        pairs_in(put(tmp_path / "p", PAIRS), subwords=16)


def test_a_text_too_small_for_so_many_subwords_has_fewer(tmp_path: Path) -> None:
    assert 30 < pairs_in(put(tmp_path / "p", PAIRS), subwords=4000).subwords.size < 200


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(pairs_in(put(tmp_path / "p", PAIRS)).train) == 8


def test_a_smaller_training_set_has_the_same_subwords_and_the_pairs_of_one_permutation(
    tmp_path: Path,
) -> None:
    folder = put(tmp_path / "p", PAIRS)
    few, more, all_of_them = (pairs_in(folder, train_samples=n) for n in (3, 5, None))
    assert (
        set(few.train.source_text)
        < set(more.train.source_text)
        < set(all_of_them.train.source_text)
    )
    assert torch.equal(few.test.source[0], all_of_them.test.source[0])
    with pytest.raises(
        UsageError, match=r"data.train_samples: 9 is not possible, as there are 8 training pairs"
    ):
        pairs_in(folder, train_samples=9)


def test_a_sentence_that_is_too_long_is_named_even_if_it_would_not_be_trained_on(
    tmp_path: Path,
) -> None:
    folder = put(tmp_path / "p", PAIRS)
    for samples in (None, 1):
        with pytest.raises(
            DataError,
            match=r"train.en:1: the sentence has \d+ subwords, but task.max_length is 2; raise it",
        ):
            pairs_in(folder, max_length=2, train_samples=samples)


def lines(*words: str) -> str:
    return "".join(f"{word}\n" for word in words)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.de", "", "train.de: the file is empty"),
        ("valid.en", b"a\n\xc3\n", "valid.en:2: the line is not UTF-8"),
        (
            "valid.de",
            lines("a", "b"),
            r"valid.de:3: the file has 2 lines, but .*valid.en has 3; each line",
        ),
        ("test.de", lines("a", " "), "test.de:2: the line is empty; remove it from both files"),
        (
            "test.en",
            lines("a", "x " * 60),
            r"test.en:2: the sentence has \d+ subwords, but task.max_length is 40; raise",
        ),
    ],
)
def test_damaged_pairs_are_named_with_file_and_line(
    tmp_path: Path, file: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        pairs_in(put(tmp_path / "p", {**PAIRS, file: content}))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_a_language_that_there_is_not_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "p", PAIRS)
    with pytest.raises(
        DataError, match=r"train.fr: the file is missing; .* set task.source and task.target"
    ):
        pairs_in(folder, target="fr")
    with pytest.raises(UsageError, match=r"task.source and task.target are both 'en'"):
        pairs_in(folder, target="en")


def multi30k(folder: Path, **changes: Any) -> PairData:
    options: dict[str, Any] = {"source": "en", "target": "de", "subwords": 1000, "max_length": 100}
    return load_pairs(
        "multi30k", data_dir=folder, offline=True, train_samples=None, **(options | changes)
    )


def test_multi30k_has_two_languages_here(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Multi30k is read in en and de, not 'fr'"):
        multi30k(tmp_path, target="fr")


@pytest.mark.data
def test_the_real_multi30k_is_read_packed_or_not_and_refused_where_it_is_altered(
    shared_data: Path, tmp_path: Path
) -> None:
    data = multi30k(shared_data)
    assert (len(data.train), len(data.validation), len(data.test)) == (29_000, 1_014, 1_000)
    assert data.subwords.size == 1000
    assert data.train.source_text[0] == "Two young, White males are outside near many bushes."
    unpack(shared_data / "multi30k", tmp_path / "multi30k")
    assert multi30k(tmp_path).digest == data.digest
    with (tmp_path / "multi30k" / "test_2016_flickr.de").open("a") as file:
        file.write("Ein Satz mehr.\n")
    with pytest.raises(
        DataError, match=r"test_2016_flickr.de: not the official file of Multi30k .* pairs:FOLDER"
    ):
        multi30k(tmp_path)


def unpack(packed: Path, folder: Path) -> None:
    folder.mkdir()
    for path in packed.glob("*.gz"):
        with gzip.open(path) as source, (folder / path.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
