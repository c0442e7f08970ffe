"""What results are compared with, and how."""

from contextlib import contextmanager


def relative(a, b):
    """How far a is from b, as a share of b."""
    a, b = a.cpu().float(), b.cpu().float()
    return ((a - b).norm() / b.norm()).item()


@contextmanager
def calls_of(**models):
    """(name of the model, rows in the batch) of every call of a transformer inside the block."""
    seen = []
    hooks = [
        model.model.diffusion_model.register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name, len(args[0])))
        )
        for name, model in models.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def by_sigma(high, low, boundary, model=None):
    """The slow reference of two experts: every call of `model` (or `high`) goes to the whole model that owns its sigma."""
    from comfy.patcher_extension import WrappersMP

    def choose(executor, x, t, *args, **kwargs):
        owner = low if bool((t < boundary - 1e-6).all()) else high
        return owner.model._apply_model(x, t, *args, **kwargs)

    model = (model or high).clone()
    model.set_additional_models("reference", [other for other in (high, low) if not other.is_clone(model)])
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "reference", choose)
    return model
