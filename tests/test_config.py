import pytest

from vargen.config import check_keys, load_config, recipe_path
from vargen.errors import ConfigError

SCHEMA = {"model": {"dim": 8, "extra": {}}, "steps": 10, "name": None}


def test_recipe_over_defaults_and_overrides_over_both(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model:\n  dim: 16\nname: ${steps}\n")
    config = load_config(file, ["steps=5", "model.extra.any=1"], SCHEMA)
    assert config == {"model": {"dim": 16, "extra": {"any": 1}}, "steps": 5, "name": 5}


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("model:\n  dmi: 3\n", [], r"unknown key 'model\.dmi'; did you mean 'dim'"),
        ("steps: 1\n", ["stepz=2"], "unknown key 'stepz'; did you mean 'steps'"),
        ("steps: 1\n", ["steps"], "expected key=value"),
        ("steps: [1\n", [], "not valid YAML"),
        ("- 1\n", [], "expected a mapping"),
        ("name: ${nothing}\n", [], "nothing"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path, text, overrides, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file, overrides, SCHEMA)
    assert "\n" not in str(error.value)


def test_names_of_recipes():
    with pytest.raises(ConfigError, match="neither a file nor a recipe"):
        recipe_path("no/such")
    assert recipe_path("digits/tokenizer").is_file()
    with pytest.raises(ConfigError, match="optimizer has no 'rl'"):
        check_keys({"rl": 1}, ["lr", "betas"], "optimizer")
