"""The exact empirical tangent kernel, assembled layer by layer without ever forming a Jacobian."""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.linear.affine_norm import use_affine_norms
from lqf_lightning.linear.fold_plan import FoldPlan
from lqf_lightning.linear.folded_network import FoldedNetwork
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.kernel import Kernel, KernelForm
from lqf_lightning.linear.kernel_assembly import TOTAL, KernelAssembly
from lqf_lightning.linear.kernel_plan import KernelPlan, plan_kernel
from lqf_lightning.linear.kernel_store import KernelStore, checksum_of
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_stream import SampleStream

_GIB = 2**30


@dataclass(frozen=True)
class KernelPair:
    """The kernel among training samples, and that of other samples with them.

    Attributes:
        train: Among n training samples, (blocks, n * coupled, n * coupled) per group.
        cross: Of m other samples (rows) with the training samples (columns); None if there are no others.
        index: Global index of the training samples (n,), ascending.
        other_index: Global index of the others (m,), ascending.
    """

    train: Kernel
    cross: Kernel | None
    index: Tensor
    other_index: Tensor


@full_precision()
def assemble_kernel(
    model: LinearizedModel,
    groups: Mapping[str, Sequence[str]],
    train: Iterable[Tensor],
    other: Iterable[Tensor] = (),
    *,
    form: KernelForm = "full",
    combinations: int | None = None,
    seed: int = 0,
    budget: int = 2 * _GIB,
    limit: int = 20_000,
    index: Tensor | None = None,
    other_index: Tensor | None = None,
    reducer: Reducer | None = None,
    store: MutableMapping[str, Tensor] | None = None,
    watch: Callable[[Any], Iterable[Any]] = iter,
    scales: Mapping[str, float] | None = None,
) -> KernelPair:
    r"""Take the inner products of all per-sample Jacobians, :math:`K = J J^T`, group by group.

    One forward pass and C backward passes of input gradients note the inputs and cotangents of every layer, from which
    its part follows (Fast Finite Width NTK, arXiv 2206.08720). No weight gradient is formed; parameters without a
    known structure are differentiated sample by sample. In single precision without TF32, or in double precision if
    the network has it.

    Args:
        model: The linearized model; its `dw` plays no part.
        groups: Parameter names by layer group. Parameters in no group are frozen, that is, left out.
        train: Inputs (B, ...) of this process's training samples, in an order that is the same every time.
        other: Inputs of further samples, for instance the validation set.
        form: See `Kernel`. "last_layer" needs no backward pass, and groups that hold just the last layer.
        combinations: For "trace", number of random combinations of outputs with signs, the same for all samples, that
            stand for C backward passes. Unbiased; the products of two samples have an error of about
            :math:`\sqrt{2 / V}` of the mean over outputs.
        seed: Of the combinations.
        budget: Bytes of inputs and cotangents that are kept at a time. Beyond, layers share several passes.
        limit: Most rows of a matrix.
        index: Global index (n,) of this process's training samples, by which results are ordered and repeated samples
            recognized; None numbers those of a single process.
        other_index: The same for `other`.
        reducer: Speaks to the other processes; None for a single one.
        store: Takes every finished group at once; groups found in it are not computed again.
        watch: Wraps what is iterated over, batches and layers, for a progress bar.
        scales: Inverse penalty weights by group, as in `Kernel.total`: groups are added up as they are finished, each
            times its scale, into a single one named "total", which takes the memory of two matrices, not of one per
            group (unless a store in memory keeps those). Groups left out or of scale 0 are not computed at all.

    Returns:
        The kernels, samples by ascending index, the same on every process.

    Raises:
        ValueError: Groups name parameters that are not trained, or one twice; the form does not fit them; the kernel
            is larger than the limit; a scale is negative or of no group; the samples do not match their index; or the
            store is that of another kernel.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> model = LinearizedModel(torch.nn.Linear(2, 1), example=x)
        >>> pair = assemble_kernel(model, {"weights": ["weight"], "biases": ["bias"]}, [x])
        >>> pair.train.groups["weights"].tolist()
        [[[5.0, 2.0], [2.0, 1.0]]]
        >>> pair.train.total().tolist()
        [[[6.0, 3.0], [3.0, 2.0]]]
    """
    check_groups(model, groups)
    _check_scales(groups, scales)
    if combinations is not None and (form != "trace" or combinations < 1):
        raise ValueError(f"combinations={combinations} with form={form!r}: they stand for outputs of form 'trace' only")
    reducer = reducer or Reducer()
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        network = use_affine_norms(FoldedNetwork(model.model, FoldPlan()).structure.eval())
        state = widened(network)
        like = next(iter(state.values()))
        keeps = bool(reducer.sum_(torch.tensor([float(store is not None)], device=device)))
        samples = SampleStream.of(train, index, like, reducer, watch, keeps)
        others = SampleStream.of(other, other_index, like, reducer, watch, keeps)
        plan = plan_kernel(network, state, groups, samples.first, reducer)
        _check_form(form, samples.layout.total, plan, limit)
        directions = _directions(form, plan.outputs, combinations, seed).to(like)
        text = f"{form}:{samples.layout.total}x{others.layout.total}x{plan.outputs}:{like.dtype}"
        if keeps:
            content = [samples.content(reducer), others.content(reducer), directions, *state.values()]
            text += f":{checksum_of([*content, *_letters(groups)]) % 2**64:016x}"
        kept = None if store is None else KernelStore(store, text)
        assembly = KernelAssembly(
            network, state, plan, form, directions, (samples, others), reducer, watch, budget, kept, scales
        )
        assembly.run(list(groups))
    names = groups if scales is None else [TOTAL]
    first, second = ({name: found[name] for name in names if name in found} for found in assembly.results)
    cross = Kernel(second, plan.outputs, form) if second else None
    return KernelPair(Kernel(first, plan.outputs, form), cross, samples.layout.index, others.layout.index)


