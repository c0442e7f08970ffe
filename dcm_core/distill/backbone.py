"""The frozen transformer that teacher, student and target network share.

There is one copy of its weights. The teacher is the plain transformer; the other two put their experts in place for a call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from ..experts.modules import LAYER_PARAMS, RoutedExpert, find_module
from ..experts.placing import Placement, in_place, placed
from ..families import Family
from ..schedule import TIMESTEPS
from .config import TrainingError
from .memory import total
from .sharding import whole

Working = Sequence[tuple[RoutedExpert, float]]


@dataclass(frozen=True)
class Text:
    """A batch of text conditionings. For an image-to-video model, the images are part of it.

    Attributes:
        context: embeddings, (batch, tokens, width).
        extras: other arguments of the transformer, each (batch, ...) (HunyuanVideo: `y`, `guidance`; Wan: `clip_fea`).
        concat: what the transformer's input has after the video's channels, (batch, channels, frames, height, width).
    """

    context: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    concat: Tensor | None = None

    def to(self, device: torch.device) -> "Text":
        extras = {name: value.to(device) for name, value in self.extras.items()}
        return Text(self.context.to(device), extras, None if self.concat is None else self.concat.to(device))


@dataclass(frozen=True)
class Features:
    """The outputs of the teacher's blocks for one video.

    Attributes:
        raw: block outputs, each (batch, video tokens, width).
        projected: the same after the teacher's output norm and projection.
        grid: (frames, height, width) in tokens.
    """

    raw: tuple[Tensor, ...]
    projected: tuple[Tensor, ...]
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Backbone:
    """The host's transformer, called with noise levels.

    Attributes:
        module: the native model class. Its weights are never written and get no gradient.
        dtype: the dtype it computes in.
        options: creates the host's `transformer_options` for a call.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again. It is always
            on for a family whose blocks overwrite what a backward pass needs.
        offload_activations: with gradient checkpointing, the blocks' inputs wait in system memory for the backward pass.
    """

    module: nn.Module
    family: Family
    dtype: torch.dtype = torch.float32
    options: Callable[[], dict[str, Any]] = dict
    gradient_checkpointing: bool = False
    offload_activations: bool = False

    def velocity(self, x: Tensor, sigma: Tensor, text: Text, experts: Working = ()) -> Tensor:
        """Velocity (float32, like x) at the noise levels `sigma` (batch,), with the experts in place."""
        with self._checkpointed(experts), self._in_place(experts):
            return self._call(x, sigma, text)

    def features(self, x: Tensor, sigma: Tensor, text: Text) -> Features:
        """Outputs of every second feature block of the teacher, raw and after its output layer."""
        frames, height, width = x.shape[2], -(-x.shape[3] // 2), -(-x.shape[4] // 2)
        tokens = frames * height * width
        found: list[Tensor] = []
        head = find_module(self.module, self.family.head)
        arguments: dict[str, Any] = {}

        def keep(_: nn.Module, __: Any, kwargs: dict[str, Any], out: Tensor) -> None:
            # where video and text are joined, newer hosts say where the video begins; in older ones the video is first
            start, *_ = kwargs.get("transformer_options", {}).get("img_slice", (0,))
            video = out[:, start : start + tokens]
            found.append(video.clone() if self.family.writes_in_place else video)

        def remember(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments.update(args=args[1:], kwargs=kwargs)

        def project(feature: Tensor) -> Tensor:
            return self._forgetful(head, (), self.family.head)(
                feature, *arguments["args"], **arguments["kwargs"]
            ).float()

        hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in self.feature_blocks()]
        hooks.append(head.register_forward_pre_hook(remember, with_kwargs=True))
        try:
            with self._checkpointed(()), self._in_place(()):
                self._call(x, sigma, text)
                for hook in hooks:
                    hook.remove()
                projected = tuple(project(feature) for feature in found)
        finally:
            for hook in hooks:
                hook.remove()
        return Features(tuple(found), projected, (frames, height, width))

    @property
    def size(self) -> int:
        """Bytes of the weights that this process keeps."""
        return total(getattr(weight, "_local_tensor", weight) for weight in self.module.parameters())

    @property
    def completed(self) -> int:
        """Bytes of a divided base's weights that are complete at the same time in a step.

        These are the block that runs, the next one, and what is outside of blocks.
        """
        blocks = [block for name in self.family.block_lists for block in find_module(self.module, name)]
        sizes = sorted(total(block.parameters()) for block in blocks)
        return total(self.module.parameters()) - sum(sizes[:-2])

    def feature_blocks(self) -> list[nn.Module]:
        """Every second block of the family's feature list."""
        return list(find_module(self.module, self.family.feature_blocks))[::2]

    def _call(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        extras = {name: value.to(self.dtype) for name, value in text.extras.items()}
        x = x if text.concat is None else torch.cat([x, text.concat], dim=1)
        out = self.module(
            x.to(self.dtype),
            TIMESTEPS * sigma,
            context=text.context.to(self.dtype),
            transformer_options=self.options(),
            **extras,
        )
        return out.float()

    @contextmanager
    def _in_place(self, experts: Working, part: str = "") -> Iterator[None]:
        """Inside the block the experts are in place, in all of the transformer or in its module `part`."""
        module = find_module(self.module, part) if part else self.module
        # without gradients nothing is saved
        usable = usable_weights(module) if torch.is_grad_enabled() else nullcontext()
        with usable, in_place(self.module, experts, _add_linear, part=part):
            yield

    @property
    def _forgets(self) -> bool:
        return (self.gradient_checkpointing or self.family.writes_in_place) and torch.is_grad_enabled()

    def _forgetful(
        self, function: Callable[..., Any], experts: Working, part: str, shared: list[Tensor] | None = None
    ) -> Callable[..., Any]:
        """The forward of the module `part`, recomputing its activations in the backward pass if configured, with the same experts in
        place.

        Args:
            shared: see `_offloaded`; None for a module whose inputs stay on the device.
        """

        def again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._in_place(experts, part)

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return checkpoint(function, *args, use_reentrant=False, context_fn=again, **kwargs)

        if not self._forgets:
            return function
        return partial(run, function) if shared is None else _offloaded(run, function, shared)

    @contextmanager
    def _checkpointed(self, experts: Working) -> Iterator[None]:
        """Inside this context the blocks recompute their activations in the backward pass, if configured."""
        if not self._forgets:
            yield
            return
        blocks = {
            f"{name}.{index}": block
            for name in self.family.block_lists
            for index, block in enumerate(find_module(self.module, name))
        }
        # another pack may have replaced the forward of a block
        forwards = [_on_copies(block) if self.family.writes_in_place else block.forward for block in blocks.values()]
        shared: list[Tensor] | None = [] if self.offload_activations else None
        with placed(
            (block.__dict__, "forward", self._forgetful(forward, experts, name, shared))
            for (name, block), forward in zip(blocks.items(), forwards, strict=True)
        ):
            yield


def _offloaded(
    checkpointed: Callable[..., Any], function: Callable[..., Any], shared: list[Tensor]
) -> Callable[..., Any]:
    """A checkpointed block whose inputs are in system memory until the backward pass.

    Args:
        checkpointed: calls a function without keeping its activations. It saves the tensors among its positional arguments.
        shared: the inputs of the first block, which calls of this function fill in. Later blocks get most of them too, so they
            stay on the device.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        values, count, names = [*args, *kwargs.values()], len(args), list(kwargs)
        if not shared:
            shared.extend(value for value in values if isinstance(value, Tensor))
        moving = [
            place
            for place, value in enumerate(values)
            if isinstance(value, Tensor) and not any(value is other for other in shared)
        ]
        tensors = [values[place] for place in moving]
        for place in moving:
            values[place] = None

        # it must not keep what moves, so neither `args` nor `kwargs`
        def call(*moved: Tensor) -> Any:
            filled = list(values)
            for place, value in zip(moving, moved, strict=True):
                filled[place] = value
            return function(*filled[:count], **dict(zip(names, filled[count:], strict=True)))

        with save_on_cpu(pin_memory=any(tensor.is_cuda for tensor in tensors)):
            return checkpointed(call, *tensors)

    return run


def _add_linear(linear: nn.Linear, out: Tensor, x: Tensor, alpha: float) -> None:
    """Add `alpha linear(x)` to `out`, in the dtype of `x`."""
    out.addmm_(x, whole(linear.weight, x.dtype).t(), alpha=alpha)


def _on_copies(block: nn.Module) -> Callable[..., Any]:
    """The forward of a block that overwrites its input after its norms have read it.

    It works on copies, so that the backward pass finds the inputs of the block and of its norms unchanged. PyTorch detects
    such a write, but not inside a recomputed checkpoint.
    """
    forward, norms = block.forward, [module for module in block.modules() if isinstance(module, nn.LayerNorm)]

    def run(*args: Any, **kwargs: Any) -> Any:
        hooks = [norm.register_forward_pre_hook(lambda _, given: tuple(map(_own, given))) for norm in norms]
        try:
            return forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})
        finally:
            for hook in hooks:
                hook.remove()

    return run


def _own(value: Any) -> Any:
    """A copy of any tensor that may be overwritten."""
    return value.clone() if isinstance(value, Tensor) else value


def _can_be_saved(weight: Tensor) -> bool:
    """Whether a backward pass can save it. A weight from inference mode that was moved later looks like a normal tensor, but has
    no version counter."""
    try:
        return not weight.is_inference() and weight._version >= 0
    except RuntimeError:
        return False


@contextmanager
def usable_weights(module: nn.Module) -> Iterator[None]:
    """Inside the block, weights that were loaded in inference mode can be used in a backward pass.

    Each is replaced by a plain tensor over the same memory. Nothing is copied or moved.
    """
    with placed(plain_weights(module)):
        yield


def plain_weights(module: nn.Module) -> Iterator[Placement]:
    """For each weight that a backward pass cannot save, a plain tensor over the same memory."""
    for parameters in (owner._parameters for owner in module.modules()):
        for name, weight in parameters.items():
            if weight is not None and not _can_be_saved(weight) and type(weight.data) is Tensor:
                plain = torch.empty(0, dtype=weight.dtype, device=weight.device)
                plain.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
                # an attribute that hides the parameter would not work: it would also hide an expert's
                yield parameters, name, plain


KEEP_COMPLETE = 'Set "shard" to false in the settings file; each process then keeps the complete base.'


def check_can_be_divided(module: nn.Module) -> None:
    """Refuse a transformer that `shard_base` cannot divide.

    Raises:
        TrainingError: weights in a format that cannot be divided, or a PyTorch without FSDP2.
    """
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"Dividing the base among processes needs PyTorch 2.6, and this is {torch.__version__}. Update PyTorch. {KEEP_COMPLETE}"
        ) from error
    for name, weight in module.named_parameters():
        kind = str(weight.dtype) if type(weight.data) is Tensor else type(weight.data).__name__
        if type(weight.data) is not Tensor or weight.dtype.itemsize < 2:
            raise TrainingError(
                f"{name} is stored as {kind}, which cannot be divided among processes. Load the base in float32, float16 or bfloat16. "
                f"{KEEP_COMPLETE}"
            )


def shard_base(module: nn.Module, family: Family, device: torch.device) -> None:
    """Divide the transformer's weights among all processes: each keeps a part of every weight, on `device`.

    A block is complete while it runs, and again in its backward pass.

    Raises:
        TrainingError: see `check_can_be_divided`.
    """
    check_can_be_divided(module)
    from torch.distributed.fsdp import fully_shard

    for parameters, name, plain in plain_weights(module):
        parameters[name] = nn.Parameter(plain, requires_grad=False)
    bare = [
        (owner._parameters, name, None)
        for owner in module.modules()
        for name, weight in owner._parameters.items()
        if weight is not None and name not in LAYER_PARAMS
    ]
    for parameters, name, _ in bare:
        parameters[name] = nn.Parameter(parameters[name].to(device), requires_grad=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [block for name in family.block_lists for block in find_module(module, name)]
    # a bare parameter stays complete: FSDP would overwrite what an expert puts in its place
    with placed(bare):
        for part in (*blocks, module):
            fully_shard(part, mesh=mesh)
