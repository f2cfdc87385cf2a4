"""Whether the same run gives the same bits again: the flags that decide it, and the operators that do not.

torch documents which operators may differ from run to run (`torch.use_deterministic_algorithms`). Switching that mode
on to hear its warnings would change kernels and so numbers and times, and it is silent about operators that it
replaces. So `OperatorRecorder` looks on instead: it sees every operator of one step, backward ones too, passes it on as
it is, and compares its name, device and arguments with what torch documents. It costs Python time for each operator, so
that only one step is seen, and never a timed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MAX_LISTED = 20  # operators in a record

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """When an operator may differ from run to run.

    documented: the name that torch's documentation has for it. devices: types on which it does. switches: whether
    `torch.use_deterministic_algorithms(True)` replaces it by one that does not differ. if_: looks at the arguments.
    """

    documented: str
    devices: tuple[str, ...] = ("cuda",)
    switches: bool = True
    if_: Callable[[Arguments], bool] | None = None


def determinism_flags(device: str) -> dict[str, Any]:
    """What of this process's settings decides precision and determinism; those of cuDNN and CUDA on a GPU only."""
    kind = torch.device(device).type
    flags: dict[str, Any] = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "autocast": torch.is_autocast_enabled(kind),
        "mkldnn": torch.backends.mkldnn.enabled if torch.backends.mkldnn.is_available() else None,
    }
    if kind == "cuda":
        flags |= {
            "cudnn_enabled": torch.backends.cudnn.enabled,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
            "matmul_fp16_reduced_precision": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            "matmul_bf16_reduced_precision": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }
    return flags


