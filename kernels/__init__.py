"""The contrastive losses and the gradient check of ACL (arXiv 2602.03563)."""

import sys

if __name__ == "kernels":
    # The checkout's root is on sys.path, so this folder was found in place of Hugging Face's
    # `kernels` distribution, which transformers imports by this name: hand over to it. Where it is
    # not installed, leave an empty module without __file__, which transformers takes for "absent"
    # (an ImportError here would break `import transformers`).
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path
    from types import ModuleType

    root = Path(__file__).resolve().parent.parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec is None or spec.loader is None:
        sys.modules["kernels"] = ModuleType("kernels")
    else:
        module = module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)
else:
    from .contrastive.losses import acl_cl_loss, acl_loss, supcon_loss
    from .contrastive.modules import ACLCLLoss, ACLLoss, SupConLoss
    from .gradients.angle import angle_degrees, combined_squared_norm, gated_combine_, grad_dot_norm

    __all__ = [
        "ACLCLLoss",
        "ACLLoss",
        "SupConLoss",
        "acl_cl_loss",
        "acl_loss",
        "angle_degrees",
        "combined_squared_norm",
        "gated_combine_",
        "grad_dot_norm",
        "supcon_loss",
    ]
