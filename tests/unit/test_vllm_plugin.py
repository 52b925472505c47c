"""The plugin for vLLM, with stand-ins for the modules of vLLM that it uses; no test needs vLLM."""

import ast
import inspect
import subprocess
import sys
import textwrap
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModel
from transformers.modeling_utils import AttentionInterface

from tests.numerics.test_families import CASES, TOKENS, convert, make_source
from transmla.families import FAMILIES
from transmla.modeling.config_facts import sliding_window_of
from transmla.modeling.kernels.eager import eager_attention
from transmla.serving import vllm_plugin

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "vllm.model_executor.models.transformers"


class Registry:
    """vLLM's registry, as far as a plugin sees it."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, architecture: str, model: str) -> None:
        module, name = model.split(":")
        assert module and name
        self.models[architecture] = model


def fake(name: str, monkeypatch: pytest.MonkeyPatch, **content: object) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_every_student_is_in_the_table() -> None:
    named = {family.student_model.__name__ for family in FAMILIES.values()}
    assert set(vllm_plugin.CLASSES) == named
    with_experts = {name for name, kind in vllm_plugin.CLASSES.items() if kind == "StudentWithExperts"}
    assert with_experts == {"MLAMixtralForCausalLM"}


def test_the_entry_point_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["transmla"].partition(":")
    assert getattr(import_module(module), name) is vllm_plugin.register


def test_it_registers_every_class_and_may_do_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    fake("vllm", monkeypatch, ModelRegistry=registry)
    vllm_plugin.register()
    first = dict(registry.models)
    vllm_plugin.register()
    assert registry.models == first and set(first) == set(vllm_plugin.CLASSES)
    assert first["MLAQwen3ForCausalLM"] == "transmla.serving.vllm_classes:Student"


@pytest.mark.parametrize("there", ["nothing", "no registry", "no function"])
def test_another_vllm_is_left_alone(
    there: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if there == "nothing":
        monkeypatch.setitem(sys.modules, "vllm", None)  # importing it is an ImportError
    else:
        fake("vllm", monkeypatch, **({} if there == "no registry" else {"ModelRegistry": object()}))
    vllm_plugin.register()
    assert len(caplog.records) == 1 and "own classes are unknown" in caplog.text


def test_registering_imports_nothing_heavy() -> None:
    """vLLM calls it in every process, for every model."""
    script = (
        "import sys; from types import ModuleType; fake = sys.modules['vllm'] = ModuleType('vllm');"
        "fake.ModelRegistry = type('R', (), {'register_model': staticmethod(lambda *names: None)});"
        "from transmla.serving.vllm_plugin import register; register();"
        "sys.exit(str({'torch', 'transformers', 'pydantic'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def imported_at_once(module: str, seen: dict[str, set[str]]) -> set[str]:
    """Packages that importing a module of this project imports, through whatever modules of it."""
    if module in seen:
        return seen[module]
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()
    seen[module] = found
    if not file.is_file():  # a name in a module
        return found
    for node in ast.parse(file.read_text()).body:  # what stands in functions, or is for types alone, comes later
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("transmla"):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            found |= imported_at_once(name, seen) if name.startswith("transmla") else {name.split(".")[0]}
    return found


def test_classes_need_nothing_that_vllm_comes_without() -> None:
    found = set().union(*(imported_at_once(name, {}) for name in (vllm_plugin.MODULE, "transmla.families.students")))
    theirs = {"torch", "transformers", "pydantic", "yaml", "safetensors", "numpy", "psutil", "vllm"}
    assert {"torch", "transformers"} <= found <= theirs | sys.stdlib_module_names


def vllm_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What vLLM's attention gives for one sequence: causal, with the window and the cap that it reads from the
    configuration. Returns [T, H*V], without the batch."""
    config, length = module.config, query.shape[-2]
    assert attention_mask is None and key.shape[1] == query.shape[1], "vLLM was told that all heads have keys"
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    hidden = ahead > 0
    if (window := sliding_window_of(config, module.layer_idx)) is not None:
        hidden |= ahead <= -window
    mask = torch.zeros(length, length).masked_fill(hidden, -torch.inf)
    cap = getattr(config, "attn_logit_softcapping", None)
    out, _ = eager_attention(module, query, key, value, mask, scaling, softcap=cap)
    return out.reshape(length, -1), None


class Backend(torch.nn.Module):
    """vLLM's transformers backend, as far as its subclasses see it."""

    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        config._attn_implementation = "vllm"
        with torch.device("meta"):
            self.model = AutoModel.from_config(config, dtype=torch.float32)


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch):
    names = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
    fake(BACKEND, monkeypatch, **{name: type(name, (Backend,), {}) for name in names})
    monkeypatch.delitem(sys.modules, vllm_plugin.MODULE, raising=False)
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", vllm_attention)
    yield import_module(vllm_plugin.MODULE)
    sys.modules.pop(vllm_plugin.MODULE, None)


def interface_calls(forward) -> int:
    """Calls of what `forward` looks up in ALL_ATTENTION_FUNCTIONS: vLLM serves a module that has exactly one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)]
    names = {node.targets[0].id for node in found if node.value.value.id == "ALL_ATTENTION_FUNCTIONS"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return sum(call.func.id in names and any(word.arg == "scaling" for word in call.keywords) for call in calls)


def configured(cards: int = 1, **model: object) -> SimpleNamespace:
    """vLLM's configuration."""
    parallel = SimpleNamespace(tensor_parallel_size=cards)
    return SimpleNamespace(model_config=SimpleNamespace(**model), parallel_config=parallel)


@pytest.mark.parametrize("name", ["Student", "StudentWithExperts"])
def test_several_cards_are_refused(name: str, classes) -> None:
    """vLLM itself only warns."""
    with pytest.raises(ValueError, match="--tensor-parallel-size 2"):
        getattr(classes, name)(vllm_config=configured(2))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_served_student_equals_the_student(case: str, classes) -> None:
    """Names of the weights, what vLLM looks for in every layer, and the result."""
    student, _ = convert(make_source(case))
    expected = student.model(TOKENS[:1], use_cache=False).last_hidden_state
    config = type(student.config).from_dict(student.config.to_dict())
    shape = SimpleNamespace(total_num_attention_heads=4, total_num_kv_heads=1)
    vllm_config = configured(hf_config=config, model_arch_config=shape)
    name = vllm_plugin.CLASSES[type(student).__name__]
    served = getattr(classes, name)(vllm_config=vllm_config)
    assert shape.total_num_kv_heads == 4

    weights = {name.removeprefix("model."): value for name, value in student.state_dict().items()}
    weights.pop("lm_head.weight")
    served.model.load_state_dict(weights, assign=True, strict=True)
    buffers = dict(student.model.named_buffers())
    for place, _ in list(served.model.named_buffers()):
        owner, _, last = place.rpartition(".")
        setattr(served.model.get_submodule(owner), last, buffers[place])  # vLLM makes them off the meta device

    found = [module for module in served.model.modules() if isinstance(module, classes.VllmAttention)]
    assert [module.layer_idx for module in found] == [0, 1]
    for module in found:
        assert interface_calls(type(module).forward) == 1 and module.is_causal
        assert module.config._attn_implementation == "vllm", "vLLM asks the module's configuration"
    hidden = served.model.eval()(TOKENS[:1], use_cache=False).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(hidden, expected, rtol=0, atol=2e-5)
