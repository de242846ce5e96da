"""The table of mechanisms: its rows are true of their classes, nothing asks for a name, and the pages list them all."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Draw, Linear
from lazypipe.model.mixers.base import TokenMixer, build_mixer
from lazypipe.model.mixers.registry import BASELINES, MECHANISMS, MIXERS, Mechanism, mechanism
from lazypipe.model.mixers.standard import StandardAttention
from lazypipe.model.transformer import Transformer
from lazypipe.stages.pretrain.optimizer import split_parameters
from tests.model.tiny_model import VOCAB, tiny
from tests.test_imports import PROJECT, loaded_by, sources


def test_every_mixer_has_a_class_of_its_own_with_the_traits_of_its_row() -> None:
    classes = {name: row.load() for name, row in MIXERS.items()}
    assert len(set(classes.values())) == len(MIXERS)
    for name, cls in classes.items():
        row = MIXERS[name]
        assert issubclass(cls, TokenMixer)
        assert cls.reads_side_sequence == (row.side_sequence is not None)
        assert cls.reads_values == row.reads_values
        assert set(cls.own_rate) <= set(cls.undecayed)


@pytest.mark.parametrize(("name", "row"), MIXERS.items())
def test_what_a_row_says_of_parameters_is_so(name: str, row: Mechanism) -> None:
    for fields in ({}, {"lazy_bias": False}, {"lazy_elastic": False}, {"sigmoid_bias_learnable": True}):
        config = tiny(name, **fields)
        mixer = build_mixer(config, name)
        tau, bias = mixer.tau_and_bias()
        assert (tau is not None, bias is not None) == (row.has_tau(config), row.has_bias(config))
        assert ("sink" in dict(mixer.named_parameters())) == row.sink_logit
        model = Transformer(config, VOCAB)
        assert all(parameter.ndim == 2 for parameter in split_parameters(model)[0].values())
        assert (model.attention_layers == [0, 1]) == row.has_weights


def test_fields_belong_to_one_mechanism_and_exist() -> None:
    fields = [field for row in MECHANISMS.values() for field in row.fields]
    assert len(set(fields)) == len(fields)
    assert set(fields) < set(ModelConfig.model_fields)
    assert all(set(row.ablations) <= set(row.fields) for row in MECHANISMS.values())


def test_the_nearest_name_is_proposed() -> None:
    with pytest.raises(ValueError, match=r"there is no mixer 'lasy'; did you mean 'lazy'\? \(known: standard, lazy, "):
        mechanism("lasy")
    with pytest.raises(ValueError, match="did you mean 'taylor'"):
        ModelConfig(mixer="tailor")


def test_the_table_loads_no_torch() -> None:
    code = "from lazypipe.model.config import ModelConfig; ModelConfig(mixer='lazy')"
    assert loaded_by(code, {"torch", "numpy"}) == []


class Rescaled(StandardAttention):
    """Standard attention times a gain per head, beside a matrix of torch's own, which has to be filled here."""

    undecayed = ("gain",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.empty(config.num_heads))
        self.extra = nn.Linear(config.head_dim, config.head_dim, bias=False)

    def initialise(self, draw: Draw) -> None:
        draw.constant("gain", 2.0)
        draw.normal("extra.weight", draw.std)
        draw.constant("o_proj.weight", 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) * self.gain[:, None, None]


def new_row(source: str) -> Mechanism:
    return Mechanism(name="new", description="a new one", paper="none", source=f"{__name__}:{source}")


def test_a_class_and_a_row_make_a_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS, "new", new_row("Rescaled"))
    model, standard = (Transformer(tiny(name), VOCAB, seed=2) for name in ("new", "standard"))
    weights = model.state_dict()
    assert (weights["layers.1.mixer.gain"] == 2).all()
    assert (weights["layers.1.mixer.o_proj.weight"] == 0).all()  # the mixer has the last word on its projections
    assert 0.01 < float(weights["layers.1.mixer.extra.weight"].std()) < 0.03
    for name, weight in standard.state_dict().items():
        assert name.endswith("o_proj.weight") or torch.equal(weight, weights[name])
    decayed, others = split_parameters(model)
    assert "layers.0.mixer.extra.weight" in decayed and "layers.0.mixer.gain" in others


class Forgetful(StandardAttention):
    """A parameter without an initial value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.empty(config.num_heads))


def test_a_parameter_without_an_initial_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS, "new", new_row("Forgetful"))
    with pytest.raises(TypeError, match=r"layers\.\d\.mixer\.gain of Forgetful has no initial value"):
        Transformer(tiny("new"), VOCAB)


def test_what_writes_into_the_residual_stream_starts_smaller() -> None:
    model = Transformer(tiny("lazy"), VOCAB)
    into = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.into_residual}
    assert into == {f"layers.{i}.{name}" for i in (0, 1) for name in ("mixer.o_proj", "mlp.down_proj")}


def compared_names(path: Path) -> list[str]:
    """Names of mechanisms that stand in a comparison or a case of a file, as "path:line name"."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        operands += [node.value] if isinstance(node, ast.MatchValue) else []
        for operand in operands:
            parts = operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
            values = [part.value for part in parts if isinstance(part, ast.Constant)]
            names += [f"{path}:{operand.lineno} {value}" for value in values if value in MECHANISMS]
    return names


def test_no_name_is_compared_with_outside_the_mixers(tmp_path: Path) -> None:
    outside = [path for path in sources() if not path.is_relative_to(PROJECT / "model" / "mixers")]
    assert [name for path in outside for name in compared_names(path)] == []
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "a == 'lazy'\nb in ('x', 'mlp')\nmatch c:\n    case 'swa' | 'gla':\n        pass\n", encoding="utf-8"
    )
    assert [name.rpartition(":")[2] for name in compared_names(wrong)] == ["1 lazy", "2 mlp", "4 swa", "4 gla"]


def test_the_page_of_mechanisms_has_a_row_for_each_and_names_its_fields_and_paper() -> None:
    page = (PROJECT / "docs" / "mechanisms.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.M))
    assert [name for name in rows if name in MIXERS] == list(MIXERS)
    assert [name for name in rows if name in BASELINES] == list(BASELINES)
    for name, row in MECHANISMS.items():
        number = re.search(r"arXiv (\d{4}\.\d{5})", row.paper)
        assert number is None or number[1] in page, name
        assert [field for field in row.fields if field not in page] == [], name
