"""YAML written by hand, by mistake, or by an enemy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.contract.base import parse
from tuner.contract.config import RunConfig
from tuner.contract.documents import MAX_BYTES, load_document, read_file, read_mapping, write_mapping
from tuner.contract.errors import ConfigError

GOOD = """
workload: latent_cfg
micro_batch_size: 8
horizon_samples: 1000
optimizer:
  lr: 3e-4
"""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_document(RunConfig, text, "run.yaml")
    return str(caught.value)


def test_a_number_without_a_dot_is_a_number() -> None:
    assert load_document(RunConfig, GOOD, "run.yaml").optimizer.lr == 3e-4


def test_off_is_a_word() -> None:
    config = load_document(RunConfig, GOOD + "options: {mode: off, other: yes, really: true}\n", "run.yaml")
    assert config.options == {"mode": "off", "other": "yes", "really": True}


@pytest.mark.parametrize(
    ("change", "path", "rule", "got"),
    [
        ("  lr: '3e-4'", "optimizer.lr", "valid number", '"3e-4"'),
        ("  lr: -1.0", "optimizer.lr", "greater than 0", "-1.0"),
        ("  lr: 3e-4\n  betas: [0.9, 1.5]", "optimizer.betas", "[0, 1)", "1.5"),
        ("  lr: 3e-4\n  nmae: adam", "optimizer.nmae", "not known here", "adam"),
        ("  lr: 3e-4\n  name: adagrad", "optimizer.name", "'adam', 'adamw', 'sgd' or 'own'", "adagrad"),
        ("  lr: 3e-4\nloader: {num_workers: 2.5}", "loader.num_workers", "valid integer", "2.5"),
        ("  lr: 3e-4\nprecision: off", "precision", "'fp32'", "off"),
        ("  lr: 3e-4\nchannels_last: off", "channels_last", "valid boolean", "off"),
        ("  lr: 3e-4\naccumulation_steps: 0", "accumulation_steps", "greater than or equal to 1", "0"),
    ],
)
def test_the_message_names_file_path_rule_and_value(change: str, path: str, rule: str, got: str) -> None:
    message = refusal(GOOD.replace("  lr: 3e-4", change))
    assert message.startswith(f"run.yaml: {path}: ")
    assert rule in message
    assert got in message


def test_every_broken_rule_has_its_line() -> None:
    lines = refusal("workload: latent_cfg\nmicro_batch_size: 0\nhorizon_samples: -5\noptimizer: {lr: 0}\n").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["micro_batch_size", "optimizer.lr", "horizon_samples"]


def test_a_duplicate_key_is_refused() -> None:
    assert "micro_batch_size" in refusal(GOOD + "micro_batch_size: 16\n")


def test_aliases_are_refused_before_they_unfold() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *a]\n" for n in range(40))
    assert "line 2" in refusal(bomb)
    assert "aliases" in refusal(bomb)


@pytest.mark.parametrize("depth", [40, 400, 20_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    assert "nested" in refusal(GOOD + "options: " + "[" * depth + "]" * depth + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "just words\n",
        "",
        "a: [1, 2\n",
        "a: b: c\n",
        "\tx: 1\n",
        "a: !!python/object:os.system x\n",
        "1: 2\n",
        "\0: 1",
    ],
)
def test_what_is_no_plain_mapping_is_refused(text: str) -> None:
    assert refusal(text).startswith("run.yaml: ")


def test_nothing_is_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refusal(f"workload: !!python/object/apply:pathlib.Path.touch ['{canary}']\n")
    assert not canary.exists()


def test_an_oversized_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        read_mapping("a: " + "x" * MAX_BYTES, "big.yaml")


@pytest.mark.parametrize(
    ("make", "says"), [("missing", "cannot be read"), ("folder", "cannot be read"), ("binary", "not a text")]
)
def test_an_unreadable_file_is_named(tmp_path: Path, make: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=f"run.yaml: .*{says}"):
        read_file(path)


def test_values_that_are_no_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="only plain values"):
        parse(RunConfig, {"workload": object()}, "there")


def test_a_workload_name_cannot_be_a_path() -> None:
    assert "workload" in refusal(GOOD.replace("latent_cfg", "../evil"))


@pytest.mark.parametrize(
    "text", ["\x85", "a\u2028b", "?a", "- x", "a\rb", " lead", "tail ", "a\n\x85", "#", "off", "3e-4", ""]
)
def test_any_text_comes_back_from_yaml(text: str) -> None:
    data = {"text": text, "list": [text], "map": {"key": text}}
    assert read_mapping(write_mapping(data), "x.yaml") == data
