"""Composition: precedence, types, and a clear message for every mistake on a command line."""

import shlex

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.messages import check_type
from hqqtrain.compose.schema import describe_unknown_key, known_keys
from hqqtrain.config.infra import parse_seconds
from hqqtrain.config.run import RunConfig


def _message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose_config(list(overrides))
    return str(caught.value)


def test_no_overrides_give_the_defaults_of_the_dataclasses():
    assert compose_config([]) == RunConfig()


def test_all_values_are_plain_types():
    config = compose_config(["recipe=tiny_2bit", "quant.skip=[lm_head,a]"])
    assert type(config) is RunConfig
    assert type(config.quant.skip) is list
    assert type(config.optim.lr) is float


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults():
    assert RunConfig().quant.nbits == 4
    assert compose_config(["recipe=tiny_2bit"]).quant.nbits == 2
    assert compose_config(["recipe=tiny_2bit", "quant.nbits=3"]).quant.nbits == 3
    assert compose_config(["quant.nbits=3", "recipe=tiny_2bit"]).quant.nbits == 3


def test_the_last_value_of_a_repeated_key_wins():
    assert compose_config(["quant.nbits=3", "quant.nbits=8"]).quant.nbits == 8


def test_an_option_group_overrides_the_recipe_and_a_key_the_group():
    assert compose_config(["recipe=tiny_2bit", "model=llama8b"]).model.name_or_path.endswith("8B")
    config = compose_config(["model=llama8b", "model.name_or_path=mine"])
    assert config.model.name_or_path == "mine"


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        ("q_proj", "q_proj"),
        ("[*.q_proj]", ["*.q_proj"]),
    ],
)
def test_target_modules_are_written_as_in_peft(value: str, targets: list[str] | str):
    assert compose_config([f"adapter.target_modules={value}"]).adapter.target_modules == targets


@pytest.mark.parametrize("value", ["5", "null", "[]", "[1]", "{a:1}", "''"])
def test_other_types_of_target_modules_are_refused(value: str):
    assert "must be a list" in _message(f"adapter.target_modules={value}")


def test_the_config_names_its_recipe_and_null_means_none():
    assert compose_config(["recipe=tiny_2bit"]).recipe == "tiny_2bit"
    assert compose_config(["recipe=null"]).recipe is None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("quant.overrides={*.down_proj:{nbits:4}}", {"*.down_proj": {"nbits": 4}}),
        ("quant.overrides={self_attn.q_proj:null}", {"self_attn.q_proj": None}),
        ("quant.overrides.q_proj={nbits:4}", {"q_proj": {"nbits": 4}}),
        ("+quant.overrides.q_proj={nbits:4}", {"q_proj": {"nbits": 4}}),
    ],
)
def test_layer_overrides_on_the_command_line(override, value):
    assert compose_config([override]).quant.overrides == value