class OperatorRecorder(TorchDispatchMode):
    """Sees the operators that run while it is entered; changes none of them.

    ops: those that may differ from run to run, as torch spells them; unknown: those that torch says nothing about
    (custom ones); dtypes: of what is multiplied and convolved, which tells whether autocast was at work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.ops: set[str] = set()
        self.unknown: set[str] = set()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        name = func._schema.name.rstrip("_")
        namespace = name.partition("::")[0]
        if name in _PRODUCTS:
            self.dtypes.add(str(_first_tensor(args).dtype).removeprefix("torch."))
        if namespace not in _DOCUMENTED_NAMESPACES and name not in _LIKE_CONVOLUTIONS:
            self.unknown.add(func._schema.name)
        elif (rule := RULES.get(name)) is not None and may_differ(rule, func, args, kwargs):
            self.ops.add(func._schema.name)
        return func(*args, **kwargs)

    def facts(self, of: str) -> dict[str, Any]:
        """For a record.

        Args:
            of: what was seen, in words: 'the first iteration'.
        Returns:
            level ('bitwise', 'not bitwise', 'unknown'), of, operators (how many ran), matmul_dtypes; `ops` and `why`
            where it is not bitwise. Bitwise means: on the same machine, with the same packages, threads and flags.
        """
        found: dict[str, Any] = {"level": "bitwise", "of": of, "operators": self.count}
        found["matmul_dtypes"] = sorted(self.dtypes)
        if not self.count:
            return found | {"level": "unknown", "why": "no operator was seen"}
        if self.ops:
            return found | {"level": "not bitwise", "ops": _listed(self.ops), "why": _WHY_NOT}
        if self.unknown:
            return found | {"level": "unknown", "ops": _listed(self.unknown), "why": "torch does not document these"}
        return found


def unseen(why: str) -> dict[str, Any]:
    """Determinism of what nobody looked at."""
    return {"level": "unknown", "why": why}


def may_differ(rule: Rule, func: Any, args: Sequence[Any], kwargs: Arguments) -> bool:
    """Whether one call of an operator may give other bits next time, under the flags as they are now."""
    if rule.switches and torch.are_deterministic_algorithms_enabled():
        return False
    tensor = _first_tensor([*args, *kwargs.values()])
    if tensor is None or tensor.device.type not in rule.devices:
        return False
    if rule.if_ is None:
        return True
    schema = func._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values |= {argument.name: value for argument, value in zip(schema, args)}
    return rule.if_(values | kwargs | {"overload": func._overloadname})


_WHY_NOT = "torch documents that these may give other bits each time, see torch.use_deterministic_algorithms"
_DOCUMENTED_NAMESPACES = ("aten", "prim", "prims", "torchvision", "profiler", "c10d")
# oneDNN's products of `diffinst.ops`, on CPUs only: kernels of the library that computes the convolutions which
# torch documents as bitwise. A test repeats them.
_LIKE_CONVOLUTIONS = {
    "mkldnn::_linear_pointwise",
    "mkldnn::_reorder_linear_weight",
    "mkldnn::_convolution_pointwise",
}
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")} | {
    "mkldnn::_linear_pointwise",
    "mkldnn::_convolution_pointwise",
}


def _listed(names: set[str]) -> list[str]:
    found = sorted(names)
    return found[:_MAX_LISTED] + ([f"and {len(found) - _MAX_LISTED} more"] if len(found) > _MAX_LISTED else [])


def _first_tensor(values: Sequence[Any]) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)) and (found := _first_tensor(value)) is not None:
            return found
    return None


def _has_duplicates(indices: Sequence[Tensor | None], shape: Sequence[int]) -> bool:
    """Whether some place is named twice, so that the order of writing counts.

    Args:
        indices: for each of the first dimensions of `shape` an integer tensor, a mask (of one or more), or None.
    """
    places: list[Tensor] = []
    sizes: list[int] = []
    dimension = 0
    for index in indices:
        if index is None:
            dimension += 1
        elif index.dtype in (torch.bool, torch.uint8):
            places += index.nonzero().unbind(1)
            sizes += shape[dimension : dimension + index.dim()]
            dimension += index.dim()
        else:
            places.append(index)
            sizes.append(shape[dimension])
            dimension += 1
    if not places:
        return False
    flat = torch.zeros((), dtype=torch.int64, device=places[0].device)
    for place, size in zip(torch.broadcast_tensors(*places), sizes):
        flat = flat * size + place.long().remainder(max(size, 1))
    return flat.unique().numel() < flat.numel()


def _index_put(values: Arguments) -> bool:
    tensor, indices = values["self"], values["indices"]
    if values["accumulate"]:
        # On a GPU the indices are sorted first; on one thread the order is that of the indices.
        return tensor.device.type == "cpu" and torch.get_num_threads() > 1 and _has_duplicates(indices, tensor.shape)
    return _has_duplicates(indices, tensor.shape)


def _put(values: Arguments) -> bool:
    # Adding is done in order on one thread, and in the deterministic mode.
    is_ordered = torch.get_num_threads() == 1 or torch.are_deterministic_algorithms_enabled()
    if values["accumulate"] and values["self"].device.type == "cpu" and is_ordered:
        return False
    return _has_duplicates([values["index"]], [values["self"].numel()])


def _index_copy(values: Arguments) -> bool:
    return _has_duplicates([values["index"]], [values["self"].shape[values["dim"]] if values["self"].dim() else 1])


def _scatter_reduce(values: Arguments) -> bool:
    if values["reduce"] in ("sum", "mean"):
        return not torch.are_deterministic_algorithms_enabled()
    return bool(values["reduce"] == "prod")


def _convolution(_: Arguments) -> bool:
    return not torch.backends.cudnn.deterministic or torch.backends.cudnn.benchmark


def _is_float(values: Arguments) -> bool:
    tensor: Tensor = values["self"]
    return tensor.is_floating_point() or tensor.is_complex()


_CONVOLUTION = "torch.nn.Conv2d"  # and of other dimensions, transposed or not
_INTERPOLATE = Rule("torch.nn.functional.interpolate", switches=False)
_ATTENTION = Rule("")  # not in the list, but attention says so itself under warn_only
_NO_ALTERNATIVE = "torchvision"  # its kernels say so themselves

# Operator, without the underscore of those that work in place -> when it may differ. Backward operators have names of
# their own, or are made of others here (that of gather is scatter_add).
RULES: dict[str, Rule] = {
    "aten::convolution": Rule(_CONVOLUTION, if_=_convolution),
    "aten::convolution_backward": Rule(_CONVOLUTION, if_=_convolution),
    "aten::replication_pad1d_backward": Rule("torch.nn.ReplicationPad1d"),
    "aten::replication_pad2d_backward": Rule("torch.nn.ReplicationPad2d"),
    "aten::replication_pad3d_backward": Rule("torch.nn.ReplicationPad3d"),
    "aten::bmm": Rule("torch.bmm", if_=lambda values: values["self"].is_sparse),
    "aten::cumsum": Rule("torch.cumsum", if_=_is_float),
    "aten::index_put": Rule("torch.Tensor.index_put", ("cpu", "cuda"), if_=_index_put),
    "aten::_index_put_impl": Rule("torch.Tensor.__getitem__", ("cpu", "cuda"), if_=_index_put),
    "aten::_unsafe_index_put": Rule("torch.Tensor.index_put", ("cpu", "cuda"), if_=_index_put),
    "aten::put": Rule("torch.Tensor.put_", ("cpu", "cuda"), switches=False, if_=_put),
    "aten::scatter_add": Rule("torch.Tensor.scatter_add_"),
    "aten::index_add": Rule("torch.index_add"),
    "aten::index_copy": Rule("torch.Tensor.index_copy", ("cpu", "cuda"), if_=_index_copy),
    "aten::scatter": Rule("torch.Tensor.scatter", if_=lambda values: isinstance(values.get("src"), Tensor)),
    "aten::scatter_reduce": Rule("torch.Tensor.scatter_reduce", switches=False, if_=_scatter_reduce),
    "aten::max_pool3d_with_indices_backward": Rule("torch.nn.MaxPool3d"),
    "aten::embedding_dense_backward": Rule("torch.nn.Embedding"),
    "aten::avg_pool3d_backward": Rule("torch.nn.AvgPool3d", switches=False),
    "aten::_adaptive_avg_pool2d_backward": Rule("torch.nn.AdaptiveAvgPool2d", switches=False),
    "aten::_adaptive_avg_pool3d_backward": Rule("torch.nn.AdaptiveAvgPool3d", switches=False),
    "aten::adaptive_max_pool2d_backward": Rule("torch.nn.AdaptiveMaxPool2d", switches=False),
    "aten::fractional_max_pool2d_backward": Rule("torch.nn.FractionalMaxPool2d", switches=False),
    "aten::fractional_max_pool3d_backward": Rule("torch.nn.FractionalMaxPool3d", switches=False),
    "aten::max_unpool2d": Rule("torch.nn.MaxUnpool2d", ("cpu", "cuda"), switches=False),
    "aten::max_unpool3d": Rule("torch.nn.MaxUnpool3d", ("cpu", "cuda"), switches=False),
    "aten::upsample_linear1d_backward": _INTERPOLATE,
    "aten::upsample_bilinear2d_backward": _INTERPOLATE,
    "aten::_upsample_bilinear2d_aa_backward": _INTERPOLATE,
    "aten::upsample_bicubic2d_backward": _INTERPOLATE,
    "aten::_upsample_bicubic2d_aa_backward": _INTERPOLATE,
    "aten::upsample_trilinear3d_backward": _INTERPOLATE,
    "aten::reflection_pad1d_backward": Rule("torch.nn.ReflectionPad1d", switches=False),
    "aten::reflection_pad2d_backward": Rule("torch.nn.ReflectionPad2d", switches=False),
    "aten::reflection_pad3d_backward": Rule("torch.nn.ReflectionPad3d", switches=False),
    "aten::nll_loss2d_forward": Rule("torch.nn.NLLLoss", switches=False),
    "aten::_ctc_loss_backward": Rule("torch.nn.CTCLoss", switches=False),
    "aten::_cudnn_ctc_loss": Rule("torch.nn.CTCLoss", switches=False),
    "aten::_embedding_bag_dense_backward": Rule(
        "torch.nn.EmbeddingBag", switches=False, if_=lambda values: values["mode"] == 2
    ),
    "aten::histc": Rule("torch.histc", switches=False),
    "aten::bincount": Rule("torch.bincount", switches=False, if_=lambda values: values["weights"] is not None),
    "aten::median": Rule("torch.median", switches=False, if_=lambda values: "dim" in values),
    "aten::nanmedian": Rule("torch.median", switches=False, if_=lambda values: "dim" in values),
    "aten::grid_sampler_2d_backward": Rule("torch.nn.functional.grid_sample", switches=False),
    "aten::grid_sampler_3d_backward": Rule("torch.nn.functional.grid_sample", switches=False),
    "aten::resize": Rule(
        "torch.Tensor.resize_", ("cpu", "cuda"), switches=False, if_=lambda values: values["self"].is_quantized
    ),
    "aten::_scaled_dot_product_flash_attention_backward": _ATTENTION,
    "aten::_scaled_dot_product_efficient_attention_backward": _ATTENTION,
    "aten::_scaled_dot_product_cudnn_attention_backward": _ATTENTION,
    "torchvision::_roi_align_backward": Rule(_NO_ALTERNATIVE, switches=False),
    "torchvision::_roi_pool_backward": Rule(_NO_ALTERNATIVE, switches=False),
    "torchvision::_ps_roi_align_backward": Rule(_NO_ALTERNATIVE, switches=False),
    "torchvision::_ps_roi_pool_backward": Rule(_NO_ALTERNATIVE, switches=False),
    "torchvision::_deform_conv2d_backward": Rule(_NO_ALTERNATIVE, switches=False),
}
