"""Experiment documents: what YAML 1.2 means here, `extends`, overrides, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.pipeline.experiment.document import dump_yaml, merge, read_document
from lazypipe.stages.contract import UserError
from lazypipe.stages.overrides import apply_overrides
from lazypipe.stages.yaml_text import MAX_DEPTH, parse_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8)
    | st.sampled_from(["no", "on", "yes", "1e-3", "0o17", "2026-01-01", "null", "~", "=", "*.txt", "a: b", "- a", "#"])
)
TREES = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=5), below, max_size=3)
    ),
    max_leaves=8,
)
FRAGMENTS = [
    *("a", "b: ", ":", "- ", "\n", "  ", "{", "}", "[", "]", ",", "&x ", "*x", "? ", "|\n", "'", '"', "\\", "#", "%"),
    *("!!int ", "!!float ", "!!bool ", "!!set ", "!!binary ", "!!omap ", "---\n", "1e3", "0o7", "~", "<<: ", "\t", "="),
    *("!", "@", "%YAML 1.1\n", "2026-01-01", ".nan", "\\ud800", "0x", "é"),
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("2.0e-3", 2e-3),
        ("-0", 0),
        ("0o17", 15),
        ("017", 17),
        ("0x1f", 31),
        ("1:30", "1:30"),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("", None),
        ("~", None),
        ("null", None),
        ("2026-01-01", "2026-01-01"),
        ("2026-13-45", "2026-13-45"),
        ("a=b=c", "a=b=c"),
        ("http://host:8000/x", "http://host:8000/x"),
        ("ü→😀", "ü→😀"),
        ("data/*.txt", "data/*.txt"),
        ("[a/*.txt, b]", ["a/*.txt", "b"]),
        ("{1: a}", {"1": "a"}),
        ("\ufeffname: x", {"name": "x"}),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "value")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", 'here.yaml:2:1: not valid YAML: found duplicate key "a"'),
        ("a:\n\tb", "here.yaml:2:1: not valid YAML"),
        ("[1,", "here.yaml:1:4: not valid YAML"),
        ("---\na\n---\nb", "another document"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("!!int abc", "not valid YAML: invalid literal for int()"),
        ("!!bool x", "not valid YAML"),
        ("9" * 5000, "not valid YAML"),
        ("a: {b: 0x" + "f" * 16 + "}", "here.yaml: a.b: an integer of 64 bits"),
        ("a: {null: 1}", "here.yaml: a: the key None is not text; write it in quotes"),
        ("a: {[1, 2]: 1}", "here.yaml: a: the key (1, 2) is not text"),
        ("{1: a, '1': b}", "the key '1' is given twice"),
        ("a: !!binary aGk=", "here.yaml: a: a YAML bytes has no meaning here"),
        ("a: !!set {b}", "here.yaml: a: a YAML set has no meaning here"),
        ("a: &x [*x]", "or an alias (*name) that contains itself"),
        ("[" * 40 + "]" * 40, f"nested more than {MAX_DEPTH} levels deep"),
        ("[" * 1200, f"nested more than {MAX_DEPTH} levels deep"),
        ('a: ["\\ud800"]', "here.yaml: a.0: '\\ud800' holds half of a surrogate pair"),
        ("a: \x00", "not valid YAML: unacceptable character"),
    ],
)
def test_what_cannot_be_an_experiment_is_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_yaml(text, "here.yaml")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore::ruamel.yaml.error.ReusedAnchorWarning")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parse_yaml(text, "text")
    except UserError as refusal:
        assert str(refusal).startswith("text")


@settings(max_examples=100, deadline=None)
@given(document=st.dictionaries(st.text(st.characters(blacklist_categories=("Cs", "Cc"))), TREES, max_size=4))
def test_a_dumped_document_reads_back_the_same(
    document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("dumped") / "experiment.yaml"
    dump_yaml(document, path)
    assert parse_yaml(path.read_text(encoding="utf-8"), "dumped") == document


# ---- extends


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_extends_merges_mappings_and_replaces_everything_else(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\nmodel: {hidden_size: 64, num_heads: 2}\nevaluate: {prompts: [a, b]}")
    write(tmp_path / "below" / "middle.yaml", "extends: ../base.yaml\nname: middle\nmodel: {num_heads: 4}")
    leaf = write(tmp_path / "below" / "leaf.yaml", "extends: middle.yaml\nevaluate: {prompts: [c]}")
    assert read_document(leaf) == {
        "name": "middle",
        "model": {"hidden_size": 64, "num_heads": 4},
        "evaluate": {"prompts": ["c"]},
    }


def test_extends_understands_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / "base.yaml", "name: base")
    assert read_document(write(tmp_path / "leaf.yaml", "extends: ~/base.yaml")) == {"name": "base"}


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ("extends: leaf.yaml", "'extends' goes in a circle"),
        ("extends: basis.yaml", "no such experiment file, which "),
        ("extends: [a, b]", "extends: expected the path of one parent file, found ['a', 'b']"),
        ('extends: "a\\0b"', "not the path of an experiment file"),
        ("", "expected a mapping of sections (name, tokenize, model, variants, ...), found empty"),
        ("- a", "found a list"),
        ("just text", "found a str"),
    ],
)
def test_a_wrong_parent_is_refused(tmp_path: Path, parent: str, expected: str) -> None:
    write(tmp_path / "base.yaml", parent)
    leaf = write(tmp_path / "leaf.yaml", "extends: base.yaml")
    with pytest.raises(UserError) as refusal:
        read_document(leaf)
    assert expected in str(refusal.value)


def test_a_file_that_extends_itself_is_a_circle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="goes in a circle"):
        read_document(write(tmp_path / "a.yaml", "extends: ./a.yaml"))


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "quickstart.yaml", "name: x")
    with pytest.raises(
        UserError, match=r"quickstrat\.yaml: no such experiment file; did you mean 'quickstart\.yaml'\?"
    ):
        read_document(tmp_path / "quickstrat.yaml")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name in ("latin.yaml", "loop.yaml", "."):
        with pytest.raises(UserError):
            read_document(tmp_path / name)


def test_merge_leaves_its_arguments_alone() -> None:
    parent, child = {"a": {"b": [1]}}, {"a": {"c": [2]}}
    merged = merge(parent, child)
    merged["a"]["b"].append(3)
    merged["a"]["c"].append(3)
    assert parent == {"a": {"b": [1]}} and child == {"a": {"c": [2]}}


# ---- overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a.b=1e-3"], {"a": {"b": 1e-3, "c": 2}, "l": [1, 2]}),
        (["a={d: 1}"], {"a": {"d": 1}, "l": [1, 2]}),
        (["a.b=1", "a.b=2"], {"a": {"b": 2, "c": 2}, "l": [1, 2]}),
        (["~a.b"], {"a": {"c": 2}, "l": [1, 2]}),
        (["a.b=5", "~a.b"], {"a": {"c": 2}, "l": [1, 2]}),
        (["~a", "a.z=1"], {"a": {"z": 1}, "l": [1, 2]}),
        (["a.b="], {"a": {"b": None, "c": 2}, "l": [1, 2]}),
        (["l=[3]"], {"a": {"b": 1, "c": 2}, "l": [3]}),
        (["a=null", "a.x=1"], {"a": {"x": 1}, "l": [1, 2]}),
        (["n.e.w=[x: 1]"], {"a": {"b": 1, "c": 2}, "l": [1, 2], "n": {"e": {"w": [{"x": 1}]}}}),
        (["a.b=x=y"], {"a": {"b": "x=y", "c": 2}, "l": [1, 2]}),
        (["a.b=http://h:1/ü"], {"a": {"b": "http://h:1/ü", "c": 2}, "l": [1, 2]}),
        (["a.b=[data/*.txt]"], {"a": {"b": ["data/*.txt"], "c": 2}, "l": [1, 2]}),
        (["a.b=no"], {"a": {"b": "no", "c": 2}, "l": [1, 2]}),
    ],
)
def test_overrides_are_applied_in_order(overrides: list[str], expected: dict[str, Any]) -> None:
    document = {"a": {"b": 1, "c": 2}, "l": [1, 2]}
    assert apply_overrides(document, overrides) == expected
    assert document == {"a": {"b": 1, "c": 2}, "l": [1, 2]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a..b=1", "expected key=value such as pretrain.lr=1e-3"),
        (".a=1", "expected key=value"),
        ("a.=1", "expected key=value"),
        ("=1", "expected key=value"),
        ("a.b", "options such as --only start with two dashes"),
        ("a b=1", "expected key=value"),
        ("l.0=5", "l is [1, 2], not a mapping; nothing can be set below it"),
        ("a.b.c=1", "a.b is 1, not a mapping"),
        ("a.b=*.txt", "a glob that starts with * must be quoted"),
        ("a.b=[*.txt]", "a glob that starts with * must be quoted"),
        ("a.b=[1", "value:1:3: not valid YAML"),
        ("a.b={x: 1, x: 2}", "duplicate key"),
        ("a.b={null: 1}", "the key None is not text"),
        ("~", "there is no such key to delete"),
        ("~a.x", "there is no such key to delete"),
        ("~a.b.c", "there is no such key to delete"),
        ("~l.0", "there is no such key to delete"),
        ("~a.bb", "did you mean 'b'?"),
    ],
)
def test_a_wrong_override_is_refused_and_quoted(override: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        apply_overrides({"a": {"b": 1, "c": 2}, "l": [1, 2]}, [override])
    assert expected in str(refusal.value)
    assert repr(override) in str(refusal.value)
