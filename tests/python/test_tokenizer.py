"""The tokenizer of a model folder, its chat template, and text while it is generated."""

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from frspec.errors import ModelError, RequestError
from frspec.streaming import StopMatcher, StreamDecoder, _LocalDecoder, _WholeDecoder
from frspec.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it?\n\n  def f(x):\n    return",
    "naïve café, Grüße aus Köln; 日本語の文章と한국어; emoji 🙂🙃👩‍👩‍👧 and math ∑∫√",
    "Ein Text mit Wörtern, noch ein Text mit Wörtern, the text with words " * 3,
]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen2: characters split over tokens, added tokens beside them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    # Holds characters that no byte-level token has, and one that byte-level tokens read as a byte.
    backend.add_tokens([AddedToken("<tool call>"), AddedToken("→日"), AddedToken("Ġé")])
    return backend


def sentencepiece(strip: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 (Gemma without the strip): bytes that are no token are spelt <0xXX>."""
    letters = sorted({c for text in TEXTS[:1] for c in text.replace(" ", "▁")})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "▁quick", "the", "é", "日", "", "▁▁▁x", *letters]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def with_decoder(decoder) -> tokenizers.Tokenizer:
    pieces = ["▁the", "▁", "▁▁", "cat", "##s", ".", "n't", "<pad>", "x</w>", "y", "", "|", "<0xE2>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="y"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<sep>"])
    return backend


SMALL = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece_no_strip": sentencepiece(strip=False),
    "metaspace": with_decoder(decoders.Metaspace()),
    "metaspace_never": with_decoder(decoders.Metaspace(prepend_scheme="never")),
    "word_piece": with_decoder(decoders.WordPiece()),
    "none": with_decoder(None),
    "byte_level_in_sequence": with_decoder(decoders.Sequence([decoders.ByteLevel()])),
    # Nothing can be streamed here, and the text must still be right.
    "bpe_suffix": with_decoder(decoders.BPEDecoder()),
    "ctc": with_decoder(decoders.CTC()),
    "regex_over_tokens": with_decoder(
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("t▁"), "T")])
    ),
}
WHOLE = {"bpe_suffix", "ctc", "regex_over_tokens"}

# FRSPEC_TEST_MODELS: a folder of model folders, to test their tokenizers too.
for _folder in sorted(Path(os.environ.get("FRSPEC_TEST_MODELS", "/nonexistent")).glob("*")):
    if (_folder / "tokenizer.json").is_file():
        SMALL[_folder.name] = tokenizers.Tokenizer.from_file(str(_folder / "tokenizer.json"))
TOKENIZERS = {name: Tokenizer(backend) for name, backend in SMALL.items()}


def stream(tokenizer: Tokenizer, token_ids: list[int], cuts: random.Random, **options) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    pieces, start = [], 0
    while start < len(token_ids):
        end = start + cuts.choice([1, 1, 1, 2, 3, 7])
        pieces.append(decoder.push(token_ids[start:end]))
        start = end
    return [*pieces, decoder.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(name, data):
    tokenizer = TOKENIZERS[name]
    # Beyond the last id too: embeddings are padded, and such ids stand for nothing.
    ids = st.lists(st.integers(0, tokenizer.size + 2), max_size=40)
    token_ids = data.draw(ids)
    skip = data.draw(st.booleans())
    cuts = random.Random(data.draw(st.integers(0, 2**16)))
    pieces = stream(tokenizer, token_ids, cuts, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_runs_of_bytes_and_spaces(name):
    """Random ids seldom give these: long runs out of a few tokens, valid characters among them."""
    tokenizer = TOKENIZERS[name]
    vocab = tokenizer.backend.get_vocab()
    chosen = [vocab[t] for t in vocab if t in ("▁", "▁▁", "", "Ġ", "Ã", "©", "ð", "Ł", "ĺ", "Ĥ")]
    chosen += [vocab[t] for t in ("<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0xC3>") if t in vocab]
    chosen += [0, 1, 5]
    for seed in range(400):
        rng = random.Random(seed)
        token_ids = rng.choices(rng.sample(chosen, min(4, len(chosen))), k=rng.randrange(30))
        assert "".join(stream(tokenizer, token_ids, rng)) == tokenizer.decode(token_ids), token_ids


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - WHOLE))
def test_text_is_given_without_waiting_for_the_end(name):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.backend.get_vocab()
    token_ids = sorted(tokens[t] for t in tokens if "<0x" not in t)[:2000]
    pieces = stream(tokenizer, token_ids, random.Random(1))
    assert len(pieces[-1]) <= 1
    assert sum(1 for piece in pieces if piece) > len(pieces) * 0.5


def test_a_decoder_that_looks_back_from_the_end_is_not_streamed():
    # Not run: the library panics when such a decoder is given an empty text.
    steps = [decoders.Fuse(), decoders.Strip(" ", 0, 1)]
    backend = with_decoder(decoders.Sequence(steps))
    assert isinstance(StreamDecoder(Tokenizer(backend))._decoder, _WholeDecoder)


def test_a_split_character_waits_for_its_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = [tokenizer.backend.token_to_id(c) for c in "ðŁĻĤa"]  # the bytes of 🙂, then a
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in token_ids] == ["", "", "", "🙂", "a"]
    assert decoder.finish() == ""


def test_an_unfinished_character_becomes_a_replacement_character():
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = [tokenizer.backend.token_to_id(c) for c in "aðŁ"]
    assert stream(tokenizer, token_ids, random.Random(0))[-1] == "\ufffd"
    assert tokenizer.decode(token_ids) == "a\ufffd"


def test_streaming_costs_the_same_for_every_token():
    decoded = 0

    def decode(tokens):
        nonlocal decoded
        decoded += len(tokens)
        return SMALL["sentencepiece"].decoder.decode(tokens)

    decoder = _LocalDecoder(decode)
    rng = random.Random(0)
    tokens = rng.choices(["▁", "▁the", "<0xC3>", "<0xA9>", "a"], k=3000)
    for token in tokens:
        decoder.push([token])
    decoder.finish()
    assert decoded < 3 * len(tokens)


def expected_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition: the first end of a stop string, the longest one that ends there."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=600, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_end_the_text_whatever_the_pieces(pieces, stops):
    matcher = StopMatcher(stops)
    shown, seen = "", ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        if matcher.matched is None:
            held = seen[len(shown) :]
            assert seen == shown + held
            # No more is held back than may still become a stop string, and no less.
            opened = [n for n in range(len(seen) + 1) if _opens(seen[len(seen) - n :], stops)]
            assert len(held) == max(opened)
    if matcher.matched is None:
        shown += matcher.finish()
    assert (shown, matcher.matched) == expected_stop("".join(pieces), stops)


def _opens(end: str, stops: list[str]) -> bool:
    return end == "" or any(len(end) < len(stop) and stop.startswith(end) for stop in stops)


def test_nothing_follows_a_stop_string():
    matcher = StopMatcher(["\nUser:"])
    pieces = ["Hello", " world\n", "Us", "er", ": and more", "even more"]
    assert [matcher.push(piece) for piece in pieces] == ["Hello", " world", "", "", "", ""]
    assert matcher.matched == "\nUser:"
    assert matcher.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_stop_strings_must_be_texts(stops):
    with pytest.raises(RequestError, match="stop: expected non-empty strings, found"):
        StopMatcher(stops)


# ---------------------------------------------------------------------------- folders


def write_folder(path: Path, backend=None, **files) -> Path:
    path.mkdir(exist_ok=True)
    (backend or SMALL["byte_level"]).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_folder_names_the_tokens_that_end_a_text(tmp_path):
    folder = write_folder(
        tmp_path / "m",
        config={"vocab_size": 512, "eos_token_id": 5},
        generation_config={"eos_token_id": [7, 5]},
        tokenizer_config={"eos_token": {"content": "<|end|>"}, "bos_token": "<|start|>"},
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.ending_ids == sorted({5, 7, tokenizer.backend.token_to_id("<|end|>")})
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "bos_token": "<|start|>"}
    assert tokenizer.vocab_size == 512
    assert tokenizer.size == len(tokenizer.backend.get_vocab()) < 512


def test_text_is_never_truncated_or_padded(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    text = TEXTS[1]
    tokenizer = Tokenizer.load(write_folder(tmp_path / "m", backend))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_on_request_only(tmp_path):
    backend = byte_level()
    start = backend.token_to_id("<|start|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    tokenizer = Tokenizer.load(write_folder(tmp_path / "m", backend))
    assert tokenizer.encode("fox") == [start, *tokenizer.encode("fox", add_special_tokens=False)]


def test_fingerprint_depends_on_what_ids_mean_and_nothing_else(tmp_path):
    base = Tokenizer(byte_level())
    other = byte_level()
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.decoder = decoders.Fuse()
    assert Tokenizer(other).fingerprint == base.fingerprint
    # A token of the vocabulary that is also listed as an added one keeps its id.
    listed = byte_level()
    listed.add_special_tokens(["a"])
    assert Tokenizer(listed).fingerprint == base.fingerprint
    assert Tokenizer.load(write_folder(tmp_path / "m")).fingerprint == base.fingerprint

    more = byte_level()
    more.add_tokens(["<new>"])
    assert Tokenizer(more).fingerprint != base.fingerprint
    description = json.loads(byte_level().to_str())
    vocab = description["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped = tokenizers.Tokenizer.from_str(json.dumps(description))
    assert Tokenizer(swapped).fingerprint != base.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "expected a JSON object, found list"),
        ("config.json", '{"eos_token_id": "2"}', "eos_token_id: expected an id or a list"),
        ("config.json", '{"vocab_size": "many"}', "vocab_size: expected a count"),
        ("chat_template.jinja", "{% for %}", "chat template does not compile"),
    ],
)
def test_unusable_folder_is_refused_by_file(tmp_path, name, content, message):
    folder = write_folder(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.load(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ending_id_beyond_the_vocabulary_is_left_out(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path / "m", config={"eos_token_id": 9999}))
    assert tokenizer.ending_ids == []  # as the runtime does


def test_half_a_surrogate_pair_is_no_prompt(tmp_path):
    with pytest.raises(RequestError, match="expected a Unicode text"):
        Tokenizer(SMALL["byte_level"]).encode("a\ud800b")


# ---------------------------------------------------------------------------- chat

MESSAGES = [{"role": "user", "content": "<b>Is 1 & 2 'fine'?</b>"}]
TEMPLATE = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {{ raise_exception('No tools here.\nSorry') }}
    {% endif %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
<|{{ message.role }}|>{% generation %}{{ message.content | tojson }}{% endgeneration %}
{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>{% endif %}"""


def chat_folder(path: Path, template, **extra) -> Path:
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **extra}
    return write_folder(path, tokenizer_config={**settings, "chat_template": template})


