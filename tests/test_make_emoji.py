"""The emoji data set, from excerpts of Unicode's files and drawings of our own, and the box's standard latents."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.models.params import random_params
from sdjax.models.vae import VAE
from sdjax.pipeline.pipeline import Pipeline
from sdjax.text.tokenizer import from_merges
from sdjax.train.dataset import open_dataset
from tests.small import MINI

sys.path.append(str(Path(__file__).parent.parent / "examples"))
make_emoji = importlib.import_module("make_emoji")
train_box = importlib.import_module("train_box")

NAMES = """\
# group: Smileys & Emotion
# subgroup: heart
2764 FE0F                                  ; fully-qualified     # ❤️ E0.6 red heart
2764                                       ; unqualified         # ❤ E0.6 red heart
1F49A                                      ; fully-qualified     # 💚 E0.6 green heart
# subgroup: hand-fingers-open
1F44B                                      ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB                                ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F91D 1F3FB 200D 1F91D 1F3FF               ; fully-qualified     # 🤝 E14.0 two tones
# subgroup: geometric
1F7E5                                      ; fully-qualified     # 🟥 E12.0 red square
1F7E6                                      ; fully-qualified     # 🟦 E12.0 blue square
1F7EA                                      ; fully-qualified     # 🟪 E12.0 same drawing
# subgroup: country-flag
1F1E9 1F1EA                                ; fully-qualified     # 🇩🇪 E0.6 flag: Germany
"""
KEYWORDS = """<ldml><annotations>
<annotation cp="❤">emotion | heart | love | red | red heart</annotation>
<annotation cp="❤" type="tts">red heart</annotation>
<annotation cp="👋">hand | wave | waving</annotation>
<annotation cp="🟥">red | square</annotation>
</annotations></ldml>
"""
DERIVED = """<ldml><annotations>
<annotation cp="👋🏻">hand | light skin tone | wave | waving</annotation>
</annotations></ldml>
"""


def painted(text, size, font):
    """Another colour for each emoji, but the blue square twice."""
    code = ord(text[0]) if text != "🟪" else ord("🟦")
    return Image.new("RGB", (size, size), (code % 251, code // 251 % 251, 40 * len(text)))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The installed files, and a Pillow that can draw them."""
    files = {"font.ttf": "", "names.txt": NAMES, "en.xml": KEYWORDS, "derived.xml": DERIVED}
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(make_emoji, "FONT", tmp_path / "font.ttf")
    monkeypatch.setattr(make_emoji, "NAMES", tmp_path / "names.txt")
    monkeypatch.setattr(make_emoji, "KEYWORDS", [tmp_path / "en.xml", tmp_path / "derived.xml"])
    monkeypatch.setattr(make_emoji.features, "check", lambda name: True)
    monkeypatch.setattr(make_emoji.ImageFont, "truetype", lambda *arguments, **options: None)
    monkeypatch.setattr(make_emoji, "draw", painted)
    return tmp_path


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def test_emoji_are_whole_not_flags_and_of_one_tone_at_most(packages):
    found = {emoji.name: emoji for emoji in make_emoji.read_emoji()}
    squares = ["red square", "blue square", "same drawing"]
    assert list(found) == ["red heart", "green heart", "waving hand", "waving hand: light skin tone", *squares]
    assert found["red heart"] == ("❤️", "red heart", ("emotion", "heart", "love", "red"), "base")
    assert found["waving hand: light skin tone"].kind == "tone"
    assert found["waving hand: light skin tone"].keywords == ("hand", "light skin tone", "wave", "waving")
    assert found["green heart"].keywords == ()


