"""STU-Net for nnU-Net v2: pre-train, pick and fine-tune large medical segmentation models.

What people want most, each imported when it is first used::

    network = stunet.create_model("base", input_channels=1, num_classes=105)    # an nn.Module
    stunet.load_weights(network, "checkpoint_final.pth")                         # by name and shape
    model = stunet.load_model("small_ep4k")                                      # published, a folder or a checkpoint
    labels = stunet.predict(model, "CT.nii.gz")                                  # in bounded memory
    table = stunet.rank(["one.pth", "another.pth"], dataset=4)                   # which checkpoint to start from
    results = stunet.evaluate("predictions", "Dataset004_Hippocampus")           # with other labels than the model's
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stunet.evaluation import evaluate
    from stunet.inference import load_model, predict
    from stunet.loss import PartialDiceCELoss
    from stunet.network import STUNet, create_model
    from stunet.ranking import rank
    from stunet.weights.published import list_models
    from stunet.weights.transfer import load_weights

__all__ = [
    "PartialDiceCELoss",
    "STUNet",
    "__version__",
    "create_model",
    "evaluate",
    "list_models",
    "load_model",
    "load_weights",
    "predict",
    "rank",
]

__version__ = version("stunet")

_ROOMS = {
    "evaluation": ["evaluate"],
    "inference": ["load_model", "predict"],
    "loss": ["PartialDiceCELoss"],
    "network": ["STUNet", "create_model"],
    "ranking": ["rank"],
    "weights.published": ["list_models"],
    "weights.transfer": ["load_weights"],
}


def __getattr__(name: str) -> Any:
    """Import PyTorch and nnU-Net, which take seconds, when something needs them."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"stunet.{room}"), name)
    raise AttributeError(f"module 'stunet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