def test_values_with_special_characters():
    assert compose_config(["data.source='my (1) file.txt'"]).data.source == "my (1) file.txt"
    assert compose_config(["data.source=wiki/text:raw-v1"]).data.source == "wiki/text:raw-v1"
    assert compose_config(["quant.group_size=null"]).quant.group_size is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quant.nbit=2", "quant.nbit: unknown key. Did you mean 'quant.nbits'?\nKeys of quant: nb"),
        ("qant.nbits=2", "qant.nbits: unknown key. Did you mean 'quant.nbits'?"),
        ("nbits=2", "nbits: unknown key. Did you mean 'quant.nbits'?"),
        ("quant.lr=1", "quant.lr: unknown key. Did you mean 'optim.lr'?"),
        ("track.backend=x", "track.backend: unknown key. Did you mean 'track.backends'?"),
        ("+quant.nbit=2", "quant.nbit: unknown key."),
        ("++quant.nbit=2", "quant.nbit: unknown key."),
        ("zzz=1", "zzz: unknown key.\nGroups and keys: task, model, quant"),
        ("quant.nbits.x=1", "quant.nbits.x: unknown key; quant.nbits is a single value"),
        ("hydra.mode=MULTIRUN", "hydra.mode: unknown key."),
        ("quant.nbits=two", "quant.nbits=two: must be an integer or null."),
        ("quant.nbits=2.5", "quant.nbits=2.5: must be an integer or null."),
        ("quant.nbits=true", "quant.nbits=True: must be an integer or null."),
        ("quant.axis=null", "quant.axis=null: must be an integer."),
        ("quant.group_size=x", "quant.group_size=x: must be an integer or null."),
        ("optim.lr=fast", "optim.lr=fast: must be a number."),
        ("train.packing=maybe", "train.packing=maybe: must be true or false."),
        ("quant.skip=lm_head", "quant.skip=lm_head: must be a list"),
        ("quant=3", "quant=3: must be a mapping of keys, such as those of quant in --help."),
        ("quant={nbit:3}", "nbit"),
        ("quant.nbits=5", "quant.nbits=5: allowed are 8, 4, 3, 2, 1, null."),
        (
            "task=finetun",
            "task=finetun: allowed are finetune, quantize, eval, export, data, generate, plan.",
        ),
        ("model=llama9b", "model=llama9b: no such option. Did you mean 'llama8b'? Allowed are"),
        ("recipe=tiny_2bits", "recipe=tiny_2bits: no such recipe. Did you mean 'tiny_2bit'?"),
        ("recipe=../tiny_2bit", "recipe=../tiny_2bit: no such recipe."),
        ("recipe=[tiny_2bit]", "no such recipe."),
        ("quant.nbits=2,3", "quant.nbits=2,3: must be one value; a sweep needs -m before it."),
        ("~quant.nbits", "~quant.nbits: keys cannot be removed"),
        ("sweep={quant.nbits:'2,3'}", "-m key=value,value"),
        ("quant.nbits", "quant.nbits: must be key=value"),
        ("data.source=a (1)", "must be key=value; text with special characters needs quotes"),
        ("data.source=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("data.source=???", "data.source"),
    ],
)
def test_every_mistake_gets_one_message(override, expected):
    message = _message(override)
    assert expected in message
    assert "Traceback" not in message


def test_every_key_with_a_letter_missing_is_refused_and_suggested():
    assert "Did you mean 'quant.nbits'?" in _message("quant.nbit=1")
    for key, _ in known_keys():
        group, _, name = key.rpartition(".")
        is_unique = sum(known.startswith(key[:-1]) for known, _ in known_keys()) == 1
        if len(name) > 4 and group and is_unique:
            assert f"Did you mean '{key}'?" in str(describe_unknown_key(key[:-1])), key


def test_a_failed_composition_does_not_affect_the_next():
    _message("quant.nbit=2")
    _message("model=llama9b")
    assert compose_config(["quant.nbits=2"]).quant.nbits == 2


def test_the_check_of_an_argument_does_not_affect_the_next():
    check_type("quant.overrides.q_proj", 3)
    check_type("quant.overrides.q_proj.nbits", 4)  # would fail below the number 3
    assert compose_config([]).quant.overrides == {}


def test_durations_are_limited_to_forms_that_slurm_and_yaml_read_alike():
    config = compose_config(["launch=slurm", "launch.time=4:00:00", "run.time_limit=1-12:00:00"])
    assert (config.launch.backend, config.launch.time) == ("slurm", "4:00:00")
    assert parse_seconds(config.run.time_limit or "") == 36 * 3600
    for text in ("60", "14400", "4:00", "1:60:00", "'4 hours'"):
        assert "must be hours:minutes:seconds" in _message(f"run.time_limit={text}"), text


@pytest.mark.parametrize("options", ["['--qos=low']", "['-x n1','--exclusive']"])
def test_sbatch_options(options: str):
    assert compose_config(["launch=slurm", f"launch.options={options}"]).launch.options
    assert "must be an option of sbatch" in _message("launch.options=['rm -rf x']")


@pytest.mark.parametrize(
    ("word", "typed"),
    [
        ("launch.options=--qos=low", """'launch.options=["--qos=low"]'"""),
        ("launch.setup=[a=b]", """'launch.setup=["one (1)","another"]'"""),
        ("run.root=a (1)", """"run.root='a (1)'\""""),
        ("run.root=it's", """"run.root='my (1).txt'\""""),
    ],
)
def test_a_message_shows_how_to_quote_an_argument(word, typed):
    with pytest.raises(UserError) as caught:
        compose_config([word])
    assert f"{word}: must be key=value; text with special characters" in str(caught.value)
    assert f"as in {typed}. " in str(caught.value)
    assert compose_config(["launch=slurm", *shlex.split(typed)])


