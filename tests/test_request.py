"""One table of settings: a field of `Request` is an option, a field of job lines, an entry of recipes, and a check."""

import dataclasses
import io
import json

import pytest
from PIL import Image

from sdjax.cli.options import parser
from sdjax.config import SamplingConfig
from sdjax.diffusion.names import INSTEAD, SAMPLER_NAMES, nearest_sampler, nearest_spacing, sampler_of
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.spacings import SPACINGS
from sdjax.jobs.forms import FIELDS, OPTIONS, Known
from sdjax.jobs.job_file import Rejected, from_json, read_lines, to_json
from sdjax.pipeline.recipe import Recipe, encoded, read_recipe, recipe_of
from sdjax.request import (
    TASKS,
    Request,
    aliases,
    check_values,
    is_real,
    requests_for,
    setting,
    settings,
)
from tests.small import mini


@dataclasses.dataclass(frozen=True)
class Sharper(Request):
    """A request with one setting more, and nothing else."""

    sharpness: float = setting(
        0.0,
        kind="float",
        expected="in [0, 2]",
        accepts=lambda value: is_real(value, 0, 2),
        help="how sharp the picture is",
        usual="0",
        metavar="X",
        aliases=("crispness",),
        similar=("acutance",),
        label="Sharpness",
    )


def lines(text, kind=".jsonl", request=Sharper):
    return list(read_lines(io.BytesIO(text.encode()), kind, {}, request_class=request))


def test_a_new_field_is_an_option_of_every_command_that_makes_pictures(capsys):
    for words in (["txt2img", "a"], ["img2img", "a", "b"], ["inpaint", "a", "b", "c"], ["batch", "j", "-o", "d"]):
        assert parser(Sharper).parse_args([*words, "--sharpness", "1.5"]).sharpness == 1.5
        with pytest.raises(SystemExit):
            parser().parse_args([*words, "--sharpness", "1.5"])
    with pytest.raises(SystemExit):
        parser(Sharper).parse_args(["txt2img", "--help"])
    assert "how sharp the picture is (0)" in " ".join(capsys.readouterr().out.split())


def test_a_new_field_may_stand_in_job_lines_of_every_form():
    for text, kind in (
        ('{"prompt": "a", "sharpness": 1.5}', ".jsonl"),
        ('{"prompt": "a", "crispness": 1.5}', ".jsonl"),
        ("prompt;sharpness\na;1,5\n", ".csv"),
        ("prompt\tcrispness\na\t1.5\n", ".tsv"),
        ("--prompt a --sharpness 1.5", ".txt"),
    ):
        (line,) = lines(text, kind)
        assert line.request == Sharper("a", sharpness=1.5, id=line.id)


def test_a_new_field_is_checked_and_its_bounds_are_named():
    for line, reason in (
        ('{"prompt": "a", "sharpness": 3}', "sharpness must be in [0, 2], found 3"),
        ('{"prompt": "a", "sharpness": "1"}', "sharpness must be in [0, 2], found '1'"),
        ('{"prompt": "a", "acutance": 1}', "unknown field 'acutance' (here it is called sharpness)"),
    ):
        (rejected,) = lines(line)
        assert isinstance(rejected, Rejected)
        assert reason in rejected.reason
    (rejected,) = lines('{"prompt": "a", "sharpness": 1}', request=Request)
    assert "unknown field 'sharpness'" in rejected.reason


def test_a_new_field_is_in_the_recipe_and_comes_back(tmp_path):
    picture = Image.new("RGB", (8, 8))
    recipe = recipe_of(Sharper("a", sharpness=1.5), SamplingConfig(), picture, model="", dtype="float32")
    (tmp_path / "a.png").write_bytes(encoded(picture, recipe))
    found = read_recipe(tmp_path / "a.png", Sharper)
    assert found == recipe
    assert found.sharpness == 1.5
    assert "Sharpness: 1.5" in found.parameters()
    with pytest.raises(ValueError, match="'sharpness' is no entry that is known"):
        read_recipe(tmp_path / "a.png")


