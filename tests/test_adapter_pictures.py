"""Adapters on pictures: live and merged give the same, each picture has its own, and nothing compiles twice."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import sdjax
from convert.adapters import targets, write_adapter
from sdjax.cli import main
from sdjax.devices.compilation import compilations
from sdjax.devices.platform import written_for
from sdjax.models.adapter_forms import Update
from sdjax.models.adapters import Adapter, merged, sections
from sdjax.pipeline import functions
from sdjax.pipeline.adapters import RANKS, Library, modules_of, tags_of
from sdjax.pipeline.batching import assemble, conditioned, initial, state_of
from sdjax.pipeline.functions import predict_noise, text_kv
from sdjax.pipeline.recipe import read_parameters, read_recipe
from sdjax.request import Request
from sdjax.text.syntax import lora_of
from tests.small import MINI, mini

SETTINGS = dict(width=8, height=8, steps=3, guidance=4.0, sampler="euler")


def lora(rank, seed, config=MINI, *, convolutions=False, part="", embeddings=None):
    """An adapter of every matrix of a model, or of those of one part."""
    rng = np.random.default_rng(seed)
    updates = {}
    for target in targets(config).values():
        inside = target.kernel[0] == "text" or any(key.startswith("attention") for key in target.kernel)
        if target.kernel[-1] != "kernel" or not target.kernel[0].startswith(part) or not (inside or convolutions):
            continue
        inner = int(np.prod(target.shape[1:]))
        tensors = {
            "lora_down": rng.normal(0, inner**-0.5, (rank, *target.shape[1:])).astype(np.float16),
            "lora_up": rng.normal(0, 0.3, (target.shape[0], rank, *[1] * (len(target.shape) - 2))).astype(np.float16),
            "alpha": np.float32(rank / 2),
        }
        updates[target.kernel] = Update("lora", tensors, target.shape, target.kernel, target.kernel_shape, target.bias)
    return Adapter("lora", updates, embeddings or {})


def loha(seed, config=MINI):
    """One that has no low rank."""
    rng = np.random.default_rng(seed)
    updates = {}
    for target in targets(config).values():
        if target.kernel[-1] == "kernel" and target.kernel[0] == "unet" and len(target.kernel_shape) == 2:
            out, inner = target.shape[:2]
            shapes = {f"hada_w{n}_{end}": (out, 9) if end == "a" else (9, inner) for n in (1, 2) for end in "ab"}
            tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
            updates[target.kernel] = Update(
                "loha", tensors, target.shape, target.kernel, target.kernel_shape, target.bias
            )
    return Adapter("loha", updates)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    write_adapter(folder / "a.safetensors", lora(4, 1), MINI)
    write_adapter(folder / "b.safetensors", lora(8, 2, convolutions=True), MINI)
    (folder / "more").mkdir()
    learnt = {"wonder": np.random.default_rng(9).standard_normal((2, 16), np.float32)}
    write_adapter(folder / "more" / "c d.safetensors", lora(3, 3, part="unet", embeddings=learnt), MINI)
    write_adapter(folder / "h.safetensors", loha(4), MINI)
    return folder


@pytest.fixture
def pipe(folder):
    return dataclasses.replace(mini(), library=Library(folder))


def assert_close(found, expected, bound=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


PROMPTS = (
    "red",
    "red <lora:a:0.8>",
    "red <lora:a:0.3:0.9><lora:c d:-1>",
    "red <lora:b:0.7>",
    "red <lora:b:0.5><lora:a:1>",
    "red <lora:c d:te=0:unet=1>",
    "red <lora:a:1:1:3>",
)


def requests(prompts=PROMPTS):
    return [Request(prompt, seed=i, **SETTINGS, id=str(i)) for i, prompt in enumerate(prompts)]


def test_live_and_merged_are_the_same_and_each_picture_is_as_if_made_alone(pipe, latents):
    together = latents(pipe, requests(), 4)
    plain = latents(mini(), requests(["red"] * len(PROMPTS)), 4)
    for i, request in enumerate(requests()):
        (changed,) = _merged(pipe, request, latents).values()
        (alone,) = latents(pipe, [request], 1).values()
        assert_close(together[str(i)], changed)
        assert_close(together[str(i)], alone)
        if i:
            assert np.abs(together[str(i)] - plain[str(i)]).max() > 0.05 * np.abs(changed).max()


def test_live_and_merged_are_the_same_in_tiled_pictures(pipe, latents):
    tiled = [dataclasses.replace(request, tiling=True) for request in requests(["red", "red <lora:b:0.7>"])]
    together = latents(pipe, tiled, 2)
    (changed,) = _merged(pipe, tiled[1], latents).values()
    assert_close(together["1"], changed)


def _merged(pipe, request, latents):
    """The latents with the adapters of a request in the parameters, by `Pipeline.with_adapters`."""
    if "a:1:1:3" in request.prompt:
        wanted = pipe.library.wanted(tags_of(request), MINI)
        changed = dataclasses.replace(pipe, params=merged(pipe.params, wanted, MINI))
    else:
        files = {str(pipe.library.find(tag.name)): (tag.unet, tag.text) for tag in tags_of(request)}
        changed = pipe.with_adapters(files)
    return latents(changed, [dataclasses.replace(request, prompt="red", id="m")], 1)


def test_what_has_no_low_rank_is_merged_in_a_job_too(pipe, latents):
    found = latents(pipe, requests(["red <lora:h:0.5>", "red <lora:h:0.5><lora:a:0.2>"]), 2)
    merged = pipe.with_adapters({str(pipe.library.find("h")): 0.5})
    assert_close(found["0"], latents(merged, requests(["red"]), 1)["0"])
    both = merged.with_adapters({str(pipe.library.find("a")): 0.2})
    assert_close(found["1"], latents(both, requests(["blue", "red"]), 2)["1"], 1e-4)


def test_adapters_of_another_weight_rank_or_file_compile_nothing(pipe):
    list(pipe.batch(requests(), batch_size=2))
    with compilations() as found:
        list(pipe.batch(requests(["blue <lora:c d:0.1>", "(blue:1.2) <lora:a:2>", "<lora:a:1:0.3>"]), batch_size=2))
        list(pipe.batch(requests(["blue <lora:b:0.1>", "<lora:b:2:dyn=2> <lora:a>"]), batch_size=2))
        pipe.with_adapters({pipe.library.find("a"): 0.4}).text_to_image("red", count=2, **SETTINGS)
    assert not found


def test_pictures_with_different_adapters_share_batches(pipe, monkeypatch):
    from sdjax.pipeline.batching import Batches

    batches = []
    started = Batches._started
    monkeypatch.setattr(
        Batches,
        "_started",
        lambda self, places: batches.append([p.request.id for p in places if p]) or started(self, places),
    )
    list(pipe.batch(requests([f"red <lora:{name}:{w}>" for name in ("a", "c d") for w in (0.2, 0.9)]), batch_size=4))
    assert sorted(batches[0]) == ["0", "1", "2", "3"]


def test_gates_of_0_give_the_plain_network_to_the_bit(pipe):
    params, rng = pipe.params["unet"], np.random.default_rng(0)
    context, x = rng.standard_normal((4, 16, 16), np.float32), rng.standard_normal((2, 8, 8, 4), np.float32)
    time = [[np.zeros((2, 16), np.float32)] * n for n in (1, 2, 2)]
    factors = {
        part: {
            name: (rng.standard_normal((*shape[:-1], 8), np.float32), rng.standard_normal((8, shape[-1]), np.float32))
            for name, shape in modules.items()
        }
        for part, modules in modules_of(MINI, convolutions=True).items()
    }

    def predicted(adapters, gates):
        with jax.disable_jit():  # one operation at a time: a compiler rounds other sums in another way
            kv = text_kv(params, context, config=MINI)
            return np.asarray(predict_noise(params, x, time, kv, adapters, gates, config=MINI))

    plain = predicted(None, None)
    zeros = np.zeros((2, len(sections(MINI)), 8), np.float32)
    np.testing.assert_array_equal(predicted(factors, zeros), plain)
    assert np.abs(predicted(factors, zeros + 1) - plain).max() > 0.1
    first = zeros.copy()
    first[0] = 1
    found = predicted(factors, first)  # rows: both negative prompts, then both prompts
    np.testing.assert_allclose(found[1::2], plain[1::2], rtol=1e-5, atol=1e-6)
    assert np.abs(found[0::2] - plain[0::2]).max() > 0.1


def test_a_bank_that_is_full_is_followed_by_another(pipe, latents, tmp_path):
    for i in range(3):
        write_adapter(tmp_path / f"{i}.safetensors", lora(RANKS // 2, 20 + i), MINI)
    wide = dataclasses.replace(pipe, library=Library(tmp_path))
    many = requests([f"red <lora:{i % 3}:0.5>" for i in range(6)])
    together = latents(wide, many, 2)
    for one in many[::2]:
        (alone,) = latents(wide, [one], 1).values()
        assert_close(together[one.id], alone)


@pytest.mark.parametrize(
    "prompts",
    [
        ("red disc", "(blue:1.3)"),
        ("red AND blue :0.5", "[green|blue] c"),
        ("red <lora:a:0.5>", "blue <lora:c d:0.7><lora:a:-1> AND red"),
        ("red " * 10, "blue " * 15),
    ],
)
def test_programs_for_gpus_and_tpus_give_the_same(pipe, prompts):
    """They take both halves of guidance at once; here they run on the CPU."""
    adapting = pipe._adapting(True)
    prepared = [pipe._prepared(Request(prompt, seed=i, **SETTINGS), {}, adapting) for i, prompt in enumerate(prompts)]
    batch, weights = assemble(prepared, MINI), prepared[0].weights
    params = pipe.params if weights is None else weights.params(pipe.params)
    found = {}
    for platform in ("cpu", "gpu", "tpu"):
        condition, sample = (
            jax.jit(written_for(platform, partial(function, config=MINI), kernels=False))
            for function in (functions.condition, functions.sample)
        )
        state = state_of(batch, initial(functions.initial_latents, batch), conditioned(condition, params, batch))
        found[platform] = np.asarray(sample(params, state).carry.x)
    assert_close(found["gpu"], found["cpu"])
    assert_close(found["tpu"], found["cpu"])


@pytest.mark.parametrize("options", [dict(), dict(parallel="pmap"), dict(model_parallel=2)])
def test_adapters_act_the_same_on_several_devices(pipe, latents, options):
    here = latents(pipe, requests(), 2)
    there = latents(pipe.on(jax.local_devices()[:2], **options), requests(), 2)
    for name, found in there.items():
        assert_close(found, here[name], 3e-5)


def test_block_weights_act_where_they_say(pipe, latents):
    """All blocks at 1 is the adapter, all at 0 nothing; of a model with one level: BASE, IN, IN, IN, M, OUT..."""
    ones, zeros = ",".join("1" * 8), ",".join("0" * 8)
    prompts = [f"red <lora:a:0.8:lbw={ones}>", f"red <lora:a:0.8:lbw={zeros}>", "red <lora:a:0.8:lbw=0,0,0,0,1,0,0,0>"]
    with pytest.raises(ValueError, match=r"block weights; expected \d+ or \d+: the text encoder's"):
        latents(pipe, requests(prompts), 4)
    count = [n for n in range(2, 12) if _accepts(pipe, n)]
    assert len(count) == 2
    n = count[-1]
    prompts = [f"red <lora:a:0.8:lbw={','.join(['1'] * n)}>", f"red <lora:a:0.8:lbw={','.join(['0'] * n)}>"]
    found = latents(pipe, requests(prompts), 2)
    expected = latents(pipe, [requests(["red <lora:a:0.8>"])[0], requests(["", "red"])[1]], 2)
    for name in "01":
        assert_close(found[name], expected[name])


def _accepts(pipe, count):
    try:
        pipe._prepared(Request(f"<lora:a:1:lbw={','.join(['1'] * count)}>", **SETTINGS), {})
    except ValueError:
        return False
    return True


def test_learnt_words_in_an_adapter_are_known_where_it_is(pipe, latents):
    found = latents(pipe, requests(["wonder <lora:c d:0>", "wonder <lora:a:0.5>"]), 2)
    plain = latents(mini(), requests(["wonder"]), 1)
    assert np.abs(found["0"] - plain["0"]).max() > 1e-3


def test_an_adapter_that_is_named_twice_has_its_last_weight(pipe, latents):
    with pytest.warns(UserWarning, match="'a' is named twice; the last weights hold"):
        twice = latents(pipe, requests(["red <lora:a:0.2><lora:a:0.9>"]), 1)
    assert_close(twice["0"], latents(pipe, requests(["red <lora:a:0.9>"]), 1)["0"])


# What is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.safetensors", ("x.safetensors", 1.0, 1.0)),
        ("x.safetensors:0.8", ("x.safetensors", 0.8, 0.8)),
        ("a/x.safetensors:0.8:-0.5", ("a/x.safetensors", -0.5, 0.8)),
        ("c:/x.pt:1", ("c:/x.pt", 1.0, 1.0)),
        ("name with spaces:.5", ("name with spaces", 0.5, 0.5)),
    ],
)
def test_an_adapter_is_named_by_file_and_weights(text, expected):
    tag = lora_of(text)
    assert (tag.name, tag.text, tag.unet) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sdjax.storage import checkpoint

    path = tmp_path_factory.mktemp("model") / "mini"
    pipe = mini()
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    data = json.loads(pipe.tokenizer.engine.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["merges"]]
    (tokenizer / "vocab.json").write_text(json.dumps(pipe.tokenizer.engine.get_vocab()))
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    checkpoint.save(path, MINI, pipe.params, tokenizer=tokenizer)
    return str(path)


def run(*arguments):
    return main([str(argument) for argument in arguments])


SHORT = ("--size", "8x8", "--steps", "2", "--guidance", "4", "--no-compile-cache")


def test_a_picture_with_adapters_and_learnt_words_is_made_again_from_its_recipe(model, folder, tmp_path, capsys):
    (tmp_path / "words").mkdir()
    save_file({"emb_params": np.full((2, 16), 0.3, np.float32)}, tmp_path / "words" / "gleam.safetensors")
    options: tuple = (
        "--model",
        model,
        "--lora",
        f"{folder}/a.safetensors:0.5",
        "--lora",
        f"{folder}/h.safetensors:0.3:0",
    )
    options += ("--lora-dir", folder, "--embeddings", tmp_path / "words", *SHORT)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert run("txt2img", "(red:1.3) gleam <lora:c d:0.7>", "-o", first, *options) == 0
    recipe = read_recipe(first)
    assert recipe.loras == (f"{folder}/a.safetensors:0.5", f"{folder}/h.safetensors:0.3:0")
    assert {path.rsplit("/")[-1] for path in recipe.adapters} == {"a.safetensors", "h.safetensors", "c d.safetensors"}
    assert [path.rsplit("/")[-1] for path in recipe.embeddings] == ["gleam.safetensors"]
    text = read_parameters(first)
    assert "(red:1.3) gleam <lora:c d:0.7> <lora:a:0.5:0.5> <lora:h:0:0.3>\n" in text
    assert 'Lora hashes: "a: ' in text
    assert run("txt2img", "--recipe", first, "-o", again, "--no-compile-cache") == 0
    assert again.read_bytes() == first.read_bytes()
    write_adapter(folder / "a.safetensors", lora(4, 99), MINI, force=True)
    try:
        capsys.readouterr()
        assert run("txt2img", "--recipe", first, "-o", again, "--no-compile-cache") == 2
        assert "a.safetensors: not what the recipe was made with" in capsys.readouterr().err
    finally:
        write_adapter(folder / "a.safetensors", lora(4, 1), MINI, force=True)


def test_lines_of_a_job_differ_in_adapters_and_a_missing_one_is_named_with_its_line(model, folder, tmp_path, capsys):
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"prompt": "red <lora:a:0.5>", "id": "a"},
        {"prompt": "red", "loras": [f"{folder}/b.safetensors:0.4"], "id": "b"},
        {"prompt": "red", "lora": f"{folder}/b.safetensors:0.4; {folder}/a.safetensors:1:0", "id": "c"},
        {"prompt": "red <lora:nowhere:0.5>", "id": "d"},
        {"prompt": "(red:1e9)", "id": "e"},
        {"prompt": "red (blue:1000000000)", "id": "f"},
        {"prompt": "red <lora:a:1e9>", "id": "g"},
    ]
    jobs.write_text("\n".join(map(json.dumps, lines)))
    options = ("--model", model, "--lora-dir", folder, *SHORT, "--batch", "2")
    assert run("batch", jobs, "-o", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "line 4: the adapter 'nowhere' is not there" in error
    assert "line 6: the weight 1e+09 of 'blue' must lie within" in error
    assert "line 7: the weight of the adapter 'a' must lie in [-100, 100]" in error
    assert "line 5" not in error  # (red:1e9) has no number in this dialect
    assert run("batch", jobs, "-o", tmp_path / "out", *options, "--skip-bad") == 0
    for name, count in (("a", 1), ("b", 1), ("c", 2)):
        assert len(read_recipe(tmp_path / "out" / f"{name}.png").adapters) == count


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("--lora", "gone.safetensors"),
            "the adapter 'gone.safetensors' is not there; give their folder by --lora-dir",
        ),
        (("--lora", ":0.5"), "expected FILE[:WEIGHT[:TEXT_WEIGHT]]"),
        (("--lora-dir", "gone"), "gone: no such folder of adapters"),
        (("--embeddings", "gone.pt"), "gone.pt: no such embedding"),
        (("--weighting", "nai"), "weighting must be one of a1111, comfy, compel, none, found 'nai'"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(arguments, reason, tmp_path, capsys):
    assert run("txt2img", "red", "-o", tmp_path / "x.png", *arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_an_adapter_for_another_model_is_refused_before_the_model_is_read(folder, tmp_path, capsys):
    assert run("txt2img", "red", "-o", tmp_path / "x.png", "--lora", folder / "a.safetensors") == 2
    assert "expected" in capsys.readouterr().err


def test_adapters_of_python_are_checked(pipe, folder):
    with pytest.raises(FileNotFoundError, match="is not there"):
        pipe.with_adapters({"gone.safetensors": 1})
    with pytest.raises(ValueError, match=r"must lie in \[-100, 100\], found nan"):
        pipe.with_adapters({folder / "a.safetensors": float("nan")})
    with pytest.raises(ValueError, match=r"the weight of .* must be a number, or \(of the UNet, of the text encoder\)"):
        pipe.with_adapters({folder / "a.safetensors": (1, 2, 3)})
    with pytest.raises(ValueError, match="must lie in"):
        pipe.with_adapters({folder / "a.safetensors": "0.8"})
    assert pipe.with_adapters({folder / "a.safetensors": np.float32(0.5)}).config == MINI
    with pytest.raises(ValueError, match="FILE"):
        sdjax.Request("a", loras=("",)) and pipe.text_to_image("a", loras=("",), **SETTINGS)


def test_an_adapter_is_found_by_its_own_name_and_two_of_one_name_are_refused(pipe, latents, tmp_path):
    named = dataclasses.replace(lora(4, 1), metadata={"ss_output_name": "ink v2"})
    write_adapter(tmp_path / "x1.safetensors", named, MINI)
    own = dataclasses.replace(pipe, library=Library(tmp_path))
    found = latents(own, requests(["red <lora:ink v2:0.8>"]), 1)
    assert_close(found["0"], latents(pipe, requests(["red <lora:a:0.8>"]), 1)["0"])
    (tmp_path / "more").mkdir()
    write_adapter(tmp_path / "more" / "x1.safetensors", named, MINI)
    with pytest.raises(ValueError, match=r"the adapter .x1. could be .*x1.safetensors and .*x1.safetensors; rename"):
        list(dataclasses.replace(pipe, library=Library(tmp_path)).batch(requests(["red <lora:x1:1>"])))
    with pytest.raises(FileNotFoundError, match=r"the adapter .y. is not there; .* has x1, x1"):
        list(own.batch(requests(["red <lora:y:1>"])))


def test_learnt_words_of_another_model_are_refused_before_it_is_read(model, tmp_path):
    save_file({"emb_params": np.full((2, 768), 0.3, np.float32)}, tmp_path / "wide.safetensors")
    asked = []
    with pytest.raises(ValueError, match="768"):
        sdjax.load(model, embeddings=tmp_path / "wide.safetensors", on_shapes=lambda *_: asked.append("read"))
    assert not asked
