"""Tokenizers of every origin."""

import json
import random
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lazypipe.stages.contract import UserError
from lazypipe.stages.tokenization.config import FileTokenizer, HubTokenizer
from lazypipe.stages.tokenization.tokenizer import (
    check_tokenizer,
    find_eos,
    joins_pieces_exactly,
    load_tokenizer,
    number_of_ids,
    tokenizer_identity,
    train_tokenizer,
)

TEXT = [
    f"Now is the winter of our {word} content, said {word}-{i}.\n" for i in range(60) for word in ("dis", "mal", "é")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXT, 300).save(str(path))
    return path


def test_trained_tokenizer_is_byte_level_with_eos_first(trained):
    tokenizer = Tokenizer.from_file(str(trained))
    assert number_of_ids(tokenizer) == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ("", " leading", "日本\x00\r\n\t 🙂", "any bytes ßpelt"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("winter").tokens[0] != "Ġwinter"  # no prefix space


def test_training_depends_on_the_text_alone(trained):
    shuffled = list(TEXT)
    random.Random(0).shuffle(shuffled)
    assert json.loads(train_tokenizer(shuffled, 300).to_str()) == json.loads(trained.read_text())


def test_a_vocabulary_larger_than_the_text_affords_is_a_warning():
    with pytest.warns(UserWarning, match="vocabulary of 257 tokens, not 5000"):
        assert number_of_ids(train_tokenizer(["a"], 5000)) == 257


def test_a_file_is_loaded_without_its_truncation_and_padding(trained, tmp_path):
    tokenizer = Tokenizer.from_file(str(trained))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "t.json"))
    loaded, own = load_tokenizer(FileTokenizer(kind="file", path=str(tmp_path / "t.json")))
    assert own is None
    expected = Tokenizer.from_file(str(trained)).encode(TEXT[0]).ids
    assert len(expected) > 4
    assert loaded.encode(TEXT[0]).ids == expected


@pytest.mark.parametrize(
    ("vocabulary", "wanted", "own", "found"),
    [
        (["a", "</s>", "<eos>"], None, None, "</s>"),
        (["a", "</s>", "<mine>"], None, "<mine>", "<mine>"),
        (["a", "</s>"], "a", "</s>", "a"),
        (["a", "<|end_of_text|>"], None, "<gone>", "<|end_of_text|>"),
    ],
)
def test_eos_is_the_wanted_the_own_or_a_usual_one(vocabulary, wanted, own, found):
    assert find_eos(vocabulary, [], wanted, own) == found


def test_no_eos_is_refused_with_the_special_tokens():
    with pytest.raises(UserError, match=r"special tokens: '<pad>', '<s>'; name one"):
        find_eos(["a", "<s>"], ["<s>", "<pad>"], None, None)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("options", [{}, {"byte_fallback": True, "remove_extra_whitespaces": False}])
def test_sentencepiece_models_keep_their_ids(tmp_path, model_type, options):
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "sp"), model_type=model_type, vocab_size=330,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    config = FileTokenizer(kind="file", path=str(tmp_path / "sp.model"))
    check_tokenizer(config, "uint16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer, own = load_tokenizer(config)
    original = sentencepiece.SentencePieceProcessor(model_file=config.path)
    assert own == "</s>"
    assert tokenizer.token_to_id("</s>") == original.eos_id()
    for text in (TEXT[5].strip(), "winter  of our content", "Unseen words, too: zebra", "é-7."):
        assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text)
    assert tokenizer.decode(original.encode(TEXT[1].strip())) == TEXT[1].strip()


def test_a_sentencepiece_model_without_eos_is_refused(tmp_path):
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=100,
        hard_vocab_limit=False, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="no end-of-document token"):
        check_tokenizer(FileTokenizer(kind="file", path=str(tmp_path / "sp.model")), "uint16")


def test_a_local_directory_is_a_hub_name(trained, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(trained.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = HubTokenizer(kind="hub", name=str(folder))
    tokenizer, own = load_tokenizer(config)
    assert own == "<|endoftext|>"
    assert tokenizer.encode(TEXT[3]).ids == Tokenizer.from_file(str(trained)).encode(TEXT[3]).ids
    before = tokenizer_identity(config)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "a"}))
    assert tokenizer_identity(config) != before


def test_an_unusable_hub_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer could be loaded from '.*'"):
        load_tokenizer(HubTokenizer(kind="hub", name=str(tmp_path)))


def test_tokenizers_that_mark_the_beginning_of_a_text_are_recognised(trained):
    assert joins_pieces_exactly(Tokenizer.from_file(str(trained)))
    marking = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("▁OnelineA\n")}, merges=[]))
    marking.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    assert not joins_pieces_exactly(marking)
