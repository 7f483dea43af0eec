from operator import attrgetter

import pytest
import yaml

from ephemera.config import (
    Analyse,
    Benchmark,
    Evaluate,
    LoraSettings,
    Settings,
    TrainGenerator,
    TrainLens,
    TrainScaleNet,
    TrainTaskLora,
    brought,
    check_config,
    dump_yaml,
    load_config,
)

KINDS = (TrainScaleNet, TrainGenerator, TrainTaskLora, Evaluate, Benchmark, Analyse)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_survive_a_round_trip(kind, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(kind()))
    assert load_config(kind, str(tmp_path / "config.yaml")) == kind() == load_config(kind)


def test_given_values_lie_over_the_defaults_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  source: rows.jsonl\nmodel:\n  lora:\n    r: 2\n")
    config = load_config(TrainScaleNet, str(tmp_path / "a.yaml"))
    assert (config.train.source, config.train.split) == ("rows.jsonl", "train")
    assert (config.validation.split, config.validation.limit) == ("validation", 200)
    assert (config.model.lora.r, config.model.lora.lora_alpha) == (2, 16)


def test_set_comes_after_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer:\n  samples: 10\n  batch_size: 2\n")
    config = load_config(TrainScaleNet, str(tmp_path / "a.yaml"), ["optimizer.samples=20", "train.source=b.jsonl"])
    assert (config.optimizer.samples, config.optimizer.batch_size) == (20, 2)
    assert (config.train.source, config.train.split) == ("b.jsonl", "train")


