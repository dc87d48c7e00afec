"""Tokens to text and back: never half a character, equal to decoding all at once; stop strings; chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_texts import END, byte_level, write_byte_fallback, write_byte_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flows.errors import DataError
from flows.serving.lamina.api.answers import Answer
from flows.serving.lamina.api.chat_template import ChatError, ChatTemplate
from flows.serving.lamina.api.stops import StopScanner
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import TokenEvent

GPT2 = Path(__file__).parents[5] / "../shared/data/tokenizers/gpt2"


def write_gpt2(folder: Path) -> Path:
    if not GPT2.is_dir():
        pytest.skip(f"{GPT2} is not there")
    vocabulary = json.loads((GPT2 / "encoder.json").read_text())
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


few = settings(max_examples=40, deadline=None)
WRITERS = {"bytes": write_byte_level, "fallback": write_byte_fallback, "gpt2": write_gpt2}


@pytest.fixture(scope="module", params=WRITERS)
def texts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = WRITERS[request.param](tmp_path_factory.mktemp("texts") / "tokenizer")
    return Texts(folder, [END] if request.param == "bytes" else ())


def library(texts: Texts) -> Tokenizer:
    return texts._tokenizer


def parts(texts: Texts, tokens: list[int], before: tuple[int, ...] = ()) -> list[str]:
    detokenizer = texts.detokenizer(before)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.finish()]


@few
@given(st.data())
def test_the_parts_are_what_the_library_makes_of_all_tokens(texts: Texts, data: st.DataObject) -> None:
    size = library(texts).get_vocab_size()
    anything = st.integers(0, size + 5)  # some ids only pad the matrix
    bytes_only = st.integers(0, 258)  # of which characters are made, and not made
    tokens = data.draw(st.lists(st.one_of(anything, bytes_only), max_size=30))
    shown = [token for token in tokens if not texts.vocabulary.is_hidden(token)]
    assert "".join(parts(texts, tokens)) == library(texts).decode(shown, skip_special_tokens=True)


@few
@given(st.data())
def test_no_part_ends_in_half_a_character(texts: Texts, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet=st.sampled_from("aé日😀 \ń‍"), max_size=20))
    tokens = library(texts).encode(text, add_special_tokens=False).ids
    found = parts(texts, tokens)
    assert "".join(found) == text
    assert not any("�" in part for part in found)


@few
@given(st.data())
def test_a_continued_text_keeps_its_spaces(texts: Texts, data: st.DataObject) -> None:
    letters = st.text(alphabet=st.sampled_from("the rain é"), max_size=15)
    tokens = library(texts).encode("in " + data.draw(letters), add_special_tokens=False).ids
    cut = data.draw(st.integers(1, len(tokens)))
    whole, begin = library(texts).decode(tokens), library(texts).decode(tokens[:cut])
    if begin and whole.startswith(begin) and "�" not in begin:
        assert begin + "".join(parts(texts, tokens[cut:], tuple(tokens[:cut]))) == whole


def test_the_first_word_of_an_answer_has_no_space_and_one_that_goes_on_has(tmp_path: Path) -> None:
    texts = Texts(write_byte_fallback(tmp_path / "fallback"))
    the = library(texts).token_to_id("▁the")
    assert "".join(parts(texts, [the, the])) == "the the"
    assert "".join(parts(texts, [the, the], (1, the))) == " the the"
    assert "".join(parts(texts, [the], (1,))) == "the"  # after the begin token a text begins
    assert texts.vocabulary.token_text(the) == " the"


def test_special_tokens_are_not_text_but_have_names(tmp_path: Path) -> None:
    texts = Texts(write_byte_level(tmp_path / "bytes"), [65])
    assert "".join(parts(texts, [END, 65, 66])) == byte_level().decode(
        [66]
    )  # 65 ends texts, says the manifest
    assert texts.vocabulary.token_text(END) == "<end>"
    assert texts.encode_prompt("a<end>") == [*texts.encode_prompt("a"), END]


# ---- stop strings


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4),
    data=st.data(),
)
def test_a_stop_string_is_found_wherever_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    scanner, shown = StopScanner(stops), ""
    while text:
        cut = data.draw(st.integers(1, len(text)))
        shown += scanner.add(text[:cut])
        assert expected.startswith(shown)  # nothing is shown that should have been held back
        text = text[cut:]
    assert shown + scanner.finish() == expected
    assert (scanner.found is not None) == bool(ends)


def test_text_is_held_back_no_longer_than_it_has_to_be() -> None:
    scanner = StopScanner(["END."])
    assert [scanner.add(part) for part in ("a", "EN", "x", "E", "ND", ".", "z")] == [
        "a", "", "ENx", "", "", "", "",
    ]  # fmt: skip


@few
@given(st.data())
def test_probabilities_cover_the_text(texts: Texts, data: st.DataObject) -> None:
    """Every token that begins within the text is listed once, in order, with its place."""
    size = library(texts).get_vocab_size()
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    stops = data.draw(st.lists(st.sampled_from(["e", "a", "�", "th", " "]), max_size=2))
    answer = Answer(texts, continues=(), stops=stops, alternatives=1)
    pieces = [
        answer.add(TokenEvent(id="x", index=index, token=token, logprob=-1.0 * index))
        for index, token in enumerate(tokens)
    ] + [answer.finish()]
    text = "".join(piece.text for piece in pieces)
    infos = [info for piece in pieces for info in piece.tokens]
    visible = [number for number, token in enumerate(tokens) if not texts.vocabulary.is_hidden(token)]
    assert [info.logprob for info in infos] == [-1.0 * number for number in visible[: len(infos)]]
    assert [info.offset for info in infos] == sorted(info.offset for info in infos)
    if answer.is_stopped:
        assert all(info.offset < len(text) for info in infos)
    else:
        assert len(infos) == len(visible)


# ---- chats


def test_a_template_is_found_where_models_keep_it(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "model", template="{{ eos_token }}{{ messages[0].content }}")
    ask = [{"role": "user", "content": "é <b>"}]
    assert Texts(folder).chat_template.render(ask) == "<end>é <b>"
    (folder / "chat_template.jinja").write_text("{{ messages[0] | tojson }}")
    assert Texts(folder).chat_template.render(ask) == '{"role": "user", "content": "é <b>"}'
    config = {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]}
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Texts(folder).chat_template.render(ask) == "y"


def test_a_model_without_a_template_gets_the_contents(tmp_path: Path) -> None:
    texts = Texts(write_byte_fallback(tmp_path / "fallback"))
    ask = [{"role": "system", "content": "the"}, {"role": "user", "content": "rain"}]
    assert texts.chat_template.is_plain
    assert texts.encode_chat(ask) == texts.encode_prompt("the\nrain")
    assert texts.encode_chat(ask)[0] == 1  # a begin token, which a template would write itself


def test_a_template_has_what_templates_expect() -> None:
    source = (
        "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert ChatTemplate(source, {}).render([{"content": "a"}, {"content": "b"}]) == "a4"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('not so') }}",
        "{{ messages.append(1) }}",  # messages are not to be changed
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_that_fails_is_an_error_for_the_client(source: str) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


# ---- bundles that cannot be used


def broken(folder: Path) -> dict[str, tuple[str, str]]:
    good = json.loads((folder / "tokenizer.json").read_text())
    word_piece = {**good, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    return {
        "is not a tokenizer": ("tokenizer.json", "{}"),
        "not a tokenizer": ("tokenizer.json", "\x00"),
        "'WordPiece'": ("tokenizer.json", json.dumps(word_piece)),
        "cannot be read": ("tokenizer_config.json", "{"),
        "does not hold an object": ("tokenizer_config.json", "[]"),
        "not a text": ("tokenizer_config.json", '{"chat_template": 5}'),
        "chat template": ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
    }


@pytest.mark.parametrize("case", range(7))
def test_a_bundle_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, case: int) -> None:
    folder = write_byte_level(tmp_path / "model")
    message, (name, content) = list(broken(folder).items())[case]
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Texts(folder)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        Texts(tmp_path)