@pytest.mark.parametrize("name", ["font.ttf", "names.txt", "derived.xml"])
def test_missing_package_is_named_before_anything_is_written(name, packages, monkeypatch):
    def no_font(*arguments, **options):
        raise OSError("cannot open resource")

    monkeypatch.setattr(make_emoji.ImageFont, "truetype", no_font)
    (packages / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing: apt-get install fonts-noto-color-emoji"):
        make_emoji.build(packages / "emoji")
    assert not (packages / "emoji").exists()


def test_pillow_that_cannot_join_sequences_is_refused(packages, monkeypatch):
    monkeypatch.setattr(make_emoji.features, "check", lambda name: False)
    with pytest.raises(RuntimeError, match="without Raqm"):
        make_emoji.build(packages / "emoji")


def test_captions_are_twelve_names_five_with_keywords_and_three_keywords():
    keywords = ("emotion", "heart", "love", "red", "affection", "passion")
    texts = make_emoji.captions(make_emoji.Emoji("❤", "red heart", keywords, "base"))
    names, mixed = texts.count("red heart"), sum(text.startswith("red heart, ") for text in texts)
    assert (len(texts), names, mixed) == (20, 12, 5)
    for text in texts:
        words = [word for word in text.split(", ") if word != "red heart"]
        assert len(set(words)) == len(words) <= 4
        assert set(words) <= set(keywords)
    assert texts == make_emoji.captions(make_emoji.Emoji("❤", "red heart", keywords, "base"))


def test_toned_emoji_always_say_their_name_and_one_without_keywords_has_nothing_else():
    toned = make_emoji.captions(make_emoji.Emoji("👋🏻", "waving hand: light skin tone", ("hand", "wave"), "tone"))
    assert Counter(text == "waving hand: light skin tone" for text in toned) == {True: 15, False: 5}
    assert all(text.startswith("waving hand: light skin tone") for text in toned)
    assert make_emoji.captions(make_emoji.Emoji("x", "bare", (), "base")) == ["bare"]


def test_split_keeps_one_base_emoji_in_forty_one_toned_in_ten_and_the_named_colours():
    def share(kind):
        return np.mean([make_emoji.is_held_out(make_emoji.Emoji("", f"name {i}", (), kind)) for i in range(4000)])

    assert share("base") == pytest.approx(1 / 40, abs=0.01)
    assert share("tone") == pytest.approx(1 / 10, abs=0.02)
    for name in make_emoji.HELD_OUT_COLOURS:
        assert make_emoji.is_held_out(make_emoji.Emoji("", name, (), "base"))


def test_built_set_is_split_by_name_without_pictures_that_are_there_twice(packages):
    counts = make_emoji.build(packages / "emoji", 16)
    train, held_out = rows(packages / "emoji" / "train"), rows(packages / "emoji" / "held_out")
    emoji = [entry for entry in make_emoji.read_emoji() if entry.name != "same drawing"]
    for part, is_held_out in ((train, False), (held_out, True)):
        assert [row["name"] for row in part] == [e.name for e in emoji if make_emoji.is_held_out(e) == is_held_out]
    assert {"green heart", "red square"} <= {row["name"] for row in held_out}
    assert sum(counts.values()) == len(train) + len(held_out) == 6

    data = open_dataset(packages / "emoji" / "train")  # as the trainings read it
    assert [example.name for example in data.examples] == [row["file_name"] for row in train]
    weights = {row["name"]: example.weight for row, example in zip(train, data.examples, strict=True)}
    assert weights["waving hand"] == 1.0
    assert weights.get("waving hand: light skin tone", 0.15) == 0.15
    heart = next(i for i, row in enumerate(train) if row["name"] == "red heart")
    assert (data.picture(heart, 16) == np.asarray(painted("❤️", 16, None))).all()


def test_build_does_not_write_into_a_set_that_is_there(packages):
    make_emoji.build(packages / "emoji", 16)
    with pytest.raises(FileExistsError):
        make_emoji.build(packages / "emoji", 16)


def test_standardised_model_has_unit_latents_and_draws_the_same_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(70):  # more than one batch
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((16, 16)).save(tmp_path / f"{i:02d}.png")
    data = open_dataset(tmp_path, captions=False)
    model = Pipeline(MINI, random_params(MINI), from_merges([]))
    after = train_box.standardised(model, data)
    assert after.params["unet"] is model.params["unet"]

    pictures = np.stack([data.picture(i, MINI.image_size) for i in range(70)]).astype(np.float32) / 127.5 - 1
    vae = VAE(MINI.vae)
    encode = jax.jit(lambda params: vae.apply({"params": params}, pictures, method="encode"))
    decode = jax.jit(lambda params, z: vae.apply({"params": params}, z, method="decode"))
    old, new = (m.params["vae"] for m in (model, after))
    before, now = encode(old), encode(new)
    np.testing.assert_allclose(now.mean.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(now.mean.std((0, 1, 2)), 1, atol=1e-4)
    std = np.asarray(before.mean).std((0, 1, 2))
    assert np.abs(std - 1).max() > 0.1
    np.testing.assert_allclose(np.exp(0.5 * now.logvar) * std, np.exp(0.5 * before.logvar), rtol=1e-3)
    np.testing.assert_allclose(decode(new, now.mean), decode(old, before.mean), atol=1e-4)