def test_set_values_are_yaml():
    overrides = [
        "scalenet.base_rates=[6, 0.1]",
        "model.dtype=bfloat16",
        "train.limit=null",
        "output=runs/a=b",
        "optimizer.learning_rate=1e-4",  # a text to YAML, and still a number here
        "model.lora.target_modules=[q_proj, up_proj]",
    ]
    config = load_config(TrainScaleNet, None, overrides)
    assert config.scalenet.base_rates == [6.0, 0.1]
    assert config.model.dtype == "bfloat16"
    assert config.train.limit is None
    assert config.output == "runs/a=b"
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.lora.target_modules == ["q_proj", "up_proj"]
    assert load_config(Evaluate, None, ["uniform_rates={1: 6, 3: 0.5}"]).uniform_rates == {1: 6.0, 3: 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.sampels=3", r"unknown setting 'optimizer.sampels'. Did you mean 'samples'\? Known here: samples, "),
        ("optimiser.samples=3", r"unknown setting 'optimiser'. Did you mean 'optimizer'\?"),
        ("model.lora.rr=3", r"unknown setting 'model.lora.rr'.*Known here: r, lora_alpha"),
        ("optimizer.samples=0", r"setting 'optimizer.samples': input should be greater than or equal to 1; got 0"),
        ("optimizer.learning_rate=.inf", r"setting 'optimizer.learning_rate': .*finite number; got inf"),
        ("scalenet.base_rates=[.nan]", r"setting 'scalenet.base_rates.0': .*finite number; got nan"),
        ("scalenet.base_rates=[-1]", r"setting 'scalenet.base_rates.0': .*greater than or equal to 0; got -1"),
        ("model.dtype=float16", r"setting 'model.dtype': .*'float32' or 'bfloat16'; got 'float16'"),
        ("optimizer.samples", r"--set takes key=value.*got 'optimizer.samples'"),
        ("output.name=3", r"--set 'output.name=3': output is a single value, it has no parts"),
        ("output=[a", r"--set 'output=\[a': the value is not valid YAML"),
        ("train=5", r"setting 'train': .*got 5"),
        ("=5", r"unknown setting ''"),
    ],
)
def test_mistakes_in_set(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(TrainScaleNet, None, [override])


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("data.limit=010", 10),
        ("output=010", "010"),
        ("output=yes", "yes"),
        ("output=off", "off"),
        ("output=2024-01-01", "2024-01-01"),
        ("output=1:30", "1:30"),
        ("output=a#b", "a#b"),
        ("output='a #b'", "a #b"),
        ("data.source=null", None),
        ("data.source=~", None),
        ("fixed_rate=1e-4", 1e-4),
        ("fixed_rate=.5", 0.5),
        ("model.checkpoint=yes", True),
        ("model.checkpoint=false", False),
    ],
)
def test_values_are_read_as_written(override, want, tmp_path):
    key, _, text = override.partition("=")
    config = load_config(Evaluate, None, [override])
    assert attrgetter(key)(config) == want
    # and in a file, and through what --print-config shows, also for readers of YAML 1.1
    names = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(names)]
    (tmp_path / "a.yaml").write_text("\n".join(lines) + f" {text}\n")
    assert load_config(Evaluate, str(tmp_path / "a.yaml")) == config
    (tmp_path / "b.yaml").write_text(dump_yaml(config))
    assert load_config(Evaluate, str(tmp_path / "b.yaml")) == config
    assert check_config(Evaluate, yaml.safe_load(dump_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.limit=yes", "setting 'data.limit': .*; got 'yes'"),
        ("data.limit=true", "data.limit: a number is needed, and true and false are none; got True"),
        ("steps=[1, true]", r"steps: a number is needed, and true and false are none; got \[1, True\]"),
        ("data.seed=1:30", "setting 'data.seed': .*; got '1:30'"),
        ("data.seed=0x10", "setting 'data.seed': .*; got '0x10'"),
        ("data.source=#x", r"\(a # begins a comment\)\. In quotes .* --set 'data.source=\"#x\"'"),
        ("data.source=My files #1/a.jsonl", r"\(a # begins a comment\)\. In quotes .*=\"My files #1/a.jsonl\"'"),
        ("data.source=", r"\(there is no value; null stands for none\)"),
        ("data.source=&x", r"\(there is no value; .*--set 'data.source=\"&x\"'"),
        ("data.source={task}/x", r"not valid YAML .*--set 'data.source=\"{task}/x\"'"),
        ("data.source={task}", r"got {'task': None}. A text that begins with { or \[ needs YAML's quotes"),
        ("output=2024", r"got 2024. In YAML's quotes it is a text: output='\"2024\"'"),
    ],
)
def test_values_that_cannot_be_meant_say_how_to_quote_them(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(Evaluate, None, [override])


def test_files_of_settings_with_a_mark_or_a_key_given_twice(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfdata:\n  limit: 010 # rows\n")
    assert load_config(Evaluate, str(tmp_path / "a.yaml")).data.limit == 10
    (tmp_path / "b.yaml").write_text("data:\n  limit: 1\n  seed: 2\n  limit: 3\n")
    with pytest.raises(ValueError, match=r"b.yaml is not valid YAML: 'limit' is given twice .* line 4"):
        load_config(Evaluate, str(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        (TrainLens, "model.checkpoint=true"),
        (TrainLens, "model.lora.r=2"),
        (TrainLens, "optimizer.passes=2"),
        (TrainGenerator, "optimizer.clip_prompt=2"),
        (TrainGenerator, "model.lora.layers=first-1"),
        (TrainGenerator, "validation.stop=samples"),
        (TrainTaskLora, "model.lora.init_std=0.5"),
        (TrainTaskLora, "optimizer.memory_gb=1"),
        (Analyse, "model.lora.r=2"),
        (Analyse, "data.stop=samples"),
        (Benchmark, "data.stop=samples"),
    ],
)
def test_a_setting_of_another_command_is_unknown(kind, override):

    with pytest.raises(ValueError, match=r"unknown setting '.*Known here: "):
        load_config(kind, None, [override])


def test_what_a_trained_network_brings_is_not_set_otherwise():
    own, plain = {"r": 8, "lora_alpha": 16.0, "folder": "x"}, LoraSettings()
    assert brought(plain, own, default=plain, by="init=x").r == 8
    assert brought(LoraSettings(r=8), own, default=plain, by="init=x").r == 8
    with pytest.raises(ValueError, match=r"r=2 has no effect: init=x was made with r=8. Leave it out."):
        brought(LoraSettings(r=2), own, default=plain, by="init=x")


def test_all_mistakes_at_once():
    with pytest.raises(ValueError, match=r"(?s)optimizer.samples.*validation_step'.*Did you mean 'validation_steps'"):
        load_config(TrainScaleNet, None, ["optimizer.samples=-1", "validation_step=[1]"])


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read config .*none.yaml: No such file"):
        load_config(Evaluate, str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="cannot read config"):
        load_config(Evaluate, str(tmp_path))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list.yaml should hold settings \(key: value\); it holds a list"):
        load_config(Evaluate, str(tmp_path / "list.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"bad.yaml is not valid YAML"):
        load_config(Evaluate, str(tmp_path / "bad.yaml"))
    (tmp_path / "wide.yaml").write_bytes("output: a".encode("utf-16"))
    with pytest.raises(ValueError, match=r"config .*wide.yaml is not text in UTF-8"):
        load_config(Evaluate, str(tmp_path / "wide.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(Evaluate, str(tmp_path / "empty.yaml")) == Evaluate()


def test_two_configurations_share_no_values():
    first = load_config(TrainScaleNet, None, ["validation_steps=[2]", "model.lora.r=1"])
    assert TrainScaleNet().validation_steps == [1, 3, 5]
    assert TrainScaleNet().model.lora.r == 4
    assert check_config(TrainScaleNet, first.model_dump(mode="json")) == first


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_survives_yaml(kind):
    assert check_config(kind, yaml.safe_load(dump_yaml(kind()))) == kind()


def test_every_settings_class_refuses_unknown_keys():
    classes = Settings.__subclasses__()
    assert len(classes) >= 7
    for kind in classes:
        with pytest.raises(ValueError, match="unknown setting 'zzz'"):
            check_config(kind, {"zzz": 1})


def test_mistakes_inside_optional_parts_and_lists():
    with pytest.raises(ValueError, match=r"unknown setting 'scalenet.mlp_sise'. Did you mean 'mlp_size'\?"):
        load_config(TrainGenerator, None, ["scalenet={mlp_sise: 3}"])
    with pytest.raises(ValueError, match=r"unknown setting 'train.tasks.0.tsk'. Did you mean 'task'\?"):
        load_config(TrainGenerator, None, ["train.tasks=[{tsk: own}]"])
    scalenet = load_config(TrainGenerator, None, ["scalenet.max_steps=3"]).scalenet
    assert scalenet is not None
    assert scalenet.max_steps == 3
