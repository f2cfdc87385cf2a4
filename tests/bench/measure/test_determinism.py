"""Which operators may differ from run to run: what torch documents, and what it warns of on a CPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.determinism import RULES, OperatorRecorder, determinism_flags, may_differ, unseen
from diffinst.ops.convolution import convolve_into
from diffinst.ops.linear import linear, prepare_linear


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def record(run: Callable[[], object]) -> OperatorRecorder:
    with OperatorRecorder() as recorder:
        run()
    return recorder


def accumulate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.put_(torch.tensor([0, 0, 1]), torch.ones(3), accumulate=False)


def step(model: nn.Module, images: torch.Tensor) -> None:
    model(images).square().mean().backward()


def test_a_convolution_and_its_gradient_are_bitwise_on_a_cpu() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)), torch.rand(2, 3, 8, 8)
    step(model, images)
    found = record(lambda: step(model, images)).facts("one step")
    assert found["level"] == "bitwise"
    assert found["of"] == "one step"
    assert found["operators"] > 5
    assert found["matmul_dtypes"] == ["float32"]


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add(func._schema.name.rstrip("_"))
        return func(*args, **(kwargs or {}))


def test_gradients_are_made_of_operators_that_have_rules() -> None:
    tensor, twice = torch.rand(3, requires_grad=True), torch.tensor([0, 0])
    with Names() as names:
        tensor.gather(0, twice).sum().backward()
        tensor.index_select(0, twice).sum().backward()
        tensor[twice].sum().backward()
    assert {"aten::scatter_add", "aten::index_add"} <= names.seen & set(RULES)
    assert {"aten::index_put", "aten::_index_put_impl"} & names.seen & set(RULES)


def test_autocast_shows_in_what_is_multiplied() -> None:
    model = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorder = record(lambda: model(torch.rand(2, 4)))
    assert recorder.facts("a call")["matmul_dtypes"] == ["bfloat16"]


@pytest.mark.parametrize(
    ("run", "op"),
    [
        (lambda: accumulate(torch.zeros(4)), "aten::put_"),
        (lambda: torch.zeros(4).index_put_((torch.tensor([1, 1]),), torch.rand(2)), "aten::index_put_"),
        (lambda: torch.zeros(4).index_put_((torch.tensor([1, -3]),), torch.rand(2)), "aten::index_put_"),
        (lambda: torch.zeros(4).index_copy_(0, torch.tensor([2, 2]), torch.rand(2)), "aten::index_copy_"),
        (lambda: F.max_unpool2d(torch.rand(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).long(), 2), "aten::max_unpool2d"),
    ],
)
def test_writing_a_place_twice_is_not_bitwise(run: Callable[[], object], op: str) -> None:
    found = record(run).facts("a call")
    assert found["level"] == "not bitwise"
    assert found["ops"] == [op]
    assert "torch documents" in found["why"]


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.zeros(4).index_put_((torch.tensor([1, 2]),), torch.rand(2)),
        lambda: torch.zeros(2, 2).index_put_((torch.tensor([0, 0]), torch.tensor([0, 1])), torch.rand(2)),
        lambda: torch.zeros(2, 2).__setitem__((slice(None), torch.tensor([0, 1])), torch.rand(2, 2)),
        lambda: torch.zeros(3).index_put_((torch.tensor([True, False, True]),), torch.rand(2)),
        lambda: torch.zeros(4).put_(torch.tensor([0, 3]), torch.ones(2)),
        lambda: torch.zeros(0).index_put_((torch.zeros(0).long(),), torch.rand(0)),
    ],
)
def test_writing_each_place_once_is_bitwise(run: Callable[[], object]) -> None:
    assert record(run).facts("a call")["level"] == "bitwise"


def test_adding_to_a_place_twice_differs_with_threads_only(two_threads: None) -> None:
    def add() -> None:
        torch.zeros(4).index_put_((torch.tensor([1, 1]),), torch.rand(2), accumulate=True)

    assert record(add).facts("a call")["level"] == "not bitwise"
    torch.set_num_threads(1)
    assert record(add).facts("a call")["level"] == "bitwise"


def test_what_torch_warns_of_on_a_cpu_is_found() -> None:
    """Parity: the mode itself, which warns only of what it cannot replace."""
    calls: list[Callable[[], object]] = [
        lambda: accumulate(torch.zeros(4)),
        lambda: F.max_unpool2d(torch.rand(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).long(), 2),
        lambda: F.max_unpool3d(torch.rand(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1).long(), 2),
        lambda: F.interpolate(torch.rand(1, 1, 2, 2, requires_grad=True), size=3, mode="bilinear").sum().backward(),
        lambda: torch.rand(3).cumsum(0),
    ]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for run in calls:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
            is_warned = any("deterministic" in str(item.message) for item in caught)
            assert (record_quietly(run).facts("a call")["level"] == "not bitwise") == is_warned
    finally:
        torch.use_deterministic_algorithms(False)


def record_quietly(run: Callable[[], object]) -> OperatorRecorder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return record(run)


def test_the_deterministic_mode_replaces_what_it_can() -> None:
    index_put, put = torch.ops.aten.index_put_.default, torch.ops.aten.put_.default
    doubled = (torch.zeros(4), [torch.tensor([1, 1])], torch.rand(2))
    assert may_differ(RULES["aten::index_put"], index_put, doubled, {})
    torch.use_deterministic_algorithms(True)
    try:
        assert not may_differ(RULES["aten::index_put"], index_put, doubled, {})
        assert may_differ(RULES["aten::put"], put, (torch.zeros(4), torch.tensor([1, 1]), torch.rand(2)), {})
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operator_that_torch_does_not_know_makes_the_level_unknown() -> None:
    with torch.library._scoped_library("diffinst_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeExplicitAutograd")
        found = record(lambda: torch.ops.diffinst_test.twice(torch.ones(2))).facts("a call")
    assert found["level"] == "unknown"
    assert found["ops"] == ["diffinst_test::twice"]


def test_linear_layers_by_onednn_are_bitwise_and_products(two_threads: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(500, 64, requires_grad=True)
    layer = nn.Linear(1024, 1100)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            prepared = prepare_linear(layer, 64)(torch.ones(64, 1024))
        return [prepared, *torch.autograd.grad(linear(x, weight).sin().sum(), [x, weight])]

    first = run()
    facts = record(lambda: [run() for _ in range(5)]).facts("five times")
    assert (facts["level"], facts["matmul_dtypes"]) == ("bitwise", ["float32"])
    for _ in range(20):
        assert all(map(torch.equal, run(), first))


def test_residual_sums_by_onednn_are_bitwise_and_products(two_threads: None) -> None:
    torch.manual_seed(0)
    x, total = (torch.randn(1, 64, 40, 40).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(64, 64, 3, 3), torch.randn(64)

    def run() -> torch.Tensor:
        with torch.no_grad():
            kept = total.clone(memory_format=torch.preserve_format)
            return convolve_into(kept, x, weight, bias, padding=(1, 1))

    first = run()
    facts = record(lambda: [run() for _ in range(5)]).facts("five times")
    assert (facts["level"], facts["matmul_dtypes"]) == ("bitwise", ["float32"])
    for _ in range(20):
        assert torch.equal(run(), first)


def test_nothing_seen_is_unknown_and_not_bitwise() -> None:
    assert OperatorRecorder().facts("nothing")["level"] == "unknown"
    assert unseen("why not") == {"level": "unknown", "why": "why not"}


def test_looking_changes_no_number() -> None:
    def train(*, watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.MultiheadAttention(6, 2, batch_first=True).out_proj)
        optimizer = torch.optim.AdamW(model.parameters())
        for iteration in range(2):
            images = torch.rand(2, 3, 8, 8)
            if watched and iteration == 0:
                with OperatorRecorder():
                    step(model, images)
            else:
                step(model, images)
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(one, two) for one, two in zip(train(watched=True), train(watched=False), strict=True))


def test_every_documented_operator_has_a_rule() -> None:
    """When torch documents another one, this fails: look it up and add it to the rules."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    listed = text[: text.index("In addition, several operations")]
    names = set(re.findall(r"\* :(?:class|func):`([\w.]+)`", listed))
    assert len(names) > 35
    # Of other dimensions, or the operator whose gradient is one that has a rule.
    same = {
        "torch.nn.Conv1d",
        "torch.nn.Conv3d",
        "torch.nn.ConvTranspose1d",
        "torch.nn.ConvTranspose2d",
        "torch.nn.ConvTranspose3d",
        "torch.nn.MaxUnpool1d",
        "torch.gather",
        "torch.index_select",
        "torch.repeat_interleave",
    }
    assert names - same <= {rule.documented for rule in RULES.values()}


def test_every_rule_names_an_operator_that_there_is() -> None:
    pytest.importorskip("torchvision")  # registers its own
    for name in RULES:
        namespace, _, base = name.partition("::")
        operators = getattr(torch.ops, namespace)
        assert hasattr(operators, base) or hasattr(operators, f"{base}_"), name


def test_flags_of_the_cpu_are_complete() -> None:
    found = determinism_flags("cpu")
    assert found["deterministic_algorithms"] is False
    assert found["float32_matmul_precision"] == "highest"
    assert found["autocast"] is False
    assert not any(name.startswith("cudnn") for name in found)


@pytest.mark.gpu
def test_flags_and_operators_of_a_gpu() -> None:
    found = determinism_flags("cuda")
    assert {"cudnn_tf32", "matmul_tf32", "cudnn_benchmark", "cudnn_deterministic"} <= set(found)
    images = torch.rand(1, 1, 4, 4, device="cuda", requires_grad=True)
    recorder = record(lambda: F.interpolate(images, size=7, mode="bilinear").sum().backward())
    assert recorder.ops == {"aten::upsample_bilinear2d_backward"}