def test_chat_renders_as_hugging_face_does(tmp_path):
    tokenizer = Tokenizer.load(chat_folder(tmp_path / "m", TEMPLATE))
    body = "<s>\n<|user|>\"<b>Is 1 & 2 'fine'?</b>\"</s>\n"
    messages = [*MESSAGES, {"role": "user", "content": "skip"}]
    assert tokenizer.chat(messages) == body + "<|assistant|>"
    assert tokenizer.chat(messages, add_generation_prompt=False) == body


def test_template_file_goes_before_the_config_and_default_before_others(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder = chat_folder(tmp_path / "m", named)
    assert Tokenizer.load(folder).chat(MESSAGES) == "d"
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y')|length }}")
    assert Tokenizer.load(folder).chat(MESSAGES) == "4"


def test_no_template_is_an_error(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path / "m"))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.chat(MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"content": "x"}], "message 0: expected an object with role"),
        (["hello"], "message 0: expected an object with role"),
        ([*MESSAGES, {"role": "user"}], "message 1: no content"),
        ([{"role": "tool", "content": "x"}], "chat template refused: No tools here. Sorry"),
    ],
)
def test_messages_that_do_not_suit_are_refused(tmp_path, messages, message):
    tokenizer = Tokenizer.load(chat_folder(tmp_path / "m", TEMPLATE))
    with pytest.raises(RequestError, match=message):
        tokenizer.chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(tmp_path, template):
    tokenizer = Tokenizer.load(chat_folder(tmp_path / "m", template))
    with pytest.raises(RequestError, match="chat template refused"):
        tokenizer.chat([dict(m) for m in MESSAGES])
