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
    from stunet.evaluation import evaluate as evaluate
    from stunet.inference import load_model as load_model
    from stunet.inference import predict as predict
    from stunet.loss import PartialDiceCELoss as PartialDiceCELoss
    from stunet.network import STUNet as STUNet
    from stunet.network import create_model as create_model
    from stunet.ranking import rank as rank
    from stunet.weights.published import list_models as list_models
    from stunet.weights.transfer import load_weights as load_weights

_ROOMS = {
    "PartialDiceCELoss": "loss",
    "STUNet": "network",
    "create_model": "network",
    "evaluate": "evaluation",
    "list_models": "weights.published",
    "load_model": "inference",
    "load_weights": "weights.transfer",
    "predict": "inference",
    "rank": "ranking",
}

__all__ = ["__version__", *_ROOMS]
__version__ = version("stunet")


def __getattr__(name: str) -> Any:
    """Import PyTorch and nnU-Net, which take seconds, when something needs them."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'stunet' has no attribute {name!r}")
    return getattr(import_module(f"stunet.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