def check_groups(model: LinearizedModel, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse groups that are no partition of linearized parameters.

    Args:
        model: The linearized model.
        groups: Parameter names by layer group.

    Raises:
        ValueError: A name is not trained or stands there twice, or a group is empty.
    """
    names = [name for chosen in groups.values() for name in chosen]
    odd = [name for name in names if name not in model.names]
    if odd:
        raise ValueError(f"{odd[0]!r} is no linearized parameter; the first of those are {', '.join(model.names[:3])}")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    empty = [group for group, chosen in groups.items() if isinstance(chosen, str) or not chosen]
    if twice or empty or not groups:
        wrong = f"{twice[0]!r} stands there twice" if twice else f"groups without a list of names: {empty}"
        raise ValueError(f"expected lists of distinct parameter names by layer group; {wrong}")


def _check_scales(groups: Mapping[str, Sequence[str]], scales: Mapping[str, float] | None) -> None:
    if scales is None:
        return
    odd = [name for name, scale in scales.items() if name not in groups or not 0 <= scale < math.inf]
    if odd or not scales:
        raise ValueError(f"scales must be finite and not negative, for groups among {list(groups)}; got {dict(scales)}")


def _check_form(form: KernelForm, samples: int, plan: KernelPlan, limit: int) -> None:
    if form not in ("full", "diagonal", "trace", "last_layer"):
        raise ValueError(f"form is {form!r}, expected 'full', 'diagonal', 'trace' or 'last_layer'")
    rows = samples * (plan.outputs if form == "full" else 1)
    if rows > limit:
        size = 8 * rows**2 / _GIB * (plan.outputs if form == "diagonal" else 1)
        cheaper = "form='trace' or 'last_layer', or the solver 'cg'" if form == "full" else "fewer samples"
        raise ValueError(
            f"a {form} kernel of {samples} samples has {rows} rows, which is {size:.1f} GiB in double precision, and "
            f"several times that while it is solved; the limit is {limit} rows. Take {cheaper}, or raise the limit"
        )
    if form == "last_layer" and (set(plan.layers) != set(plan.last) or len({one.module for one in plan.layers}) != 1):
        others = [name for one in plan.layers if one not in plan.last for name in one.parameters]
        raise ValueError(
            "form 'last_layer' needs groups that hold the last linear layer of the network and nothing else; got "
            f"{', '.join(others[:3]) or 'none of its parameters'}"
        )


def widened(network: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network, in single precision at least.

    Args:
        network: The network.

    Returns:
        Detached tensors by name.
    """
    state = {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    wide = torch.float64 if next(network.parameters()).dtype == torch.float64 else torch.float32
    return {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _directions(form: KernelForm, outputs: int, combinations: int | None, seed: int) -> Tensor:
    if form == "last_layer":
        return torch.zeros(0, outputs)
    if combinations is None:
        return torch.eye(outputs)
    # The kernel takes the mean over combinations, so that E[v v^T] = I / C makes it the mean over outputs: tr/C.
    signs = torch.randint(2, (combinations, outputs), generator=torch.Generator().manual_seed(seed))
    return (2.0 * signs - 1.0) / math.sqrt(outputs)


def _letters(groups: Mapping[str, Sequence[str]]) -> list[Tensor]:
    return [torch.tensor(list(f"{group}:{','.join(names)}".encode())) for group, names in groups.items()]