def test_a_new_field_reaches_the_pictures():
    asked = [Sharper("red disc", seed=1, steps=1, width=8, height=8, sharpness=1.5)]
    ((request, picture),) = mini().batch(asked, batch_size=1)
    ((_, plain),) = mini().batch([Request("red disc", seed=1, steps=1, width=8, height=8)], batch_size=1)
    assert request is asked[0]
    assert picture.tobytes() == plain.tobytes()


def test_every_setting_is_documented_and_consistent():
    for name, known in settings().items():
        assert f"    {name}: {known.help}" in Request.__doc__
        assert known.expected
        assert set(known.tasks) <= set(TASKS)
    words = [*settings(), *aliases(), "count", "size"]
    assert len(words) == len(set(words)), "no name means two things"
    assert set(settings()) - {"image"} <= set(FIELDS)
    assert not set(Known.of(Request).similar) & set(aliases())
    assert set(OPTIONS.values()) <= set(FIELDS)


def test_defaults_are_usable():
    defaults = {field.name: field.default for field in dataclasses.fields(Request) if field.name != "prompt"}
    check_values(defaults)


# Names and values of other tools


def test_names_of_other_tools_are_understood_in_python():
    theirs = Request("a", num_inference_steps=5, cfg_scale=3, sampler_name="DPM++ 2M Karras", denoising_strength=0.5)
    assert theirs == Request("a", steps=5, guidance=3, sampler="dpmpp_2m", spacing="karras", strength=0.5)
    assert Request("a", guidance_scale=4).guidance == 4
    with pytest.raises(TypeError, match="guidance is given twice"):
        Request("a", guidance_scale=4, guidance=4)
    pictures = mini().text_to_image("red disc", num_inference_steps=1, num_images_per_prompt=2, width=8, height=8)
    assert len(pictures) == 2


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_samplers_are_understood_as_other_tools_spell_them(name):
    for spelled, spacing in (
        (SAMPLER_NAMES[name], None),
        (SAMPLER_NAMES[name].lower(), None),
        (f"{SAMPLER_NAMES[name]} Karras", "karras"),
        (f"{SAMPLER_NAMES[name]}  exponential", "exponential"),
        (name, None),
    ):
        request = Request("a", sampler=spelled)
        assert (request.sampler, request.spacing) == (name, spacing)
    assert Request("a", sampler=f"{SAMPLER_NAMES[name]} Karras", spacing="trailing").spacing == "trailing"


@pytest.mark.parametrize(
    ("spelled", "sampler", "spacing"),
    [
        ("euler_ancestral", "euler_a", None),
        ("k_dpm_2_a", "dpm2_a", None),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", None),
        ("DPM++ 2M SDE Heun Exponential", "dpmpp_2m_sde_heun", "exponential"),
        ("DPM++ 3M SDE SGM Uniform", "dpmpp_3m_sde", "sgm_uniform"),
        ("Euler Beta", "euler", "beta_a1111"),
        ("dpmpp_2m beta", "dpmpp_2m", "beta"),
        ("DPM++ 2M trailing", "dpmpp_2m", "trailing"),
        ("DDIM CFG++", "euler_cfg_pp", None),
        ("Karras", "Karras", None),
        ("no such", "no such", None),
    ],
)
def test_a_sampler_may_have_its_spacing_in_its_name(spelled, sampler, spacing):
    assert sampler_of(spelled) == (sampler, spacing)