def test_a_mapping_with_quoted_keys_gets_an_example_without():
    message = _message("quant.overrides={'*.q_proj':{nbits:4}}")
    typed = "'quant.overrides={*.q_proj:{nbits:4}}'"
    assert f"as in {typed}, where the keys of a mapping have none. " in message
    assert compose_config(shlex.split(typed)).quant.overrides == {"*.q_proj": {"nbits": 4}}


@pytest.mark.parametrize(
    ("overrides", "begins"),
    [
        (
            "optim.lr=1e-4x quant.nbits=5 adapter.r=0",
            ["optim.lr=1e-4x", "quant.nbits=5", "adapter.r=0"],
        ),
        (
            "quant.nbit=2 data.validation=2 quant.nbits=x",
            ["quant.nbit:", "quant.nbits=x", "data.valid"],
        ),
        (
            "recipe=no_such quant.nbits=5 adapter.r=x",
            ["recipe=no_such", "adapter.r=x", "quant.nbits=5"],
        ),
        ("a=( quant.nbits=2 b=(", ["a=(", "b=("]),
        ("model=llama9b optim.lrr=2", ["optim.lrr", "model=llama9b"]),
        # A refused argument may be what a combination lacks.
        ("eval.evry=5 ckpt.keep_best=2", ["eval.evry"]),
        ("lanch=slurm launch.nodes=2", ["lanch"]),
        ("launch.backnd=slurm launch.nodes=2 launch.time=x", ["launch.backnd", "launch.time=x"]),
        ("track.backens=[wandb] track.backends=[] track.artifacts=true", ["track.backens"]),
    ],
)
def test_all_mistakes_are_reported_at_once(overrides, begins):
    lines = _message(*overrides.split()).splitlines()
    lines = sorted(x for x in lines if not x.startswith(("Keys of ", "Groups and keys: ")))
    assert len(lines) == len(begins)
    for line, begin in zip(lines, sorted(begins), strict=True):
        assert line.startswith(begin)


def test_the_known_keys_are_listed_once_after_all_mistakes(tmp_path):
    words = ["quant.nbit=2", "zzz=1", "quant.groups=5", "qant.nbits=2", "quant.nbits=5"]
    lines = _message(*words).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "quant.nbit", "zzz", "quant.groups", "qant.nbits", "quant.nbits=5", "Keys of quant",
        "Groups and keys",
    ]  # fmt: skip
    (tmp_path / "mine.yaml").write_text("quant: {nbit: 2, groups: 5, nbits: 5}\nzzz: 1")
    lines = _message(f"recipe={tmp_path}/mine.yaml").splitlines()
    assert [line.startswith(str(tmp_path)) for line in lines] == [True, True, True, False, False]
    assert "Keys of" not in _message("quant.nbits.x=1", "quant.storage=x")
    sources = "data.source=[{path: a, wieght: 1}, {path: b, x: 1}]"
    assert _message(sources).splitlines()[-1].startswith("Keys of a source: path, repeats")
    assert _message(sources).count("Keys of") == 1


@pytest.mark.parametrize(
    ("word", "typed", "value"),
    [
        ("data.source=a,b.txt", "\"data.source='a,b.txt'\"", "a,b.txt"),
        ("eval.source=a, b", "\"eval.source='a, b'\"", "a, b"),
        ("quant.skip=lm_head,q_proj", "'quant.skip=[lm_head,q_proj]'", ["lm_head", "q_proj"]),
        ("adapter.target_modules=q,v", "'adapter.target_modules=[q,v]'", ["q", "v"]),
        ("quant.nbits=2,3", "", None),
        ("task=eval,export", "", None),
        ("quant.solver=hqq,rtn", "", None),
        ("quant.overrides={a:null},{b:null}", "", None),
    ],
)
def test_a_list_or_a_text_with_commas_gets_an_example_that_works(word, typed, value):
    message = _message(word)
    assert f"{word}: must be one value; a sweep needs -m before it." in message
    assert ("as in" in message) == bool(typed)
    if typed:
        assert message.endswith(f"as in {typed}.")
        group, _, name = word.partition("=")[0].partition(".")
        assert getattr(getattr(compose_config(shlex.split(typed)), group), name) == value