@pytest.mark.parametrize(
    ("spelled", "spacing"),
    [("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("Align Your Steps", "ays_a1111"), ("Uniform", "normal")]
    + [("Beta", "beta_a1111"), ("beta", "beta"), ("KL Optimal", "kl_optimal_a1111"), ("DDIM", "ddim_uniform")],
)
def test_spacings_are_understood_as_a1111_spells_them(spelled, spacing):
    assert Request("a", spacing=spelled).spacing == spacing


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"sampler": "DPM adaptive"}, "nearest to it is dpmpp_2m"),
        ({"sampler": "DPM++ 2S"}, "nearest to it is dpmpp_2s_a"),
        ({"sampler": "eular a"}, "nearest to it is euler_a"),
        ({"sampler": "exp_heun_2_x0"}, "nearest to it is heun"),
        ({"sampler": "exp_heun_2_x0_sde"}, "nearest to it is dpmpp_sde"),
        ({"spacing": "laplace"}, "nearest to it is karras"),
        ({"spacing": "karass"}, "nearest to it is karras"),
        ({"spacing": "linear_quadratic"}, "nearest to it is sgm_uniform"),
    ],
)
def test_a_name_that_nobody_can_run_is_refused_with_the_nearest_that_can(settings, nearest):
    with pytest.raises(ValueError, match=nearest):
        check_values(settings)


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_nearest_is_of_the_same_kind(name):
    assert nearest_sampler(name) in SAMPLERS
    assert nearest_spacing(name) in SPACINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "dpmpp_2m", "s_churn": 1.0}, "s_churn must be left out for dpmpp_2m .it belongs to euler, heun"),
        ({"sampler": "unipc", "s_noise": 1.1}, "s_noise must be left out for unipc, which adds no noise"),
        ({"sampler": "euler", "eta": 0.5}, "eta must be left out for euler .it belongs to ddim, euler_a"),
        ({"spacing": "simple", "rho": 3.0}, "rho must be left out for simple .it belongs to karras, polyexponential"),
        ({"s_churn": -1.0}, "s_churn must be a number from 0, found -1"),
        ({"rho": 0.0}, "rho must be above 0"),
    ],
)
def test_settings_of_other_samplers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_values(settings)


def test_a_line_may_use_the_names_of_other_tools():
    (line,) = lines('{"prompt": "a", "cfg_scale": 3, "num_inference_steps": 5, "sampler_name": "Euler a"}')
    assert (line.request.guidance, line.request.steps, line.request.sampler) == (3, 5, "euler_a")
    (line,) = lines('{"prompt": "a", "sampler": "DPM++ 2M SDE Karras", "num_images_per_prompt": 2}')
    assert (line.request.sampler, line.request.spacing, line.count) == ("dpmpp_2m_sde", "karras", 2)
    (rejected,) = lines('{"prompt": "a", "sampler": "DPM adaptive"}')
    assert "sampler must be one of ddpm" in rejected.reason


def test_seed_minus_one_is_a_random_one_that_is_written_down():
    seeds = {Request("a", seed=-1).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)
    with pytest.warns(UserWarning, match="seed -1 stands for a random one, which is") as noted:
        first, *others = requests_for(["a", "b"], seed=-1, count=2)
    assert str(noted[0].message).endswith(f" {first.seed}")
    assert [request.seed - first.seed for request in others] == [1, 0, 1]
    once, again = (lines('{"prompt": "a", "seed": -1}\n{"prompt": "a", "seed": -1, "count": 3}\n') for _ in range(2))
    assert once == again, "a job that is read again is the same job"
    assert once[0].request.seed != once[1].request.seed
    assert from_json(to_json(once[0])).request.seed == once[0].request.seed >= 0


def test_recipes_of_earlier_versions_are_read():
    """Entries in their order of then, without those that came later."""
    old = {
        **dict(task="txt2img", prompt="a", negative_prompt="", model="", seed=1, steps=20, guidance=4.0),
        **dict(guidance_rescale=0.0, guidance_interval=[0.0, 1.0], sampler="dpmpp_2m", spacing="karras", eta=None),
        **dict(clip_skip=None, width=64, height=64, dtype="float32", strength=None, noise="jax", image=None, mask=None),
        "version": "0.1.0",
    }
    recipe = Recipe.from_json(json.dumps(old))
    assert {name: getattr(recipe, name) for name in old} == old | {"guidance_interval": (0.0, 1.0)}
    then = {"guidance_interval": (0.0, 1.0), "environment": {}, "weighting": "none"}  # brackets were text
    assert recipe == Recipe(**(old | then))
